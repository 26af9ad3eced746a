"""Attention over [batch, sequence, heads, head dim], and what stands around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, ShapeProblem, Work
from mlmdsl.graph.ops.common import partial, pointwise, shard_name, shardable
from mlmdsl.graph.ops.linear import features, integer, number
from mlmdsl.graph.placement import BROADCAST, REPLICATE, Strategy, shard
from mlmdsl.graph.tensor import TensorType
from mlmdsl.runtime.config import QUERY_BLOCK

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
    scaling += ["interleaved=True"] if e.attrs["interleaved"] else []
    if e.cut:
        scaling.append(f"cut=({e.cut}{'' if ',' in e.cut else ','})")
    return f"rotary({', '.join([e.inputs[0], repr(e.attrs['theta']), *scaling])})"


# ---- attention ------------------------------------------------------------------------------------------------------


def _attend_type(types: Types, attrs: Attributes) -> TensorType:
    query, key, value = types[:3]
    for argument, type in enumerate(types[:3]):
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
    for asked, name in ((attrs["causal"], "causal attention"), (attrs["window"] is not None, "a window")):
        if asked and query.shape[1] != key.shape[1]:
            raise ShapeProblem("MLM0501", f"{name} wants as many queries as keys, not {query} and {key}", 1)
    softcap = attrs["softcap"]
    if softcap is not None and number(attrs, "softcap") <= 0:
        raise ShapeProblem("MLM0503", f"softcap is a positive number, not {softcap}")
    if _documents(attrs) and query.shape[1] != key.shape[1]:
        raise ShapeProblem("MLM0501", f"documents want as many queries as keys, not {query} and {key}", 1)
    for argument, extra in enumerate(types[3:], 3):
        if extra.dtype != "int":
            _fit_bias(extra, (heads, query.shape[1], key.shape[1]))
        elif extra.shape != key.shape[:2]:
            raise ShapeProblem("MLM0501", f"{extra} is not of the keys {key}", argument)
    return TensorType("float", (*query.shape[:3], value.shape[3]))


def _documents(attrs: Attributes) -> bool:
    """The last input numbers documents."""
    return bool(attrs.get("documents"))


def _fit_bias(bias: TensorType, scores: tuple[int | str, ...]) -> None:
    fits = len(bias.shape) == 3 and all(size in (1, whole) for size, whole in zip(bias.shape, scores, strict=True))
    if not fits:
        wanted = ", ".join(map(str, scores))
        raise ShapeProblem("MLM0501", f"a bias is [{wanted}], or 1 in place of a dim, not {bias}", 3)


def _attend_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    found = [
        Strategy("replicated", (REPLICATE,) * len(types), (), REPLICATE),
        Strategy("broadcast", tuple(REPLICATE if t.dtype == "int" else BROADCAST for t in types), (), BROADCAST),
    ]
    heads, kv_heads = types[0].shape[2], types[1].shape[2]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    if heads % n == 0 and (kv_heads % n == 0 or kv_heads == 1):  # a single one of keys and values serves every rank
        shared = BROADCAST if kv_heads == 1 else shard(2)
        extra = tuple(REPLICATE if t.dtype == "int" else BROADCAST if t.shape[0] == 1 else shard(0) for t in types[3:])
        found.append(Strategy("heads", (shard(2), shared, shared, *extra), (), shard(2)))
    return tuple(found)


def _attend_context(types: Types, out: TensorType, weights: Shapes, attrs: Attributes) -> tuple[Strategy, ...]:
    """This rank's queries over all keys and values, which are gathered; a bias has the rows of the queries."""
    extra = tuple(REPLICATE if t.dtype == "int" else shard(1) if isinstance(t.shape[1], str) else BROADCAST for t in types[3:])
    return (Strategy("context", (shard(1), BROADCAST, BROADCAST, *extra), (), shard(1)),)


def _pairs(length: int, attrs: Attributes) -> float:
    """Pairs of a query and a key that the mask leaves of a sequence: the area that it leaves of the square, so that causal
    attention is half of it, and a window that reaches everything changes nothing."""
    window = length if attrs["window"] is None else min(length, integer(attrs, "window"))
    return length * window - window * window / 2 if attrs["causal"] else 2.0 * length * window - window * window


def _attend_work(local: Local, blockwise: bool = False) -> Work:
    """By what the runtime calls (runtime/attend.py): where the calls for chunks of a sequence or for its documents are joined,
    their results stay beside the whole; the gradients of what was cut for them are joined, too."""
    apart = _documents(local.attrs)
    seen = tuple(shape for i, shape in enumerate(local.inputs) if i < 3 or len(shape) == 3)  # not the integers
    work = _whole_work(replace(local, inputs=seen) if apart else local, blockwise)
    masked = local.attrs["causal"] or local.attrs["window"] is not None
    chunks = 2 if masked and local.inputs[0][1] < local.inputs[1][1] else 1
    if chunks == 1 and not apart:
        return work
    joined = float(prod(local.output) * local.output_bytes)
    cut = float(sum(prod(s) for s in local.inputs[:3]) * local.output_bytes)
    return replace(
        work,
        bytes_forward=work.bytes_forward + 2 * joined,
        bytes_backward=work.bytes_backward + 2 * (joined + cut),
        extra_saved_bytes=work.extra_saved_bytes + joined,
        extra_cheap_bytes=work.extra_cheap_bytes + joined,
        kernels_forward=work.kernels_forward * chunks + 1,
        kernels_backward=work.kernels_backward * chunks + 4,
    )


def _learned_work(local: Local) -> Work:
    return _attend_work(local, blockwise=True)


def _at_once(local: Local) -> int:
    """Queries of one call: half of a rank's where masks are of chunks of a sequence."""
    queries, keys = local.inputs[0][1], local.inputs[1][1]
    masked = local.attrs["causal"] or local.attrs["window"] is not None
    return queries // 2 if masked and queries < keys else queries


def _whole_work(local: Local, blockwise: bool) -> Work:
    """Flash attention (arXiv:2205.14135): scores never reach memory; the output and the log-sum-exp are kept for backward."""
    batch, queries, heads, size = local.inputs[0]
    keys, kv_heads = local.inputs[1][1:3]
    attrs, width = local.attrs, local.output_bytes
    pairs = _pairs(keys, attrs) * queries / keys if attrs["causal"] or attrs["window"] is not None else float(queries * keys)
    flops = 2.0 * batch * heads * pairs * (size + local.output[3])
    moved = float(sum(prod(s) for s in local.inputs[:3]) + prod(local.output)) * width
    fused = Work(
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
    if attrs["softcap"] is not None or blockwise:
        return _blockwise_work(fused, local, pairs)
    windowed = attrs["window"] is not None and integer(attrs, "window") < keys
    if not windowed and len(local.inputs) == 3:
        return fused
    return _masked_work(
        fused, local, pairs, made=windowed or bool(attrs["causal"]) or len(local.inputs) > 4, shared=kv_heads != heads
    )


def _masked_work(fused: Work, local: Local, pairs: float, *, made: bool, shared: bool) -> Work:
    """With an explicit mask every score is computed of the keys that any of a call's queries sees. `made`: the mask is a tensor
    of its own and not just the bias or the padding; with either it stays for the backward pass, that of a window alone is there
    once for all layers. `shared`: a copy of keys and values for every head stays, too."""
    batch, queries, heads, size = local.inputs[0]
    keys, width = local.inputs[1][1], local.output_bytes
    bias, padded = [s for s in local.inputs[3:] if len(s) == 3], any(len(s) == 2 for s in local.inputs[3:])
    causal = bool(local.attrs["causal"]) and local.attrs["window"] is None
    executed = pairs + queries * _at_once(local) / 2 if causal else float(queries * keys)
    mask = float((executed if made or bias else keys) * (bias[0][0] if bias else 1) * (batch if padded else 1) * width)
    read = mask * (batch if bias and not padded else 1)
    copies = float(batch * keys * heads * (size + local.output[3]) * width) if shared else 0.0
    own = made and (bool(bias) or padded)
    kept = copies + (mask if own else 0.0)
    saved = ("in0", *(() if shared else ("in1", "in2")), *(() if made or not bias else ("in3",)), "out")
    return replace(
        fused,
        bytes_forward=fused.bytes_forward + read + (3 * mask if own else 0.0) + 2 * copies,
        bytes_backward=fused.bytes_backward + 2 * read + 2 * copies,
        saved=saved,
        extra_saved_bytes=fused.extra_saved_bytes + kept,
        extra_cheap_bytes=kept,
        standing_bytes=mask if made and not own else 0.0,
        transient_bytes=mask if own else 0.0,
        kernels_forward=1 + 2 * shared + (6 if own else 0),
        kernels_backward=2 + 2 * shared,
        computed=executed / pairs,
    )


def _blockwise_work(fused: Work, local: Local, pairs: float) -> Work:
    """Blocks of queries over the keys that any of them sees: the scores of a block pass through memory once per elementwise
    kernel, in fp32 and in the width of the inputs, and again in the backward pass."""
    batch, queries, heads, _ = local.inputs[0]
    keys, width = local.inputs[1][1], local.output_bytes
    block, blocks = min(_at_once(local), QUERY_BLOCK), -(-queries // QUERY_BLOCK)
    ragged = bool(local.attrs["causal"]) + (local.attrs["window"] is not None)
    executed = min(float(queries * keys), pairs + ragged * queries * block / 2)
    summed = (4 - width) * sum(prod(s) for s in local.inputs[3:] if len(s) == 3)  # the gradient of the bias is one in fp32
    scores = batch * heads * executed
    return replace(
        fused,
        bytes_forward=fused.bytes_forward + scores * (4 * width + 40),
        bytes_backward=fused.bytes_backward + scores * (8 * width + 100),
        saved=("in0", "in1", "in2", *(f"in{i}" for i in range(3, len(local.inputs))), "out"),
        extra_saved_bytes=0.0,
        transient_bytes=float(batch * heads * block * keys * (12 + (width if width < 4 else 0)) + summed),
        kernels_forward=10 * blocks,
        kernels_backward=24 * blocks,
        computed=executed / pairs,
    )


def _attend_emit(e: Emission) -> str:
    options = [f"cp={e.context}"] if e.context else []
    options += ["causal=True"] if e.attrs["causal"] else []
    options += [f"{name}={e.attrs[name]!r}" for name in ("scale", "window", "softcap") if e.attrs[name] is not None]
    named = [f"valid={x}" if t.dtype == "int" else x for x, t in zip(e.inputs, e.input_types, strict=True)]
    if _documents(e.attrs):
        named[-1] = f"documents={e.inputs[-1]}"
    return f"attention({', '.join([*named, *options])})"


def _rotary_work(local: Local) -> Work:
    """For each half a product to fp32, and another added to it (runtime/functions.py); besides the angles' few numbers."""
    moved = prod(local.output) * (2 * local.output_bytes + local.input_bytes[0] + 8.0)
    return Work("memory", bytes_forward=moved, bytes_backward=moved, kernels_forward=12, kernels_backward=5)


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
        " frequencies as Llama 3.1 does; `interleaved` pairs neighbours, not halves.",
        infer=_rotary_type,
        strategies=lambda types, out, weights, attrs, n: pointwise(types, out, n, 0, besides=(3,)),
        work=_rotary_work,
        emit=_rotary_emit,
        imports=("rotary",),
    ),
    Op(
        name="attend",
        doc="Scaled dot-product attention of q [B, S, H, d] over k [B, T, K, d], v [B, T, K, e]; H / K queries share a key."
        " With `softcap` the scores are softcap * tanh(scores / softcap) (arXiv:2408.00118); `bias` [H, S, T], 1 in place of a"
        " dim where it is the same along it, is added to them. Query i sees key j where j <= i if `causal`, and where"
        " |i - j| < `window`. Nothing sees padding, keys of 0 in `valid` int[B, T]; only with `causal` or a window a query sees"
        " itself in any case. With `documents` int[B, T] a query sees the keys of its document alone, neighbours with the same"
        " number; FLOPs, time and memory are those of one document in each row. FLOPs count the area"
        " that the mask leaves: S^2 / 2 of causal attention, S w - w^2 / 2 of a causal window. Time counts what is computed: a"
        " window, a bias or padding is a mask to a fused kernel, which computes all"
        " scores;"
        f" soft-capping, and on a CPU a bias that is learned, is computed in blocks of {QUERY_BLOCK} queries, whose scores pass"
        " through memory.",
        infer=_attend_type,
        strategies=_attend_strategies,
        work=_attend_work,
        work_learned=_learned_work,
        emit=_attend_emit,
        context=_attend_context,
        imports=("attention",),
        cheap=False,
    ),
)
