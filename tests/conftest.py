"""Shared fixtures: golden files.

`golden(name, text)` compares `text` with tests/golden/<name>; `pytest --update-golden` (or `make golden`) rewrites them, and
the diff is the review.

Property tests take the same examples in every run; `make fuzz` (`--hypothesis-profile fuzz`) takes new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"

settings.register_profile("fuzz")
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {name}: run pytest --update-golden and read the diff"
        assert text == path.read_text(encoding="utf-8")

    return check
