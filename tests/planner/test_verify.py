"""Programs held to their plans: one rank's step under fake ranks and fake tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlmdsl.cli import main
from mlmdsl.grammar.constraints import ORDERS
from mlmdsl.planner.plan import PlanVariables
from mlmdsl.planner.promise import Verdict, compare, group
from mlmdsl.report.verdict import render_verdict
from mlmdsl.runtime.verify import measure
from tests.parity.models import GPT, SETTINGS
from tests.planner.test_traffic import compiled

INSIDE = ORDERS[1]

# ranks, and whether the ledger is within its tolerance
CASES: list[tuple[str, dict[str, Any], tuple[int, ...], bool]] = [
    ("gpt", {}, (0,), True),
    ("llama", dict(tensor=2, data=2, sequence_parallel=True), (0, 3), True),
    ("gpt", dict(tensor=2, sequence_parallel=False), (1,), True),
    ("gpt", dict(tensor=2, sequence_parallel=True, recompute="full"), (0,), True),
    ("llama", dict(context=2, tensor=2, sequence_parallel=True, recompute="selective"), (3,), True),
    ("gpt", dict(context=2), (0,), True),
    ("gpt", dict(pipeline=2, schedule="1f1b"), (0, 1), True),
    ("llama", dict(pipeline=2, schedule="gpipe"), (0, 1), True),
    ("llama", dict(pipeline=2, schedule="interleaved_1f1b", interleave=2), (0, 1), True),
    ("gpt", dict(pipeline=2, schedule="zb_v"), (0, 1), True),
    ("llama", dict(pipeline=2, schedule="dualpipe_v", data=2, zero=1, micro_batch=1), (0, 3), False),
    ("llama", dict(pipeline=2, tensor=2, sequence_parallel=True, schedule="1f1b"), (3,), True),
    ("gpt", dict(data=2, zero=0), (1,), True),
    ("gpt", dict(data=2, zero=1), (0,), False),
    ("gpt", dict(data=2, zero=3), (1,), False),
    ("gpt", dict(tensor=2, data=2, zero=3, sequence_parallel=True, recompute="full"), (3,), False),
    ("mixtral", dict(data=4, expert=2), (3,), False),
    ("mixtral", dict(tensor=2, sequence_parallel=True, data=4, expert=2, zero=1), (7,), False),
    ("llama", dict(tensor=2, sequence_parallel=True, pipeline=2, data=2, schedule="1f1b", order=INSIDE), (2, 5), True),
    ("llama", dict(context=2, pipeline=2, data=2, schedule="1f1b", zero=0, order=INSIDE), (6,), True),
    ("mixtral", dict(pipeline=2, data=2, expert=2, zero=1, schedule="1f1b", order=INSIDE), (2,), False),
    ("gpt", dict(pipeline=2, data=4, zero=1, replicate=2, schedule="gpipe", order=INSIDE), (5,), False),
]


def verdict_of(model: str, pins: dict[str, Any], rank: int, folder: Path) -> Verdict:
    plan, text = compiled(model, 4 if model != "mixtral" else 2, pins)
    (folder / "program.py").write_text(text, encoding="utf-8")
    return compare(plan, rank, measure(folder / "program.py", rank, "cpu"))


@pytest.mark.parametrize(
    ("model", "pins", "ranks", "within"), CASES, ids=lambda x: " ".join(map(str, x.values())) if isinstance(x, dict) else None
)
def test_a_program_keeps_its_plan(
    model: str, pins: dict[str, Any], ranks: tuple[int, ...], within: bool, tmp_path: Path
) -> None:
    for rank in ranks:
        verdict = verdict_of(model, pins, rank, tmp_path)
        assert all(row.agrees for row in verdict.collectives), render_verdict(verdict)
        assert verdict.flops_agree, render_verdict(verdict)
        assert verdict.memory_agrees or not within, render_verdict(verdict)
        assert verdict.found_peak_bytes < 1.05 * verdict.planned_peak_bytes or model == "mixtral"


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
