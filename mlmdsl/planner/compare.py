"""Two plans side by side: what each part of a step takes under either, and in words why one is slower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlmdsl import words
from mlmdsl.frozen import frozen
from mlmdsl.planner.assemble import ledger, links_of, predicted, variables
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.plan import Plan, PlanVariables, Predicted, StageMemory
from mlmdsl.planner.pricing import Place

_SAME = 0.0005  # of a step: times that differ by less are alike
_NOTABLE = 0.10  # of the difference: parts that explain less are left out
_STATE = ("weights_bytes", "master_weights_bytes", "optimizer_bytes")


@dataclass(frozen=True)
class Costed:
    """A plan and what it costs; `links`: by axis, as ClusterFacts has them; `batch`: sequences of a step; `alike`: whether all
    stages lie on alike devices."""

    plan: PlanVariables
    predicted: Predicted
    memory: tuple[StageMemory, ...]
    links: dict[str, dict[str, float | str]]
    batch: int
    alike: bool = True

    @property
    def seconds(self) -> float:
        return self.predicted.step_time_s

    @property
    def peak_bytes(self) -> int:
        return max(self.predicted.peak_memory_bytes)

    @property
    def micro_batches(self) -> int:
        return self.batch // (self.plan.data * self.plan.micro_batch)

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total_bytes)

    def part(self, name: str) -> float:
        return self.predicted.breakdown_s.get(name, 0.0)


def costed(place: Place, candidate: Candidate) -> Costed:
    batch, alike = place.bench.setting.spec.train.batch, place.alike
    return Costed(variables(candidate), predicted(place, candidate), ledger(place, candidate), links_of(place), batch, alike)


def costed_plan(plan: Plan) -> Costed:
    alike = len({pool.device for pool in plan.cluster.pools}) < 2 or plan.plan.pipeline == 1
    return Costed(plan.plan, plan.predicted, plan.memory, plan.cluster.links, plan.batch, alike)


@frozen
class Part:
    """Seconds of a step that one part takes under two plans."""

    name: str
    chosen_s: float
    other_s: float


def parts_of(chosen: Costed, other: Costed) -> tuple[Part, ...]:
    """Those that either has."""
    names = dict.fromkeys((*chosen.predicted.breakdown_s, *other.predicted.breakdown_s))
    found = (Part(name=name, chosen_s=chosen.part(name), other_s=other.part(name)) for name in names)
    return tuple(part for part in found if part.chosen_s > 0 or part.other_s > 0)


def verdict(chosen: Costed, other: Costed) -> Literal["slower", "faster", "as_fast"]:
    more = other.seconds / chosen.seconds - 1
    return "as_fast" if abs(more) < _SAME else "slower" if more > 0 else "faster"


def difference(chosen: Costed, other: Costed) -> str:
    """`2.1 s (27 %) slower: tensor collectives take 2.4 s more (...), and compute 320 ms less`."""
    kind = verdict(chosen, other)
    if kind == "as_fast":
        return f"takes as long; {_memory(chosen, other)}"
    slower, faster = (other, chosen) if kind == "slower" else (chosen, other)
    gap = slower.seconds - faster.seconds
    lead = f"{words.seconds(gap)} ({words.percent(gap / chosen.seconds)}) {kind}"
    losses = _largest(slower, faster, gap)
    if kind == "slower":
        clauses = [
            f"{_NAMES[name]} {_verb(name)} {words.seconds(more)} more{_because(name, slower, faster)}" for name, more in losses
        ]
    else:
        clauses = [f"{_NAMES[name]} {_verb(name)} {words.seconds(more)} less" for name, more in losses]
    saved = _largest(faster, slower, gap)
    if saved:
        saving = ", ".join(f"{_NAMES[name]} {words.seconds(less)}" for name, less in saved)
        clauses.append(f"against that {saving} {'less' if kind == 'slower' else 'more'}")
    return f"{lead}: {'; '.join(clauses)}"


def _largest(slower: Costed, faster: Costed, gap: float) -> list[tuple[str, float]]:
    """Parts that take longer in the first, the most first."""
    more = [(part.name, part.chosen_s - part.other_s) for part in parts_of(slower, faster)]
    return sorted((item for item in more if item[1] > _NOTABLE * gap), key=lambda item: -item[1])[:3]


def _memory(chosen: Costed, other: Costed) -> str:
    more = other.peak_bytes - chosen.peak_bytes
    if abs(more) < 2**20:
        return "the choice is the simpler of the two"
    return f"its peak memory is {words.gib(abs(more))} {'more' if more > 0 else 'less'}"


# ---- why a part takes longer ----------------------------------------------------------------------------------------

_NAMES = {
    "compute": "compute",
    "recompute": "recomputation",
    "tensor": "tensor collectives",
    "context": "collectives over parts of the sequence",
    "expert": "the exchange with experts",
    "pipeline": "sends between stages",
    "data": "sums of gradients and ZeRO's gathers",
    "optimizer": "the optimizer",
    "bubble": "the pipeline's idle time",
}
_PLURAL = ("tensor", "context", "pipeline", "data")


def _verb(name: str) -> str:
    return "take" if name in _PLURAL else "takes"


def _because(name: str, slower: Costed, faster: Costed) -> str:
    reason = _REASONS[name](slower, faster) if name in _REASONS else ""
    return f" ({reason})" if reason else ""


def _compute(slower: Costed, faster: Costed) -> str:
    a, b = slower.plan, faster.plan
    fullest, mean = max(_layers(a)), sum(a.stages) / a.pipeline
    if not slower.alike or not faster.alike:
        return _on_pools(slower, faster)
    if fullest > 1.02 * mean and fullest / mean > 1.01 * max(_layers(b)) / (sum(b.stages) / b.pipeline):
        return f"the fullest of {a.pipeline} stages has {fullest} layers of {mean:.4g} on average"
    if a.tensor > b.tensor:
        return f"each matrix is cut in {a.tensor}, not {b.tensor}, and smaller products use a device less well"
    if a.tensor > 1 and b.sequence_parallel and not a.sequence_parallel:
        return "every tensor rank works on the whole sequence in norms and additions"
    if a.micro_batch < b.micro_batch:
        return f"{slower.micro_batches:,} micro-batches of {a.micro_batch}, not {faster.micro_batches:,} of {b.micro_batch}"
    if a.pipeline > b.pipeline:
        return f"of {a.pipeline} stages the one with the head has more than its share"
    return ""


def _on_pools(slower: Costed, faster: Costed) -> str:
    """Where one of them at least has stages on unlike devices."""
    if slower.alike:
        return "every rank works at the pace of the slowest device, where stages on faster ones could have more layers"
    a, b = slower.plan, faster.plan
    if not faster.alike and (a.pipeline, a.interleave) == (b.pipeline, b.interleave) and a.stages != b.stages:
        return "layers are not laid on stages by the speed of their devices"
    return ""


def _layers(plan: PlanVariables) -> list[int]:
    """Of each rank of the pipeline; virtual stages lie round and round (of a V in pairs, which add up alike)."""
    return [sum(plan.stages[rank :: plan.pipeline]) for rank in range(plan.pipeline)]


def _recompute(slower: Costed, faster: Costed) -> str:
    a, b = slower.plan.recomputed, faster.plan.recomputed
    return f"{a}, not {b}" if a != b else ""


def _tensor(slower: Costed, faster: Costed) -> str:
    a, b = slower.plan.tensor, faster.plan.tensor
    if _link(slower, "tensor") != _link(faster, "tensor") and b > 1:
        return f"groups of {a} go over {_over(slower, 'tensor')}"
    if b == 1:
        return f"with tensor 1 there are none; groups of {a} go over {_over(slower, 'tensor')}"
    if a > b:
        return f"{a} ranks exchange the same activations as {b} do, for less work each"
    if slower.plan.recompute != faster.plan.recompute and slower.plan.recompute == "full":
        return "those of the forward pass are run again"
    if slower.plan.micro_batch < faster.plan.micro_batch:
        return f"more and smaller calls, of {slower.plan.micro_batch} sequences each"
    return ""


def _pipeline(slower: Costed, faster: Costed) -> str:
    a, b = slower.plan, faster.plan
    if a.pipeline * a.interleave > b.pipeline * b.interleave and len(a.stages) > len(b.stages):
        return f"{len(a.stages)} virtual stages hand on activations over {_over(slower, 'pipeline')}, not {len(b.stages)}"
    return f"over {_over(slower, 'pipeline')}" if _link(slower, "pipeline") != _link(faster, "pipeline") else ""


def _data(slower: Costed, faster: Costed) -> str:
    a, b = slower.plan, faster.plan
    if a.zero == 3 and b.zero != 3:
        return f"ZeRO 3 gathers weights for every pass of {_batches(slower)}"
    if a.zero == 3 and slower.micro_batches > faster.micro_batches:
        return f"weights are gathered for {_batches(slower)}, not {faster.micro_batches:,}"
    share_a, share_b = a.tensor * a.pipeline, b.tensor * b.pipeline
    if share_a < share_b:
        return f"a rank has 1/{share_a} of the weights, not 1/{share_b}, so more gradients to sum over {_over(slower, 'data')}"
    if _link(slower, "data") != _link(faster, "data"):
        return f"over {_over(slower, 'data')}"
    if a.pipeline > 1 and b.pipeline == 1:
        return "under a pipeline they wait for the last backward pass"
    return f"ZeRO {a.zero}, not {b.zero}" if a.zero != b.zero else ""


def _optimizer(slower: Costed, faster: Costed) -> str:
    a, b = (sum(getattr(each.fullest, name) for name in _STATE) for each in (slower, faster))
    return f"a rank keeps {words.gib(a)} of weights and state, not {words.gib(b)}" if a > 1.05 * b else ""


def _bubble(slower: Costed, faster: Costed) -> str:
    a, b = slower.plan, faster.plan
    what = f"{a.pipeline} stages of {a.schedule} are filled by {_batches(slower)}"
    if b.pipeline == 1:
        return what
    if a.pipeline == b.pipeline and slower.micro_batches == faster.micro_batches:
        kind, other = (_scheduled(each) for each in (a, b))
        return f"{kind}, not {other}" if kind != other else "stages are less even"
    return f"{what}, not {b.pipeline} by {faster.micro_batches:,}"


def _batches(each: Costed) -> str:
    return f"{each.micro_batches:,} micro-batch{'es' * (each.micro_batches != 1)}"


def _scheduled(plan: PlanVariables) -> str:
    return plan.schedule + (f" x {plan.interleave}" if plan.interleave > 1 else "")


def _expert(slower: Costed, faster: Costed) -> str:
    a, b = slower.plan.expert, faster.plan.expert
    if b == 1:
        return "with expert 1 there is none"
    return f"groups of {a} go over {_over(slower, 'expert')}" if _link(slower, "expert") != _link(faster, "expert") else ""


def _link(each: Costed, axis: str) -> str:
    return str(each.links[axis]["link"]) if axis in each.links else ""


def _over(each: Costed, axis: str) -> str:
    """`infiniband at 50 GB/s`."""
    if axis not in each.links:
        return "no link"
    return f"{each.links[axis]['link']} at {words.rate(float(each.links[axis]['bytes_per_second']))}"


_REASONS: dict[str, Callable[[Costed, Costed], str]] = {
    "compute": _compute,
    "recompute": _recompute,
    "tensor": _tensor,
    "expert": _expert,
    "pipeline": _pipeline,
    "data": _data,
    "optimizer": _optimizer,
    "bubble": _bubble,
}
