"""The search: every legal plan is priced and put against the ledger; the best one is assembled into a Plan.

Exhaustive over tensor x sequence_parallel x context x pipeline x data x expert x micro_batch x recompute x schedule x
interleave x ZeRO, but for degrees of interleaving that differ little (`Space._interleaves`), and for degrees of context that
leave a rank little of a sequence (`Space._contexts`); what a bound proves not to fit is counted, not priced. "Legal" is what
divides and what torch's schedules can run; everything else has its price (pricing.py). Deterministic: of plans that cost the
same the simpler one is taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any, NamedTuple

from mlmdsl.grammar.spec import PlanConstraints, Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import assemble, explain
from mlmdsl.planner.outcome import Found, Outcome
from mlmdsl.planner.passes import MODES
from mlmdsl.planner.plan import Plan, Schedule, SearchReport
from mlmdsl.planner.pricing import Bench, Candidate, Place, Setting, Times
from mlmdsl.planner.rules import CompiledRule, compile_rule
from mlmdsl.planner.schedule import V_SHAPED, cannot_run, executable, pipeline_bound, recomputes, zeros
from mlmdsl.planner.sharding import Infeasible
from mlmdsl.planner.stages import Cut

_LONG = 8192  # tokens
_FAR = 1.25  # times the best plan's objective
_TIMES = frozenset({"step_time", "bubble", "mfu", "cost"})  # facts that follow from times
_PLAIN: tuple[Schedule, ...] = ("1f1b", "gpipe", "interleaved_1f1b", *V_SHAPED)  # simplest first


class Group(NamedTuple):
    """Candidates that differ in ZeRO alone."""

    place: Place
    micro_batch: int
    mode: int
    schedule: Schedule
    interleave: int
    cut: Cut


def search(spec: Spec, graph: Graph) -> Plan:
    """The best plan. Raises PlanError (MLM0601 to 0604) where none fits."""
    started = time.perf_counter()
    outcome = explore(Setting(spec, graph), spec.plan)
    if not outcome.found:
        raise explain.nothing_fits(outcome, explore)
    seconds = time.perf_counter() - started
    report = SearchReport(
        candidates=outcome.candidates,
        feasible=len(outcome.found),
        seconds=round(seconds, 3),
        rejected=explain.rejections(outcome),
    )
    best = outcome.found[0]
    plan = assemble.plan_of(best.place, best.candidate, report)
    return plan.model_copy(
        update={
            "alternatives": explain.runners_up(outcome),
            "soft": explain.wishes(outcome),
            "notes": explain.notes(outcome.setting, plan),
        }
    )


def single_device(spec: Spec, graph: Graph) -> Plan:
    """The trivial plan on one device, whatever the cluster says: for sampling. Memory is not asked for."""
    setting = Setting(spec, graph)
    bench = setting.shard(1, False)
    assert isinstance(bench, Bench)
    place = Place(bench, 1, 1)
    candidate = Candidate(1, False, 1, 1, 1, "1f1b", 1, 0, 0, place.given((setting.chain.count,)))
    return assemble.plan_of(place, candidate, SearchReport(candidates=1, feasible=1, seconds=0.0, rejected=()))


def explore(setting: Setting, limits: PlanConstraints) -> Outcome:
    """Prices every legal candidate within the pins."""
    memory = float(setting.device.memory_bytes)
    rules = tuple(compile_rule(rule, setting.device, memory) for rule in limits.rules)
    outcome = Outcome(setting, tuple(rule for rule in rules if not rule.hard))
    space = Space(setting, {pin.variable: pin.value for pin in limits.pins}, outcome)
    judge = Judge(setting, limits.minimize, tuple(rule for rule in rules if rule.hard), outcome)
    for group in space.groups():
        judge.price(group, space.zeros(group.place, group.schedule))
    outcome.found.sort(key=Found.order)
    return outcome


# ---- what is legal --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """The legal candidates within the pins; what is not legal is tallied, a mesh or a choice at a time."""

    setting: Setting
    pins: Mapping[str, Any]
    outcome: Outcome

    def within(self, name: str, values: Iterable[Any]) -> list[Any]:
        """The values that a pin leaves."""
        return [value for value in values if name not in self.pins or self.pins[name] == value]

    def groups(self) -> Iterator[Group]:
        world = self.setting.spec.cluster.world_size
        for tensor in self.within("tensor", divisors(world)):
            for parallel in self.within("sequence_parallel", (False, True) if tensor > 1 else (False,)):
                bench = self.setting.shard(tensor, parallel)
                if isinstance(bench, Infeasible):
                    self._reject(bench.reason, float(tensor), bench.message)
                    continue
                for context in self._contexts(world // tensor):
                    yield from self._over_context(bench, context, world // tensor // context)

    def _contexts(self, ranks: int) -> list[int]:
        """Degrees that leave every rank `_LONG` tokens of a sequence: shorter parts are what the data axis is for, which costs
        no gathering of keys and values. A pin may ask for any."""
        longest = self.setting.spec.train.seq_len // _LONG
        return self.within("context", (n for n in divisors(ranks) if n <= max(1, longest) or "context" in self.pins))

    def _over_context(self, bench: Bench, context: int, ranks: int) -> Iterator[Group]:
        along = bench.over_context(context)
        if isinstance(along, Infeasible):
            self._reject(along.reason, float(context), along.message)
            return
        for pipeline in self.within("pipeline", divisors(ranks)):
            yield from self._on_mesh(along, pipeline, ranks // pipeline)

    def _on_mesh(self, bench: Bench, pipeline: int, data: int) -> Iterator[Group]:
        layers, batch = self.setting.chain.count, self.setting.spec.train.batch
        if not self.within("data", (data,)):
            return
        if pipeline > max(layers, 1):
            self._reject("layers", float(pipeline), f"pipeline = {pipeline} has more stages than the model's {layers} layers")
            return
        if batch % data:
            message = f"a batch of {batch} cannot be split over data = {data}"
            self._reject("batch", float(data), message)
            return
        for expert in self._experts(data * bench.sharding.context):
            place = Place(bench.over_experts(expert), pipeline, data)
            hopeless = False
            for micro_batch in self.within("micro_batch", divisors(batch // data)):
                hopeless = hopeless or self._hopeless(place.least_bytes(micro_batch, zero) for zero in self.zeros(place))
                for schedule, interleave in self._schedules(pipeline, batch // data // micro_batch):
                    yield from self._cuts(place, micro_batch, schedule, interleave, hopeless)

    def _experts(self, replicas: int) -> list[int]:
        """Degrees that divide the replicas and the experts of every layer."""
        return self.within("expert", divisors(gcd(replicas, self.setting.experts)) if self.setting.experts else (1,))

    def _schedules(self, pipeline: int, micro_batches: int) -> Iterator[tuple[Schedule, int]]:
        for schedule, interleave in self._choices(pipeline):
            if not self.within("schedule", (schedule,)) or not self.within("interleave", (interleave,)):
                continue
            if not self.within("zero", zeros(schedule)):
                continue
            if executable(schedule, pipeline, micro_batches):
                yield schedule, interleave
            else:
                self._reject("schedule", float(pipeline - micro_batches), cannot_run(schedule, pipeline, micro_batches))

    def _choices(self, pipeline: int) -> Iterator[tuple[Schedule, int]]:
        """Schedules with their virtual stages a rank, simplest first."""
        if pipeline == 1:
            yield ("gpipe" if self.pins.get("schedule") == "gpipe" else "1f1b"), 1
            return
        yield "1f1b", 1
        yield "gpipe", 1
        for interleave in sorted(self.within("interleave", self._interleaves(pipeline))):
            yield "interleaved_1f1b", interleave
        if 2 * pipeline <= self.setting.chain.count:
            yield "zb_v", 2
            yield "dualpipe_v", 2

    def _interleaves(self, pipeline: int) -> Iterable[int]:
        """Of degrees whose largest virtual stage has as many layers, the least: more stages send more, and gain little, where
        the first and the last grow shorter (three parts in a hundred on small models). A pin may ask for any."""
        layers = self.setting.chain.count
        several = range(2, layers // pipeline + 1)
        if "interleave" in self.pins:
            return several
        return {-(-layers // (pipeline * v)): v for v in reversed(several)}.values()

    def _cuts(self, place: Place, micro_batch: int, schedule: Schedule, interleave: int, hopeless: bool) -> Iterator[Group]:
        """Candidates that a bound proves not to fit are tallied at once."""
        modes = self.within("recompute", recomputes(schedule) if self.setting.chain.layers else MODES[:1])
        given = self.pins.get("stages")
        if given is not None and len(given) != place.pipeline * interleave:
            return
        choices = self.zeros(place, schedule)
        for mode in map(MODES.index, modes):
            chosen = (micro_batch, mode, schedule, interleave)
            if hopeless or self._hopeless(place.least_under(*chosen, zero) for zero in choices):
                self.outcome.rejected["memory", ""].count += len(choices)
                self.outcome.candidates += len(choices)
                continue
            cut = place.given(given, schedule) if given is not None else place.cut(micro_batch, mode, schedule, interleave)
            yield Group(place, *chosen, cut)

    def _hopeless(self, least: Iterable[int]) -> bool:
        """Whether plans that take so many bytes at least neither fit nor are the closest to it."""
        tally = self.outcome.rejected.get(("memory", ""))
        return tally is not None and all(each - self.setting.capacity_bytes > tally.distance for each in least)

    def zeros(self, place: Place, schedule: Schedule = "1f1b") -> tuple[int, ...]:
        """Over one rank with these weights ZeRO is nothing, unless asked for by name."""
        pinned = (self.pins["zero"],) if "zero" in self.pins else None
        choices = pinned or ((0, 1, 3) if place.replicas > 1 else (0,))
        return tuple(zero for zero in choices if zero in zeros(schedule))

    def _reject(self, reason: str, distance: float, words: str) -> None:
        self.outcome.candidates += 1
        self.outcome.reject(reason).add(distance, words=words)


def divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return (*small, *(n // d for d in reversed(small) if d * d != n))


# ---- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Prices groups of candidates, tallies what does not fit, keeps what does."""

    setting: Setting
    minimize: str
    rules: tuple[CompiledRule, ...]
    outcome: Outcome

    def price(self, group: Group, zeros: tuple[int, ...]) -> None:
        """What does not fit needs no price."""
        place, outcome = group.place, self.outcome
        sharding = place.bench.sharding
        fixed = (sharding.tensor, sharding.sequence_parallel, place.pipeline, place.data)
        chosen = (group.micro_batch, group.schedule, group.interleave, group.mode)
        candidates = [Candidate(*fixed, *chosen, zero, group.cut, place.context, place.expert) for zero in zeros]
        outcome.candidates += len(candidates)
        held = place.held_bytes(candidates[0])
        fitting: list[tuple[Candidate, int]] = []
        for candidate in candidates:
            peak = place.peak_bytes(candidate, held)
            over = peak - self.setting.capacity_bytes
            if over > 0:
                outcome.reject("memory").add(over, candidate, place)
            else:
                fitting.append((candidate, peak))
        for candidate, peak in fitting:
            times = place.times(candidate, pipeline_bound)
            exact = self._asks_for_times or times.total <= _FAR * outcome.best
            self._weigh(candidate, place, place.times(candidate) if exact else times, peak, exact)

    @cached_property
    def _asks_for_times(self) -> bool:
        """Otherwise plans that a bound proves to be far behind the best one may keep the bound."""
        names = {name for rule in (*self.rules, *self.outcome.wishes) for name in rule.names}
        return self.minimize == "memory" or not names.isdisjoint(_TIMES)

    def _weigh(self, candidate: Candidate, place: Place, times: Times, peak: int, exact: bool) -> None:
        facts = self.facts(candidate, place, times, peak) if self.rules or self.outcome.wishes else {}
        for rule in self.rules:
            if not rule.kept(facts):
                distance = peak if "memory" in rule.names else times.total
                self.outcome.reject(rule.rule.form, rule.rule.text).add(distance, candidate, place)
                return
        broken = sum(1 << i for i, wish in enumerate(self.outcome.wishes) if not wish.kept(facts))
        # all devices of the cluster are taken, so the cheapest plan is the fastest
        objective = float(peak) if self.minimize == "memory" else times.total
        simple = simplicity(candidate, peak)
        found = Found(objective, times, peak, broken, candidate, place, simple, exact)
        self.outcome.found.append(found)
        self.outcome.best = min(self.outcome.best, found.order()[0])

    def facts(self, c: Candidate, place: Place, times: Times, peak: int) -> dict[str, Any]:
        """What rules may speak of, as plain numbers."""
        spec, mesh = self.setting.spec, place.mesh
        crosses = {
            f"{axis}.crosses_nodes": mesh.crosses_nodes(axis) for axis in ("tensor", "context", "pipeline", "data", "expert")
        }
        hours = times.total * spec.train.steps / 3600
        return {
            "replicate": 1,
            "replicate.crosses_nodes": False,
            "expert": c.expert,
            "tensor": c.tensor,
            "context": c.context,
            "pipeline": c.pipeline,
            "data": c.data,
            "interleave": c.interleave,
            "micro_batch": c.micro_batch,
            "zero": c.zero,
            "sequence_parallel": c.sequence_parallel,
            "schedule": c.schedule,
            "recompute": MODES[c.recompute],
            "stages": c.cut.stages,
            "memory": float(peak),
            "step_time": times.total,
            "bubble": times.bubble / times.pipeline,
            "mfu": self.setting.step_flops / (times.total * spec.cluster.world_size * self.setting.kernels.peak),
            "cost": hours * spec.cluster.world_size * (spec.cluster.usd_per_device_hour or 0.0),
            **crosses,
        }


def simplicity(c: Candidate, peak: int) -> tuple[int, ...]:
    """Smaller is simpler: nothing recomputed, less ZeRO, fewer virtual stages, no context axis, no expert axis, a shorter
    pipeline, less tensor parallelism."""
    axes = (c.context, c.expert, c.pipeline, c.tensor, c.sequence_parallel)
    return (c.recompute, c.zero, c.interleave, *axes, _PLAIN.index(c.schedule), peak)
