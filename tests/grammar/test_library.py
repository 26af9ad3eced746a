"""The shipped library, read item by item."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlmdsl.diagnostics import Diagnostics, Span
from mlmdsl.grammar import syntax
from mlmdsl.grammar.library import DEVICES, SHIPPED, definitions
from mlmdsl.grammar.modules import read_file
from mlmdsl.grammar.parser import parse


def spans(value: object) -> Iterator[Span]:
    """All that a syntax tree has, in its order."""
    if isinstance(value, Span):
        yield value
    elif isinstance(value, syntax.Node):
        yield from spans(tuple(vars(value).values()))
    elif isinstance(value, tuple):
        for part in value:  # pyright: ignore[reportUnknownVariableType]
            yield from spans(part)  # pyright: ignore[reportUnknownArgumentType]


@pytest.mark.parametrize("path", sorted(SHIPPED))
def test_items_are_those_of_the_whole_file(path: str) -> None:
    """Where they stand too, and none is left out."""
    source, found = read_file(path), Diagnostics()
    whole = parse(source, path, found).items
    kind = syntax.Const if path == DEVICES else syntax.Block
    read = definitions(source, path, kind)
    assert not found.items and all(isinstance(item, kind) for item in whole)
    assert [read[name] for name in read] == list(whole)
    assert [list(spans(read[name])) for name in read] == [list(spans(item)) for item in whole]


def test_names_need_no_reading() -> None:
    read = definitions("block Sound(x: [B, S, d]) {\n  output x\n}\nblock Broken( {\n  what\n}\n", "std/mlp.mlm", syntax.Block)
    assert list(read) == ["Sound", "Broken"]
    assert read["Sound"].name == "Sound" and "Other" not in read
    with pytest.raises(AssertionError):
        read["Broken"]
