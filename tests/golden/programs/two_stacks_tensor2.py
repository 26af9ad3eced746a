"""two_stacks on laptop.

Plan: tensor 2 x pipeline 2, 1f1b, micro-batch 1, recompute none.
Written by mlmdsl from tiny.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 4 program.py --out runs/two_stacks
Predicted: 0.213 s a step, 9,615 tokens/s and 0.0123 TFLOP/s per device (MFU 24.6 % of 0.05 TFLOP/s, counting matrix products
only, causal attention half); peak memory 256 MiB to 257 MiB.

Shapes: B = 1 (sequences of a micro-batch), S = 64 (tokens); n/tp is a dim divided over the 2 ranks of the tensor axis.
Ranks: torch.arange(4).view(2, 1, 1, 2): pipeline, data, context, tensor. Collectives over data and pipeline are the runtime's.
"""

import torch.nn.functional as F
from torch import nn

from mlmdsl.runtime import (
    AdamW,
    Axis,
    Data,
    Mesh,
    Parallel,
    Schedule,
    Scope,
    Tokenizer,
    Training,
    all_gather,
    all_reduce,
    all_reduce_both,
    copy_to,
    gather,
    main,
    normal,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    weight,
    zeros,
)

PARALLEL = Parallel(pipeline=2, data=1, tensor=2, schedule="1f1b", stages=(7, 3), zero=0, micro_batch=1)

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

    def __init__(self, tp: Axis):
        super().__init__()
        self.tp = tp
        self.a = Scope(weight=weight((64, 64), normal(0.02), tp, shard=0))

    def forward(self, h):  # h: [B, S, 64]
        tp = self.tp
        x = copy_to(h, tp)  # backward all_reduce of 32 KiB: encoder.a asks for broadcast
        x = F.linear(x, self.a.weight)  # [B, S, 64/tp]
        x = gather(x, tp, dim=2)  # [B, S, 64], 32 KiB; backward split: encoder.h_2 asks for replicate
        h = h + x
        return h


class Decoder(nn.Module):
    """One pass of `repeat 6 as decoder`."""

    def __init__(self, tp: Axis):
        super().__init__()
        self.tp = tp
        self.half_ = Scope(weight=weight((64, 64), normal(0.02), tp, shard=0))

    def forward(self, y, z, memory, shared_weight):  # y: [B, S, 64], z: [B, S, 64], memory: [B, S, 64/tp]
        tp = self.tp
        y = copy_to(y, tp)  # [B, S, 64], backward all_reduce of 32 KiB: decoder.half asks for broadcast
        half = F.linear(y, self.half_.weight)  # [B, S, 64/tp]
        memory = all_gather(memory, tp, dim=2)  # [B, S, 64], 32 KiB; backward reduce_scatter: decoder.shared asks for broadcast
        y = half + F.linear(memory, shared_weight)  # [B, S, 64/tp]
        y = gather(y, tp, dim=2)  # [B, S, 64], 32 KiB; backward split: decoder.y asks for replicate
        z = z + y
        return y, z


class Stage(nn.Module):
    """Virtual stage `index` of the pipeline: its share of the layers, and on the first and last what stands around them."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.tp = tp = mesh.tensor
        self.first, self.last = index == 0, index == len(PARALLEL.stages) - 1
        lo = sum(PARALLEL.stages[:index])
        hi = lo + PARALLEL.stages[index]
        self.lo, self.hi = lo, hi
        if self.first or (lo < 4 <= hi) or self.last:
            # used on several stages: the runtime sums their gradients
            self.tok = Scope(weight=weight((256, 64), normal(0.02), tp, shard=0))
        if self.first or (max(lo, 4) < min(hi, 10)):
            # used on several stages: the runtime sums their gradients
            self.shared = Scope(weight=weight((64, 64), normal(0.02), tp, shard=0))
        self.encoder = nn.ModuleDict({str(i): Encoder(tp) for i in range(lo, min(hi, 4))})
        if (lo < 4 <= hi) or self.last:
            self.bridge = Scope()
            self.bridge.weight = weight((64, 64), normal(0.02), tp, shard=0)
        if lo < 4 <= hi:
            self.bridge.bias = weight((64,), zeros, tp, shard=0)
        self.decoder = nn.ModuleDict({str(i - 4): Decoder(tp) for i in range(max(lo, 4), hi)})

    def forward(self, *values, tokens):  # the first stage is given tokens: int[B, S]
        tp = self.tp
        if not self.first:
            y, z, skip, memory = values
        if self.first:
            h = vocab_parallel_embedding(tokens, self.tok.weight, tp)  # [B, S, 64], partial sums
            x = all_reduce_both(h, tp)  # [B, S, 64], 32 KiB; backward all_reduce: skip asks for broadcast
            skip = F.linear(x, self.shared.weight)  # [B, S, 64/tp]
            h = all_reduce(h, tp)  # [B, S, 64], 32 KiB: encoder.h asks for replicate
        for block in self.encoder.values():
            h = block(h)
        if self.lo < 4 <= self.hi:
            h = copy_to(h, tp)  # backward all_reduce of 32 KiB: bridge asks for broadcast
            memory = F.linear(h, self.bridge.weight, self.bridge.bias)  # [B, S, 64/tp]
            z = vocab_parallel_embedding(tokens, self.tok.weight, tp)  # [B, S, 64], partial sums
            z = all_reduce(z, tp)  # [B, S, 64], 32 KiB: decoder.z asks for replicate
            y = z
        for block in self.decoder.values():
            y, z = block(y, z, memory, self.shared.weight)
        if not self.last:
            return y, z, skip, memory
        x = y + z
        skip = gather(skip, tp, dim=2)  # 32 KiB; backward split: sum_2 asks for replicate
        x = x + skip
        x = copy_to(x, tp)  # backward all_reduce of 32 KiB: head asks for broadcast
        x = F.linear(x, self.bridge.weight)  # [B, S, 64/tp]
        x = all_gather(x, tp, dim=2)  # [B, S, 64], 32 KiB; backward reduce_scatter: logits asks for broadcast
        return F.linear(x, self.tok.weight)  # [B, S, 256/tp]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    tp = mesh.tensor
    return vocab_parallel_cross_entropy(logits, targets, tp)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
