"""tiny_llama on laptop.

Plan: tensor 2, sequence parallel, micro-batch 1, recompute full.
Written by mlmdsl from tiny.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 2 program.py --out runs/tiny_llama
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
    recomputed,
    reduce_scatter,
    rotary,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    weight,
)

PARALLEL = Parallel(pipeline=1, data=1, tensor=2, stages=(5,), zero=0, micro_batch=1, recompute="full")

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


class LlamaBlock(nn.Module):
    """One pass of `repeat 5 as blocks`."""

    def __init__(self, tp: Axis):
        super().__init__()
        self.tp = tp
        self.attn_norm = Scope(weight=weight((64,), ones, tp, partial=True))
        self.attn = Scope(
            query=Scope(weight=weight((64, 64), normal(0.02), tp, shard=0)),
            key=Scope(weight=weight((32, 64), normal(0.02), tp, shard=0)),
            value=Scope(weight=weight((32, 64), normal(0.02), tp, shard=0)),
            out=Scope(weight=weight((64, 64), normal(0.02), tp, shard=1)),
        )
        self.mlp_norm = Scope(weight=weight((64,), ones, tp, partial=True))
        self.mlp = Scope(
            gate=Scope(weight=weight((192, 64), normal(0.02), tp, shard=0)),
            up=Scope(weight=weight((192, 64), normal(0.02), tp, shard=0)),
            down=Scope(weight=weight((64, 192), normal(0.02), tp, shard=1)),
        )

    def forward(self, h):  # h: [B, S/tp, 64]
        tp = self.tp
        attn_norm = F.rms_norm(h, (64,), self.attn_norm.weight, 1e-5)
        # attn: Attention
        attn_norm = all_gather(attn_norm, tp, dim=1)  # 32 KiB; backward reduce_scatter: blocks.attn.value asks for broadcast
        q = F.linear(attn_norm, self.attn.query.weight).unflatten(-1, (2, 16))  # [B, S, 4/tp, 16]
        k = F.linear(attn_norm, self.attn.key.weight).unflatten(-1, (1, 16))  # [B, S, 2/tp, 16]
        v = F.linear(attn_norm, self.attn.value.weight).unflatten(-1, (1, 16))
        q = rotary(q, 500000.0)  # [B, S, 4/tp, 16]
        k = rotary(k, 500000.0)  # [B, S, 2/tp, 16]
        a = attention(q, k, v, causal=True).flatten(-2)  # [B, S, 64/tp]
        out = F.linear(a, self.attn.out.weight)  # [B, S, 64], partial sums
        out = reduce_scatter(out, tp, dim=1)  # [B, S/tp, 64], 32 KiB; backward all_gather: blocks.h_2 asks for shard(1)
        h = h + out
        mlp_norm = F.rms_norm(h, (64,), self.mlp_norm.weight, 1e-5)
        # mlp: SwiGLU
        mlp_norm = all_gather(mlp_norm, tp, dim=1)  # 32 KiB; backward reduce_scatter: blocks.mlp.up asks for broadcast
        x = F.silu(F.linear(mlp_norm, self.mlp.gate.weight)) * F.linear(mlp_norm, self.mlp.up.weight)  # [B, S, 192/tp]
        down = F.linear(x, self.mlp.down.weight)  # [B, S, 64], partial sums
        down = reduce_scatter(down, tp, dim=1)  # [B, S/tp, 64], 32 KiB; backward all_gather: blocks.add asks for shard(1)
        return h + down


class Stage(nn.Module):
    """The whole model."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.tp = tp = mesh.tensor
        self.h = Scope(weight=weight((256, 64), normal(0.02), tp, shard=0))
        self.blocks = nn.ModuleDict({str(i): LlamaBlock(tp) for i in range(5)})
        self.norm = Scope(weight=weight((64,), ones, tp, partial=True))
        self.linear = Scope(weight=weight((256, 64), normal(0.02), tp, shard=0))

    def forward(self, tokens):  # tokens: int[B, S]
        tp = self.tp
        h = vocab_parallel_embedding(tokens, self.h.weight, tp)  # [B, S, 64], partial sums
        h = reduce_scatter(h, tp, dim=1)  # [B, S/tp, 64], 32 KiB; backward all_gather: blocks.h asks for shard(1)
        for block in self.blocks.values():
            h = recomputed(block, PARALLEL.recompute)(h)
        norm = F.rms_norm(h, (64,), self.norm.weight, 1e-5)
        norm = all_gather(norm, tp, dim=1)  # [B, S, 64], 32 KiB; backward reduce_scatter: linear asks for broadcast
        return F.linear(norm, self.linear.weight)  # [B, S, 256/tp]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    tp = mesh.tensor
    return vocab_parallel_cross_entropy(logits, targets, tp)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
