"""The search: every legal plan is priced and put against the ledger; the best one is assembled into a Plan.

Exhaustive over tensor x sequence_parallel x context x pipeline x data x expert x micro_batch x recompute x schedule x
interleave x ZeRO, but for degrees of interleaving that differ little (`Space._interleaves`), and for degrees of context that
leave a rank little of a sequence (`Space._contexts`). What a bound proves not to fit is counted, not priced; what a bound
proves to be slower than the best and its runners-up keeps the bound (`SearchReport` says how many). "Legal" is what divides and
what torch's schedules can run; everything else has its price (pricing.py). Deterministic: of plans that cost the same the
simpler one is taken.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heapify, heappop, heapreplace
from math import gcd
from typing import Any, NamedTuple, cast

from mlmdsl.grammar.constraints import ZEROS
from mlmdsl.grammar.spec import PlanConstraints, Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import assemble, explain, recomputing
from mlmdsl.planner.outcome import Found, Outcome
from mlmdsl.planner.passes import MODES
from mlmdsl.planner.plan import Plan, Schedule, SearchReport
from mlmdsl.planner.pricing import Bench, Candidate, Place, Setting, Times
from mlmdsl.planner.rules import CompiledRule, compile_rule
from mlmdsl.planner.schedule import V_SHAPED, cannot_run, executable, pipeline_bound, recomputes, zeros
from mlmdsl.planner.sharding import Infeasible
from mlmdsl.planner.stages import Cut

_LONG = 8192  # tokens
_TIMES = frozenset({"step_time", "bubble", "mfu", "cost"})  # facts that follow from times
_PLAIN: tuple[Schedule, ...] = ("1f1b", "gpipe", "interleaved_1f1b", *V_SHAPED)  # simplest first


Chosen = tuple[int, int, Schedule, int]  # micro-batch, index into MODES, schedule, interleave


class Group(NamedTuple):
    """Candidates that differ in ZeRO and its copies alone."""

    place: Place
    micro_batch: int
    mode: int
    schedule: Schedule
    interleave: int
    cut: Cut
    modes: tuple[int, ...] = ()


def search(spec: Spec, graph: Graph) -> Plan:
    """The best plan. Raises PlanError (MLM0601 to 0604) where none fits."""
    collecting = gc.isenabled()
    gc.disable()  # a search makes many small things and no cycles
    try:
        return _searched(spec, graph)
    finally:
        if collecting:
            gc.enable()


def _searched(spec: Spec, graph: Graph) -> Plan:
    started = time.perf_counter()
    outcome = explore(Setting(spec, graph), spec.plan)
    if not outcome.found:
        raise explain.nothing_fits(outcome, explore)
    alternatives, wishes = explain.runners_up(outcome), explain.wishes(outcome)
    report = SearchReport(
        candidates=outcome.candidates,
        feasible=len(outcome.found),
        bounded=outcome.pruned,
        outpaced=sum(not found.exact for found in outcome.found),
        seconds=round(time.perf_counter() - started, 3),
        rejected=explain.rejections(outcome),
    )
    best = outcome.found[0]
    plan = assemble.plan_of(best.place, best.candidate, report)
    notes = explain.notes(outcome.setting, plan)
    return plan.model_copy(update={"alternatives": alternatives, "soft": wishes, "notes": notes})


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
        judge.price(group, space.shares(group.place, group.schedule))
    for group in space.closest_to_fit():
        judge.measure(group, space.shares(group.place, group.schedule))
    outcome.settle()
    if outcome.found and "recompute" not in space.pins and limits.minimize != "memory":
        recomputing.refine(outcome, judge.limit_bytes, judge.add)
        outcome.settle()
    return outcome


# ---- what is legal --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """The legal candidates within the pins; what is not legal is tallied, a mesh or a choice at a time."""

    setting: Setting
    pins: Mapping[str, Any]
    outcome: Outcome
    _put_off: list[tuple[int, int, Place, Chosen]] = field(default_factory=list[tuple[int, int, Place, "Chosen"]])

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
            if not (choices := self.shares(place)):
                continue
            least = 0  # grows with the micro-batch: what is too much for one need not be told for a larger one
            for micro_batch in self.within("micro_batch", divisors(batch // data)):
                if least <= self.setting.capacity_bytes:
                    least = min(place.least_bytes(micro_batch, *choice) for choice in choices)
                for schedule, interleave in self._schedules(pipeline, batch // data // micro_batch):
                    yield from self._cuts(place, micro_batch, schedule, interleave, least)

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

    def _cuts(self, place: Place, micro_batch: int, schedule: Schedule, interleave: int, least: int) -> Iterator[Group]:
        """Candidates that a bound proves not to fit are tallied at once; `least`: bytes that any on this mesh holds."""
        if isinstance(asked := self.pins.get("recompute"), tuple):
            yield from self._mixed(place, micro_batch, schedule, interleave, cast(tuple[str, ...], asked))
            return
        modes = self.within("recompute", recomputes(schedule) if self.setting.chain.layers else MODES[:1])
        given = self.pins.get("stages")
        if given is not None and len(given) != place.pipeline * interleave:
            return
        choices = self.shares(place, schedule)
        for mode in map(MODES.index, modes):
            chosen = (micro_batch, mode, schedule, interleave)
            over = least - self.setting.capacity_bytes
            if over <= 0:
                over = min(place.least_under(*chosen, *choice) for choice in choices) - self.setting.capacity_bytes
            if over > 0:
                self._put_aside(over, place, chosen, len(choices))
            else:
                yield self._group(place, chosen)

    def _mixed(
        self, place: Place, micro_batch: int, schedule: Schedule, interleave: int, asked: tuple[str, ...]
    ) -> Iterator[Group]:
        """As a pin says for every layer."""
        given = self.pins.get("stages")
        if not set(asked) <= set(recomputes(schedule)) or (given is not None and len(given) != place.pipeline * interleave):
            return
        modes = tuple(map(MODES.index, asked))
        group = self._group(place, (micro_batch, max(modes), schedule, interleave))
        yield group._replace(modes=modes) if len(set(modes)) > 1 else group

    def _group(self, place: Place, chosen: Chosen) -> Group:
        given = self.pins.get("stages")
        cut = place.given(given, chosen[2]) if given is not None else place.cut(*chosen)
        return Group(place, *chosen, cut)

    def _put_aside(self, over: int, place: Place, chosen: Chosen, count: int) -> None:
        """Not priced, unless it may be the closest to fit."""
        tally = self.outcome.reject("memory")
        tally.count += count
        self.outcome.candidates += count
        self.outcome.pruned += count
        if over < tally.distance:
            self._put_off.append((over, len(self._put_off), place, chosen))

    def closest_to_fit(self) -> Iterator[Group]:
        """Of what was put aside, what may be closer to fitting than anything so far: the least bound first."""
        tally, waiting = self.outcome.reject("memory"), self._put_off
        heapify(waiting)
        while waiting and waiting[0][0] < tally.distance:
            over, number, place, chosen = waiting[0]
            choices = self.shares(place, chosen[2])
            exact = min(place.least_under(*chosen, *choice) for choice in choices) - self.setting.capacity_bytes
            if exact > over:
                heapreplace(waiting, (exact, number, place, chosen))
            else:
                heappop(waiting)
                yield self._group(place, chosen)
        if not tally.count:
            del self.outcome.rejected["memory", ""]

    def shares(self, place: Place, schedule: Schedule = "1f1b") -> tuple[tuple[int, int], ...]:
        """(zero, replicate). Over one rank with these weights ZeRO is nothing, unless asked for by name."""
        pinned = (self.pins["zero"],) if "zero" in self.pins else None
        choices = pinned or (ZEROS if place.replicas > 1 else (0,))
        legal = (zero for zero in choices if zero in zeros(schedule))
        return tuple((zero, replicate) for zero in legal for replicate in self._copies(place, zero))

    def _copies(self, place: Place, zero: int) -> tuple[int, ...]:
        """Copies of sharded weights: where replicas lie on several nodes, one on each of them, so that what is sent for every
        micro-batch stays inside. ZeRO 1 sends once a step. A pin may ask for any."""
        asked = self.pins.get("replicate")
        if asked is None or asked == 1:
            return (1, place.islands) if asked is None and zero > 1 and place.islands > 1 else (1,)
        return (asked,) if zero and place.data % asked == 0 and place.replicas > asked else ()

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

    def price(self, group: Group, shares: tuple[tuple[int, int], ...]) -> None:
        """What does not fit needs no price."""
        self.outcome.candidates += len(shares)
        for candidate, peak in self._peaks(group, shares):
            if peak > self.setting.capacity_bytes:
                tally = self.outcome.reject("memory")
                tally.add(peak - self.setting.capacity_bytes, candidate, group.place)
            else:
                exact = self._asks_for_times
                times = group.place.times(candidate) if exact else group.place.times(candidate, pipeline_bound)
                self._weigh(candidate, group.place, times, peak, exact)

    def measure(self, group: Group, shares: tuple[tuple[int, int], ...]) -> None:
        """How far from fitting are candidates that are known not to fit, and counted."""
        for candidate, peak in self._peaks(group, shares):
            self.outcome.reject("memory").closer(peak - self.setting.capacity_bytes, candidate, group.place)

    def _peaks(self, group: Group, shares: tuple[tuple[int, int], ...]) -> Iterator[tuple[Candidate, int]]:
        """Bytes of the fullest rank."""
        place, sharding = group.place, group.place.bench.sharding
        fixed = (sharding.tensor, sharding.sequence_parallel, place.pipeline, place.data)
        chosen = (group.micro_batch, group.schedule, group.interleave, group.mode)
        around = (group.cut, place.context, place.expert)
        candidates = [Candidate(*fixed, *chosen, zero, *around, replicate, group.modes) for zero, replicate in shares]
        fillings = place.fillings(candidates[0])
        yield from ((candidate, place.peak_bytes(candidate, fillings)) for candidate in candidates)

    def add(self, candidate: Candidate, place: Place) -> None:
        """One that fits."""
        self.outcome.candidates += 1
        peak = place.peak_bytes(candidate)
        self._weigh(candidate, place, place.times(candidate), peak, True)

    @cached_property
    def limit_bytes(self) -> float:
        """The most that a plan may take, as far as rules over memory alone say it, too."""
        rules = [rule for rule in self.rules if "memory" in rule.names and rule.names <= {"memory", "device.memory"}]

        def kept(size: float) -> bool:
            return all(rule.kept({"memory": size}) for rule in rules)

        low, high = 0.0, float(self.setting.capacity_bytes)
        if kept(high):
            return high
        while high - low > 1:
            middle = (low + high) / 2
            low, high = (middle, high) if kept(middle) else (low, middle)
        return low

    @cached_property
    def _asks_for_times(self) -> bool:
        """Otherwise plans that a bound proves to be behind the best ones may keep the bound."""
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
        self.outcome.found.append(Found(objective, times, peak, broken, candidate, place, simple, exact))

    def facts(self, c: Candidate, place: Place, times: Times, peak: int) -> dict[str, Any]:
        """What rules may speak of, as plain numbers."""
        spec, mesh = self.setting.spec, place.mesh
        crosses = {
            f"{axis}.crosses_nodes": mesh.crosses_nodes(axis) for axis in ("tensor", "context", "pipeline", "data", "expert")
        }
        hours = times.total * spec.train.steps / 3600
        return {
            "replicate": c.replicate,
            "replicate.crosses_nodes": place.mesh_of(c.replicate).crosses_nodes("replicate"),
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
            "recompute": c.recomputed,
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
    return (c.recompute, bool(c.modes), c.zero, c.replicate, c.interleave, *axes, _PLAIN.index(c.schedule), peak)
