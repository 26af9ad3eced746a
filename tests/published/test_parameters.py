"""The shipped specs against published figures: exact parameter counts, and FLOPs per token by an independent closed form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mlmdsl.compile import Compilation, compile_spec

MODELS = Path(__file__).resolve().parents[2] / "specs" / "models"


@dataclass(frozen=True)
class Published:
    """hidden, layers, heads, kv heads, feed-forward, vocabulary; `parameters` as counted in the checkpoint, or from its shapes
    where no checkpoint was published (8.3B, 175B)."""

    parameters: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    gated: bool = False


TABLE = {
    "gpt2_124m": Published(124_439_808, 768, 12, 12, 12, 3072, 50257),
    "gpt2_355m": Published(354_823_168, 1024, 24, 16, 16, 4096, 50257),
    "gpt2_774m": Published(774_030_080, 1280, 36, 20, 20, 5120, 50257),
    "gpt2_1p5b": Published(1_557_611_200, 1600, 48, 25, 25, 6400, 50257),
    "megatron_8p3b": Published(8_317_040_640, 3072, 72, 24, 24, 12288, 51200),
    "gpt3_175b": Published(174_615_846_912, 12288, 96, 96, 96, 49152, 51200),
    "llama3_8b": Published(8_030_261_248, 4096, 32, 32, 8, 14336, 128256, True),
    "llama3_70b": Published(70_553_706_496, 8192, 80, 64, 8, 28672, 128256, True),
    "llama3_405b": Published(405_853_388_800, 16384, 126, 128, 8, 53248, 128256, True),
}


def compiled(name: str) -> Compilation:
    path = MODELS / f"{name}.mlm"
    return compile_spec(path.read_text(encoding="utf-8"), path=str(path), until="graph")


def flops_per_token(model: Published, seq_len: int) -> float:
    """Forward and backward: 6 FLOPs for each weight that multiplies, and causal attention's 6 S d (half of 12 S d) a layer."""
    kv = model.hidden * model.kv_heads // model.heads
    products = 2 * model.hidden * model.hidden + 2 * model.hidden * kv + (3 if model.gated else 2) * model.hidden * model.ffn
    attention = seq_len * model.hidden
    return 6 * (model.layers * (products + attention) + model.vocab * model.hidden)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_those_of_the_checkpoint(name: str) -> None:
    graph = compiled(name).graph
    assert graph is not None
    assert graph.parameters == TABLE[name].parameters


@pytest.mark.parametrize("name", TABLE)
def test_flops_per_token_are_those_of_the_closed_form(name: str) -> None:
    from mlmdsl.graph.flops import flops_per_token as counted

    done = compiled(name)
    assert done.graph is not None and done.spec is not None
    seq_len = done.spec.train.seq_len
    assert counted(done.graph, seq_len) == pytest.approx(flops_per_token(TABLE[name], seq_len), rel=1e-12)


def test_every_shipped_model_stands_in_the_table() -> None:
    assert {path.stem for path in MODELS.glob("*.mlm")} == set(TABLE)
