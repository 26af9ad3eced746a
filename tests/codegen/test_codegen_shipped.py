"""Programs of shipped specs under the planner's own choice (and one with pins): golden, short, readable."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from mlmdsl.codegen.emit import Program
from mlmdsl.codegen.text import WIDTH
from mlmdsl.compile import compile_spec

MODELS = Path(__file__).resolve().parents[2] / "specs" / "models"

# golden file -> (spec, pins)
SHIPPED: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpt2_124m": ("gpt2_124m", ()),
    "llama3_70b": ("llama3_70b", ()),
    "llama3_70b_tensor8_pipeline4": ("llama3_70b", ("tensor=8", "pipeline=4")),
    "llama3_405b": ("llama3_405b", ()),
}


def made(name: str) -> Program:
    """As if the spec lay in /specs: programs name the paths of their data."""
    model, pins = SHIPPED[name]
    text = (MODELS / f"{model}.mlm").read_text(encoding="utf-8")
    program = compile_spec(text, path=f"/specs/{model}.mlm", pins=pins).program
    assert program is not None
    return program


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_programs(name: str, golden: Callable[[str, str], None]):
    text = made(name).text
    assert text.count("\n") < 300 and max(map(len, text.splitlines())) <= WIDTH
    ast.parse(text)
    golden(f"programs/{name}.py", text)
