"""gpt2_124m on dgx_a100.

Plan: data 8, ZeRO 1, micro-batch 64, recompute none.
Written by mlmdsl from gpt2_124m.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nproc-per-node 8 program.py --out runs/gpt2_124m
Predicted: 0.365 s a step, 179,698 tokens/s and 143 TFLOP/s per device (MFU 46.0 % of 312 TFLOP/s, counting matrix products
only, causal attention half); peak memory 65.13 GiB.

Shapes: B = 64 (sequences of a micro-batch), S = 1,024 (tokens).
Ranks: torch.arange(8).view(1, 8, 1, 1): pipeline, data, context, tensor. Collectives over data and pipeline are the runtime's.
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

PARALLEL = Parallel(pipeline=1, data=8, tensor=1, stages=(12,), zero=1, micro_batch=64)

TRAINING = Training(
    data=Data("text", ("/specs/corpus/*.txt",), validation=0.05),
    tokenizer=Tokenizer("hf", "/specs/tokenizer.json"),
    vocab=50257,
    sequence=1024,
    batch=512,
    steps=572205,
    optimizer=AdamW(lr=6e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0),
    schedule=Schedule("cosine", warmup=2000, min_lr=6e-5),
    precision="bf16",
    flops_per_token=797815296.0,
    peak_flops_per_second=3.12e14,
)


class GPTBlock(nn.Module):
    """One pass of `repeat 12 as blocks`."""

    def __init__(self):
        super().__init__()
        self.ln_1 = Scope(weight=weight((768,), ones), bias=weight((768,), zeros))
        self.attn = Scope(
            query=Scope(weight=weight((768, 768), normal(0.02)), bias=weight((768,), zeros)),
            key=Scope(weight=weight((768, 768), normal(0.02)), bias=weight((768,), zeros)),
            value=Scope(weight=weight((768, 768), normal(0.02)), bias=weight((768,), zeros)),
            out=Scope(weight=weight((768, 768), normal(0.02)), bias=weight((768,), zeros)),
        )
        self.ln_2 = Scope(weight=weight((768,), ones), bias=weight((768,), zeros))
        self.mlp = Scope(
            up=Scope(weight=weight((3072, 768), normal(0.02)), bias=weight((3072,), zeros)),
            down=Scope(weight=weight((768, 3072), normal(0.02)), bias=weight((768,), zeros)),
        )

    def forward(self, h):  # h: [B, S, 768]
        ln_1 = F.layer_norm(h, (768,), self.ln_1.weight, self.ln_1.bias)
        # attn: Attention
        q = F.linear(ln_1, self.attn.query.weight, self.attn.query.bias).unflatten(-1, (12, 64))  # [B, S, 12, 64]
        k = F.linear(ln_1, self.attn.key.weight, self.attn.key.bias).unflatten(-1, (12, 64))
        v = F.linear(ln_1, self.attn.value.weight, self.attn.value.bias).unflatten(-1, (12, 64))
        a = attention(q, k, v, causal=True).flatten(-2)  # [B, S, 768]
        h = h + F.linear(a, self.attn.out.weight, self.attn.out.bias)
        ln_2 = F.layer_norm(h, (768,), self.ln_2.weight, self.ln_2.bias)
        # MLP
        up = F.gelu(F.linear(ln_2, self.mlp.up.weight, self.mlp.up.bias), approximate="tanh")  # [B, S, 3072]
        return h + F.linear(up, self.mlp.down.weight, self.mlp.down.bias)  # [B, S, 768]


class Stage(nn.Module):
    """The whole model."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.wte = Scope(weight=weight((50257, 768), normal(0.02)))
        self.wpe = Scope(weight=weight((1024, 768), normal(0.02)))
        self.blocks = nn.ModuleDict({str(i): GPTBlock() for i in range(12)})
        self.ln_f = Scope(weight=weight((768,), ones), bias=weight((768,), zeros))

    def forward(self, tokens):  # tokens: int[B, S]
        h = F.embedding(tokens, self.wte.weight) + positions(self.wpe.weight, tokens.size(1))  # [B, S, 768]
        for block in self.blocks.values():
            h = block(h)
        ln_f = F.layer_norm(h, (768,), self.ln_f.weight, self.ln_f.bias)
        return F.linear(ln_f, self.wte.weight)  # [B, S, 50257]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    return cross_entropy(logits, targets)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
