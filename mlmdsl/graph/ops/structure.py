"""Operations without computation: what the data loader feeds, and what a repeat carries."""

from __future__ import annotations

from mlmdsl.graph.ops.base import Op, Work
from mlmdsl.graph.ops.common import shard_name, shardable
from mlmdsl.graph.placement import REPLICATE, Strategy, shard

OPS = (
    Op(
        name="input",
        doc="A model input or the objective's targets: whole on every rank.",
        infer=lambda types, attrs: types[0],
        strategies=lambda types, out, weights, attrs, n: (Strategy("replicated", (), (), REPLICATE),),
        work=lambda local: Work("none", kernels_forward=0, kernels_backward=0),
        emit=lambda e: "",
    ),
    Op(
        name="carry",
        doc="A variable of a repeat at the start of a pass: whole, or cut along one dim.",
        infer=lambda types, attrs: types[0],
        strategies=lambda types, out, weights, attrs, n: (
            Strategy("replicated", (), (), REPLICATE),
            *(Strategy(shard_name(out, d), (), (), shard(d)) for d in shardable(out, n)),
        ),
        work=lambda local: Work("none", kernels_forward=0, kernels_backward=0),
        emit=lambda e: "",
    ),
)
