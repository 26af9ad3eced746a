"""Small specs for tests of the search, and every legal plan of one by plain loops over what the language says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlmdsl.compile import compile_spec
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.plan import Plan, Schedule
from mlmdsl.planner.pricing import Bench, Candidate, Place, Setting

TEXT = """
block Block(x: [B, S, d]) {{
  h = x + Attention(RMSNorm(x), heads = 8, kv_heads = 4, causal = true, bias = false)
  output h + SwiGLU(RMSNorm(h), hidden = 3 * d)
}}
model small {{
  param d = 256
  param layers = 6
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 2048, dim = d)
  repeat layers as blocks {{ h = Block(h) }}
  output Linear(RMSNorm(h), out = 2048, bias = false)
}}
cluster here {{
  nodes = {nodes}
  devices_per_node = {per_node}
  device = gpu(memory = {memory}, bf16 = 100 TFLOPS, fp32 = 20 TFLOPS, bandwidth = 1 TB/s)
  intra = nvlink(bandwidth = {bandwidth} GB/s per gpu)
  inter = infiniband(bandwidth = 10 GB/s per gpu)
}}
train {{
  data = text("unused.txt")
  tokenizer = bytes()
  seq_len = 512 tok
  batch = {batch} seq
  stop = 100 steps
  optimizer = adamw(lr = 1e-3)
  precision = bf16
}}
plan {{
{plan}
}}
"""


# Plans that recompute some layers in one way and others in another are none of `legal`
ALIKE = "require recompute in [none, selective, full]"


def text_of(
    *plan: str, nodes: int = 2, per_node: int = 4, memory: str = "1200 MiB", batch: int = 16, bandwidth: int = 100
) -> str:
    lines = "\n".join(f"  {line}" for line in plan)
    return TEXT.format(nodes=nodes, per_node=per_node, memory=memory, batch=batch, bandwidth=bandwidth, plan=lines)


def problem(*plan: str, **changes: int | str) -> tuple[Spec, Graph]:
    done = compile_spec(text_of(*plan, **changes), path="/specs/x.mlm", until="graph")  # pyright: ignore[reportArgumentType]
    assert done.spec is not None and done.graph is not None
    return done.spec, done.graph


def planned(*plan: str, pins: Sequence[str] = (), **changes: int | str) -> Plan:
    """The best plan; its layout is verified on the way."""
    text = text_of(*plan, **changes)  # pyright: ignore[reportArgumentType]
    found = compile_spec(text, path="/specs/x.mlm", pins=pins, until="plan").plan
    assert found is not None
    return found


def legal(spec: Spec, graph: Graph) -> Iterator[tuple[Place, Candidate]]:
    """Every plan that the model, the batch and torch's schedules allow, whatever its memory, with stages balanced."""
    setting = Setting(spec, graph)
    world, batch, layers = spec.cluster.world_size, spec.train.batch, graph.layers
    for tensor in range(1, world + 1):
        for sequence in (False, True) if tensor > 1 else (False,):
            bench = setting.shard(tensor, sequence) if world % tensor == 0 else None
            if not isinstance(bench, Bench):
                continue
            for pipeline in range(1, layers + 1):
                data = world // tensor // pipeline
                if tensor * pipeline * data == world and batch % data == 0:
                    yield from _on(Place(bench, pipeline, data), batch // data)


def _on(place: Place, rows: int) -> Iterator[tuple[Place, Candidate]]:
    for micro_batch in (n for n in range(1, rows + 1) if rows % n == 0):
        for schedule, interleave in _schedules(place, rows // micro_batch):
            for mode in range(3):
                for zero in range(4) if place.data > 1 else (0,):
                    if schedule in ("zb_v", "dualpipe_v") and (mode or zero > 1):
                        continue
                    sharding = place.bench.sharding
                    cut = place.cut(micro_batch, mode, schedule, interleave)
                    mesh = (sharding.tensor, sharding.sequence_parallel, place.pipeline, place.data)
                    first = Candidate(*mesh, micro_batch, schedule, interleave, mode, zero, cut)
                    for replicate in (1, *copies(place)) if zero > 1 else (1,):
                        yield place, first._replace(replicate=replicate)


def copies(place: Place) -> list[int]:
    """One copy of the sharded weights on each of several nodes, where every node has the same whole number of replicas."""
    node, ranks = place.mesh.devices_per_node, place.mesh.tensor * place.data
    return [ranks // node] if ranks > node > place.mesh.tensor and ranks % node == 0 == node % place.mesh.tensor else []


def _schedules(place: Place, m: int) -> Iterator[tuple[Schedule, int]]:
    p, layers = place.pipeline, place.bench.setting.graph.layers
    if p == 1 or m >= p:
        yield "1f1b", 1
    if p > 1:
        yield "gpipe", 1
        if m < p or m % (m // p) == 0:
            yield from (("interleaved_1f1b", v) for v in range(2, layers // p + 1))
        if layers >= 2 * p:
            yield "zb_v", 2
            if m >= 2 * p:
                yield "dualpipe_v", 2


def fits(place: Place, candidate: Candidate) -> bool:
    return place.peak_bytes(candidate) <= place.bench.setting.capacity_bytes
