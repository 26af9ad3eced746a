"""From the chosen candidate to the Plan: layout, ledger, collectives, predictions."""

from __future__ import annotations

from typing import NamedTuple

from mlmdsl.graph.flops import active_parameters, flops_per_token
from mlmdsl.planner import schedule
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.blend import regions_of
from mlmdsl.planner.candidate import Candidate, Times
from mlmdsl.planner.memory import stage_memory
from mlmdsl.planner.plan import (
    ClusterFacts,
    ModelFacts,
    Plan,
    PlanVariables,
    Predicted,
    SearchReport,
    StageMemory,
    StageTime,
)
from mlmdsl.planner.pools import pool_facts
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.traffic import collectives, flops

_AXES = ("tensor", "context", "expert", "data", "pipeline")


def plan_of(place: Place, candidate: Candidate, report: SearchReport) -> Plan:
    """Without runners-up, wishes and notes."""
    setting = place.bench.setting
    train = setting.spec.train
    sizes = setting.graph.sizes(candidate.micro_batch, train.seq_len)
    return Plan(
        spec_sha256=setting.spec.sha256,
        overrides=setting.spec.overrides,
        plan=variables(candidate),
        predicted=predicted(place, candidate),
        model=_model(setting),
        cluster=_cluster(place),
        search=report,
        alternatives=(),
        seq_len=train.seq_len,
        batch=train.batch,
        precision=train.precision,
        memory=ledger(place, candidate),
        tensors=ledger(place, candidate, tensors=True),
        layout=place.bench.sharding.layouts(sizes, setting.width),
        context_layout=place.bench.sharding.context_layouts(sizes, setting.width),
        collectives=collectives(place, candidate),
        flops=flops(place, candidate),
        timeline=_timeline(place, candidate),
    )


def variables(c: Candidate) -> PlanVariables:
    return PlanVariables(
        tensor=c.tensor,
        sequence_parallel=c.sequence_parallel,
        context=c.context,
        pipeline=c.pipeline,
        interleave=c.interleave,
        schedule=c.schedule,
        data=c.data,
        replicate=c.replicate,
        zero=c.zero,
        expert=c.expert,
        micro_batch=c.micro_batch,
        recompute=c.recomputed,
        stages=c.cut.stages,
        order=c.order,
    )


def ledger(place: Place, c: Candidate, *, tensors: bool = False) -> tuple[StageMemory, ...]:
    """By pipeline stage, at the moment when the device holds the most, or when tensors alone are the most."""
    fullest = (place.fullest(c, rank, c.cut.held(rank), tensors=tensors) for rank in range(place.pipeline))
    context = place.context_bytes + place.more_context_bytes(c.replicate)
    each = enumerate(fullest)
    return tuple(stage_memory(rank, moment.turn, state, held, context) for rank, (moment, state, held) in each)


def predicted(place: Place, c: Candidate) -> Predicted:
    setting, times = place.bench.setting, place.times(c)
    train, world = setting.spec.train, setting.spec.cluster.world_size
    rate = setting.step_flops / times.total / place.mesh.world_size
    hours = times.total * train.steps / 3600
    watts = sum(p.nodes * p.devices_per_node * p.device.power_watts for p in setting.spec.cluster.pools)
    price = setting.spec.cluster.usd_per_device_hour
    return Predicted(
        step_time_s=times.total,
        tokens_per_s_per_device=train.batch * train.seq_len / times.total / place.mesh.world_size,
        model_tflops_per_device=rate / 1e12,
        mfu=rate / setting.peak,
        bubble_fraction=times.bubble / times.pipeline,
        peak_memory_bytes=tuple(stage.total_bytes for stage in ledger(place, c)),
        train_days=hours / 24,
        cost_usd=None if price is None else hours * world * price,
        energy_kwh=hours * watts / 1000,
        breakdown_s=_breakdown(place, c, times),
    )


# ---- time -----------------------------------------------------------------------------------------------------------


class _Share(NamedTuple):
    """Seconds of one micro-batch on one rank. gathered: what ZeRO 3 adds to passes that do not hide it."""

    compute: float
    recompute: float
    tensor: float
    context: float
    expert: float
    sends: float
    gathered: float

    @property
    def whole(self) -> float:
        return sum(self)


def _breakdown(place: Place, c: Candidate, times: Times) -> dict[str, float]:
    """The parts of the step on the busiest rank; they add up to it. On shared cores it is faster while others wait."""
    m: float = place.micro_batches(c.micro_batch)
    shares = [_share(place, c, rank) for rank in range(place.pipeline)]
    busiest = max(shares, key=lambda share: share.whole)
    if place.idle_share < 1.0:
        m = min(m, times.pipeline / busiest.whole)
    return {
        "compute": m * busiest.compute,
        "recompute": m * busiest.recompute,
        "tensor": m * busiest.tensor,
        "context": m * busiest.context,
        "expert": m * busiest.expert,
        "pipeline": m * busiest.sends,
        "data": m * busiest.gathered + times.gathered + times.summed + place.sync_seconds,
        "optimizer": times.optimizer,
        "bubble": times.pipeline - m * busiest.whole if place.pipeline > 1 else 0.0,
    }


def _share(place: Place, c: Candidate, rank: int) -> _Share:
    stages = c.cut.placed[rank]
    costs, chain = place.benches[rank].passes(c.micro_batch).costs, place.bench.setting.chain
    regions = [each for stage in stages for each in regions_of(chain, c.cut.parts[stage], place.how(c, stage))]
    counted = [(costs[i], count) for i, _, count in regions]
    compute = sum(count * (cost.forward_seconds + cost.backward_seconds) for cost, count in counted)
    tensor = sum(count * (cost.tensor_forward_seconds + cost.tensor_backward_seconds) for cost, count in counted)
    context = sum(count * (cost.context_forward_seconds + cost.context_backward_seconds) for cost, count in counted)
    expert = sum(count * (cost.expert_forward_seconds + cost.expert_backward_seconds) for cost, count in counted)
    repeated = [(costs[i].again[mode], count) for i, mode, count in regions]
    again = sum(count * (a.kernel_seconds + a.tensor_seconds + a.context_seconds + a.expert_seconds) for a, count in repeated)
    forward, backward = _passes(place, c, stages)
    sends = forward + backward - compute - tensor - context - expert - again
    gathering = place.with_gathers(c, ((1, forward, backward, 0.0),))
    gathered = sum(f + b for _, f, b, _ in gathering) - forward - backward
    return _Share(compute, again, tensor, context, expert, sends if place.pipeline > 1 else 0.0, gathered)


def _passes(place: Place, c: Candidate, stages: tuple[int, ...]) -> tuple[float, float]:
    """Forward and backward seconds of one micro-batch through virtual stages, sends included."""
    each = [place.stage_seconds(c, stage) for stage in stages]
    return sum(forward for forward, _, _ in each), sum(backward for _, backward, _ in each)


def _timeline(place: Place, c: Candidate) -> tuple[StageTime, ...]:
    times, m = place.times(c), place.micro_batches(c.micro_batch)
    found: list[StageTime] = []
    starts = 0.0
    for rank, stages in enumerate(c.cut.placed):
        forward, backward = _passes(place, c, stages)
        busy = m * (forward + backward)
        found.append(
            StageTime(
                stage=rank,
                layers=sum(c.cut.stages[stage] for stage in stages),
                starts_s=starts,
                forward_s=forward,
                backward_s=backward,
                busy_s=busy,
                idle_s=max(0.0, times.pipeline - busy) if place.pipeline > 1 else 0.0,
                in_flight=sum(schedule.in_flight(c.schedule, place.pipeline, c.interleave, m, rank)),
            )
        )
        starts += _passes(place, c, stages[:1])[0]
    return tuple(found)


# ---- facts ----------------------------------------------------------------------------------------------------------


def _model(setting: Setting) -> ModelFacts:
    parameters = setting.graph.parameters
    return ModelFacts(
        name=setting.graph.model,
        parameters=parameters,
        parameters_active=active_parameters(setting.graph),
        flops_per_token=flops_per_token(setting.graph, setting.spec.train.seq_len),
    )


def _cluster(place: Place) -> ClusterFacts:
    setting = place.bench.setting
    cluster, precision = setting.spec.cluster, setting.spec.train.precision
    names = dict.fromkeys(p.device.name for p in cluster.pools)
    return ClusterFacts(
        name=cluster.name,
        device=" + ".join(names),
        device_memory_bytes=setting.device.memory_bytes,
        peak_flops_per_second=setting.peak,
        nodes=sum(pool.nodes for pool in cluster.pools),
        devices_per_node=setting.network.devices_per_node,
        world_size=cluster.world_size,
        links=links_of(place),
        pools=pool_facts(cluster, place.mesh, precision),
    )


def links_of(place: Place) -> dict[str, dict[str, float | str]]:
    """The slowest link that groups of each axis cross, as ClusterFacts has it."""
    network = place.bench.setting.network
    links = {axis: network.link(place.mesh, axis) for axis in _AXES if place.mesh.size(axis) > 1}
    return {
        axis: {
            "link": link.kind,
            "bytes_per_second": link.bytes_per_second / link.oversubscription,
            "latency_seconds": link.latency_seconds,
        }
        for axis, link in links.items()
    }
