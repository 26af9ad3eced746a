"""From a family's maps to pieces: which part of which weight of theirs is which part of which of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from mlmdsl.graph.graph import Graph
from mlmdsl.graph.tensor import Weight
from mlmdsl.huggingface.config import Recognised
from mlmdsl.huggingface.expressions import evaluate, filled, value_of
from mlmdsl.huggingface.families import Layout
from mlmdsl.runtime.pieces import Piece

_TERM = re.compile(r"\(([^)]*)\)|(\w+)")
PART = "part"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """`pieces` cover every weight of `ours` and `theirs` (name -> shape) once; `ignored` names of theirs may stand in files."""

    pieces: tuple[Piece, ...]
    ours: Mapping[str, Shape]
    theirs: Mapping[str, Shape]
    ignored: frozenset[str]


def exchange(found: Recognised, model: Graph) -> Exchange:
    """`found.match` names the weights of `model`, whose names checkpoints have; the family's files name the reference's."""
    reference, scope = found.graph, dict(found.params)
    pieces: list[Piece] = []
    theirs: dict[str, Shape] = {}
    mapped: set[str] = set()
    for layout in found.family.layouts:
        keys = [key for key in layout.ours if key in reference.weights and evaluate(layout.where, scope)]
        assert len(keys) in (0, len(layout.ours)), f"{found.family.name}: only some of {layout.ours}"
        if not keys:
            continue
        mapped.update(keys)
        weights = [reference.weights[key] for key in keys]
        names = [model.weights[found.match.weights[key]] for key in keys]
        for index in range(reference.count_of(weights[0])):
            for piece, name, shape in lowered(layout, weights, {**scope, "i": index}):
                assert theirs.setdefault(name, shape) == shape, name
                pieces.append(replace(piece, ours=names[keys.index(piece.ours)].instance(index)))
    assert mapped == set(reference.weights), f"{found.family.name}: no map for {set(reference.weights) - mapped}"
    ours = {weight.instance(i): weight.shape for weight in model.weights.values() for i in range(model.count_of(weight))}
    return Exchange(tuple(pieces), ours, theirs, frozenset(_ignored(found, reference)))


def _ignored(found: Recognised, reference: Graph) -> Iterator[str]:
    layers = max((region.count for region in reference.regions), default=1)
    for pattern in found.family.ignored:
        for index in range(layers if "{" in pattern else 1):
            yield filled(pattern, {**found.params, "i": index})


# ---- axes -----------------------------------------------------------------------------------------------------------


def lowered(layout: Layout, weights: Sequence[Weight], scope: Mapping[str, Any]) -> Iterator[tuple[Piece, str, Shape]]:
    """Pieces of one pass, each with its name and shape of theirs; `ours` is the folded key still."""
    counted = {axis: int(value_of(entry, scope)) for axis, entry in layout.over.items()}
    parts = [int(value_of(part, scope)) for part in layout.parts]
    sizes = {axis: int(value_of(entry, scope)) for axis, entry in layout.sizes.items()}
    theirs_terms, ours_terms = _terms(layout, len(weights[0].shape))
    for number, weight in enumerate(weights):
        known = {**sizes, **counted} | ({PART: parts[number]} if parts else {})
        axes = solved(ours_terms, weight.shape, known)
        for values in product(*(range(size) for size in counted.values())):
            at = dict(zip(counted, values, strict=True))
            name = filled(layout.theirs, {**scope, **at})
            whole = {**axes, PART: sum(parts)} if parts else axes
            shape = tuple(prod(whole[axis] for axis in term) for term in theirs_terms)
            yield _piece(weight.key, name, (theirs_terms, ours_terms), axes, whole, at, sum(parts[:number])), name, shape


def _piece(
    ours: str,
    theirs: str,
    terms: tuple[list[list[str]], list[list[str]]],
    axes: Mapping[str, int],
    whole: Mapping[str, int],
    at: Mapping[str, int],
    before: int,
) -> Piece:
    """`axes`: sizes in ours; `whole`: in theirs; `at`: the places on the axes that theirs' names count."""
    outer = [*at, *(axis for term in terms[0] for axis in term)]
    inner = [axis for term in terms[1] for axis in term]
    assert sorted(outer) == sorted(inner), (ours, terms)
    return Piece(
        ours=ours,
        theirs=theirs,
        theirs_axes=tuple(1 if axis in at else whole[axis] for axis in outer),
        start=tuple(before if axis == PART else 0 for axis in outer),
        box=tuple(1 if axis in at else axes[axis] for axis in outer),
        order=tuple(outer.index(axis) for axis in inner),
        ours_axes=tuple(axes[axis] for axis in inner),
        ours_start=tuple(at.get(axis, 0) for axis in inner),
        dims=tuple(dim for dim, term in enumerate(terms[1]) for _ in term),
    )


def _terms(layout: Layout, rank: int) -> tuple[list[list[str]], list[list[str]]]:
    """Both sides as lists of the axes of each dim; the same on both where nothing is said."""
    if not layout.axes:
        same = [[f"axis{dim}"] for dim in range(rank)]
        return same, same
    left, _, right = layout.axes.partition("->")
    return _dims(left), _dims(right)


def _dims(text: str) -> list[list[str]]:
    return [(found[1] if found[1] is not None else found[2]).split() for found in _TERM.finditer(text)]


def solved(terms: Sequence[Sequence[str]], shape: Shape, known: Mapping[str, int]) -> dict[str, int]:
    """The sizes of all axes: in each dim at most one is not known."""
    axes = dict(known)
    assert len(terms) == len(shape), (terms, shape)
    for term, size in zip(terms, shape, strict=True):
        rest = prod(axes[axis] for axis in term if axis in axes)
        unknown = [axis for axis in term if axis not in axes]
        assert len(unknown) <= 1 and size % rest == 0 and (unknown or size == rest), (term, size, axes)
        if unknown:
            axes[unknown[0]] = size // rest
    return axes
