"""Strings that a user can choose never become code."""

from __future__ import annotations

import ast

import pytest

from mlmdsl.codegen.emit import emit
from mlmdsl.planner.plan import PlanVariables
from tests.codegen.samples import plan, spec, two_stacks

HOSTILE = [
    '"""; import os; os.system("true"); """',
    "'''\nimport os\n'''",
    'a"b',
    "a'b",
    "a\nimport os",
    "a\r\nimport os",
    "a\u2028import os",
    "a\u2029import os\x85import sys",
    "a\x0cimport os\x1cimport sys\x00",
    "back\\slash\\",
    "\\u000aimport os",
    '\\""" + __import__("os").name + """',
    "{__import__('os')} %s {0}",
    "# noqa\n)",
    "\u202eright to left",
    " ",
    "x" * 300,
]


def structure(text: str) -> str:
    """The program's tree with every literal left out."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = type(node.value).__name__
    return ast.dump(tree)


def program(text: str) -> str:
    graph = two_stacks()
    source = spec(path=f"/specs/{text.replace('/', '|')}", patterns=(text, text), field=text, tokenizer=text)
    return emit(source, graph, plan(graph, PlanVariables(stages=(10,)), model=text, cluster=text)).text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_change_literals_only(text: str):
    emitted = program(text)
    assert structure(emitted) == structure(program("harmless"))
    values = {node.value for node in ast.walk(ast.parse(emitted)) if isinstance(node, ast.Constant)}
    assert text in values
    assert len(emitted.splitlines()) <= len(program("harmless").splitlines()) + 40
