"""Losses beside the objective's, and the load and capacity of experts."""

from __future__ import annotations

from collections.abc import Mapping

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Op, ShapeProblem, sequence_dims
from mlmdsl.graph.ops.common import memory_bound, shard_name, shardable
from mlmdsl.graph.ops.linear import features, integer, number
from mlmdsl.graph.placement import BROADCAST, REPLICATE, Placement, Strategy, shard
from mlmdsl.graph.tensor import TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]
Shapes = tuple[tuple[int, ...], ...]


# ---- losses ---------------------------------------------------------------------------------------------------------


def _add_type(types: Types, attrs: Attributes) -> TensorType:
    x, loss = types
    if loss.dtype == "int" or loss.shape[:1] != ("B",):
        raise ShapeProblem("MLM0502", f"a loss has values for every sequence, [B, ...], not {loss}", 1)
    if x.dtype == "int":
        raise ShapeProblem("MLM0502", f"this wants floating-point values, not {x}", 0)
    return x


def _add_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    """The two inputs lie independently of each other."""
    x, loss = types
    first: list[tuple[str, Placement]] = [("replicated", REPLICATE), ("broadcast", BROADCAST)]
    first += [(shard_name(x, dim), shard(dim)) for dim in shardable(x, n)]
    second = [REPLICATE, BROADCAST, *(shard(dim) for dim in shardable(loss, n) if dim in sequence_dims(loss))]
    return tuple(
        Strategy(name if place == other else f"{name}, loss {other}", (place, other), (), place)
        for name, place in first
        for other in second
    )


def _add_on_context(types: Types, out: TensorType, weights: Shapes, attrs: Attributes) -> tuple[Strategy, ...]:
    places = [next((shard(dim) for dim in sequence_dims(type)), BROADCAST) for type in types]
    return (Strategy("sequence", tuple(places), (), places[0]),)


def _add_emit(e: Emission) -> str:
    alike = e.axis if e.strategy.inputs[1] == REPLICATE else None
    cut = [axis for axis in (e.context, None if alike else e.axis) if axis]
    options = [f"cut=({', '.join(cut)},)"] if cut else []
    options += [f"alike={alike}"] if alike else []
    arguments = [*e.inputs, f"{number(e.attrs, 'factor')!r} / TRAINING.batch", "tally", *options]
    return f"add_loss({', '.join(arguments)})"


# ---- load and capacity ----------------------------------------------------------------------------------------------


def _gates(types: Types) -> tuple[int | str, int]:
    """The batch, and how many experts there are."""
    experts = features(types[0])
    if len(types[0].shape) != 3:
        raise ShapeProblem("MLM0503", f"this wants gates [B, S, experts], not {types[0]}", 0)
    return types[0].shape[0], experts


def _load_type(types: Types, attrs: Attributes) -> TensorType:
    batch, experts = _gates(types)
    return TensorType("float", (batch, 1, experts))


def _limit_type(types: Types, attrs: Attributes) -> TensorType:
    _gates(types)
    if number(attrs, "factor") <= 0:
        raise ShapeProblem("MLM0503", "a capacity is more than nothing", 0, help="factor = 1.0 leaves no room to spare")
    return types[0]


def _whole(*pairs: tuple[Placement, Placement]) -> tuple[Strategy, ...]:
    """Sequences have to be whole."""
    names = {REPLICATE: "replicated", BROADCAST: "broadcast"}
    return tuple(Strategy(names[given], (given,), (), made) for given, made in pairs)


_SAME = ((REPLICATE, REPLICATE), (BROADCAST, BROADCAST))

OPS = (
    Op(
        name="add_loss",
        doc="x itself; `factor` times the mean of `loss` [B, ...] over the global batch is added to what is minimised. Every"
        " sequence counts alike, and every value of it, padding too. Not in evaluations.",
        infer=_add_type,
        strategies=_add_strategies,
        work=lambda local: memory_bound(local, ("in1",), backward=0.5),
        emit=_add_emit,
        imports=("add_loss",),
        context=_add_on_context,
    ),
    Op(
        name="load",
        doc="How many of its fair share of each sequence's tokens every expert is given by gates [B, S, E]: [B, 1, E], ones"
        " where they are even. Without gradient.",
        infer=_load_type,
        strategies=lambda types, out, weights, attrs, n: _whole(*_SAME, (REPLICATE, BROADCAST), (BROADCAST, REPLICATE)),
        work=lambda local: memory_bound(local, kernels=4, backward=0.0),
        emit=lambda e: f"load({e.inputs[0]})",
        imports=("load",),
        context=lambda types, out, weights, attrs: _whole((REPLICATE, BROADCAST)),
    ),
    Op(
        name="limit",
        doc="Gates [B, S, E] without those beyond the capacity of an expert: of each sequence the first"
        " ceil(factor * top_k * S / E) tokens that chose it. Metrics count the others as dropped, places that stay empty as"
        " padded.",
        infer=_limit_type,
        strategies=lambda types, out, weights, attrs, n: _whole(*_SAME),
        work=lambda local: memory_bound(local, extra=2.0 * local.output[-1] * local.output[0] * local.output[1], kernels=4),
        emit=lambda e: f"limit({e.inputs[0]}, {integer(e.attrs, 'top_k')}, {number(e.attrs, 'factor')!r}, tally)",
        imports=("limit",),
        context=lambda types, out, weights, attrs: _whole((REPLICATE, REPLICATE)),
    ),
)
