"""The context axis in the search: long sequences, up to those that no rank holds alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import PlanError
from mlmdsl.planner.plan import Plan
from mlmdsl.report.terminal import render_plan

SPEC = Path(__file__).resolve().parents[2] / "specs" / "models" / "llama3_8b.mlm"


@cache
def planned(*pins: str, batch: int = 32) -> Plan:
    """Llama 3 8B on 64 H100s at 131,072 tokens."""
    long = ("train.seq_len=131072 tok", f"train.batch={batch} seq")
    done = compile_spec(SPEC.read_text(encoding="utf-8"), path=str(SPEC), overrides=long, pins=pins, until="plan")
    assert done.plan is not None
    return done.plan


def test_long_sequences_are_cut(golden: Callable[[str, str], None]) -> None:
    """Llama 3 405B was trained at this length with 16 context ranks beside 8 tensor ones (arXiv:2407.21783, table 4)."""
    plan = planned()
    assert plan.plan.context * plan.plan.tensor >= 8 > plan.plan.tensor
    assert max(plan.predicted.peak_memory_bytes) < 0.95 * 80 * 1024**3
    golden("plans/llama3_8b_131k.txt", render_plan(plan.saved()) + "\n")


def test_a_sequence_that_one_rank_does_not_hold() -> None:
    """Neither weights nor layers are cut: what is too much is the sequence."""
    whole = ("tensor=1", "pipeline=1", "micro_batch=1", "zero=3")
    with pytest.raises(PlanError, match="MLM0601"):
        planned(*whole, "context=1", batch=64)
    held = planned(*whole, "context=16", batch=64)
    assert held.plan.context == 16 and held.plan.data == 4


def test_short_sequences_are_not_cut() -> None:
    """The data axis costs no gathering of keys and values."""
    text = SPEC.read_text(encoding="utf-8")
    done = compile_spec(text, path=str(SPEC), until="plan")
    assert done.plan is not None and done.plan.plan.context == 1
