"""llama3_70b on h100x256.

Plan: tensor 8 x pipeline 4 x data 8, sequence parallel, dualpipe_v, ZeRO 1, micro-batch 1, recompute none.
Written by mlmdsl from llama3_70b.mlm; it needs torch and mlmdsl.runtime, and runs with
    torchrun --nnodes 32 --nproc-per-node 8 program.py --out runs/llama3_70b
Predicted: 18.6 s a step, 881 tokens/s and 396 TFLOP/s per device (MFU 40.0 % of 989 TFLOP/s, counting matrix products only,
causal attention half); peak memory 70.65 GiB to 71.7 GiB.

Shapes: B = 1 (sequences of a micro-batch), S = 8,192 (tokens); n/tp is a dim divided over the 8 ranks of the tensor axis.
Ranks: torch.arange(256).view(4, 8, 1, 8): pipeline, data, context, tensor. Collectives over data and pipeline are the
runtime's.
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
    all_to_all,
    attention,
    main,
    normal,
    ones,
    reduce_scatter,
    rotary,
    vocab_parallel_cross_entropy,
    weight,
)

PARALLEL = Parallel(
    pipeline=4,
    data=8,
    tensor=8,
    interleave=2,
    schedule="dualpipe_v",
    stages=(10, 10, 10, 10, 10, 10, 10, 10),
    zero=1,
    micro_batch=1,
)

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

    def __init__(self, tp: Axis):
        super().__init__()
        self.tp = tp
        self.attn_norm = Scope(weight=weight((8192,), ones, tp, partial=True))
        self.attn = Scope(
            query=Scope(weight=weight((8192, 8192), normal(0.02), tp, shard=0)),
            key=Scope(weight=weight((1024, 8192), normal(0.02), tp, shard=0)),
            value=Scope(weight=weight((1024, 8192), normal(0.02), tp, shard=0)),
            out=Scope(weight=weight((8192, 8192), normal(0.02), tp, shard=1)),
        )
        self.mlp_norm = Scope(weight=weight((8192,), ones, tp, partial=True))
        self.mlp = Scope(
            gate=Scope(weight=weight((28672, 8192), normal(0.02), tp, shard=0)),
            up=Scope(weight=weight((28672, 8192), normal(0.02), tp, shard=0)),
            down=Scope(weight=weight((8192, 28672), normal(0.02), tp, shard=1)),
        )

    def forward(self, h):  # h: [B, S/tp, 8192]
        tp = self.tp
        attn_norm = F.rms_norm(h, (8192,), self.attn_norm.weight, 1e-5)
        # attn: Attention
        # 128 MiB; backward reduce_scatter: attn.query, attn.key, attn.value are column-parallel
        attn_norm = all_gather(attn_norm, tp, dim=1)
        q = F.linear(attn_norm, self.attn.query.weight).unflatten(-1, (8, 128))  # [B, S, 64/tp, 128]
        k = F.linear(attn_norm, self.attn.key.weight).unflatten(-1, (1, 128))  # [B, S, 8/tp, 128]
        v = F.linear(attn_norm, self.attn.value.weight).unflatten(-1, (1, 128))
        q = rotary(q, 500000.0)  # [B, S, 64/tp, 128]
        k = rotary(k, 500000.0)  # [B, S, 8/tp, 128]
        a = attention(q, k, v, causal=True).flatten(-2)  # [B, S, 8192/tp]
        out = F.linear(a, self.attn.out.weight)  # [B, S, 8192], partial sums
        out = reduce_scatter(out, tp, dim=1)  # [B, S/tp, 8192], 128 MiB; backward all_gather: attn.out is row-parallel
        h = h + out
        mlp_norm = F.rms_norm(h, (8192,), self.mlp_norm.weight, 1e-5)
        # mlp: SwiGLU
        mlp_norm = all_gather(mlp_norm, tp, dim=1)  # 128 MiB; backward reduce_scatter: mlp.gate, mlp.up are column-parallel
        x = F.silu(F.linear(mlp_norm, self.mlp.gate.weight)) * F.linear(mlp_norm, self.mlp.up.weight)  # [B, S, 28672/tp]
        down = F.linear(x, self.mlp.down.weight)  # [B, S, 8192], partial sums
        down = reduce_scatter(down, tp, dim=1)  # [B, S/tp, 8192], 128 MiB; backward all_gather: mlp.down is row-parallel
        return h + down


class Stage(nn.Module):
    """Virtual stage `index` of the pipeline: its share of the layers, and on the first and last what stands around them."""

    def __init__(self, index: int, mesh: Mesh):
        super().__init__()
        self.tp = tp = mesh.tensor
        self.first, self.last = index == 0, index == len(PARALLEL.stages) - 1
        lo = sum(PARALLEL.stages[:index])
        hi = lo + PARALLEL.stages[index]
        if self.first:
            self.tok = Scope(weight=weight((128256, 8192), normal(0.02), tp, shard=1))
        self.blocks = nn.ModuleDict({str(i): LlamaBlock(tp) for i in range(lo, hi)})
        if self.last:
            self.norm = Scope(weight=weight((8192,), ones, tp, partial=True))
            self.linear = Scope(weight=weight((128256, 8192), normal(0.02), tp, shard=0))

    def forward(self, h):  # the first stage is given tokens: int[B, S]
        tp = self.tp
        if self.first:
            tokens = h
            h = F.embedding(tokens, self.tok.weight)  # [B, S, 8192/tp]
            h = all_to_all(h, tp, 2, 1)  # 16 MiB; backward all_to_all: blocks carries it cut along the sequence
        for block in self.blocks.values():
            h = block(h)
        if not self.last:
            return h
        norm = F.rms_norm(h, (8192,), self.norm.weight, 1e-5)  # [B, S/tp, 8192]
        norm = all_gather(norm, tp, dim=1)  # [B, S, 8192], 128 MiB; backward reduce_scatter: linear is column-parallel
        return F.linear(norm, self.linear.weight)  # [B, S, 128256/tp]


def loss(logits, targets, mesh: Mesh):
    """Sum of the losses over the tokens of this rank's micro-batch; targets of -100 do not count."""
    tp = mesh.tensor
    return vocab_parallel_cross_entropy(logits, targets, tp)


if __name__ == "__main__":
    main(Stage, loss, PARALLEL, TRAINING)
