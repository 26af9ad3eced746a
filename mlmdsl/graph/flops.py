"""FLOPs of the model: matrix products only, attention in full where it is bidirectional and half where it is causal."""

from __future__ import annotations

from collections.abc import Mapping

from mlmdsl.graph.graph import Graph, Node
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import Local, Work
from mlmdsl.graph.tensor import TensorType

_BYTES = {"int": 8, "float": 2, "fp32": 4}


def local_of(graph: Graph, node: Node, sizes: Mapping[str, int], float_bytes: int = 2) -> Local:
    """A node's sizes on one rank that holds everything."""
    types = [graph.nodes[source].type for source in node.inputs]

    def width(type: TensorType) -> int:
        return float_bytes if type.dtype == "float" else _BYTES[type.dtype]

    return Local(
        inputs=tuple(t.sizes(sizes) for t in types),
        input_bytes=tuple(width(t) for t in types),
        output=node.type.sizes(sizes),
        output_bytes=width(node.type),
        weights=tuple(graph.weights[key].shape for key in node.weights),
        weight_bytes=float_bytes,
        attrs=node.attrs,
    )


def work_of(graph: Graph, node: Node, sizes: Mapping[str, int]) -> Work:
    return CATALOGUE[node.op].work(local_of(graph, node, sizes))


def flops_per_sequence(graph: Graph, seq_len: int) -> tuple[float, float]:
    """(forward, backward) FLOPs of one sequence of `seq_len` tokens through the whole model."""
    sizes = graph.sizes(1, seq_len)
    forward = backward = 0.0
    for region in graph.regions:
        for node in region.nodes:
            work = work_of(graph, node, sizes)
            forward += region.count * work.flops_forward
            backward += region.count * work.flops_backward
    return forward, backward


def active_parameters(graph: Graph) -> int:
    """Trainable values that one token is computed with: of experts those that it goes to."""
    shares: dict[str, float] = {}
    for node in graph.nodes.values():
        share = CATALOGUE[node.op].active(tuple(graph.nodes[source].type for source in node.inputs))
        shares.update((key, max(share, shares.get(key, 0.0))) for key in node.weights)
    return sum(round(share * graph.weights[key].elements) * graph.count_of(graph.weights[key]) for key, share in shares.items())


def flops_per_token(graph: Graph, seq_len: int) -> float:
    """Forward and backward."""
    return sum(flops_per_sequence(graph, seq_len)) / seq_len
