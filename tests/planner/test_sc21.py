"""docs/sc21.md is what the planner says today: `make sc21` writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sc21 import Row, page, rows
from mlmdsl.planner.compare import parts_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sc21.md"


def test_the_page_is_what_the_planner_says(request: pytest.FixtureRequest) -> None:
    made = page()
    if request.config.getoption("--update-golden"):
        PAGE.write_text(made, encoding="utf-8")
    assert made == PAGE.read_text(encoding="utf-8"), "the page is old: make sc21"
    assert made.count("\n## ") == 10


def test_the_choice_is_no_slower_and_the_published_plans_cost_what_was_measured() -> None:
    found: list[Row] = list(rows())
    for row in found:
        assert row.free.seconds <= row.published.seconds
        assert row.run.step_seconds is not None
        assert row.published.seconds == pytest.approx(row.run.step_seconds, rel=0.15)
        parts = parts_of(row.free, row.published)
        assert sum(part.other_s for part in parts) == pytest.approx(row.published.seconds, rel=1e-3)
