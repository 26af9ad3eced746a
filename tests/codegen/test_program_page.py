"""docs/program.md shows real programs."""

from __future__ import annotations

import re

from mlmdsl.codegen.layers import FUNCTIONS
from tests.conftest import GOLDEN, ROOT

PAGE = (ROOT / "docs" / "program.md").read_text(encoding="utf-8")


def test_excerpts_stand_in_golden_programs():
    programs = [path.read_text(encoding="utf-8") for path in sorted((GOLDEN / "programs").glob("*.py"))]
    excerpts = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(excerpts) == 2
    for excerpt in excerpts:
        assert any(excerpt in program for program in programs), excerpt


def test_every_function_of_a_transition_is_explained():
    for text in FUNCTIONS.values():
        assert f"| `{text.partition('(')[0]}(" in PAGE
