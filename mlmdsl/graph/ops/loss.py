"""The end of the training graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, ShapeProblem, Work, sequence_dims
from mlmdsl.graph.ops.linear import features
from mlmdsl.graph.placement import PARTIAL, REPLICATE, Strategy, shard
from mlmdsl.graph.tensor import TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]


def _type(types: Types, attrs: Attributes) -> TensorType:
    logits, targets = types
    features(logits)
    if targets.dtype != "int" or logits.shape[:-1] != targets.shape:
        raise ShapeProblem(
            "MLM0504", f"logits {logits} do not fit targets {targets}", 0, help="the model's output is [B, S, vocabulary]"
        )
    return TensorType("fp32", ())


def _strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    logits = types[0]
    last = len(logits.shape) - 1
    found = [Strategy("replicated", (REPLICATE, REPLICATE), (), REPLICATE)]
    vocab = logits.shape[last]
    if isinstance(vocab, int) and vocab % n == 0:
        found.append(Strategy("vocabulary", (shard(last), REPLICATE), (), REPLICATE))
    found += [
        Strategy("sequence", (shard(d), shard(d)), (), REPLICATE)  # the sum over the axis is part of the operation
        for d, size in enumerate(logits.shape[:-1])
        if isinstance(size, str) and size != "B"
    ]
    return tuple(found)


def _on_context(types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes) -> tuple[Strategy, ...]:
    """The sum over this rank's tokens: the ranks' sums are added up once per step, as those of the data axis are."""
    dims = sequence_dims(types[0])[:1]
    return tuple(Strategy("sequence", (shard(d), shard(d)), (), PARTIAL) for d in dims)


def _work(local: Local) -> Work:
    """The log-probabilities are kept in fp32 for backward; their gradient and that of the logits are there beside them.
    Forward: to fp32, log-softmax; backward: zeros with the targets' places, the softmax's gradient of both, to the training
    precision."""
    count, width = float(prod(local.inputs[0])), local.input_bytes[0]
    return Work(
        "memory",
        bytes_forward=count * (width + 3 * 4),
        bytes_backward=count * (width + 5 * 4),
        saved=("in1",),
        extra_saved_bytes=4.0 * count,
        transient_bytes=8.0 * count,
        kernels_forward=4,
        kernels_backward=3,
    )


def _over_vocabulary(local: Local) -> Work:
    """The logits are kept as they are. Their softmax in fp32, of which there is one copy, becomes their gradient, which is then
    copied to the training precision."""
    count, width = float(prod(local.inputs[0])), local.input_bytes[0]
    transient = count * (4 + width * (width < 4))
    return replace(_work(local), saved=("in0", "in1"), extra_saved_bytes=0.0, transient_bytes=transient)


def _emit(e: Emission) -> str:
    if e.strategy.name == "vocabulary":
        return f"vocab_parallel_cross_entropy({e.inputs[0]}, {e.inputs[1]}, {e.axis})"
    text = f"cross_entropy({e.inputs[0]}, {e.inputs[1]})"
    return f"all_reduce({text}, {e.axis})" if e.strategy.name == "sequence" else text


def _collectives(strategy: Strategy, local: Local) -> tuple[tuple[str, int, int], ...]:
    """Vocabulary: the largest logit, the sum of exponentials and the target's logit of each token, fp32; sequence: the sum."""
    if strategy.name == "vocabulary":
        return (("all_reduce", 4 * prod(local.inputs[1]), 3),)
    return (("all_reduce", 4, 1),) if strategy.name == "sequence" else ()


OPS = (
    Op(
        name="cross_entropy",
        doc="Sum over the valid targets of -log softmax(logits)[target]; a target of -100 does not count.",
        infer=_type,
        strategies=_strategies,
        work=_work,
        work_under={"vocabulary": _over_vocabulary},
        emit=_emit,
        imports=("all_reduce", "cross_entropy", "vocab_parallel_cross_entropy"),
        collectives=_collectives,
        context=_on_context,
    ),
)
