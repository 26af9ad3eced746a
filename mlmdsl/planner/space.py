"""What is legal: the meshes of a cluster, and what may run on each, within the pins. What is not is tallied, a mesh or a choice
at a time.

tensor x sequence_parallel x context x pipeline x data x order x expert x micro_batch x recompute x schedule x interleave x
ZeRO, but for degrees of interleaving that differ little (`Space._interleaves`), for degrees of context that leave a rank little
of a sequence (`Space._contexts`), and for orders of ranks that bring no stages together (`Space._orders`). "Legal" is what
divides and what torch's schedules can run; everything else has its price.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from itertools import product
from math import gcd
from typing import Any, NamedTuple, cast

from mlmdsl.frozen import frozen
from mlmdsl.grammar.constraints import ORDERS, USUAL, ZEROS, Order
from mlmdsl.planner.bench import Bench, Setting
from mlmdsl.planner.mesh import shares_out
from mlmdsl.planner.outcome import Outcome, Tally
from mlmdsl.planner.passes import MODES
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.schedule import V_SHAPED, Course, cannot_run, executable, recomputes, sums_while_full, zeros
from mlmdsl.planner.sharding import Infeasible
from mlmdsl.planner.stages import begins_anew

_LONG = 8192  # tokens

Way = tuple[int, tuple[int, ...]]  # of recomputing, as indices into MODES: the dearest; of every layer if pinned so


class Runs(NamedTuple):
    """What so many rows may run on so long a pipeline: by micro-batch, the smallest first; those refused, once for each."""

    courses: Mapping[int, tuple[Course, ...]]
    refused: Tally

    def number(self, micro_batches: Iterable[int], v_shaped: bool) -> int:
        each = (schedule in V_SHAPED for size in micro_batches for schedule, _ in self.courses[size])
        return sum(v == v_shaped for v in each)


class Family(NamedTuple):
    """Schedules that go with the same ways of recomputing and of ZeRO. `now`: with a micro-batch, by whether ranks have sums of
    gradients while they are full; `ever`: with this or a larger one."""

    now: tuple[tuple[Course, ...], ...]
    ever: tuple[Course, ...]

    @property
    def schedule(self) -> Schedule:
        """One of them."""
        return self.ever[0][0]


@frozen
class Space:
    """The legal candidates within the pins."""

    setting: Setting
    pins: Mapping[str, Any]
    outcome: Outcome
    _shares: dict[tuple[Place, bool], tuple[tuple[int, int], ...]] = field(
        default_factory=dict[tuple[Place, bool], "tuple[tuple[int, int], ...]"]
    )
    _runs: dict[tuple[int, int], Runs] = field(default_factory=dict[tuple[int, int], Runs])
    _families: dict[tuple[int, ...], tuple[Family, ...]] = field(default_factory=dict[tuple[int, ...], "tuple[Family, ...]"])
    _ways: dict[Schedule, tuple[Way, ...]] = field(default_factory=dict[Schedule, tuple[Way, ...]])
    _modes: dict[Schedule, tuple[int, ...]] = field(default_factory=dict[Schedule, "tuple[int, ...]"])

    def within(self, name: str, values: Iterable[Any]) -> list[Any]:
        """The values that a pin leaves."""
        return [value for value in values if name not in self.pins or self.pins[name] == value]

    # ---- meshes -----------------------------------------------------------------------------------------------------

    def places(self) -> Iterator[Place]:
        """All that may have candidates; what is refused on them is tallied."""
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

    def _over_context(self, bench: Bench, context: int, ranks: int) -> Iterator[Place]:
        along = bench.over_context(context)
        if isinstance(along, Infeasible):
            self._reject(along.reason, float(context), along.message)
            return
        for pipeline in self.within("pipeline", divisors(ranks)):
            yield from self._on_mesh(along, pipeline, ranks // pipeline)

    def _on_mesh(self, bench: Bench, pipeline: int, data: int) -> Iterator[Place]:
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
        for expert, order in product(self._experts(data * bench.sharding.context), self._orders(bench, pipeline, data)):
            if not shares_out(order, bench.sharding.context, expert):
                message = f"expert = {expert} takes uneven parts of context = {bench.sharding.context} where order = {order}"
                self._reject("expert", float(expert), message)
                continue
            place = Place(bench.over_experts(expert, 1 if order == USUAL else pipeline), pipeline, data, order)
            if self.shares(place):
                refused = self.runs(place).refused
                if refused.count:
                    self.outcome.candidates += refused.count
                    self.outcome.reject("schedule").join(refused)
                yield place

    def _experts(self, replicas: int) -> list[int]:
        """Degrees that divide the replicas and the experts of every layer."""
        return self.within("expert", divisors(gcd(replicas, self.setting.experts)) if self.setting.experts else (1,))

    def _orders(self, bench: Bench, pipeline: int, data: int) -> tuple[Order, ...]:
        """Stages inside ranks of data where that brings them together on one node. Elsewhere they send over the same links in
        both orders, and replicas are nowhere nearer than in the usual one, which also keeps the ranks of a stage together
        where pools differ. A pin may ask for either."""
        if "order" in self.pins:
            return (self.pins["order"],)
        if pipeline == 1 or data == 1 or not self.setting.alike:
            return (USUAL,)
        degrees = (bench.sharding.tensor, data, pipeline, bench.sharding.context)
        crosses = (self.setting.mesh(*degrees, order=order).crosses_nodes("pipeline") for order in ORDERS)
        return ORDERS if tuple(crosses) == (True, False) else (USUAL,)

    def _reject(self, reason: str, distance: float, words: str) -> None:
        self.outcome.candidates += 1
        self.outcome.reject(reason).add(distance, words=words)

    # ---- on a mesh --------------------------------------------------------------------------------------------------

    def runs(self, place: Place) -> Runs:
        """Alike on meshes of as many rows and stages."""
        rows = self.setting.spec.train.batch // place.data
        found = self._runs.get((place.pipeline, rows))
        if found is None:
            found = self._runs[place.pipeline, rows] = self._made_runs(place.pipeline, rows)
        return found

    def _made_runs(self, pipeline: int, rows: int) -> Runs:
        refused, courses = Tally(), dict[int, tuple[Course, ...]]()
        meant = [course for course in self._schedules(pipeline) if self._asked(*course)]
        stages = self.pins.get("stages")
        for micro_batch in self.within("micro_batch", divisors(rows)):
            legal: list[Course] = []
            for schedule, interleave in meant:
                micro_batches = rows // micro_batch
                if not executable(schedule, pipeline, micro_batches):
                    words = cannot_run(schedule, pipeline, micro_batches)
                    refused.add(float(pipeline - micro_batches), words=words)
                elif stages is None or len(stages) == pipeline * interleave:
                    legal.append((schedule, interleave))
            courses[micro_batch] = tuple(legal)
        return Runs(courses, refused)

    def _asked(self, schedule: Schedule, interleave: int) -> bool:
        """As far as pins say so."""
        mine = self.within("schedule", (schedule,)) and self.within("interleave", (interleave,))
        return bool(mine and self.within("zero", zeros(schedule)))

    def _schedules(self, pipeline: int) -> Iterator[Course]:
        """With their virtual stages a rank, simplest first."""
        if pipeline == 1:
            yield ("gpipe" if self.pins.get("schedule") == "gpipe" else "1f1b"), 1
            return
        yield "1f1b", 1
        yield "gpipe", 1
        for interleave in sorted(self.within("interleave", self._interleaves(pipeline))):
            yield "interleaved_1f1b", interleave
        if 2 * pipeline <= self.setting.chain.count and begins_anew(self.setting.graph) is None:
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

    def families(self, place: Place, micro_batch: int) -> tuple[Family, ...]:
        """Of one micro-batch."""
        key = (place.pipeline, place.micro_batches(1), micro_batch)
        found = self._families.get(key)
        if found is None:
            runs, m = self.runs(place).courses, place.micro_batches(micro_batch)
            larger = [course for size, courses in runs.items() if size > micro_batch for course in courses]
            made = list[Family]()
            for v_shaped in (False, True):
                now, later = ([c for c in of if (c[0] in V_SHAPED) == v_shaped] for of in (runs[micro_batch], larger))
                if now and self.ways(now[0][0]):
                    groups = (
                        tuple(c for c in now if sums_while_full(c[0], place.pipeline, m) == full) for full in (True, False)
                    )
                    made.append(Family(tuple(group for group in groups if group), tuple(dict.fromkeys((*now, *later)))))
            found = self._families[key] = tuple(made)
        return found

    def modes(self, schedule: Schedule) -> tuple[int, ...]:
        """Ways in which a layer may be recomputed, the mildest first."""
        found = self._modes.get(schedule)
        if found is None:
            each = {mode for mode, modes in self.ways(schedule) for mode in modes or (mode,)}
            found = self._modes[schedule] = tuple(sorted(each))
        return found

    def ways(self, schedule: Schedule = "1f1b") -> tuple[Way, ...]:
        """Ways of recomputing, the mildest first; as a pin says for every layer, if it does."""
        found = self._ways.get(schedule)
        if found is None:
            found = self._ways[schedule] = self._found_ways(schedule)
        return found

    def _found_ways(self, schedule: Schedule) -> tuple[Way, ...]:
        legal = recomputes(schedule) if self.setting.chain.layers else MODES[:1]
        if isinstance(asked := self.pins.get("recompute"), tuple):
            several = cast(tuple[str, ...], asked)
            modes = tuple(map(MODES.index, several))
            return ((max(modes), modes if len(set(modes)) > 1 else ()),) if set(several) <= set(legal) else ()
        return tuple((MODES.index(mode), ()) for mode in self.within("recompute", legal))

    def shares(self, place: Place, schedule: Schedule = "1f1b") -> tuple[tuple[int, int], ...]:
        """(zero, replicate). Over one rank with these weights ZeRO is nothing, unless asked for by name."""
        key = (place, schedule in V_SHAPED)
        found = self._shares.get(key)
        if found is None:
            found = self._shares[key] = self._found_shares(place, schedule)
        return found

    def _found_shares(self, place: Place, schedule: Schedule) -> tuple[tuple[int, int], ...]:
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

    def count(self, place: Place, micro_batches: Iterable[int]) -> int:
        """Candidates with these micro-batches."""
        runs, sizes = self.runs(place), tuple(micro_batches)

        def counted(v_shaped: bool, schedule: Schedule) -> int:
            courses = runs.number(sizes, v_shaped)
            return courses and courses * len(self.ways(schedule)) * len(self.shares(place, schedule))

        return counted(False, "1f1b") + counted(True, V_SHAPED[0])


def divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return (*small, *(n // d for d in reversed(small) if d * d != n))
