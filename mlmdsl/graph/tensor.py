"""Types of values in the graph: a dtype and a symbolic shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Literal

from mlmdsl.frozen import frozen

# A known size, or one that is bound when planning: a symbol such as "B" or "S", or a sum of products of symbols and numbers
# ("2*B*S" rows of tokens that go to two experts each)
Dim = int | str
DType = Literal["int", "float", "fp32"]  # "float": the training precision; "fp32": always


def size_of(dim: Dim, bound: Mapping[str, int]) -> int:
    """A dim with its symbols replaced: KeyError for an unbound one."""
    if isinstance(dim, int):
        return dim
    if dim in bound:
        return bound[dim]
    return sum(number * prod(bound[symbol] for symbol in symbols) for number, symbols in _terms(dim))


@cache
def _terms(dim: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """(number, symbols) of each product."""
    products = [term.split("*") for term in dim.split("+")]
    return tuple(
        (prod(int(f) for f in factors if f.isdecimal()), tuple(f for f in factors if not f.isdecimal())) for factors in products
    )


@cache
def symbols_of(dim: Dim) -> frozenset[str]:
    names = dim.replace("+", "*").split("*") if isinstance(dim, str) else []
    return frozenset(name for name in names if not name.isdecimal())


@frozen
class TensorType:
    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return ("" if self.dtype == "float" else self.dtype) + "[" + ", ".join(str(d) for d in self.shape) + "]"

    def sizes(self, bound: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with its symbols replaced: KeyError for an unbound one."""
        return tuple([d if isinstance(d, int) else size_of(d, bound) for d in self.shape])

    def elements(self, bound: Mapping[str, int]) -> int:
        return prod(self.sizes(bound))


@frozen
class Init:
    """How a weight starts: every value is a function of the weight's name and the global index alone."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@frozen
class Weight:
    """A parameter tensor. In a repeated region one `Weight` stands for `count` of them."""

    region: str  # "" outside every repeat
    name: str  # "attn.query.weight", inside its region
    shape: tuple[int, ...]
    init: Init
    decay: bool = True  # weight decay applies: matrices yes, norms and biases no
    expert: bool = False  # a stack of experts along dim 0, which the expert axis shares out
    balance: float = 0.0  # not 0: moved after each step by so much against the sign of its gradient; no parameter of the model

    @property
    def key(self) -> str:
        """Its name in the folded graph."""
        return f"{self.region}.{self.name}" if self.region else self.name

    def instance(self, index: int) -> str:
        """The checkpoint's key of pass `index`: `blocks.0.attn.query.weight`."""
        return f"{self.region}.{index}.{self.name}" if self.region else self.name

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def shape_over(self, experts: int) -> tuple[int, ...]:
        """On one of the ranks of an expert axis."""
        return (self.shape[0] // experts, *self.shape[1:]) if self.expert else self.shape
