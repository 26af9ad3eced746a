"""One diagnostic for one mistake: alone, in pairs, ten at a time; at its place, and nothing that only follows from it."""

from __future__ import annotations

import re

import pytest

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.parser import parse
from mlmdsl.graph.walk import nodes_in
from mlmdsl.rendering import render
from tests.grammar.mistakes import MISTAKES, PATH, SOUND, Mistake, front_end, places, seeded

NAMES = [m.name for m in MISTAKES]
TEN = (
    "a missing comma",
    "a misspelt keyword",
    "an unclosed call",
    "an unknown function",
    "an unknown weight",
    "an unknown device",
    "a bare bandwidth",
    "a missing equals sign",
    "an unknown precision",
    "an unknown plan variable",
)

LEAVES = s.Number | s.QuantityLiteral | s.String | s.Name | s.Bool
NO_VALUES = ("import", "block", "  input", "  precision")  # names that are defined there, and words


def check(mistakes: tuple[Mistake, ...]) -> None:
    text, expected = seeded(mistakes)
    items = front_end(text)
    assert places(items) == expected, f"{text}\n{render(items, {PATH: text})}"


# What can only be judged with a part of the spec that another mistake leaves unknown
_EMBEDDING = {"an unknown name in the model", "a missing argument"}
_LAYERS = {"a missing comma", "a missing operand", "another width"} | _EMBEDDING  # no sound call of Layer
HIDDEN = {
    "a failing expectation": {m.name for m in MISTAKES if m.code < "MLM03" or m.code in ("MLM0410", "MLM0501", "MLM0502")},
    "heads that do not divide": _LAYERS,
    "another width": _EMBEDDING,
    "an unknown weight": _EMBEDDING,
    "an unknown device": {"an unknown import"},
}


def compatible(one: Mistake, other: Mistake) -> bool:
    """They change different pieces of the text, and neither hides the other by right."""
    (a, b), (c, d) = [(SOUND.index(m.right), SOUND.index(m.right) + len(m.right)) for m in (one, other)]
    hidden = other.name in HIDDEN.get(one.name, ()) or one.name in HIDDEN.get(other.name, ())
    return (b <= c or d <= a) and not hidden


def test_the_sound_spec_is_sound() -> None:
    assert front_end(SOUND) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=NAMES)
def test_alone(mistake: Mistake) -> None:
    check((mistake,))


def test_ten_at_once() -> None:
    mistakes = tuple(m for m in MISTAKES if m.name in TEN)
    assert len(mistakes) == 10 and len({m.code for m in mistakes}) == 10
    check(mistakes)


VALUES = [node for item in parse(SOUND, PATH, Diagnostics()).items for node in nodes_in(item) if isinstance(node, LEAVES)]
FUNCTIONS = re.compile(r"\w+(?=\()")


@pytest.mark.parametrize(("wrong", "code"), [("nowhere", "MLM0201"), ("4 nowhere", "MLM0301"), ("(1 / 0)", "MLM0207")])
def test_any_value_is_judged_once(wrong: str, code: str) -> None:
    """Every number, quantity, string and name of the text replaced by something that is already wrong by itself."""
    lines = SOUND.split("\n")
    for span in (node.span for node in VALUES):
        line = lines[span.line - 1]
        if FUNCTIONS.match(line, span.column - 1) or line.startswith(NO_VALUES):
            continue
        changed = line[: span.column - 1] + wrong + line[span.end_column - 1 :]
        items = front_end("\n".join([*lines[: span.line - 1], changed, *lines[span.line :]]))
        assert [(d.code, d.span and d.span.line) for d in items] == [(code, span.line)], f"{changed}: {items}"


@pytest.mark.parametrize("mistake", MISTAKES, ids=NAMES)
def test_in_pairs(mistake: Mistake) -> None:
    others = [o for o in MISTAKES[MISTAKES.index(mistake) + 1 :] if compatible(mistake, o)]
    for other in others:
        check((mistake, other))
