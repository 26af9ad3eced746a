"""The regret benchmark's figures and page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.regret import Plan, Result, table

RESULT = Result(
    "2 ranks, loopback",
    [Plan("tensor 2", 0.012, Path()), Plan("data 2", 0.010, Path()), Plan("pipeline 2", 0.011, Path())],
    "tensor 2",
    [[0.022, 0.036, 0.044], [0.020, 0.030, 0.040], [0.029]],
)


def test_regret_is_taken_within_each_round() -> None:
    """Of those that were in all of them."""
    assert RESULT.best == "data 2" and RESULT.regret == pytest.approx(0.1)


def test_the_page_lists_the_fastest_first() -> None:
    rows = [line for line in table(RESULT).splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| 1 | pipeline 2 | 11.0 | 29.0 |",
        "| 2 | data 2 | 10.0 | 30.0 |",
        "| 3 | **tensor 2** (chosen) | 12.0 | 36.0 |",
    ]
