"""What a model's variables hold besides numbers: tensors, weights, and the scopes that lead to weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlmdsl.diagnostics import Span
from mlmdsl.frozen import frozen
from mlmdsl.graph.tensor import TensorType


@frozen
class TensorValue:
    """The output of a node. `scope` is where the weights of the call that made it stand (`tok` in `tok.weight`)."""

    path: str
    type: TensorType
    span: Span = field(compare=False)
    scope: str | None = field(default=None, compare=False)


@frozen
class WeightRef:
    """`tok.weight`: an existing weight, by its key."""

    key: str
    shape: tuple[int, ...]


@frozen
class ScopeRef:
    """`attn.query` on the way to `attn.query.weight`."""

    path: str


@frozen
class Symbol:
    """A dim without a known size: B, S."""

    name: str


@dataclass
class Scope:
    """Where names are made: a prefix, and how often each name was taken. Calls that own weights and values have names of their
    own: `h = Linear(h)` in a repeat that carries `h` makes the weight `h.weight` and the value `h_2`."""

    prefix: str  # "" or "blocks.attn."
    region: str  # the folded repeat around it, or ""
    calls: tuple[tuple[str, str], ...] = ()  # (path, block name) of the block calls around it, outermost first
    values: Counter[str] = field(default_factory=Counter[str])
    owners: Counter[str] = field(default_factory=Counter[str])

    def value(self, name: str) -> str:
        """The path of a new value: `attn`, then `attn_2`, `attn_3`."""
        return self.prefix + _fresh(self.values, name)

    def owner(self, name: str) -> str:
        """The path of a new call that owns weights."""
        return self.prefix + _fresh(self.owners, name)


def _fresh(taken: Counter[str], name: str) -> str:
    found, number = name, 1
    while taken[found]:
        number += 1
        found = f"{name}_{number}"
    taken[found] += 1
    return found
