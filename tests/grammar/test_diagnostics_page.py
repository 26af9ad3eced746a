"""docs/diagnostics.md is current, and has every code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from mlmdsl.diagnostics import CODES
from tests.grammar.examples import table

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _maker() -> ModuleType:
    found = importlib.util.spec_from_file_location("diagnostics_page", DOCS / "diagnostics.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_table_has_the_codes() -> None:
    assert sorted(set(CODES) - set(table())) == [], "explain these in docs/diagnostics.toml"
    assert sorted(set(table()) - set(CODES)) == []


def test_the_page_is_current(request: pytest.FixtureRequest) -> None:
    text = _maker().page(table())
    if request.config.getoption("--update-golden"):
        (DOCS / "diagnostics.md").write_text(text, encoding="utf-8")
    assert (DOCS / "diagnostics.md").read_text(encoding="utf-8") == text, "run python docs/diagnostics.py"
    assert re.findall(r"^### (MLM\d{4}):", text, re.M) == sorted(CODES)
