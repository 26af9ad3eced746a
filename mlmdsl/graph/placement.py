"""How a value lies on one mesh axis: its placement, and its gradient's with it.

The gradient belongs to the type. A replicated value whose consumers each compute the whole gradient (REPLICATE) is not the same
as one whose gradient is spread over the ranks as partial sums (BROADCAST, the output of Megatron's *f*, arXiv:1909.08053 §3):
confusing the two is the classic wrong-by-a-factor bug.

    placement    value on each rank          gradient on each rank
    REPLICATE    the whole                   the whole
    BROADCAST    the whole                   a partial sum
    Shard(dim)   its slice of `dim`          its slice of `dim`
    PARTIAL      a partial sum               the whole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlmdsl.frozen import frozen


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    kind: Literal["replicate", "broadcast", "shard", "partial"]
    dim: int = -1  # of the tensor, counted from 0; -1 unless kind is "shard"

    def __str__(self) -> str:
        return f"shard({self.dim})" if self.kind == "shard" else self.kind

    @property
    def is_shard(self) -> bool:
        return self.kind == "shard"


REPLICATE = Placement("replicate")
BROADCAST = Placement("broadcast")
PARTIAL = Placement("partial")


def shard(dim: int) -> Placement:
    assert dim >= 0
    return Placement("shard", dim)


def parse_placement(text: str) -> Placement:
    """The inverse of `str(placement)`."""
    if text.startswith("shard("):
        return shard(int(text[6:-1]))
    return {"replicate": REPLICATE, "broadcast": BROADCAST, "partial": PARTIAL}[text]


@dataclass(frozen=True, slots=True, order=True)
class WeightPlacement:
    """How a weight lies on the axis: cut along `dim` (None: whole on every rank), and whether the gradient that the backward
    pass leaves on each rank is a partial sum that has to be summed over the axis once per step."""

    dim: int | None = None
    partial_gradient: bool = False

    def __str__(self) -> str:
        return ("replicate" if self.dim is None else f"shard({self.dim})") + ("+partial_grad" if self.partial_gradient else "")


WHOLE = WeightPlacement()
WHOLE_PARTIAL = WeightPlacement(None, True)


def parse_weight_placement(text: str) -> WeightPlacement:
    name, _, partial = text.partition("+")
    return WeightPlacement(None if name == "replicate" else int(name[6:-1]), bool(partial))


@frozen
class Strategy:
    """One way to compute an operation on the axis: what it asks of its inputs and weights, what it gives."""

    name: str  # "column", "row", "vocabulary", "heads", "sequence", "replicated", ...: appears in explanations
    inputs: tuple[Placement, ...]
    weights: tuple[WeightPlacement, ...]
    output: Placement
