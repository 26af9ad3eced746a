"""What passes under one sharding have in common, whatever the size of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mlmdsl.graph.tensor import TensorType
from mlmdsl.planner.sharding import Lie

Key = tuple[str, str]  # a value and the placement it was brought to ("" as it was made): names a storage


class Form(NamedTuple):
    """A node under a sharding, for any size of micro-batch: how its values lie, as numbers in `Layout.lies`."""

    inputs: tuple[int, ...]
    input_bytes: tuple[int, ...]
    output: int
    output_bytes: int
    weights: tuple[tuple[int, ...], ...]


class Layout:
    """What passes of any size under one sharding have in common, made when it is first asked for: which values there are, and
    by region what is kept of them."""

    def __init__(self) -> None:
        self.lies: list[tuple[TensorType, Lie]] = []
        self.numbers: dict[tuple[TensorType, Lie], int] = {}
        self.forms: dict[str, Form] = {}
        self.aliases: dict[str, str] = {}
        self.made: dict[int, Callable[[Key], bool]] = {}
        self.plain: dict[int, tuple[tuple[str, Key, int], ...]] = {}
        self.dear: dict[int, tuple[tuple[Key, int], ...]] = {}

    def number(self, type: TensorType, lie: Lie) -> int:
        found = self.numbers.get((type, lie))
        if found is None:
            found = self.numbers[type, lie] = len(self.lies)
            self.lies.append((type, lie))
        return found
