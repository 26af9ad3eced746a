"""Programs held to their plans: one rank's step under fake ranks and fake tensors."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from mlmdsl.cli import main
from mlmdsl.compile import compile_spec
from mlmdsl.grammar.constraints import ORDERS
from mlmdsl.planner.plan import Plan, PlanVariables
from mlmdsl.planner.promise import compare, group
from mlmdsl.report.verdict import render_verdict
from mlmdsl.runtime.verify import measure
from tests.parity.models import GPT, MODELS, OBJECTIVES, SETTINGS, small_model

INSIDE = ORDERS[1]
TWO, EIGHT, WIDE, BF16 = ("mixtral.layers=2",), ("llama.layers=8",), ("gpt.d=128",), ("train.precision=bf16",)
T5 = ("t5.layers=2", f"train.objective={OBJECTIVES['t5']}")
LONG = ("t5.layers=2", "train.objective=span_corruption(target_len = 256 tok)", "train.seq_len=1024 tok")

# model, pins, ranks, overrides
CASES: list[tuple[str, dict[str, Any], tuple[int, ...], tuple[str, ...]]] = [
    ("gpt", {}, (0,), ()),
    ("llama", dict(tensor=2, data=2, sequence_parallel=True), (3,), ()),
    ("gpt", dict(tensor=2, sequence_parallel=True, recompute="full"), (0,), ()),
    ("llama", dict(context=2, tensor=2, sequence_parallel=True, recompute="selective"), (3,), ()),
    ("gpt", dict(context=2, data=2, zero=1), (3,), ()),
    ("gpt", dict(pipeline=2, schedule="1f1b"), (0, 1), ()),
    ("llama", dict(pipeline=2, schedule="gpipe"), (0, 1), ()),
    ("llama", dict(pipeline=2, schedule="interleaved_1f1b", interleave=2), (0, 1), ()),
    ("llama", dict(pipeline=2, schedule="interleaved_1f1b", interleave=4, data=2, zero=1, micro_batch=2), (0, 3), EIGHT),
    ("gpt", dict(pipeline=2, schedule="zb_v"), (0, 1), ()),
    ("llama", dict(pipeline=2, schedule="zb_v", data=2, zero=1, micro_batch=1), (2,), ()),
    ("llama", dict(pipeline=2, schedule="dualpipe_v", data=2, zero=1, micro_batch=1), (0, 3), ()),
    ("gpt", dict(data=2, zero=0), (1,), ()),
    ("gpt", dict(data=2, zero=1), (0,), ()),
    ("gpt", dict(data=2, zero=1, micro_batch=4), (0,), WIDE),
    ("gpt", dict(data=2, zero=2), (0,), ()),
    ("gpt", dict(pipeline=2, data=2, zero=2, schedule="1f1b", micro_batch=1), (1, 2), ()),
    ("gpt", dict(data=4, zero=2, replicate=2, micro_batch=1), (3,), ()),
    ("llama", dict(data=2, zero=3), (1,), BF16),
    ("gpt", dict(tensor=2, data=2, zero=3, sequence_parallel=True, recompute="full"), (3,), ()),
    ("gpt", dict(pipeline=2, data=2, zero=3, schedule="1f1b", micro_batch=1), (0,), ()),
    ("mixtral", dict(data=4, expert=2), (3,), TWO),
    ("mixtral", dict(tensor=2, sequence_parallel=True, data=4, expert=2, zero=1), (7,), TWO),
    ("t5", dict(data=2, zero=1), (1,), T5),
    ("t5", dict(tensor=2, sequence_parallel=True), (1,), T5),
    ("t5", dict(pipeline=2, schedule="1f1b", data=2, zero=1, micro_batch=1), (3,), T5),
    # the encoder's output goes on as it was brought, whole; what is not brought yet goes on as it lies
    ("t5", dict(tensor=2, sequence_parallel=True, pipeline=2, schedule="1f1b", micro_batch=1), (0, 3), T5),
    ("t5", dict(tensor=2, sequence_parallel=True, pipeline=2, schedule="1f1b", micro_batch=1, stages="[3,1]"), (0,), T5),
    # causal attention under a bias: of each chunk's queries over the keys that they see
    ("t5", dict(context=2), (0,), T5),
    ("t5", dict(context=2, tensor=2, sequence_parallel=True), (3,), T5),
    ("bloom", dict(tensor=2), (1,), ()),
    ("bloom", dict(context=2), (1,), ()),
    # blocks of queries, of which one is there at a time
    ("t5", dict(recompute="full"), (0,), LONG),
    # a CPU's RMSNorm of bfloat16 saves its input as fp32
    ("llama", dict(pipeline=2, schedule="zb_v", micro_batch=1), (1,), (*BF16, "train.seq_len=512 tok", "llama.d=256")),
    # a CPU adds up in fp32
    ("llama", dict(tensor=2, sequence_parallel=True), (0,), BF16),
    ("t5", dict(tensor=2, micro_batch=1), (0,), (*T5, *BF16)),
    ("llama", dict(tensor=2, sequence_parallel=True, pipeline=2, data=2, schedule="1f1b", order=INSIDE), (2, 5), ()),
    ("llama", dict(context=2, pipeline=2, data=2, schedule="1f1b", zero=0, order=INSIDE), (6,), ()),
    ("mixtral", dict(pipeline=2, data=2, expert=2, zero=1, schedule="1f1b", order=INSIDE), (2,), TWO),
    ("gpt", dict(pipeline=2, data=4, zero=1, replicate=2, schedule="gpipe", order=INSIDE), (5,), ()),
]


def written(model: str, pins: dict[str, Any], overrides: tuple[str, ...], folder: Path) -> tuple[Plan, Path]:
    world = prod(pins.get(axis, 1) for axis in ("tensor", "context", "pipeline", "data"))
    defaults = {"tensor": 1, "context": 1, "pipeline": 1, "data": 1, "zero": 0, "micro_batch": 2, "recompute": "none"}
    done = compile_spec(
        (MODELS.get(model) or small_model(model)) + SETTINGS,
        path="/specs/x.mlm",
        overrides=(f"cluster.devices_per_node={world}", *overrides),
        pins=[f"{name}={str(value).lower()}" for name, value in (defaults | pins).items()],
    )
    assert done.plan is not None and done.program is not None
    done.program.write(folder)
    return done.plan, folder / "program.py"


@pytest.mark.parametrize(
    ("model", "pins", "ranks", "overrides"),
    CASES,
    ids=[" ".join((model, *map(str, pins.values()), *more)) for model, pins, _, more in CASES],
)
def test_a_program_keeps_its_plan(
    model: str, pins: dict[str, Any], ranks: tuple[int, ...], overrides: tuple[str, ...], tmp_path: Path
) -> None:
    plan, program = written(model, pins, overrides, tmp_path)
    for rank in ranks:
        verdict = compare(plan, rank, measure(program, rank, "cpu"))
        assert verdict.agrees, render_verdict(verdict)


# Of plans that were drawn at random, in sizes at which activations, logits or weights are most of the memory
PARALLEL_BLOCK = """
block Block(x: [B, S, d]) {
  n = RMSNorm(x)
  attn = Attention(n, heads = 16, causal = true, bias = false, rope_theta = 10_000)
  output x + attn + SwiGLU(n, hidden = 3 * d)
}

model drawn {
  param d = 2048
  param layers = 6
  param vocab = 32_000
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = vocab, dim = d)
  h = tok
  repeat layers as blocks { h = Block(h) }
  output Linear(RMSNorm(h), weight = tok.weight)
}
"""

# Heads whose values are not as wide as their keys
LATENT = PARALLEL_BLOCK.replace(
    "Attention(n, heads = 16, causal = true, bias = false, rope_theta = 10_000)",
    "LatentAttention(n, heads = 16, query_rank = 512, kv_rank = 256, head_dim = 96, rope_dim = 32)",
)

LARGE = """
cluster large {
  nodes = 1
  devices_per_node = %d
  device = gpu(memory = 4000 GiB, bandwidth = 2 TB/s, bf16 = 312 TFLOPS, fp32 = 19.5 TFLOPS)
  intra = nvlink(bandwidth = 300 GB/s per gpu)
}

train {
  data = text("unused.txt")
  tokenizer = hf("tokenizer.json")
  objective = next_token()
  seq_len = 4096 tok
  batch = %d seq
  stop = 8 steps
  optimizer = adamw(lr = 0.001)
  schedule = constant(warmup = 1 steps)
  precision = %s
}
"""

# An encoder-decoder whose masks and biases are most of its activations
BIASED = (
    "t5.layers=2",
    "t5.d=512",
    "t5.heads=8",
    "t5.head_dim=64",
    "t5.ff=2048",
    "t5.vocab=4_096",
    "train.seq_len=1024 tok",
    "train.objective=span_corruption(target_len = 512 tok)",
)
# One whose table of 64 MiB is that of both and of the head
TABLE = (
    *BIASED[:5],
    "t5.vocab=32_768",
    "train.seq_len=512 tok",
    "train.objective=span_corruption(target_len = 128 tok)",
)
# Weights that are most of the memory
SHORT = ("drawn.d=1024", "drawn.layers=8", "drawn.vocab=1_024", "train.seq_len=128 tok")
EXPERTS = (
    "mixtral.d=512",
    "mixtral.layers=4",
    "mixtral.ff=1024",
    "mixtral.vocab=8_192",
    "train.seq_len=512 tok",
)

# model, micro-batches, precision, pins, ranks, overrides
LARGE_CASES: list[tuple[str, int, str, dict[str, Any], tuple[int, ...], tuple[str, ...]]] = [
    # tied weights on an interleaved last stage: what RMSNorm keeps where a GPU computes it
    (
        "drawn",
        4,
        "bf16",
        dict(pipeline=2, data=8, zero=1, micro_batch=4, schedule="interleaved_1f1b", interleave=2),
        (1, 9),
        ("drawn.layers=8",),
    ),
    (
        "latent",
        4,
        "bf16",
        dict(tensor=2, sequence_parallel=True, pipeline=2, schedule="1f1b", micro_batch=1),
        (0, 3),
        ("drawn.layers=4",),
    ),
    # a cut vocabulary: the loss keeps the logits, not their softmax
    ("drawn", 3, "bf16", dict(tensor=4, pipeline=2, schedule="gpipe", recompute="full"), (4,), ("drawn.vocab=128_000",)),
    # gradients of a large table, which are there when it is their turn
    ("drawn", 2, "fp32", dict(data=8, zero=1, micro_batch=1, recompute="full"), (0,), ("drawn.vocab=128_000",)),
    # a loss that is gone, gradients of weights that are put off and not added up
    ("drawn", 4, "bf16", dict(pipeline=2, data=2, zero=1, schedule="zb_v"), (0, 2), ("drawn.layers=4",)),
    ("drawn", 4, "fp32", dict(context=2, pipeline=2, data=2, zero=1, schedule="dualpipe_v"), (0, 5), ("drawn.layers=4",)),
    # those of whole backward passes are added up layer by layer
    ("drawn", 8, "bf16", dict(pipeline=2, data=2, zero=1, schedule="zb_v", micro_batch=1), (0, 2), SHORT),
    ("mixtral", 4, "bf16", dict(pipeline=2, data=2, zero=1, schedule="dualpipe_v", micro_batch=1), (0, 2), EXPERTS),
    # what was reduced last lies there of every stage of a rank; no sums are there before the first backward pass
    (
        "mixtral",
        4,
        "bf16",
        dict(pipeline=2, data=2, zero=2, schedule="interleaved_1f1b", interleave=2, micro_batch=1),
        (0, 2),
        EXPERTS,
    ),
    (
        "drawn",
        2,
        "fp32",
        dict(pipeline=2, data=2, zero=2, schedule="gpipe", micro_batch=1),
        (0, 2),
        ("drawn.d=256", "drawn.layers=4", "train.seq_len=512 tok"),
    ),
    # what recomputing brings back is not there together with what layers behind it keep
    (
        "drawn",
        8,
        "fp32",
        dict(pipeline=2, data=2, zero=1, schedule="1f1b", micro_batch=1, recompute="[full, selective, selective, full]"),
        (0, 2),
        ("drawn.d=256", "drawn.layers=4", "drawn.vocab=1_024", "train.seq_len=1024 tok"),
    ),
    ("t5", 2, "bf16", dict(recompute="[selective, none, none, none]"), (0,), BIASED),
    # gradients of a bias that every layer is given are added up; so are those of a table that stands in several places
    ("t5", 2, "fp32", dict(micro_batch=1, recompute="full"), (0,), BIASED),
    ("t5", 2, "fp32", dict(), (0,), TABLE),
    ("t5", 2, "fp32", dict(pipeline=2, schedule="gpipe", recompute="full"), (0,), TABLE),
    # tensors are not the most when the device is the fullest
    ("drawn", 4, "bf16", dict(tensor=4, data=2, zero=1, recompute="full"), (0,), ("drawn.vocab=4_096",)),
    ("t5", 4, "bf16", dict(micro_batch=1), (0,), BIASED),
    ("t5", 4, "bf16", dict(tensor=2, recompute="full"), (1,), BIASED),
    ("t5", 4, "bf16", dict(context=2), (1,), BIASED),
    ("t5", 4, "bf16", dict(pipeline=2, schedule="1f1b", micro_batch=1), (0, 1), BIASED),
    ("t5", 4, "bf16", dict(tensor=2, pipeline=2, schedule="1f1b"), (0,), BIASED),
    ("t5", 4, "bf16", dict(pipeline=2, data=2, zero=1, schedule="1f1b", micro_batch=1), (0,), BIASED),
]


@pytest.mark.parametrize(
    ("model", "micro_batches", "precision", "pins", "ranks", "overrides"),
    LARGE_CASES,
    ids=[" ".join((name, dtype, *map(str, pins.values()), *more)) for name, _, dtype, pins, _, more in LARGE_CASES],
)
def test_a_large_program_keeps_its_plan(
    model: str,
    micro_batches: int,
    precision: str,
    pins: dict[str, Any],
    ranks: tuple[int, ...],
    overrides: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """On a GPU."""
    pins = {"tensor": 1, "context": 1, "pipeline": 1, "data": 1, "zero": 0, "micro_batch": 2, "recompute": "none"} | pins
    world = prod(pins[axis] for axis in ("tensor", "context", "pipeline", "data"))
    text = {"drawn": PARALLEL_BLOCK, "latent": LATENT}.get(model) or small_model(model)
    done = compile_spec(
        text + LARGE % (world, micro_batches * pins["micro_batch"] * pins["data"], precision),
        path="/specs/x.mlm",
        overrides=overrides,
        pins=[f"{name}={str(value).lower()}" for name, value in pins.items()],
    )
    assert done.plan is not None and done.program is not None
    done.program.write(tmp_path)
    for rank in ranks:
        verdict = compare(done.plan, rank, measure(tmp_path / "program.py", rank, "cuda"))
        assert verdict.agrees, render_verdict(verdict)


def test_groups_of_a_rank() -> None:
    grid = PlanVariables(tensor=2, context=2, pipeline=2, data=4, expert=4, stages=(1, 1))
    assert group(grid, "tensor", 21) == (20, 21)
    assert group(grid, "context", 21) == (21, 23)
    assert group(grid, "data", 21) == (17, 21, 25, 29)
    assert group(grid, "replicas", 21) == tuple(range(17, 32, 2))
    assert group(grid, "expert", 21) == (17, 19, 21, 23)
    assert group(grid, "copies", 21) == (21, 29)
    assert group(grid, "pipeline", 21) == (5, 21)
    assert group(grid, "world", 21) == tuple(range(32))
    copied = replace(grid, replicate=2)
    assert group(copied, "shards", 21) == (17, 19, 21, 23) and group(copied, "replicate", 21) == (21, 29)


def test_groups_of_a_rank_where_stages_lie_inside() -> None:
    grid = PlanVariables(tensor=2, context=2, pipeline=2, data=4, expert=4, replicate=2, stages=(1, 1), order=INSIDE)
    assert group(grid, "context", 21) == (21, 23)
    assert group(grid, "data", 21) == (5, 13, 21, 29)
    assert group(grid, "replicas", 21) == (5, 7, 13, 15, 21, 23, 29, 31)
    assert group(grid, "expert", 21) == group(grid, "shards", 21) == (21, 23, 29, 31)
    assert group(grid, "copies", 21) == group(grid, "replicate", 21) == (5, 21)
    assert group(grid, "pipeline", 21) == (17, 21)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, plan = tmp_path / "gpt.mlm", tmp_path / "plan.json"
    spec.write_text(GPT + SETTINGS, encoding="utf-8")
    pins = ("tensor=2", "sequence_parallel=true", "data=2", "pipeline=2", "zero=0", "schedule=1f1b", "recompute=none")
    assert main(["plan", str(spec), "-o", str(plan), *(word for pin in pins for word in ("--pin", pin))]) == 0
    capsys.readouterr()
    assert main(["verify", str(plan), "--rank", "7"]) == 0
    said = capsys.readouterr().out
    assert "rank 7 of 8, pipeline stage 1" in said and "DIFFERS" not in said
    assert main(["verify", str(plan), "--rank", "8"]) == 2
    plan.write_text(plan.read_text(encoding="utf-8").replace('"kind": "all_reduce"', '"kind": "all_gather"'), encoding="utf-8")
    assert main(["verify", str(plan), "--rank", "0", "--json"]) == 1
