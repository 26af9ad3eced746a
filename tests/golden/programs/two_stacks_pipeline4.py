"""two_stacks on laptop.

Plan: pipeline 4, 1f1b, micro-batch 1, recompute none.
Written by mlmdsl from tiny.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 4 program.py --out runs/two_stacks
Predicted: 0.213 s a step, 9,615 tokens/s and 0.0123 TFLOP/s per device (MFU 24.6 % of 0.05 TFLOP/s, counting matrix products
only, causal attention half); peak memory 256 MiB to 259 MiB.

Shapes: B = 1 (sequences of a micro-batch), S = 64 (tokens).
Ranks: torch.arange(4).view(4, 1, 1, 1): pipeline, data, context, tensor. Collectives over data and pipeline are the runtime's.
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
    weight,
    zeros,
)

PARALLEL = Parallel(pipeline=4, data=1, tensor=1, schedule="1f1b", stages=(2, 2, 3, 3), zero=0, micro_batch=1)

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


class Encoder(nn.Module):
    """One pass of `repeat 4 as encoder`."""

    def __init__(self):
        super().__init__()
        self.a = Scope(weight=weight((64, 64), normal(0.02)))

    def forward(self, h):  # h: [B, S, 64]
        h = h + F.linear(h, self.a.weight)
        return h


class Decoder(nn.Module):
    """One pass of `repeat 6 as decoder`."""

    def __init__(self):
        super().__init__()
        self.half_ = Scope(weight=weight((64, 64), normal(0.02)))

    def forward(self, y, z, memory, shared_weight):  # y: [B, S, 64], z: [B, S, 64], memory: [B, S, 64]
        y = F.linear(y, self.half_.weight) + F.linear(memory, shared_weight)  # [B, S, 64]
        z = z + y
        return y, z


class Stage(nn.Module):
    """Virtual stage `index` of the pipeline: its share of the layers, and on the first and last what stands around them."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.first, self.last = index == 0, index == len(PARALLEL.stages) - 1
        lo = sum(PARALLEL.stages[:index])
        hi = lo + PARALLEL.stages[index]
        self.lo, self.hi = lo, hi
        if self.first or (lo < 4 <= hi) or self.last:
            # used on several stages: the runtime sums their gradients
            self.tok = Scope(weight=weight((256, 64), normal(0.02)))
        if self.first or (max(lo, 4) < min(hi, 10)):
            # used on several stages: the runtime sums their gradients
            self.shared = Scope(weight=weight((64, 64), normal(0.02)))
        self.encoder = nn.ModuleDict({str(i): Encoder() for i in range(lo, min(hi, 4))})
        if (lo < 4 <= hi) or self.last:
            self.bridge = Scope()
            self.bridge.weight = weight((64, 64), normal(0.02))
        if lo < 4 <= hi:
            self.bridge.bias = weight((64,), zeros)
        self.decoder = nn.ModuleDict({str(i - 4): Decoder() for i in range(max(lo, 4), hi)})

    def forward(self, *values, tokens):  # the first stage is given tokens: int[B, S]
        if not self.first and self.lo < 4:
            h, skip = values
        elif not self.first:
            y, z, skip, memory = values
        if self.first:
            h = F.embedding(tokens, self.tok.weight)  # [B, S, 64]
            skip = F.linear(h, self.shared.weight)
        for block in self.encoder.values():
            h = block(h)
        if self.hi < 4:
            return h, skip
        if self.lo < 4 <= self.hi:
            memory = F.linear(h, self.bridge.weight, self.bridge.bias)
            z = F.embedding(tokens, self.tok.weight)
            y = z
        for block in self.decoder.values():
            y, z = block(y, z, memory, self.shared.weight)
        if not self.last:
            return y, z, skip, memory
        x = F.linear((y + z) + skip, self.bridge.weight)
        return F.linear(x, self.tok.weight)  # [B, S, 256]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    return cross_entropy(logits, targets)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
