"""Plans of shipped specs as the terminal shows them: the diff of a golden file is what a change to the planner does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlmdsl.compile import compile_spec
from mlmdsl.planner.plan import load_plan
from mlmdsl.report.terminal import render_plan

MODELS = Path(__file__).resolve().parents[2] / "specs" / "models"


@pytest.mark.parametrize("name", ["llama3_405b", "llama3_70b", "llama3_70b_mixed", "gpt2_124m", "mixtral_8x7b"])
def test_shipped_plans(name: str, golden: Callable[[str, str], None]) -> None:
    text = (MODELS / f"{name}.mlm").read_text(encoding="utf-8")
    plan = compile_spec(text, path="/specs/x.mlm", until="plan").plan
    assert plan is not None
    saved = plan.saved()
    assert saved.search.seconds == 0.0 and load_plan(saved.to_json()) == saved
    golden(f"plans/{name}.txt", render_plan(saved) + "\n")
