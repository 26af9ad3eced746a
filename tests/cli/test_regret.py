"""The regret benchmark's figures and page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.regret import Plan, Result, table

RESULT = Result(
    "2 ranks, loopback",
    [Plan("data 2", 0.010, Path()), Plan("tensor 2", 0.012, Path())],
    "tensor 2",
    [[0.020, 0.030, 0.040], [0.022, 0.036, 0.044]],
)


def test_regret_is_taken_within_each_round() -> None:
    assert RESULT.regret == pytest.approx(0.1)


def test_the_page_lists_the_fastest_first() -> None:
    rows = [line for line in table(RESULT).splitlines() if line.startswith("| ")][2:]
    assert rows == ["| 1 | data 2 | 10.0 | 30.0 |", "| 2 | **tensor 2** (chosen) | 12.0 | 36.0 |"]
