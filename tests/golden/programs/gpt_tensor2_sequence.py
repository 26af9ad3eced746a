"""tiny_gpt on laptop.

Plan: tensor 2, sequence parallel, micro-batch 1, recompute none.
Written by mlmdsl from tiny.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 2 program.py --out runs/tiny_gpt
Predicted: 0.213 s a step, 9,615 tokens/s and 0.0123 TFLOP/s per device (MFU 24.6 % of 0.05 TFLOP/s, counting matrix products
only, causal attention half); peak memory 256 MiB.

Shapes: B = 1 (sequences of a micro-batch), S = 64 (tokens); n/tp is a dim divided over the 2 ranks of the tensor axis.
Ranks: torch.arange(2).view(1, 1, 1, 2): pipeline, data, context, tensor. Collectives over data and pipeline are the runtime's.
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
    attention,
    main,
    normal,
    ones,
    positions,
    reduce_scatter,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    weight,
    zeros,
)

PARALLEL = Parallel(pipeline=1, data=1, tensor=2, stages=(4,), zero=0, micro_batch=1)

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


class GPTBlock(nn.Module):
    """One pass of `repeat 4 as blocks`."""

    def __init__(self, tp: Axis):
        super().__init__()
        self.tp = tp
        self.layer_norm = Scope(weight=weight((64,), ones, tp, partial=True), bias=weight((64,), zeros, tp, partial=True))
        self.attention = Scope(
            query=Scope(weight=weight((64, 64), normal(0.02), tp, shard=0), bias=weight((64,), zeros, tp, shard=0)),
            key=Scope(weight=weight((64, 64), normal(0.02), tp, shard=0), bias=weight((64,), zeros, tp, shard=0)),
            value=Scope(weight=weight((64, 64), normal(0.02), tp, shard=0), bias=weight((64,), zeros, tp, shard=0)),
            out=Scope(weight=weight((64, 64), normal(0.02), tp, shard=1), bias=weight((64,), zeros, tp, partial=True)),
        )
        self.layer_norm_2 = Scope(weight=weight((64,), ones, tp, partial=True), bias=weight((64,), zeros, tp, partial=True))
        self.mlp = Scope(
            up=Scope(weight=weight((256, 64), normal(0.02), tp, shard=0), bias=weight((256,), zeros, tp, shard=0)),
            down=Scope(weight=weight((64, 256), normal(0.02), tp, shard=1), bias=weight((64,), zeros, tp, partial=True)),
        )

    def forward(self, h):  # h: [B, S/tp, 64]
        tp = self.tp
        x = F.layer_norm(h, (64,), self.layer_norm.weight, self.layer_norm.bias)
        # Attention
        x = all_gather(x, tp, dim=1)  # [B, S, 64], 32 KiB; backward reduce_scatter: blocks.attention.value asks for broadcast
        q = F.linear(x, self.attention.query.weight, self.attention.query.bias).unflatten(-1, (2, 16))  # [B, S, 4/tp, 16]
        k = F.linear(x, self.attention.key.weight, self.attention.key.bias).unflatten(-1, (2, 16))
        v = F.linear(x, self.attention.value.weight, self.attention.value.bias).unflatten(-1, (2, 16))
        a = attention(q, k, v, causal=True).flatten(-2)  # [B, S, 64/tp]
        out = F.linear(a, self.attention.out.weight)  # [B, S, 64], partial sums
        out = reduce_scatter(out, tp, dim=1)  # 32 KiB; backward all_gather: blocks.attention.out.bias asks for shard(1)
        h = h + (out + self.attention.out.bias)  # [B, S/tp, 64]
        x = F.layer_norm(h, (64,), self.layer_norm_2.weight, self.layer_norm_2.bias)
        # MLP
        x = all_gather(x, tp, dim=1)  # [B, S, 64], 32 KiB; backward reduce_scatter: blocks.mlp.up asks for broadcast
        up = F.gelu(F.linear(x, self.mlp.up.weight, self.mlp.up.bias))  # [B, S, 256/tp]
        down = F.linear(up, self.mlp.down.weight)  # [B, S, 64], partial sums
        down = reduce_scatter(down, tp, dim=1)  # 32 KiB; backward all_gather: blocks.mlp.down.bias asks for shard(1)
        return h + (down + self.mlp.down.bias)  # [B, S/tp, 64]


class Stage(nn.Module):
    """The whole model."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.tp = tp = mesh.tensor
        self.tok = Scope(weight=weight((256, 64), normal(0.02), tp, shard=0))
        self.position = Scope(weight=weight((64, 64), normal(0.02), tp, partial=True))
        self.blocks = nn.ModuleDict({str(i): GPTBlock(tp) for i in range(4)})
        self.layer_norm = Scope(weight=weight((64,), ones, tp, partial=True), bias=weight((64,), zeros, tp, partial=True))

    def forward(self, tokens):  # tokens: int[B, S]
        tp = self.tp
        tok = vocab_parallel_embedding(tokens, self.tok.weight, tp)  # [B, S, 64], partial sums
        tok = reduce_scatter(tok, tp, dim=1)  # [B, S/tp, 64], 32 KiB; backward all_gather: h asks for shard(1)
        h = tok + positions(self.position.weight, tokens.size(1) // 2, cut=(tp,))
        for block in self.blocks.values():
            h = block(h)
        x = F.layer_norm(h, (64,), self.layer_norm.weight, self.layer_norm.bias)
        x = all_gather(x, tp, dim=1)  # [B, S, 64], 32 KiB; backward reduce_scatter: linear asks for broadcast
        return F.linear(x, self.tok.weight)  # [B, S, 256/tp]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    tp = mesh.tensor
    return vocab_parallel_cross_entropy(logits, targets, tp)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
