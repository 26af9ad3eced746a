"""What a model's variables hold besides numbers: tensors, weights, and the scopes that lead to weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlmdsl.diagnostics import Span
from mlmdsl.graph.tensor import TensorType


@dataclass(frozen=True)
class TensorValue:
    """The output of a node. `scope` is where the weights of the call that made it stand (`tok` in `tok.weight`)."""

    path: str
    type: TensorType
    span: Span = field(compare=False)
    scope: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class WeightRef:
    """`tok.weight`: an existing weight, by its key."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ScopeRef:
    """`attn.query` on the way to `attn.query.weight`."""

    path: str


@dataclass(frozen=True)
class Symbol:
    """A dim without a known size: B, S."""

    name: str


@dataclass
class Scope:
    """Where names are made: a prefix for paths, and how often each name was taken."""

    prefix: str  # "" or "blocks.attn."
    region: str  # the folded repeat around it, or ""
    calls: tuple[tuple[str, str], ...] = ()  # (path, block name) of the block calls around it, outermost first
    taken: Counter[str] = field(default_factory=Counter[str])

    def fresh(self, name: str) -> str:
        """The path of a new name: `attn`, then `attn_2`, `attn_3`."""
        self.taken[name] += 1
        count = self.taken[name]
        if count == 1:
            return self.prefix + name
        return self.fresh(f"{name}_{count}") if self.taken[f"{name}_{count}"] else self._numbered(name, count)

    def _numbered(self, name: str, count: int) -> str:
        self.taken[f"{name}_{count}"] += 1
        return f"{self.prefix}{name}_{count}"
