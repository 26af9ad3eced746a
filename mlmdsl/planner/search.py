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
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import Any, NamedTuple

from mlmdsl.grammar.constraints import USUAL
from mlmdsl.grammar.spec import PlanConstraints, Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import assemble, explain, recomputing
from mlmdsl.planner.bench import Bench, Setting
from mlmdsl.planner.bounds import (
    ROUNDED,
    LeastStep,
    Rates,
    Share,
    least_at,
    least_busy,
    least_mixed,
    least_step,
    least_with,
    rates_of,
    shares_of,
)
from mlmdsl.planner.candidate import Candidate, Times
from mlmdsl.planner.demand import Cuts, Demand, demand_of, loaded_demand
from mlmdsl.planner.outcome import Branch, Found, Outcome
from mlmdsl.planner.plan import Plan, Schedule, SearchReport
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.refitting import Fitting
from mlmdsl.planner.rooms import Unlike
from mlmdsl.planner.rules import CompiledRule, compile_rule
from mlmdsl.planner.schedule import V_SHAPED, Course, pipeline_bound
from mlmdsl.planner.space import Space

_TIMES = frozenset({"step_time", "bubble", "mfu", "cost"})  # facts that follow from times
# Facts that are not known of a branch
_LATE = frozenset({"zero", "recompute", "replicate", "replicate.crosses_nodes", "stages", "memory", *_TIMES})
_GROUPED = frozenset({"micro_batch", "schedule", "interleave"})  # known of one with a schedule
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
    return replace(plan, alternatives=alternatives, soft=wishes, notes=notes)


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
    if not outcome.found:
        outcome.find_closest()
    return outcome


class _Aside(NamedTuple):
    """A branch that a bound proves not to fit; `over`: by so many bytes at least."""

    over: float
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
    _unlike: Unlike = field(default_factory=Unlike)
    _shares: dict[Place, dict[tuple[int, int], Share]] = field(default_factory=dict[Place, "dict[tuple[int, int], Share]"])
    _demands: dict[tuple[object, ...], Demand] = field(default_factory=dict[tuple[object, ...], Demand])
    _rated: dict[tuple[Place, int, tuple[int, ...], bool], Rates] = field(
        default_factory=dict[tuple[Place, int, tuple[int, ...], bool], Rates]
    )

    # ---- branches ---------------------------------------------------------------------------------------------------

    def plant(self, place: Place) -> None:
        """All candidates of a mesh."""
        sizes = tuple(size for size, courses in self.space.runs(place).courses.items() if courses)
        candidates = self.space.count(place, sizes)
        self.outcome.candidates += candidates
        if candidates:
            self.outcome.plant(Branch(self._afar(place), self._broken(place), place, sizes))

    def _afar(self, place: Place) -> float:
        """What no plan of a place takes less than, as far as passes tell that do not wait for each other."""
        return 0.0 if self.minimize == "memory" else least_busy(place, self.setting.spec.train.batch)

    def _peeled(self, branch: Branch) -> Iterator[Branch]:
        """The smallest micro-batch, by schedules that are much alike, and all others."""
        place, (first, *others) = branch.place, branch.micro_batches
        for family in self.space.families(place, first):
            shares = self.space.shares(place, family.schedule)
            for group in family.now:
                yield from self._scheduled(branch._replace(micro_batches=(first,), courses=group, shares=shares))
        if others:
            yield from self._larger(branch._replace(micro_batches=tuple(others)))

    def _larger(self, branch: Branch) -> Iterator[Branch]:
        """With these micro-batches, as far as sums over a whole batch tell; if they may fit."""
        place, found = branch.place, list[LeastStep]()
        for family in self.space.families(place, branch.micro_batch):
            now = tuple(course for group in family.now for course in group)
            part = branch._replace(courses=now, shares=self.space.shares(place, family.schedule))
            found += self._least(part, family.ever, self.setting.spec.train.batch)
        over = min((least.over for least in found), default=inf)
        if over > 0:
            self._put_aside(over, branch)
            return
        seconds = min(least.seconds for least in found)
        yield branch._replace(bound=max(branch.bound, self._objective(place, seconds, over)))

    def _least(self, branch: Branch, ever: tuple[Course, ...] = (), of: int = 0) -> list[LeastStep]:
        """By way of ZeRO, of the smallest micro-batch under a branch's schedules, or of this or a larger one under `ever`, as
        far as sums of `of` sequences tell; however layers are cut."""
        place, micro_batch, schedule, on = branch.place, branch.micro_batch, branch.schedule, self._on(branch.place)
        rates = self._rates(place, of or micro_batch, self.space.modes(schedule), schedule)
        shares = [on[choice] for choice in branch.shares]
        return least_at(place, shares, rates, micro_batch, branch.courses, ever, of, self._is_balanced(place))

    def _objective(self, place: Place, seconds: float, over: float) -> float:
        return (over + place.most_bytes) * (1 - 1e-8) if self.minimize == "memory" else seconds

    def open_up(self, branch: Branch) -> Iterator[Branch]:
        """Smaller branches, or the same with a closer bound; a plan that fits goes to the outcome."""
        if branch.mild is not None:
            yield from self._mixed(branch)
        elif branch.candidate is not None:
            self._weigh(branch.candidate, branch.place, branch.place.peak_bytes(branch.candidate))
        elif branch.mode is not None:
            yield from self._fitting(branch)
        elif not branch.courses:
            yield from self._peeled(branch)
        elif len(branch.courses) > 1:
            for part in self._parts(branch):
                yield from self._scheduled(part)
        elif not branch.closely:
            yield from self._viable(branch._replace(closely=True))
        else:
            for part in self._parts(branch):
                yield from self._viable(part)

    def _scheduled(self, branch: Branch) -> Iterator[Branch]:
        """With one schedule, by way of ZeRO; with several, all ways that may fit."""
        alone = len(branch.courses) == 1
        if alone and self.outcome.wishes:
            branch = branch._replace(broken=self._broken(branch.place, branch))
        bounds = [(self._objective(branch.place, least.seconds, least.over), least.over) for least in self._least(branch)]
        kept = self._kept(branch, bounds)
        if alone:
            yield from kept
        elif several := list(kept):
            yield branch._replace(bound=min(each.bound for each in several), shares=tuple(each.shares[0] for each in several))

    def _parts(self, branch: Branch) -> Iterator[Branch]:
        """All that a branch consists of: by schedule, by ZeRO and its copies, by way of recomputing."""
        place = branch.place
        if len(branch.courses) != 1:
            for course in branch.courses or self.space.runs(place).courses[branch.micro_batch]:
                shares = branch.shares or self.space.shares(place, course[0])
                if shares and self.space.ways(course[0]):
                    yield branch._replace(courses=(course,), shares=shares)
        elif len(branch.shares) > 1:
            for share in branch.shares:
                yield branch._replace(shares=(share,))
        else:
            for mode, modes in self.space.ways(branch.schedule):
                yield branch._replace(mode=mode, modes=modes)

    def _kept(self, branch: Branch, bounds: Iterable[tuple[float, float]]) -> Iterator[Branch]:
        """Of one with a schedule, by way of ZeRO, what may fit; the rest is put aside. (bound, over) of each."""
        aside, least = list[tuple[int, int]](), inf
        for choice, (bound, over) in zip(branch.shares, bounds, strict=True):
            if over <= 0 and bound < inf:
                yield branch._replace(shares=(choice,), bound=max(bound, branch.bound))
            else:
                aside.append(choice)
                least = min(least, over)
        if aside:
            self._put_aside(least, branch._replace(shares=tuple(aside)))

    def _viable(self, branch: Branch) -> Iterator[Branch]:
        """Of one with a schedule and a way of ZeRO."""
        yield from self._kept(branch, [self._bounds(branch)])

    def _bounds(self, branch: Branch) -> tuple[float, float]:
        """(bound, over) of one with a schedule and a way of ZeRO: what none of its candidates falls below, and bytes by which
        they exceed what a plan may use, at least."""
        place, micro_batch, (choice,) = branch.place, branch.micro_batch, branch.shares
        rates, demand, kept = self._terms(branch)
        share = self._on(place)[choice]
        over, bound = demand.over(demand.may_keep(share.states), share.states, kept), inf
        if over <= 0 and self.minimize != "memory":
            bound = least_step(place, share, rates, place.micro_batches(micro_batch), branch.course, demand)
        if self._is_free(branch):
            passes, lacking = self._unlike.least(place, micro_batch, branch.course, self._modes(branch), choice)
            bound, over = max(bound, least_with(place, share, micro_batch, passes)), max(over, lacking)
        return self._objective(place, bound, over), over

    def _fitting(self, branch: Branch) -> Iterator[Branch]:
        """One way of recomputing: if that fits, itself, and others that recompute some layers in a milder way."""
        if not branch.told and branch.schedule in V_SHAPED and branch.place.alike:  # it takes long to tell what fits
            yield self._told(branch, self._candidate(branch))
            return
        candidate = self._laid_out(branch)
        if candidate is None:
            return
        milder = (mild for mild, _ in self.space.ways(candidate.schedule) if mild < candidate.recompute)
        for mild in (None, *(milder if self._mixes(branch) else ())):
            part = branch._replace(candidate=candidate, mild=mild, told=False)
            if self._is_free(branch):
                yield self._told(part, candidate)
            else:
                yield part._replace(bound=max(branch.bound, self._bounds(part)[0]))

    def _told(self, branch: Branch, candidate: Candidate) -> Branch:
        """One whose layers are laid on stages: what it takes at least, each layer's passes as short as if all were recomputed
        in the milder way."""
        place = branch.place
        mild = candidate.recompute if branch.mild is None else branch.mild
        if self.minimize == "memory":
            return branch._replace(told=True)
        if self._is_free(branch):
            passes = self._unlike.laid(place, candidate, mild)
            bound = least_with(place, self._on(place)[branch.shares[0]], branch.micro_batch, passes)
        else:
            bound = ROUNDED * place.times(candidate._replace(recompute=mild), pipeline_bound).total
            if mild < candidate.recompute and self._is_plain(place):
                rates, demand, _ = self._terms(branch)
                bound = max(bound, least_mixed(place, self._on(place)[branch.shares[0]], rates, candidate, mild, demand))
        return branch._replace(bound=max(bound, branch.bound), told=True)

    def _mixes(self, branch: Branch) -> bool:
        """Whether layers of a plan may be recomputed in two ways."""
        return not branch.modes and "recompute" not in self.space.pins and self.minimize != "memory"

    def _mixed(self, branch: Branch) -> Iterator[Branch]:
        """As few layers under the dearer way as memory allows."""
        place, candidate, mild = branch.place, branch.candidate, branch.mild
        assert candidate is not None and mild is not None
        if not branch.told:
            yield self._told(branch, candidate)
            return
        for found, peak in recomputing.fewest(place, candidate, mild, self.limit_bytes):
            self.outcome.candidates += 1
            self._weigh(found, place, peak)

    def _terms(self, branch: Branch) -> tuple[Rates, Demand, float]:
        """What bounds on one with a schedule are made of; bytes of a micro-batch that its layers keep at least."""
        place, micro_batch, schedule = branch.place, branch.micro_batch, branch.schedule
        modes = self._modes(branch)
        rates = self._rates(place, micro_batch, modes, schedule)
        kept = rates.trade.least
        if branch.mode is not None and not branch.modes:  # alone it has to fit
            kept = self._rates(place, micro_batch, (branch.mode,), schedule).trade.kept
        return rates, self._demand(branch, rates, modes), kept

    def _is_free(self, branch: Branch) -> bool:
        """Whether layers are laid on the stages of unlike devices as memory allows."""
        return not branch.place.alike and not branch.modes and "stages" not in self.space.pins

    def _modes(self, branch: Branch) -> tuple[int, ...]:
        """Ways in which layers may be recomputed, the mildest first."""
        every, mode = self.space.modes(branch.schedule), branch.mode
        if mode is None or branch.modes:
            return every
        if branch.mild is not None:
            return branch.mild, mode
        if branch.candidate is not None or not self._mixes(branch):
            return (mode,)
        return tuple(mild for mild in every if mild <= mode)

    def _demand(self, branch: Branch, rates: Rates, modes: tuple[int, ...]) -> Demand:
        """Of one with a schedule."""
        place, micro_batch, course, candidate = branch.place, branch.micro_batch, branch.course, branch.candidate
        m = place.micro_batches(micro_batch)
        if place.pipeline == 1 or not self._is_plain(place):
            return demand_of(place, rates.held, m, (course,))
        if candidate is not None:
            return loaded_demand(place, rates.held, m, course, (candidate.cut.stages,))
        key = (place, micro_batch, course, branch.mode, modes)
        found = self._demands.get(key)
        if found is None:
            found = self._demands[key] = loaded_demand(place, rates.held, m, course, self._cuts(branch))
        return found

    def _is_plain(self, place: Place) -> bool:
        """Whether all layers are alike, and all devices."""
        return place.alike and len(self.setting.chain.kinds) == 1

    def _is_balanced(self, place: Place) -> bool:
        """Whether they are cut so that the slowest stage is as fast as can be, too."""
        return self._is_plain(place) and "stages" not in self.space.pins

    def _cuts(self, branch: Branch) -> Cuts:
        """Ways in which layers may be cut into stages: for each way of recomputing the one that balances them."""
        if (given := self.space.pins.get("stages")) is not None:
            return (given,)
        modes = [mode for mode, _ in self.space.ways(branch.schedule)] if branch.mode is None else [branch.mode]
        bench, stages = branch.place.bench, branch.place.pipeline * branch.course[1]
        found = [bench.balanced(branch.micro_batch, mode, stages) for mode in modes]
        return tuple({id(cut): cut for cut in found}.values())  # equal ones are one object

    def _rates(self, place: Place, micro_batch: int, modes: tuple[int, ...], schedule: Schedule) -> Rates:
        key = (place, micro_batch, modes, schedule in V_SHAPED)
        found = self._rated.get(key)
        if found is None:
            found = self._rated[key] = rates_of(*key)
        return found

    def _on(self, place: Place) -> Mapping[tuple[int, int], Share]:
        """What ways of ZeRO take on a place."""
        found = self._shares.get(place)
        if found is None:
            found = self._shares[place] = shares_of(place, self.space.shares(place))
        return found

    def _broken(self, place: Place, branch: Branch | None = None) -> int:
        """Wishes that no candidate of a branch keeps, as far as they speak of what all have in common."""
        known, unknown = self._facts_of(place) if self.outcome.wishes else {}, _LATE | _GROUPED
        if branch is not None:
            schedule, interleave = branch.course
            known |= {"micro_batch": branch.micro_batch, "schedule": schedule, "interleave": interleave}
            unknown = _LATE
        wishes = enumerate(self.outcome.wishes)
        return sum(1 << i for i, wish in wishes if wish.names.isdisjoint(unknown) and not wish.kept(known))

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _put_aside(self, over: float, branch: Branch) -> None:
        """Not looked at, unless it may be the closest to fit."""
        candidates = self._count(branch)
        self.outcome.reject("memory").count += candidates
        self.outcome.bounded += candidates
        self._aside.append(_Aside(over, next(self._numbers), branch))

    def _count(self, branch: Branch) -> int:
        if not branch.courses:
            return self.space.count(branch.place, branch.micro_batches)
        courses, shares = len(branch.courses), len(branch.shares)
        return courses * shares * len(self.space.ways(branch.schedule)) if branch.mode is None else 1

    def find_closest(self) -> None:
        """Of what was put aside, what may be closer to fitting than anything so far: the least bound first."""
        tally = self.outcome.rejected.get(("memory", ""))
        if tally is None:
            return
        waiting = self._aside
        heapify(waiting)
        while waiting and waiting[0].over < tally.distance:
            _, _, branch = heappop(waiting)
            if branch.mode is not None:
                candidate, place = self._candidate(branch), branch.place
                limit = min(tally.distance, waiting[0].over if waiting else inf)  # what is further over may wait
                over = place.over_bytes(candidate, limit)
                if over <= limit:
                    tally.closer(over, candidate, place)
                elif over < tally.distance:
                    heappush(waiting, _Aside(over, next(self._numbers), branch))
                continue
            for part in self._parts(branch):
                over = min(self._bounds(part._replace(shares=(choice,)))[1] for choice in part.shares)
                heappush(waiting, _Aside(over, next(self._numbers), part))

    # ---- prices -----------------------------------------------------------------------------------------------------

    def _laid_out(self, branch: Branch) -> Candidate | None:
        """The candidate, where pools are unlike with its layers laid on the stages in another way if need be; None where that
        does not fit."""
        candidate, place = self._candidate(branch), branch.place
        over = place.over_bytes(candidate, 0)
        if over <= 0:
            return candidate
        self._put_aside(over, branch)
        other = self._refitting(place, candidate).within(candidate) if self._is_free(branch) else None
        if other is not None:
            self.outcome.candidates += 1
        return other

    def _refitting(self, place: Place, c: Candidate) -> Fitting:
        """Alike for plans that differ in ZeRO alone."""
        key = (place, c.micro_batch, c.schedule, c.interleave, c.recompute)
        if key not in self._fittings:
            self._fittings[key] = Fitting(place, c)
        return self._fittings[key]

    def _candidate(self, branch: Branch) -> Candidate:
        """Of one with one share and a way of recomputing."""
        place, micro_batch, (schedule, interleave) = branch.place, branch.micro_batch, branch.course
        sharding = place.bench.sharding
        assert branch.mode is not None
        given, ((zero, replicate),) = self.space.pins.get("stages"), branch.shares
        cut = place.given(given, schedule) if given is not None else place.cut(micro_batch, branch.mode, schedule, interleave)
        fixed = (sharding.tensor, sharding.sequence_parallel, place.pipeline, place.data)
        chosen = (micro_batch, schedule, interleave, branch.mode)
        return Candidate(*fixed, *chosen, zero, cut, place.context, place.expert, replicate, branch.modes, place.order)

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
