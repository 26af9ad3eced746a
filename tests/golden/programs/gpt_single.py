"""tiny_gpt on laptop.

Plan: one device, micro-batch 1, recompute none.
Written by mlmdsl from tiny.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 1 program.py --out runs/tiny_gpt
Predicted: 0.213 s a step, 9,615 tokens/s and 0.0123 TFLOP/s per device (MFU 24.6 % of 0.05 TFLOP/s, counting matrix products
only, causal attention half); peak memory 256 MiB.

Shapes: B = 1 (sequences of a micro-batch), S = 64 (tokens).
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
    positions,
    weight,
    zeros,
)

PARALLEL = Parallel(pipeline=1, data=1, tensor=1, stages=(4,), zero=0, micro_batch=1)

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

    def __init__(self):
        super().__init__()
        self.layer_norm = Scope(weight=weight((64,), ones), bias=weight((64,), zeros))
        self.attention = Scope(
            query=Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros)),
            key=Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros)),
            value=Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros)),
            out=Scope(weight=weight((64, 64), normal(0.02)), bias=weight((64,), zeros)),
        )
        self.layer_norm_2 = Scope(weight=weight((64,), ones), bias=weight((64,), zeros))
        self.mlp = Scope(
            up=Scope(weight=weight((256, 64), normal(0.02)), bias=weight((256,), zeros)),
            down=Scope(weight=weight((64, 256), normal(0.02)), bias=weight((64,), zeros)),
        )

    def forward(self, h):  # h: [B, S, 64]
        x = F.layer_norm(h, (64,), self.layer_norm.weight, self.layer_norm.bias)
        # Attention
        q = F.linear(x, self.attention.query.weight, self.attention.query.bias).unflatten(-1, (4, 16))  # [B, S, 4, 16]
        k = F.linear(x, self.attention.key.weight, self.attention.key.bias).unflatten(-1, (4, 16))
        v = F.linear(x, self.attention.value.weight, self.attention.value.bias).unflatten(-1, (4, 16))
        a = attention(q, k, v, causal=True).flatten(-2)  # [B, S, 64]
        h = h + F.linear(a, self.attention.out.weight, self.attention.out.bias)
        x = F.layer_norm(h, (64,), self.layer_norm_2.weight, self.layer_norm_2.bias)
        # MLP
        up = F.gelu(F.linear(x, self.mlp.up.weight, self.mlp.up.bias))  # [B, S, 256]
        return h + F.linear(up, self.mlp.down.weight, self.mlp.down.bias)  # [B, S, 64]


class Stage(nn.Module):
    """The whole model."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.tok = Scope(weight=weight((256, 64), normal(0.02)))
        self.position = Scope(weight=weight((64, 64), normal(0.02)))
        self.blocks = nn.ModuleDict({str(i): GPTBlock() for i in range(4)})
        self.layer_norm = Scope(weight=weight((64,), ones), bias=weight((64,), zeros))

    def forward(self, tokens):  # tokens: int[B, S]
        h = F.embedding(tokens, self.tok.weight) + positions(self.position.weight, tokens.size(1))  # [B, S, 64]
        for block in self.blocks.values():
            h = block(h)
        x = F.layer_norm(h, (64,), self.layer_norm.weight, self.layer_norm.bias)
        return F.linear(x, self.tok.weight)  # [B, S, 256]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    return cross_entropy(logits, targets)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
