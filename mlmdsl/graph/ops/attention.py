"""Attention over [batch, sequence, heads, head dim], and what stands around it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, ShapeProblem, Work
from mlmdsl.graph.ops.common import memory_bound, partial, pointwise, shard_name, shardable
from mlmdsl.graph.ops.linear import features, integer
from mlmdsl.graph.placement import BROADCAST, REPLICATE, Strategy, shard
from mlmdsl.graph.tensor import TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]
Shapes = tuple[tuple[int, ...], ...]


# ---- heads ----------------------------------------------------------------------------------------------------------


def _split_type(types: Types, attrs: Attributes) -> TensorType:
    width, heads = features(types[0]), integer(attrs, "heads")
    if heads < 1 or width % heads:
        raise ShapeProblem(
            "MLM0410", f"{width} features cannot be split into {heads} heads", 0, help="heads has to divide the width"
        )
    return TensorType("float", (*types[0].shape[:-1], heads, width // heads))


def _merge_type(types: Types, attrs: Attributes) -> TensorType:
    shape = types[0].shape
    if len(shape) < 2 or not isinstance(shape[-1], int) or not isinstance(shape[-2], int):
        raise ShapeProblem("MLM0503", f"this wants [..., heads, head dim], not {types[0]}", 0)
    return TensorType("float", (*shape[:-2], shape[-2] * shape[-1]))


def _view_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    """A view that splits or merges the last dims: cut by heads, or along a dim before them, which both sides count alike."""
    narrow = min(len(types[0].shape), len(out.shape)) - 1
    wide = types[0] if len(types[0].shape) > len(out.shape) else out
    found = [
        Strategy("replicated", (REPLICATE,), (), REPLICATE),
        Strategy("broadcast", (BROADCAST,), (), BROADCAST),
        partial(1),
    ]
    dims = shardable(out, n, besides=range(narrow, len(out.shape)))
    found += [Strategy(shard_name(out, dim), (shard(dim),), (), shard(dim)) for dim in dims]
    heads = wide.shape[-2]
    if isinstance(heads, int) and heads % n == 0:
        found.append(Strategy("heads", (shard(narrow),), (), shard(narrow)))
    return tuple(found)


def _split_emit(e: Emission) -> str:
    heads, size = e.output_type.shape[-2:]
    assert isinstance(heads, int)
    return f"{e.inputs[0]}.unflatten(-1, ({heads // e.axis_size if e.strategy.name == 'heads' else heads}, {size}))"


# ---- rotary positions -----------------------------------------------------------------------------------------------

_ROTARY_DEFAULTS = (("factor", 1.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0), ("original_max", 8192))


def _rotary_type(types: Types, attrs: Attributes) -> TensorType:
    shape = types[0].shape
    if len(shape) != 4 or features(types[0]) % 2:
        raise ShapeProblem("MLM0503", f"this wants [B, S, heads, an even head dim], not {types[0]}", 0)
    dim = attrs["dim"]
    if dim is not None and (integer(attrs, "dim") % 2 or integer(attrs, "dim") > features(types[0])):
        raise ShapeProblem(
            "MLM0503", f"{dim} of {features(types[0])} features cannot be turned in pairs", 0, help="dim is even"
        )
    return types[0]


def _rotary_emit(e: Emission) -> str:
    scaling = [
        f"{name}={e.attrs[name]!r}"
        for name, default in _ROTARY_DEFAULTS
        if e.attrs["factor"] != 1.0 and e.attrs[name] != default
    ]
    if e.attrs["dim"] not in (None, e.output_type.shape[-1]):
        scaling.append(f"dim={e.attrs['dim']}")
    if e.strategy.name == "sequence":
        scaling.append(f"offset={e.axis}.rank * {e.inputs[0]}.size(1)")
    return f"rotary({', '.join([e.inputs[0], repr(e.attrs['theta']), *scaling])})"


# ---- attention ------------------------------------------------------------------------------------------------------


def _attend_type(types: Types, attrs: Attributes) -> TensorType:
    query, key, value = types
    for argument, type in enumerate(types):
        features(type, argument)
        if len(type.shape) != 4:
            raise ShapeProblem("MLM0503", f"this wants [B, S, heads, head dim], not {type}", argument)
    if key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3] or query.shape[0] != key.shape[0]:
        raise ShapeProblem("MLM0501", f"queries {query}, keys {key} and values {value} do not fit together", 1)
    heads, kv_heads = query.shape[2], key.shape[2]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    if heads % kv_heads:
        message = f"{heads} heads cannot share {kv_heads} key and value heads"
        raise ShapeProblem("MLM0411", message, 1, help="kv_heads has to divide heads")
    if attrs["causal"] and query.shape[1] != key.shape[1]:
        raise ShapeProblem("MLM0501", f"causal attention wants as many queries as keys, not {query} and {key}", 1)
    return TensorType("float", (*query.shape[:3], value.shape[3]))


def _attend_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    found = [
        Strategy("replicated", (REPLICATE,) * 3, (), REPLICATE),
        Strategy("broadcast", (BROADCAST,) * 3, (), BROADCAST),
    ]
    counts = [t.shape[2] for t in types]
    if all(isinstance(c, int) and c % n == 0 for c in counts):
        found.append(Strategy("heads", (shard(2),) * 3, (), shard(2)))
    return tuple(found)


def _attend_work(local: Local) -> Work:
    """Flash attention (arXiv:2205.14135): scores never reach memory; the output and the log-sum-exp are kept for backward."""
    batch, queries, heads, size = local.inputs[0]
    keys = local.inputs[1][1]
    flops = 4.0 * batch * heads * queries * keys * size * (0.5 if local.attrs["causal"] else 1.0)
    moved = float(sum(prod(s) for s in local.inputs) + prod(local.output)) * local.output_bytes
    return Work(
        "attention",
        flops_forward=flops,
        flops_backward=2 * flops,
        bytes_forward=moved,
        bytes_backward=2.5 * moved,
        saved=("in0", "in1", "in2", "out"),
        extra_saved_bytes=4.0 * batch * heads * queries,
        kernels_backward=2,
        attention=(batch, heads, queries, keys, size),
    )


def _attend_emit(e: Emission) -> str:
    options = ["causal=True"] if e.attrs["causal"] else []
    options += [f"scale={e.attrs['scale']!r}"] if e.attrs["scale"] is not None else []
    return f"attention({', '.join([*e.inputs, *options])})"


OPS = (
    Op(
        name="split_heads",
        doc="[..., heads * d] to [..., heads, d].",
        infer=_split_type,
        strategies=_view_strategies,
        work=lambda local: Work("none", kernels_forward=0, kernels_backward=0),
        emit=_split_emit,
    ),
    Op(
        name="merge_heads",
        doc="[..., heads, d] to [..., heads * d].",
        infer=_merge_type,
        strategies=_view_strategies,
        work=lambda local: Work("none", kernels_forward=0, kernels_backward=0),
        emit=lambda e: f"{e.inputs[0]}.flatten(-2)",
    ),
    Op(
        name="rotary",
        doc="Rotary positions (arXiv:2104.09864) of paired halves, or of the first `dim` features only; `factor` > 1 scales the"
        " frequencies as Llama 3.1 does.",
        infer=_rotary_type,
        strategies=lambda types, out, weights, attrs, n: pointwise(types, out, n, 0, besides=(3,)),
        work=lambda local: memory_bound(local, kernels=6, backward=1.0),
        emit=_rotary_emit,
        imports=("rotary",),
    ),
    Op(
        name="attend",
        doc="Scaled dot-product attention of q [B, S, H, d] over k [B, T, K, d], v [B, T, K, e]; H / K queries share a key.",
        infer=_attend_type,
        strategies=_attend_strategies,
        work=_attend_work,
        emit=_attend_emit,
        imports=("attention",),
        cheap=False,
    ),
)
