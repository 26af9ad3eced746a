"""Biases of attention's scores by the distance of query and key: learned buckets (T5), fixed slopes (ALiBi)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, ShapeProblem, WeightSpec, Work
from mlmdsl.graph.ops.common import output_bytes
from mlmdsl.graph.ops.linear import integer, number
from mlmdsl.graph.placement import BROADCAST, REPLICATE, WHOLE, WHOLE_PARTIAL, Placement, Strategy, WeightPlacement, shard
from mlmdsl.graph.tensor import Dim, Init, TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]


def _length(types: Types) -> Dim:
    """S of x [B, S, ..], all that is read of it."""
    if len(types[0].shape) < 2:
        raise ShapeProblem("MLM0503", f"this wants [B, S] or [B, S, ...], not {types[0]}", 0)
    return types[0].shape[1]


def _askable(type: TensorType) -> Iterator[Placement]:
    """Placements of a value of which only the length of its sequence is read: no gradient comes back, so any will do."""
    yield REPLICATE
    if type.dtype != "int":
        yield BROADCAST
    if isinstance(type.shape[1], str):
        yield shard(1)


# ---- learned --------------------------------------------------------------------------------------------------------


def _relative_type(types: Types, attrs: Attributes) -> TensorType:
    buckets, least = integer(attrs, "buckets"), 4 if attrs["bidirectional"] else 2
    if buckets < least or buckets % 2 or integer(attrs, "max_distance") <= buckets // 2:
        message = f"{buckets} buckets cannot hold distances up to {attrs['max_distance']}"
        raise ShapeProblem("MLM0503", message, help=f"an even number of buckets from {least} on, less than twice max_distance")
    length = _length(types)
    return TensorType("float", (integer(attrs, "heads"), length, length))


def _relative_strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    found: list[Strategy] = []
    for x in _askable(types[0]):
        found.append(Strategy("replicated", (x,), (WHOLE,), REPLICATE))
        found.append(Strategy("broadcast", (x,), (WHOLE_PARTIAL,), BROADCAST))
        if weights[0][1] % n == 0:
            found.append(Strategy("heads", (x,), (WeightPlacement(1),), shard(0)))
    return tuple(found)


def _relative_work(local: Local) -> Work:
    """A look-up for every pair of positions, and its copy with the heads in front; the numbers of the buckets stay."""
    pairs = float(prod(local.output[1:]))
    moved = 4 * output_bytes(local) + 60 * pairs
    return Work(
        "memory",
        bytes_forward=moved,
        bytes_backward=3 * output_bytes(local) + 16 * pairs,
        extra_saved_bytes=8 * pairs,
        transient_bytes=output_bytes(local) + 24 * pairs,
        kernels_forward=15,
        kernels_backward=3,
    )


def _relative_emit(e: Emission) -> str:
    options = ["bidirectional=True"] if e.attrs["bidirectional"] else []
    options += [f"tp={e.axis}", "sequence=True"] if e.strategy.inputs[0] == shard(1) else []
    options += [f"cp={e.context}"] if e.context else []
    return f"relative_positions({', '.join([e.inputs[0], e.weights[0], str(e.attrs['max_distance']), *options])})"


# ---- fixed ----------------------------------------------------------------------------------------------------------


def _alibi_type(types: Types, attrs: Attributes) -> TensorType:
    length = _length(types)
    return TensorType("fp32", (integer(attrs, "heads"), length if attrs["bidirectional"] else 1, length))


def _alibi_strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    found: list[Strategy] = []
    for x in _askable(types[0]):
        found += [Strategy("replicated", (x,), (), REPLICATE), Strategy("broadcast", (x,), (), BROADCAST)]
        if integer(attrs, "heads") % n == 0:
            found.append(Strategy("heads", (x,), (), shard(0)))
    return tuple(found)


def _alibi_context(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes
) -> tuple[Strategy, ...]:
    """The rows of this rank's queries; of causal attention all have one."""
    return (Strategy("sequence", (shard(1),), (), shard(1) if attrs["bidirectional"] else BROADCAST),)


def _alibi_work(local: Local) -> Work:
    return Work("memory", bytes_forward=2 * output_bytes(local), kernels_forward=6, kernels_backward=0)


def _alibi_emit(e: Emission) -> str:
    cut, sequence = e.strategy.name == "heads", e.strategy.inputs[0] == shard(1)
    options = ["bidirectional=True"] if e.attrs["bidirectional"] else []
    options += [f"tp={e.axis}"] if cut or sequence else []
    options += ["cut=True"] if cut else []
    options += ["sequence=True"] if sequence else []
    options += [f"cp={e.context}"] if e.context else []
    return f"alibi({', '.join([e.inputs[0], str(e.attrs['heads']), *options])})"


OPS = (
    Op(
        name="relative_position",
        doc="T5's relative positions (arXiv:1910.10683, section 2.1) for the sequence of x [B, S, ...]: a bias [heads, S, S]"
        " for `attend` from a table [buckets, heads]. Half of the buckets are single distances, the others grow with their"
        " logarithm up to `max_distance`; `bidirectional` gives half of all to keys that come later.",
        infer=_relative_type,
        strategies=_relative_strategies,
        work=_relative_work,
        emit=_relative_emit,
        context=lambda types, out, weights, attrs: (Strategy("sequence", (shard(1),), (WHOLE_PARTIAL,), shard(1)),),
        imports=("relative_positions",),
        weights=lambda types, attrs: (
            WeightSpec("weight", (integer(attrs, "buckets"), integer(attrs, "heads")), Init("normal", number(attrs, "std"))),
        ),
    ),
    Op(
        name="alibi",
        doc="Attention with linear biases (arXiv:2108.12409) for the sequence of x [B, S, ...]: a bias for `attend` that falls"
        " with the distance, by a slope for each head. [heads, 1, S] for causal attention, where a row's constant is nothing to"
        " its softmax; [heads, S, S] if `bidirectional`.",
        infer=_alibi_type,
        strategies=_alibi_strategies,
        work=_alibi_work,
        emit=_alibi_emit,
        context=_alibi_context,
        of_shape=True,
        imports=("alibi",),
    ),
)
