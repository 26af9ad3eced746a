"""A program as the compiler emits it, by hand: a GPT with learned positions, biases and a tied head.

`PROGRAM` takes its plan from `PARALLEL`, so that one text serves every degree and schedule; the collectives are those of
sequence parallelism where the tensor axis has several ranks, and fall away where it has one.
"""

from __future__ import annotations

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn

from mlmdsl.runtime import (
    Axis, Mesh, Parallel, Scope, all_gather, attention, main, normal, ones, positions, recomputed, reduce_scatter, split,
    vocab_parallel_cross_entropy, vocab_parallel_embedding, weight, zeros,
)


class Block(nn.Module):
    def __init__(self, tp: Axis):
        super().__init__()
        self.tp = tp
        self.norm1 = Scope(weight=weight((32,), ones, tp, partial=True), bias=weight((32,), zeros, tp, partial=True))
        self.attn = Scope(
            query=Scope(weight=weight((32, 32), normal(0.02), tp, shard=0), bias=weight((32,), zeros, tp, shard=0)),
            key=Scope(weight=weight((32, 32), normal(0.02), tp, shard=0), bias=weight((32,), zeros, tp, shard=0)),
            value=Scope(weight=weight((32, 32), normal(0.02), tp, shard=0), bias=weight((32,), zeros, tp, shard=0)),
            out=Scope(weight=weight((32, 32), normal(0.02), tp, shard=1), bias=weight((32,), zeros, tp, partial=True)),
        )
        self.norm2 = Scope(weight=weight((32,), ones, tp, partial=True), bias=weight((32,), zeros, tp, partial=True))
        self.up = Scope(weight=weight((96, 32), normal(0.02), tp, shard=0), bias=weight((96,), zeros, tp, shard=0))
        self.down = Scope(weight=weight((32, 96), normal(0.02), tp, shard=1), bias=weight((32,), zeros, tp, partial=True))

    def forward(self, h):
        tp = self.tp
        x = F.layer_norm(h, (32,), self.norm1.weight, self.norm1.bias, 1e-5)
        x = all_gather(x, tp, dim=1)
        q = F.linear(x, self.attn.query.weight, self.attn.query.bias).unflatten(-1, (-1, 8))
        k = F.linear(x, self.attn.key.weight, self.attn.key.bias).unflatten(-1, (-1, 8))
        v = F.linear(x, self.attn.value.weight, self.attn.value.bias).unflatten(-1, (-1, 8))
        x = attention(q, k, v, causal=True)
        x = F.linear(x.flatten(-2), self.attn.out.weight)
        x = reduce_scatter(x, tp, dim=1)
        h = h + (x + self.attn.out.bias)
        x = F.layer_norm(h, (32,), self.norm2.weight, self.norm2.bias, 1e-5)
        x = all_gather(x, tp, dim=1)
        x = F.linear(F.gelu(F.linear(x, self.up.weight, self.up.bias)), self.down.weight)
        x = reduce_scatter(x, tp, dim=1)
        return h + (x + self.down.bias)


class Stage(nn.Module):
    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.tp = tp = mesh.tensor
        self.first, self.last = index == 0, index == len(PARALLEL.stages) - 1
        lo = sum(PARALLEL.stages[:index])
        if self.first or self.last:
            self.tok = Scope(weight=weight((64, 32), normal(0.02), tp, shard=0))
        if self.first:
            self.position = Scope(weight=weight((16, 32), normal(0.02), tp, partial=True))
        self.blocks = nn.ModuleDict({str(i): Block(tp) for i in range(lo, lo + PARALLEL.stages[index])})
        if self.last:
            self.norm = Scope(weight=weight((32,), ones, tp, partial=True), bias=weight((32,), zeros, tp, partial=True))

    def forward(self, h):
        tp = self.tp
        if self.first:
            tokens = h
            x = vocab_parallel_embedding(tokens, self.tok.weight, tp)
            n = tokens.size(1) // tp.size
            h = reduce_scatter(x, tp, dim=1) + positions(self.position.weight, n, (tp,))
        for block in self.blocks.values():
            h = recomputed(block, PARALLEL.recompute)(h)
        if self.last:
            h = F.layer_norm(h, (32,), self.norm.weight, self.norm.bias, 1e-5)
            h = all_gather(h, tp, dim=1)
            h = F.linear(h, self.tok.weight)
        return h


def loss(logits, targets, mesh: Mesh):
    return vocab_parallel_cross_entropy(logits, targets, mesh.tensor)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
"""


def program(parallel: str, training: str) -> str:
    """The text with its settings in front, as `repr` of the configuration's values."""
    imports = "from mlmdsl.runtime.config import *\n"
    return f"{imports}\nPARALLEL = {parallel}\n\nTRAINING = {training}\n{PROGRAM}"
