"""unpleasant on laptop.

Plan: pipeline 2, 1f1b, micro-batch 1, recompute none.
Written by mlmdsl from tiny.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 2 program.py --out runs/unpleasant
Predicted: 0.213 s a step, 9,615 tokens/s and 0.0123 TFLOP/s per device (MFU 24.6 % of 0.05 TFLOP/s, counting matrix products
only, causal attention half); peak memory 256 MiB to 257 MiB.

Shapes: B = 1 (sequences of a micro-batch), S = 64 (tokens).
Ranks: torch.arange(2).view(2, 1, 1, 1): pipeline, data, context, tensor. Collectives over data and pipeline are the runtime's.
"""

import torch.nn.functional as F
from torch import nn

from mlmdsl.runtime import (
    AdamW,
    Data,
    Mesh,
    Parallel,
    Schedule,
    Scope,
    Tokenizer,
    Training,
    cross_entropy,
    main,
    normal,
    ones,
    positions,
    weight,
    zeros,
)

PARALLEL = Parallel(pipeline=2, data=1, tensor=1, schedule="1f1b", stages=(3, 4), zero=0, micro_batch=1)

TRAINING = Training(
    data=Data("text", ("/data/*.txt",), validation=0.05),
    tokenizer=Tokenizer("bytes"),
    vocab=256,
    sequence=64,
    batch=32,
    steps=200,
    optimizer=AdamW(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0),
    schedule=Schedule("cosine", warmup=20, min_lr=3e-5),
    precision="fp32",
    flops_per_token=4.9e6,
    peak_flops_per_second=5e10,
)


class Stage_(nn.Module):
    """One pass of `repeat 2 as main`."""

    def __init__(self):
        super().__init__()
        self.self_ = Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros))
        self.half_ = Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros))
        self.torch = Scope(weight=weight((64,), ones))

    def forward(self, nn_):  # nn_: [B, S, 64]
        self_ = F.gelu(F.linear(nn_, self.self_.weight, self.self_.bias))
        tp_ = F.linear(self_, self.half_.weight, self.half_.bias) * 0.5
        weight_ = tp_ + nn_
        return F.rms_norm(weight_, (64,), self.torch.weight, 1e-5)


class Stage_2(nn.Module):
    """One pass of `repeat 2 as stage`."""

    def __init__(self):
        super().__init__()
        self.self_ = Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros))
        self.half_ = Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros))
        self.torch = Scope(weight=weight((64,), ones))

    def forward(self, nn_):  # nn_: [B, S, 64]
        self_ = F.gelu(F.linear(nn_, self.self_.weight, self.self_.bias))
        tp_ = F.linear(self_, self.half_.weight, self.half_.bias) * 0.5
        weight_ = tp_ + nn_
        return F.rms_norm(weight_, (64,), self.torch.weight, 1e-5)


class Mesh_(nn.Module):
    """One pass of `repeat 3 as eval`."""

    def __init__(self):
        super().__init__()
        self.forward_ = Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros))
        self.type_ = Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros))

    def forward(self, nn_):  # nn_: [B, S, 64]
        forward = F.linear(nn_, self.forward_.weight, self.forward_.bias)
        return nn_ + F.linear(forward, self.type_.weight, self.type_.bias)


class Stage(nn.Module):
    """Virtual stage `index` of the pipeline: its share of the layers, and on the first and last what stands around them."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.first, self.last = index == 0, index == len(PARALLEL.stages) - 1
        lo = sum(PARALLEL.stages[:index])
        hi = lo + PARALLEL.stages[index]
        self.lo, self.hi = lo, hi
        if self.first or self.last:
            # used on several stages: the runtime sums their gradients
            self.F = Scope(weight=weight((256, 64), normal(0.02)))
        if self.first:
            self.position = Scope(weight=weight((64, 64), normal(0.02)))
        self.main = nn.ModuleDict({str(i): Stage_() for i in range(lo, min(hi, 2))})
        self.stage = nn.ModuleDict({str(i - 2): Stage_2() for i in range(max(lo, 2), min(hi, 4))})
        self.eval_ = nn.ModuleDict({str(i - 4): Mesh_() for i in range(max(lo, 4), hi)})
        if self.last:
            self.last_ = Scope(weight=weight((64,), ones), bias=weight((64,), zeros))

    def forward(self, nn_):  # the first stage is given lambda: int[B, S]
        if self.first:
            lambda_ = nn_
            nn_ = F.embedding(lambda_, self.F.weight) + positions(self.position.weight, lambda_.size(1))  # [B, S, 64]
        for block in self.main.values():
            nn_ = block(nn_)
        for block in self.stage.values():
            nn_ = block(nn_)
        if self.hi < 4:
            return nn_
        for block in self.eval_.values():
            nn_ = block(nn_)
        last = F.layer_norm(nn_, (64,), self.last_.weight, self.last_.bias)
        return F.linear(last, self.F.weight)  # [B, S, 256]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    return cross_entropy(logits, targets)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
