"""Small specs for tests of the search, and every legal plan of one by plain loops over what the language says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlmdsl.compile import compile_spec
from mlmdsl.grammar.constraints import ORDERS, USUAL, Order
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.assemble import ledger
from mlmdsl.planner.bench import Bench, Setting
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.memory import capacity_bytes
from mlmdsl.planner.outcome import Outcome
from mlmdsl.planner.plan import Plan, Schedule
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.search import explore

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


# Two pools of unlike devices in the place of `nodes` alike nodes
POOLS = """cluster here {{
  inter = infiniband(bandwidth = 10 GB/s per gpu)
  pool one {{
    nodes = {nodes}
    devices_per_node = {per_node}
    device = gpu(name = "one", memory = {memory}, bf16 = 100 TFLOPS, fp32 = 20 TFLOPS, bandwidth = 1 TB/s)
    intra = nvlink(bandwidth = {bandwidth} GB/s per gpu)
  }}
  pool two {{
    nodes = {other_nodes}
    devices_per_node = {other_per_node}
    device = gpu(name = "two", memory = {other_memory}, bf16 = {speed} TFLOPS, fp32 = 20 TFLOPS, bandwidth = 2 TB/s)
    intra = nvlink(bandwidth = 50 GB/s per gpu)
  }}
}}
"""


# Plans that recompute some layers in one way and others in another are none of `legal`
ALIKE = "require recompute in [none, selective, full]"


def text_of(
    *plan: str, nodes: int = 2, per_node: int = 4, memory: str = "1200 MiB", batch: int = 16, bandwidth: int = 100
) -> str:
    lines = "\n".join(f"  {line}" for line in plan)
    return TEXT.format(nodes=nodes, per_node=per_node, memory=memory, batch=batch, bandwidth=bandwidth, plan=lines)


def on_cpu(*plan: str, cores: str = "0.5", launch: str = "10 us", batch: int = 8, ranks: int = 4) -> str:
    """Ranks of one machine in the place of the cluster."""
    text = text_of(*plan, nodes=1, per_node=ranks, memory="2 GiB", batch=batch)
    before, device, after = text.partition("gpu(memory = 2 GiB, bf16 = 100 TFLOPS, fp32 = 20 TFLOPS, bandwidth = 1 TB/s)")
    assert device
    text = f"{before}cpu(memory = 2 GiB, fp32 = 50 GFLOPS, launch = {launch}, cores = {cores}){after}"
    return text.replace("nvlink(bandwidth = 100 GB/s per gpu)", "loopback(2 GB/s per gpu)")


def pooled_text_of(*plan: str, **changes: int | str) -> str:
    """`other_nodes`, `other_per_node`, `other_memory`, `speed`: of the second pool; the others as for `text_of`."""
    plain = {key: changes.pop(key) for key in ("batch",) if key in changes}
    text = text_of(*plan, **plain)  # pyright: ignore[reportArgumentType]
    usual: dict[str, int | str] = {"nodes": 1, "per_node": 4, "memory": "1200 MiB", "bandwidth": 100}
    other: dict[str, int | str] = {"other_nodes": 1, "other_per_node": 4, "other_memory": "1200 MiB", "speed": 300}
    start, end = text.index("cluster here"), text.index("train {")
    return text[:start] + POOLS.format(**usual | other | changes) + text[end:]


def pooled(*plan: str, **changes: int | str) -> tuple[Spec, Graph]:
    """A problem on two pools of unlike devices."""
    done = compile_spec(pooled_text_of(*plan, **changes), path="/specs/x.mlm", until="graph")
    assert done.spec is not None and done.graph is not None
    return done.spec, done.graph


def problem(*plan: str, **changes: int | str) -> tuple[Spec, Graph]:
    done = compile_spec(text_of(*plan, **changes), path="/specs/x.mlm", until="graph")  # pyright: ignore[reportArgumentType]
    assert done.spec is not None and done.graph is not None
    return done.spec, done.graph


def shared_cores(*plan: str) -> tuple[Spec, Graph]:
    """A problem of four ranks on two cores."""
    done = compile_spec(on_cpu(*plan), path="/specs/x.mlm", until="graph")
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
                    for order in orders(spec, tensor * pipeline, pipeline > 1 < data):
                        yield from _on(Place(bench, pipeline, data, order), batch // data)


def orders(spec: Spec, ranks: int, several: bool) -> tuple[Order, ...]:
    """Stages inside ranks of data where a node has room for the `ranks` of one pipeline, and there are several nodes."""
    pool, *others = spec.cluster.pools  # several are planned in the usual order
    inside = several and not others and pool.nodes > 1 and pool.devices_per_node % ranks == 0
    return ORDERS if inside else (USUAL,)


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
                    first = Candidate(*mesh, micro_batch, schedule, interleave, mode, zero, cut, order=place.order)
                    for replicate in (1, *copies(place)) if zero > 1 else (1,):
                        yield place, first._replace(replicate=replicate)


def copies(place: Place) -> list[int]:
    """One copy of the sharded weights on each of several nodes, where every node has the same whole number of replicas."""
    between = place.pipeline if place.order != USUAL else 1
    node, each = place.mesh.devices_per_node, place.mesh.tensor * between
    ranks = each * place.data
    return [ranks // node] if ranks > node > each and ranks % node == 0 == node % each else []


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


def exhausted(spec: Spec, graph: Graph) -> Outcome:
    """A search that goes on until nothing is left."""
    outcome = explore(Setting(spec, graph), spec.plan)
    outcome.exhaust()
    outcome.find_closest()
    return outcome


def fits(place: Place, candidate: Candidate) -> bool:
    return all(stage.total_bytes <= capacity_of(place, stage.stage) for stage in ledger(place, candidate))


def capacity_of(place: Place, rank: int) -> int:
    """What a plan may use of the memory of a pipeline rank's devices: the least of them."""
    cluster, each = place.bench.setting.spec.cluster, place.mesh.world_size // place.pipeline
    devices = [pool.device for pool in cluster.pools for _ in range(pool.nodes * pool.devices_per_node)]
    return min(capacity_bytes(device) for device in devices[rank * each : (rank + 1) * each])
