"""Graphs and machines that the planner's tests share."""

from __future__ import annotations

from collections.abc import Mapping

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar.resolve import resolve
from mlmdsl.grammar.spec import Device, Link
from mlmdsl.graph.build import build
from mlmdsl.graph.graph import Graph
from mlmdsl.graph.verify import verify
from mlmdsl.planner.choice import Costs
from mlmdsl.planner.communication import group_of
from mlmdsl.planner.compute import Kernels
from mlmdsl.planner.mesh import Mesh, Network

LLAMA = """
block Block(x: [B, S, d]) {
  h = x + Attention(RMSNorm(x), heads = 16, kv_heads = 8, causal = true, bias = false, rope_theta = 10_000)
  output h + SwiGLU(RMSNorm(h), hidden = 8192)
}
model llama {
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 32_000, dim = 2048)
  repeat 16 as blocks { h = Block(h) }
  output Linear(RMSNorm(h), out = 32_000, bias = false)
}
"""

GPT = """
block Block(x: [B, S, d]) {
  h = x + Attention(LayerNorm(x), heads = 16, causal = true)
  output h + MLP(LayerNorm(h))
}
model gpt {
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 50_304, dim = 2048)
  h = tok + Position(tokens, max = 2048, dim = 2048)
  repeat 24 as blocks { h = Block(h) }
  output Linear(LayerNorm(h), weight = tok.weight)
}
"""

PARALLEL = """
block Block(x: [B, S, d]) {
  n = RMSNorm(x)
  both = Attention(n, heads = 16, causal = true, bias = false) + SwiGLU(n, hidden = 8192)
  output x + both
}
model parallel {
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 32_000, dim = 2048)
  repeat 16 as blocks { h = Block(h) }
  output Linear(RMSNorm(h), out = 32_000, bias = false)
}
"""

H100 = Device(
    name="H100_SXM_80GB",
    kind="cuda",
    memory_bytes=79 * 2**30,
    memory_bytes_per_second=3.35e12,
    peak_flops_per_second={"fp32": 67e12, "tf32": 494e12, "bf16": 989e12},
    launch_seconds=5e-6,
    power_watts=700,
)
CPU = Device(
    name="cpu",
    kind="cpu",
    memory_bytes=2 * 2**30,
    memory_bytes_per_second=2e10,
    peak_flops_per_second={"fp32": 8e10},
    launch_seconds=1e-6,
    power_watts=65,
)
NVLINK = Link(kind="nvlink", bytes_per_second=450e9, latency_seconds=2e-6)
INFINIBAND = Link(kind="infiniband", bytes_per_second=50e9, latency_seconds=5e-6)
LOOPBACK = Link(kind="loopback", bytes_per_second=1e9, latency_seconds=5e-4)
NETWORK = Network(NVLINK, INFINIBAND, 8)


def graph_of(text: str) -> Graph:
    """The graph of the one model in `text`."""
    found = Diagnostics()
    resolved = resolve("model.mlm", text, found)
    assert resolved.model is not None, found.items
    graph = build(resolved.model, found)
    assert graph is not None, found.items
    verify(graph)
    return graph


def costs_of(
    tensor: int, sizes: Mapping[str, int], *, network: Network = NETWORK, device: Device = H100, precision: str = "bf16"
) -> Costs:
    mesh = Mesh(tensor=tensor, data=1, pipeline=1, devices_per_node=network.devices_per_node)
    float_bytes = 2 if precision == "bf16" else 4
    return Costs(
        Kernels(device, precision), group_of(mesh, "tensor", network), network.inter_bytes_per_second, float_bytes, sizes
    )
