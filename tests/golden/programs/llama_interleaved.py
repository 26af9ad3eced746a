"""tiny_llama on laptop.

Plan: pipeline 2 x data 2, interleaved_1f1b x 2, ZeRO 3, micro-batch 1, recompute none.
Written by mlmdsl from tiny.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 4 program.py --out runs/tiny_llama
Predicted: 0.213 s a step, 9,615 tokens/s and 0.0123 TFLOP/s per device (MFU 24.6 % of 0.05 TFLOP/s, counting matrix products
only, causal attention half); peak memory 256 MiB to 257 MiB.

Shapes: B = 1 (sequences of a micro-batch), S = 64 (tokens).
Ranks: torch.arange(4).view(2, 2, 1, 1): pipeline, data, context, tensor. Collectives over data and pipeline are the runtime's.
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
    attention,
    cross_entropy,
    main,
    normal,
    ones,
    rotary,
    weight,
)

PARALLEL = Parallel(
    pipeline=2,
    data=2,
    tensor=1,
    interleave=2,
    schedule="interleaved_1f1b",
    stages=(1, 2, 1, 1),
    zero=3,
    micro_batch=1,
)

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

    def __init__(self):
        super().__init__()
        self.attn_norm = Scope(weight=weight((64,), ones))
        self.attn = Scope(
            query=Scope(weight=weight((64, 64), normal(0.02))),
            key=Scope(weight=weight((32, 64), normal(0.02))),
            value=Scope(weight=weight((32, 64), normal(0.02))),
            out=Scope(weight=weight((64, 64), normal(0.02))),
        )
        self.mlp_norm = Scope(weight=weight((64,), ones))
        self.mlp = Scope(
            gate=Scope(weight=weight((192, 64), normal(0.02))),
            up=Scope(weight=weight((192, 64), normal(0.02))),
            down=Scope(weight=weight((64, 192), normal(0.02))),
        )

    def forward(self, h):  # h: [B, S, 64]
        attn_norm = F.rms_norm(h, (64,), self.attn_norm.weight, 1e-5)
        # attn: Attention
        q = F.linear(attn_norm, self.attn.query.weight).unflatten(-1, (4, 16))  # [B, S, 4, 16]
        k = F.linear(attn_norm, self.attn.key.weight).unflatten(-1, (2, 16))  # [B, S, 2, 16]
        v = F.linear(attn_norm, self.attn.value.weight).unflatten(-1, (2, 16))
        q = rotary(q, 500000.0)  # [B, S, 4, 16]
        k = rotary(k, 500000.0)  # [B, S, 2, 16]
        a = attention(q, k, v, causal=True).flatten(-2)  # [B, S, 64]
        h = h + F.linear(a, self.attn.out.weight)
        mlp_norm = F.rms_norm(h, (64,), self.mlp_norm.weight, 1e-5)
        # mlp: SwiGLU
        x = F.silu(F.linear(mlp_norm, self.mlp.gate.weight)) * F.linear(mlp_norm, self.mlp.up.weight)  # [B, S, 192]
        return h + F.linear(x, self.mlp.down.weight)  # [B, S, 64]


class Stage(nn.Module):
    """Virtual stage `index` of the pipeline: its share of the layers, and on the first and last what stands around them."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.first, self.last = index == 0, index == len(PARALLEL.stages) - 1
        lo = sum(PARALLEL.stages[:index])
        hi = lo + PARALLEL.stages[index]
        if self.first:
            self.h = Scope(weight=weight((256, 64), normal(0.02)))
        self.blocks = nn.ModuleDict({str(i): LlamaBlock() for i in range(lo, hi)})
        if self.last:
            self.norm = Scope(weight=weight((64,), ones))
            self.linear = Scope(weight=weight((256, 64), normal(0.02)))

    def forward(self, h):  # the first stage is given tokens: int[B, S]
        if self.first:
            tokens = h
            h = F.embedding(tokens, self.h.weight)  # [B, S, 64]
        for block in self.blocks.values():
            h = block(h)
        if not self.last:
            return h
        norm = F.rms_norm(h, (64,), self.norm.weight, 1e-5)  # [B, S, 64]
        return F.linear(norm, self.linear.weight)  # [B, S, 256]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    return cross_entropy(logits, targets)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
