"""The table of transitions, carried out on numbers: values and gradients mean the same before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mlmdsl.graph.placement import BROADCAST, PARTIAL, REPLICATE, Placement, shard
from mlmdsl.planner.placement import Step, transition

Array = NDArray[np.float64]
Locals = list[Array]
N = 4
PLACEMENTS = (REPLICATE, BROADCAST, PARTIAL, shard(0), shard(1))
# What a rank holds of a value, and of its gradient (graph/placement.py)
VALUES = {"replicate": "whole", "broadcast": "whole", "shard": "slice", "partial": "sum"}
GRADIENTS = {"replicate": "whole", "broadcast": "sum", "shard": "slice", "partial": "whole"}


def spread(whole: Array, how: str, dim: int, random: np.random.Generator) -> Locals:
    """What the ranks hold of `whole`."""
    if how == "whole":
        return [whole.copy() for _ in range(N)]
    if how == "slice":
        return [part.copy() for part in np.split(whole, N, dim)]
    parts = [random.normal(size=whole.shape) for _ in range(N - 1)]
    return [*parts, whole - sum(parts)]


def whole_of(parts: Sequence[Array], how: str, dim: int) -> Array:
    """The one value that the ranks hold together."""
    if how == "whole":
        assert all(np.allclose(part, parts[0]) for part in parts)
        return parts[0]
    return np.concatenate(parts, dim) if how == "slice" else np.sum(parts, axis=0)


def all_reduce(parts: Locals, gathered: int | None, cut: int | None) -> Locals:
    return [np.sum(parts, axis=0) for _ in parts]


def all_gather(parts: Locals, gathered: int | None, cut: int | None) -> Locals:
    assert gathered is not None
    return [np.concatenate(parts, gathered) for _ in parts]


def split(parts: Locals, gathered: int | None, cut: int | None) -> Locals:
    assert cut is not None
    return [np.split(part, N, cut)[rank] for rank, part in enumerate(parts)]


def reduce_scatter(parts: Locals, gathered: int | None, cut: int | None) -> Locals:
    return split(all_reduce(parts, None, None), None, cut)


def all_to_all(parts: Locals, gathered: int | None, cut: int | None) -> Locals:
    return split(all_gather(parts, gathered, None), None, cut)


CALLS: dict[str, Callable[[Locals, int | None, int | None], Locals]] = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "split": split,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
}


def call(kind: str | None, parts: Locals, gathered: int | None, cut: int | None) -> Locals:
    return parts if kind is None else CALLS[kind](parts, gathered, cut)


def dims(step: Step) -> tuple[int | None, int | None]:
    """(gathered, cut) going forward."""
    return (step.dim, step.dim) if step.target_dim is None else (step.dim, step.target_dim)


LEGAL = [(a, b) for a in PLACEMENTS for b in PLACEMENTS if a != b and transition(a, b) is not None]


@pytest.mark.parametrize(("source", "target"), LEGAL, ids=lambda p: str(p))
def test_a_transition_keeps_the_value_and_its_gradient(source: Placement, target: Placement) -> None:
    step = transition(source, target)
    assert step is not None
    random = np.random.default_rng(0)
    gathered, cut = dims(step)
    value, gradient = random.normal(size=(2, 8, 12))
    parts = call(step.forward, spread(value, VALUES[source.kind], source.dim, random), gathered, cut)
    assert np.allclose(whole_of(parts, VALUES[target.kind], target.dim), value)
    back = call(step.backward, spread(gradient, GRADIENTS[target.kind], target.dim, random), cut, gathered)
    assert np.allclose(whole_of(back, GRADIENTS[source.kind], source.dim), gradient)


def test_what_is_absent() -> None:
    """A gradient that is a partial sum is never taken for whole, and nothing becomes a partial sum."""
    illegal = {(str(a), str(b)) for a in PLACEMENTS for b in PLACEMENTS if a != b} - {(str(a), str(b)) for a, b in LEGAL}
    assert illegal == {
        ("broadcast", "replicate"),
        ("broadcast", "partial"),
        ("broadcast", "shard(0)"),
        ("broadcast", "shard(1)"),
        ("replicate", "partial"),
        ("shard(0)", "partial"),
        ("shard(1)", "partial"),
    }


@pytest.mark.parametrize(("source", "target"), LEGAL, ids=lambda p: str(p))
def test_integers_have_no_gradient(source: Placement, target: Placement) -> None:
    step = transition(source, target, integer=True)
    assert step is not None and step.backward is None


def test_the_larger_side() -> None:
    gather, exchange = transition(shard(1), BROADCAST), transition(shard(1), shard(0))
    assert gather is not None and exchange is not None
    assert gather.side_bytes(4096, 4) == 4096
    assert exchange.side_bytes(4096, 4) == 1024
