"""The shipped library: blocks and devices, read from the text when they are first asked for.

Its files are in the canonical layout, in which an item starts in the first column and ends with a bracket there: that is
enough to know the names, and a spec uses a few of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.parser import parse

STD = Path(__file__).with_name("std")
DEVICES = "std/devices.mlm"
SHIPPED = frozenset(f"std/{path.name}" for path in STD.glob("*.mlm"))

_DEFINITION = re.compile(r"^(?P<kind>block|const) (?P<name>\w+).*?^[)}]$", re.MULTILINE | re.DOTALL)
_WORDS: dict[type, str] = {s.Block: "block", s.Const: "const"}
_Value = TypeVar("_Value")
_Item = TypeVar("_Item", s.Block, s.Const)


class Lazy(Mapping[str, _Value]):
    """Values by names that are known beforehand; each is made when it is first asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], _Value]):
        self._names, self._make = dict.fromkeys(names), make
        self._made: dict[str, _Value] = {}

    def __getitem__(self, name: str) -> _Value:
        if name not in self._made:
            if name not in self._names:
                raise KeyError(name)
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def std_blocks() -> tuple[str, ...]:
    """Shipped files whose blocks are in scope everywhere."""
    return tuple(sorted(SHIPPED - {DEVICES}))


def shipped(name: str) -> bool:
    """Whether a file, or a block by its qualified name, is of the shipped library."""
    return name.partition(":")[0] in SHIPPED


def definitions(source: str, path: str, kind: type[_Item]) -> Lazy[_Item]:
    """The items of a kind of a shipped file, by name."""
    found = {match["name"]: match.span() for match in _DEFINITION.finditer(source) if match["kind"] == _WORDS[kind]}

    def read(name: str) -> _Item:
        item = _definition(source, path, *found[name])
        assert isinstance(item, kind)
        return item

    return Lazy(found, read)


@lru_cache(maxsize=256)
def _definition(source: str, path: str, start: int, end: int) -> s.Item:
    """One item, which stands on the lines that it has in its file: parsed once in a process."""
    found = Diagnostics()
    file = parse("\n" * source.count("\n", 0, start) + source[start:end], path, found)
    assert not found.errors, found.items
    return file.items[0]
