"""The search: of all legal plans (space.py) the best one that fits is assembled into a Plan, with its runners-up.

Best first: bounds on time (bounds.py) say which mesh, which micro-batch, which schedule and way of recomputing to look at next;
what a bound on memory proves not to fit is not cut into stages; the ledger comes before the price; and what a bound proves to
be behind the best plan and its runners-up is not looked at (`SearchReport` says how many of each). The choice is that of an
exhaustive search. Deterministic: of plans that cost the same the simpler one is taken.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from operator import le
from typing import Any, NamedTuple

from mlmdsl.grammar.constraints import USUAL
from mlmdsl.grammar.spec import PlanConstraints, Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import assemble, explain, recomputing
from mlmdsl.planner.bounds import Share, least_blended, least_from, least_seconds, least_with, share_of
from mlmdsl.planner.outcome import Branch, Found, Outcome
from mlmdsl.planner.passes import MODES
from mlmdsl.planner.plan import Plan, Schedule, SearchReport
from mlmdsl.planner.pricing import Bench, Candidate, Place, Setting, Times
from mlmdsl.planner.refitting import Fitting
from mlmdsl.planner.rules import CompiledRule, compile_rule
from mlmdsl.planner.schedule import V_SHAPED, Course, pipeline_bound
from mlmdsl.planner.space import Space

_TIMES = frozenset({"step_time", "bubble", "mfu", "cost"})  # facts that follow from times
_LATE = frozenset({"zero", "replicate", "replicate.crosses_nodes", "stages", "memory", *_TIMES})  # not known of a branch
_GROUPED = frozenset({"micro_batch", "schedule", "interleave", "recompute"})  # known of one with a schedule
_PLAIN: tuple[Schedule, ...] = ("1f1b", "gpipe", "interleaved_1f1b", *V_SHAPED)  # simplest first


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
    best = outcome.found[0]
    alternatives, wishes = explain.runners_up(outcome), explain.wishes(outcome)
    rejected = explain.rejections(outcome)
    report = SearchReport(
        candidates=outcome.candidates,
        feasible=len(outcome.found),
        bounded=outcome.bounded,
        outpaced=outcome.outpaced,
        seconds=round(time.perf_counter() - started, 3),
        rejected=rejected,
    )
    plan = assemble.plan_of(best.place, best.candidate, report)
    notes = explain.notes(outcome, plan, explore)
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
    """The best plan within the pins is the first of `found`, if any fits; as little else is looked at as that takes."""
    memory = float(setting.device.memory_bytes)
    rules = tuple(compile_rule(rule, setting.device, memory) for rule in limits.rules)
    outcome = Outcome(setting, tuple(rule for rule in rules if not rule.hard))
    space = Space(setting, {pin.variable: pin.value for pin in limits.pins}, outcome)
    judge = Judge(setting, limits.minimize, tuple(rule for rule in rules if rule.hard), outcome, space)
    outcome.open_up, outcome.find_closest = judge.open_up, judge.find_closest
    for place in space.places():
        judge.plant(place)
    outcome.settle()
    if outcome.found and "recompute" not in space.pins and limits.minimize != "memory":
        recomputing.refine(outcome, judge.limit_bytes, judge.add, judge.least_milder)
        outcome.settle()
    if not outcome.found:
        outcome.find_closest()
    return outcome


class _Aside(NamedTuple):
    """A branch that a bound proves not to fit; `over`: by so many bytes at least."""

    over: int
    number: int
    branch: Branch


@dataclass(frozen=True)
class Judge:
    """Opens branches: bounds smaller ones, tallies what does not fit, keeps what does."""

    setting: Setting
    minimize: str
    rules: tuple[CompiledRule, ...]
    outcome: Outcome
    space: Space
    _aside: list[_Aside] = field(default_factory=list[_Aside])
    _numbers: Iterator[int] = field(default_factory=count)
    _fittings: dict[tuple[object, ...], Fitting] = field(default_factory=dict[tuple[object, ...], Fitting])
    _shares: dict[Place, dict[tuple[int, int], Share]] = field(default_factory=dict[Place, "dict[tuple[int, int], Share]"])

    # ---- branches ---------------------------------------------------------------------------------------------------

    def plant(self, place: Place) -> None:
        """All candidates of a mesh."""
        sizes = tuple(size for size, courses in self.space.runs(place).courses.items() if courses)
        candidates = self.space.count(place, sizes)
        self.outcome.candidates += candidates
        if candidates:
            self.outcome.plant(self._from(place, sizes))

    def _from(self, place: Place, sizes: tuple[int, ...]) -> Branch:
        if self.minimize == "memory":
            bound = self._least_bytes(place, sizes[0]) * (1 - 1e-8)
        else:
            bound = least_from(place, [share.overhead for share in self._on(place).values()], sizes[0])
        return Branch(bound, self._broken(place), place, sizes, self.space.shares(place))

    def open_up(self, branch: Branch) -> Iterator[Branch]:
        """Smaller branches, or the same with a closer bound; a plan that fits goes to the outcome."""
        if branch.schedule is not None and branch.passes is None and self._has_one_cut(branch):
            candidate = next(self._candidates(branch))
            yield self._bounded(branch._replace(passes=branch.place.passes_seconds(candidate, pipeline_bound)))
        elif branch.schedule is not None and len(branch.shares) == 1:
            self._price(branch)
        elif branch.mode is None and (over := self._over(branch)) > 0:
            self._put_aside(over, branch)
        else:
            for part in self._parts(branch):
                if part.mode is None:
                    yield part
                elif (fitting := self._fitting(part)).shares:
                    yield self._bounded(fitting)

    def _has_one_cut(self, branch: Branch) -> bool:
        """Whether layers are cut into stages in the same way whatever fits, and times matter."""
        return self.minimize != "memory" and branch.place.alike and not branch.modes

    def _parts(self, branch: Branch) -> Iterator[Branch]:
        """All that a branch consists of."""
        if branch.mode is None:
            return self._ways(branch)
        return self._groups(branch) if branch.schedule is None else self._leaves(branch)

    def _ways(self, branch: Branch) -> Iterator[Branch]:
        """With the first micro-batch, by way of recomputing; all with larger ones."""
        place, (micro_batch, *larger), milder = branch.place, branch.micro_batches, inf
        for mode, modes in self.space.ways():
            if self.space.courses(place, micro_batch, (mode, modes)):
                yield Branch(0.0, branch.broken, place, (micro_batch,), self.space.shares(place), mode, modes, milder)
                milder = branch.bound
        if larger:
            yield self._from(place, tuple(larger))

    def _groups(self, way: Branch) -> Iterator[Branch]:
        """By schedule."""
        for schedule, interleave in self._courses(way):
            shares = tuple(share for share in self.space.shares(way.place, schedule) if share in way.shares)
            if shares:
                group = way._replace(shares=shares, schedule=schedule, interleave=interleave)
                yield group._replace(broken=self._broken(way.place, group)) if self.outcome.wishes else group

    def _leaves(self, group: Branch) -> Iterator[Branch]:
        """By ZeRO and its copies."""
        return (group._replace(shares=(share,)) for share in group.shares)

    def _fitting(self, branch: Branch) -> Branch:
        """What may fit of one with a way of recomputing; the rest is put aside."""
        if branch.modes:
            return branch
        assert branch.mode is not None
        known = self._on(branch.place)
        most = branch.place.most_states(branch.micro_batches[0], branch.mode, self._courses(branch))
        fitting = tuple(share for share in branch.shares if any(map(le, known[share].states, most)))
        if len(fitting) == len(branch.shares):
            return branch
        rest = branch._replace(shares=tuple(share for share in branch.shares if share not in fitting))
        self._put_aside(self._over(rest), rest)
        return branch._replace(shares=fitting)

    def _bounded(self, branch: Branch) -> Branch:
        """One with a way of recomputing."""
        if self.minimize == "memory":
            return branch._replace(bound=self._least_under(branch) * (1 - 1e-8))
        place, (micro_batch,), mode, courses = branch.place, branch.micro_batches, branch.mode, self._courses(branch)
        assert mode is not None
        overheads = [self._on(place)[share].overhead for share in branch.shares]
        if branch.passes is not None:
            return branch._replace(bound=least_with(place, overheads, micro_batch, branch.interleave, branch.passes))
        return branch._replace(bound=least_seconds(place, overheads, micro_batch, 0 if branch.modes else mode, courses))

    def least_milder(self, branch: Branch, milds: Iterable[int]) -> float:
        """A closer bound than `milder`: as few layers are recomputed as memory allows, the others in one of these ways."""
        assert branch.mode is not None
        place, (micro_batch,) = branch.place, branch.micro_batches
        courses, ways = self._courses(branch), [(mild, branch.mode) for mild in milds]
        shares = [self._on(place)[share] for share in branch.shares]
        closest = min(least_blended(place, share, micro_batch, ways, courses) for share in shares)
        if branch.passes is None:
            return closest
        candidate, overheads = next(self._candidates(branch)), [share.overhead for share in shares]
        each = (place.passes_seconds(candidate._replace(recompute=mild), pipeline_bound) for mild, _ in ways)
        return max(closest, least_with(place, overheads, micro_batch, branch.interleave, min(each)))

    def _courses(self, branch: Branch) -> tuple[Course, ...]:
        """Of one with a way of recomputing."""
        if branch.schedule is not None:
            return ((branch.schedule, branch.interleave),)
        assert branch.mode is not None
        return self.space.courses(branch.place, branch.micro_batches[0], (branch.mode, branch.modes))

    def _on(self, place: Place) -> Mapping[tuple[int, int], Share]:
        """What ways of ZeRO take on a place."""
        found = self._shares.get(place)
        if found is None:
            found = self._shares[place] = {share: share_of(place, *share) for share in self.space.shares(place)}
        return found

    def _broken(self, place: Place, group: Branch | None = None) -> int:
        """Wishes that no candidate of a branch keeps, as far as they speak of what all have in common."""
        known, unknown = self._facts_of(place) if self.outcome.wishes else {}, _LATE | _GROUPED
        if group is not None and group.mode is not None and not group.modes:
            known |= {
                "micro_batch": group.micro_batches[0],
                "schedule": group.schedule,
                "interleave": group.interleave,
                "recompute": MODES[group.mode],
            }
            unknown = _LATE
        wishes = enumerate(self.outcome.wishes)
        return sum(1 << i for i, wish in wishes if wish.names.isdisjoint(unknown) and not wish.kept(known))

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _over(self, branch: Branch) -> int:
        """Bytes by which all of its candidates exceed what a plan may use, at least. What layers keep that are recomputed in
        several ways has no bound."""
        if branch.modes or (branch.mode is None and isinstance(self.space.pins.get("recompute"), tuple)):
            return 0
        if branch.mode is None:
            return self._least_bytes(branch.place, branch.micro_batches[0]) - branch.place.most_bytes
        return self._least_under(branch) - branch.place.most_bytes

    def _least_bytes(self, place: Place, micro_batch: int) -> int:
        """Grows with the micro-batch."""
        return place.least_bytes(micro_batch, min(share.states.plain for share in self._on(place).values()))

    def _least_under(self, branch: Branch) -> int:
        """Of one with a way of recomputing."""
        assert branch.mode is not None
        chosen = (branch.micro_batches[0], branch.mode, self._courses(branch))
        states = (self._on(branch.place)[share].states for share in branch.shares)
        return min(branch.place.least_under(*chosen, each) for each in states)

    def _put_aside(self, over: int, branch: Branch) -> None:
        """Not looked at, unless it may be the closest to fit."""
        candidates = self._count(branch)
        self.outcome.reject("memory").count += candidates
        self.outcome.bounded += candidates
        self._aside.append(_Aside(over, next(self._numbers), branch))

    def _count(self, branch: Branch) -> int:
        if branch.mode is None:
            return self.space.count(branch.place, branch.micro_batches)
        return sum(len(group.shares) for group in self._groups(branch)) if branch.schedule is None else len(branch.shares)

    def find_closest(self) -> None:
        """Of what was put aside, what may be closer to fitting than anything so far: the least bound first."""
        tally = self.outcome.rejected.get(("memory", ""))
        if tally is None:
            return
        waiting = self._aside
        heapify(waiting)
        while waiting and waiting[0].over < tally.distance:
            _, _, branch = heappop(waiting)
            if branch.schedule is not None:
                for candidate in self._candidates(branch):
                    tally.closer(branch.place.over_bytes(candidate), candidate, branch.place)
                continue
            for part in self._parts(branch):
                heappush(waiting, _Aside(self._over(part), next(self._numbers), part))

    # ---- prices -----------------------------------------------------------------------------------------------------

    def _price(self, branch: Branch) -> None:
        """What does not fit needs no price."""
        for candidate in self._candidates(branch):
            if branch.place.alike:
                limit = branch.place.most_bytes
                peak = branch.place.peak_bytes(candidate, limit)
                if peak > limit:
                    self._put_aside(peak - limit, branch)
                else:
                    self._weigh(candidate, branch.place, peak)
                continue
            over = branch.place.over_bytes(candidate)
            if over <= 0:
                self._weigh(candidate, branch.place, branch.place.peak_bytes(candidate))
                continue
            self.outcome.reject("memory").add(over, candidate, branch.place)
            if not branch.modes and "stages" not in self.space.pins:
                other = self._refitting(branch.place, candidate).within(candidate)
                if other is not None:
                    self.add(other, branch.place)

    def _refitting(self, place: Place, c: Candidate) -> Fitting:
        """Alike for plans that differ in ZeRO alone."""
        key = (place, c.micro_batch, c.schedule, c.interleave, c.recompute)
        if key not in self._fittings:
            self._fittings[key] = Fitting(place, c)
        return self._fittings[key]

    def _candidates(self, branch: Branch) -> Iterator[Candidate]:
        """By ZeRO and its copies."""
        place, sharding, schedule = branch.place, branch.place.bench.sharding, branch.schedule
        assert schedule is not None and branch.mode is not None
        given, (micro_batch,) = self.space.pins.get("stages"), branch.micro_batches
        if given is not None:
            cut = place.given(given, schedule)
        else:
            cut = place.cut(micro_batch, branch.mode, schedule, branch.interleave)
        fixed = (sharding.tensor, sharding.sequence_parallel, place.pipeline, place.data)
        chosen = (micro_batch, schedule, branch.interleave, branch.mode)
        around = (cut, place.context, place.expert)
        for zero, replicate in branch.shares:
            yield Candidate(*fixed, *chosen, zero, *around, replicate, branch.modes, place.order)

    def add(self, candidate: Candidate, place: Place) -> None:
        """One that fits."""
        self.outcome.candidates += 1
        self._weigh(candidate, place, place.peak_bytes(candidate))

    @cached_property
    def limit_bytes(self) -> float:
        """The most that a plan may take, as far as rules over memory alone say it, too."""
        rules = [rule for rule in self.rules if "memory" in rule.names and rule.names <= {"memory", "device.memory"}]

        def kept(size: float) -> bool:
            return all(rule.kept({"memory": size}) for rule in rules)

        low, high = 0.0, float(self.setting.most_bytes)
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

    def _weigh(self, candidate: Candidate, place: Place, peak: int) -> None:
        exact = self._asks_for_times
        times = place.times(candidate) if exact else place.times(candidate, pipeline_bound)
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

    def _facts_of(self, place: Place) -> dict[str, Any]:
        """What rules may speak of that all plans of a place have in common."""
        mesh, sharding = place.mesh, place.bench.sharding
        crosses = {
            f"{axis}.crosses_nodes": mesh.crosses_nodes(axis) for axis in ("tensor", "context", "pipeline", "data", "expert")
        }
        degrees = {name: mesh.size(name) for name in ("tensor", "context", "pipeline", "data", "expert")}
        return {**degrees, "order": place.order, "sequence_parallel": sharding.sequence_parallel, **crosses}

    def facts(self, c: Candidate, place: Place, times: Times, peak: int) -> dict[str, Any]:
        """What rules may speak of, as plain numbers."""
        spec = self.setting.spec
        hours = times.total * spec.train.steps / 3600
        return {
            **self._facts_of(place),
            "replicate": c.replicate,
            "replicate.crosses_nodes": place.mesh_of(c.replicate).crosses_nodes("replicate"),
            "interleave": c.interleave,
            "micro_batch": c.micro_batch,
            "zero": c.zero,
            "schedule": c.schedule,
            "recompute": c.recomputed,
            "stages": c.cut.stages,
            "memory": float(peak),
            "step_time": times.total,
            "bubble": times.bubble / times.pipeline,
            "mfu": self.setting.step_flops / (times.total * spec.cluster.world_size * self.setting.peak),
            "cost": hours * spec.cluster.world_size * (spec.cluster.usd_per_device_hour or 0.0),
        }


def simplicity(c: Candidate, peak: int) -> tuple[int, ...]:
    """Smaller is simpler: nothing recomputed, less ZeRO, fewer virtual stages, no context axis, no expert axis, a shorter
    pipeline, less tensor parallelism, ranks in the usual order."""
    axes = (c.context, c.expert, c.pipeline, c.tensor, c.sequence_parallel, c.order != USUAL)
    return (c.recompute, bool(c.modes), c.zero, c.replicate, c.interleave, *axes, _PLAIN.index(c.schedule), peak)
