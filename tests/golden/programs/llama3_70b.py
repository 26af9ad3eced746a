"""llama3_70b on h100x256.

Plan: data 256, ZeRO 3, micro-batch 1, recompute full.
Written by mlmdsl from llama3_70b.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nnodes 32 --nproc-per-node 8 program.py --out runs/llama3_70b
Predicted: 14.5 s a step, 1,130 tokens/s and 508 TFLOP/s per device (MFU 51.3 % of 989 TFLOP/s, counting matrix products only,
causal attention half); peak memory 59.04 GiB.

Shapes: B = 1 (sequences of a micro-batch), S = 8,192 (tokens).
Ranks: torch.arange(256).view(1, 256, 1, 1): pipeline, data, context, tensor. Collectives over data and pipeline are the
runtime's.
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
    recomputed,
    rotary,
    weight,
)

PARALLEL = Parallel(pipeline=1, data=256, tensor=1, stages=(80,), zero=3, micro_batch=1, recompute="full")

TRAINING = Training(
    data=Data("text", ("/specs/corpus/*.txt",), validation=0.05),
    tokenizer=Tokenizer("hf", "/specs/tokenizer.json"),
    vocab=128256,
    sequence=8192,
    batch=512,
    steps=3576279,
    optimizer=AdamW(lr=1.5e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0),
    schedule=Schedule("cosine", warmup=8000, min_lr=1.5e-6),
    precision="bf16",
    flops_per_token=449222541312.0,
    peak_flops_per_second=9.89e14,
)


class LlamaBlock(nn.Module):
    """One pass of `repeat 80 as blocks`."""

    def __init__(self):
        super().__init__()
        self.attn_norm = Scope(weight=weight((8192,), ones))
        self.attn = Scope(
            query=Scope(weight=weight((8192, 8192), normal(0.02))),
            key=Scope(weight=weight((1024, 8192), normal(0.02))),
            value=Scope(weight=weight((1024, 8192), normal(0.02))),
            out=Scope(weight=weight((8192, 8192), normal(0.02))),
        )
        self.mlp_norm = Scope(weight=weight((8192,), ones))
        self.mlp = Scope(
            gate=Scope(weight=weight((28672, 8192), normal(0.02))),
            up=Scope(weight=weight((28672, 8192), normal(0.02))),
            down=Scope(weight=weight((8192, 28672), normal(0.02))),
        )

    def forward(self, h):  # h: [B, S, 8192]
        attn_norm = F.rms_norm(h, (8192,), self.attn_norm.weight, 1e-5)
        # attn: Attention
        q = F.linear(attn_norm, self.attn.query.weight).unflatten(-1, (64, 128))  # [B, S, 64, 128]
        k = F.linear(attn_norm, self.attn.key.weight).unflatten(-1, (8, 128))  # [B, S, 8, 128]
        v = F.linear(attn_norm, self.attn.value.weight).unflatten(-1, (8, 128))
        q = rotary(q, 500000.0)  # [B, S, 64, 128]
        k = rotary(k, 500000.0)  # [B, S, 8, 128]
        a = attention(q, k, v, causal=True).flatten(-2)  # [B, S, 8192]
        h = h + F.linear(a, self.attn.out.weight)
        mlp_norm = F.rms_norm(h, (8192,), self.mlp_norm.weight, 1e-5)
        # mlp: SwiGLU
        x = F.silu(F.linear(mlp_norm, self.mlp.gate.weight)) * F.linear(mlp_norm, self.mlp.up.weight)  # [B, S, 28672]
        return h + F.linear(x, self.mlp.down.weight)  # [B, S, 8192]


class Stage(nn.Module):
    """The whole model."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.tok = Scope(weight=weight((128256, 8192), normal(0.02)))
        self.blocks = nn.ModuleDict({str(i): LlamaBlock() for i in range(80)})
        self.norm = Scope(weight=weight((8192,), ones))
        self.linear = Scope(weight=weight((128256, 8192), normal(0.02)))

    def forward(self, tokens):  # tokens: int[B, S]
        h = F.embedding(tokens, self.tok.weight)  # [B, S, 8192]
        for block in self.blocks.values():
            h = recomputed(block, PARALLEL.recompute)(h)
        norm = F.rms_norm(h, (8192,), self.norm.weight, 1e-5)  # [B, S, 8192]
        return F.linear(norm, self.linear.weight)  # [B, S, 128256]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    return cross_entropy(logits, targets)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
