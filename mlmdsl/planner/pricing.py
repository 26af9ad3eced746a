"""What a candidate plan costs on its mesh: seconds of a step and bytes on each rank, from a bench's sums.

Plain floats and tuples: a search asks tens of thousands of times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import NamedTuple

from mlmdsl.grammar.constraints import USUAL, Order
from mlmdsl.planner import host, memory, schedule, zero_bubble
from mlmdsl.planner.bench import Bench, Sums
from mlmdsl.planner.blend import Blend, How, blends
from mlmdsl.planner.candidate import Candidate, Times
from mlmdsl.planner.communication import Group, collective_seconds, group_of, send_seconds
from mlmdsl.planner.holdings import Sharing, State, shard_elements
from mlmdsl.planner.mesh import Mesh
from mlmdsl.planner.moments import Moment, moments, reduces_each_pass
from mlmdsl.planner.plan import CollectiveKind, Schedule
from mlmdsl.planner.pools import Site, group_on
from mlmdsl.planner.proportion import Paces, Speed, paces, proportion
from mlmdsl.planner.stages import Cut, Part, cut_of
from mlmdsl.planner.trade import Trade, cheapest

# AdamW reads and writes weight and two moments and reads the gradient, in fp32; clipping reads the gradient; in bf16 the weight
# is written a second time (docs of torch.optim.AdamW, fused)
_OPTIMIZER_BYTES = {"fp32": 32.0, "bf16": 38.0}
# Of a GPU that computes while a collective runs, what the collective takes: its kernels hold 20 of 132 multiprocessors
# (DeepSeek-V3, arXiv:2412.19437, section 3.2.2), and its bytes pass through the same memory; kernels were measured to take
# 1.1 to 1.3 times as long beside one
_TAKEN = 0.2


Moments = tuple[tuple[int, Moment, State], ...]  # bytes of state, when, what they are made of


class Exchange(NamedTuple):
    """Seconds of one rank's traffic over weights and gradients: all gathers once, all reductions once, the share of the largest
    unit in them; sums over hybrid sharding's copies; those of experts that are shared out; tied and partial gradients; the
    optimizer; ZeRO's hooks in a pass through all of the rank's stages."""

    gather: float
    reduce: float
    unit: float
    copied: float
    experts: float
    tied: float
    partial: float
    optimizer: float
    hooks: float


@dataclass(frozen=True, eq=False, repr=False)
class Place:
    """One mesh: a bench, the degrees, the groups."""

    bench: Bench
    pipeline: int
    data: int
    order: Order = USUAL
    _cuts: dict[tuple[object, ...], Cut] = field(default_factory=dict[tuple[object, ...], Cut])
    _exchanges: dict[tuple[object, ...], Exchange] = field(default_factory=dict[tuple[object, ...], Exchange])
    _sends: dict[int, float] = field(default_factory=dict[int, float])
    _paces: dict[tuple[int, int], Paces] = field(default_factory=dict[tuple[int, int], Paces])
    _fillings: dict[tuple[object, ...], memory.Filling] = field(default_factory=dict[tuple[object, ...], memory.Filling])
    _moments: dict[tuple[object, ...], Moments] = field(default_factory=dict[tuple[object, ...], "Moments"])
    _blends: dict[tuple[object, ...], tuple[Blend, ...]] = field(default_factory=dict[tuple[object, ...], "tuple[Blend, ...]"])
    _proportioned: dict[tuple[object, ...], tuple[int, ...]] = field(default_factory=dict[tuple[object, ...], tuple[int, ...]])
    _groups: dict[tuple[object, ...], Group] = field(default_factory=dict[tuple[object, ...], Group])
    _stage_seconds: dict[tuple[object, ...], tuple[float, float, float]] = field(
        default_factory=dict[tuple[object, ...], "tuple[float, float, float]"]
    )

    @cached_property
    def mesh(self) -> Mesh:
        sharding = self.bench.sharding
        return self.bench.setting.mesh(sharding.tensor, self.data, self.pipeline, self.context, self.expert, order=self.order)

    @property
    def context(self) -> int:
        return self.bench.sharding.context

    @property
    def expert(self) -> int:
        return self.bench.sharding.expert

    @cached_property
    def replicas(self) -> int:
        """Ranks with the same weights: those of data and context."""
        return self.data * self.context

    @cached_property
    def replica_group(self) -> Group:
        return group_of(self.mesh, "replicas", self.bench.setting.network)

    def mesh_of(self, replicate: int) -> Mesh:
        """With as many copies of the sharded weights."""
        sharding = self.bench.sharding
        degrees = (sharding.tensor, self.data, self.pipeline, self.context, self.expert, replicate)
        return self.mesh if replicate == 1 else self.bench.setting.mesh(*degrees, self.order)

    def shards(self, c: Candidate) -> int:
        """Ranks that ZeRO shares a weight out over."""
        return self.replicas // c.replicate if c.zero else 1

    @cached_property
    def islands(self) -> int:
        """The copies of hybrid sharding whose shards lie each within a node; 1 where all do, or none can."""
        within = self.mesh.per_node("replicas")
        copies = self.replicas // within
        even = copies * within == self.replicas and self.data % copies == 0 and within > 1
        return copies if even and not self.mesh_of(copies).crosses_nodes("shards") else 1

    @cached_property
    def benches(self) -> tuple[Bench, ...]:
        """By pipeline rank, the bench of what it lies on."""
        setting = self.bench.setting
        if setting.alike or self.order != USUAL:  # stages inside ranks of data lie on all pools
            return (self.bench,) * self.pipeline
        return tuple(map(self.bench.on, setting.sites.of(self.pipeline, self.mesh.world_size // self.pipeline)))

    def bench_of(self, c: Candidate, stage: int) -> Bench:
        """Of a virtual stage."""
        return self.bench if self.alike else self.benches[schedule.pipeline_rank(c.schedule, self.pipeline, stage)]

    @cached_property
    def distinct(self) -> tuple[Bench, ...]:
        return tuple({bench.site: bench for bench in self.benches}.values())

    @cached_property
    def alike(self) -> bool:
        """Whether all ranks of the pipeline lie on the like of the weakest."""
        return self.distinct == (self.bench,)

    @cached_property
    def most_bytes(self) -> int:
        """What a plan may use of the stages' largest memory."""
        return max(bench.site.capacity_bytes for bench in self.distinct)

    def group_on(self, site: Site, axis: str, replicate: int = 1) -> Group:
        """Groups inside a stage that lies there."""
        key = (site, axis, replicate)
        if key not in self._groups:
            self._groups[key] = group_on(site, self.mesh_of(replicate), axis)
        return self._groups[key]

    @cached_property
    def pipeline_group(self) -> Group:
        return group_of(self.mesh, "pipeline", self.bench.setting.network)

    @cached_property
    def context_bytes(self) -> int:
        axes = ("tensor", "context", "replicas", "pipeline", "expert")
        several = sum(self.mesh.size(axis) > 1 for axis in axes) + (1 < self.expert < self.replicas)
        return memory.context_bytes(self.bench.setting.device.kind, several)

    def more_context_bytes(self, replicate: int) -> int:
        """Of two communicators more: of the shards, and of their copies."""
        return 2 * (replicate > 1) * memory.COMMUNICATOR_BYTES[self.bench.setting.device.kind]

    @cached_property
    def sync_seconds(self) -> float:
        """Counting tokens over the replicas, then norm and loss over the world."""
        setting = self.bench.setting
        world = group_of(self.mesh, "world", setting.network)
        tokens = collective_seconds("all_reduce", 8, self.replica_group)
        return tokens + collective_seconds("all_reduce", self.norm_bytes, world)

    @property
    def norm_bytes(self) -> int:
        """Loss, norm, a place for each rank's own, and four for what blocks add to the loss and leave out."""
        return 8 * (6 + self.mesh.world_size)

    @cached_property
    def rows(self) -> int:
        """Sequences of a step on a rank."""
        return self.bench.setting.spec.train.batch // self.data

    def micro_batches(self, micro_batch: int) -> int:
        return self.rows // micro_batch

    def cut(self, micro_batch: int, mode: int, kind: Schedule, interleave: int) -> Cut:
        """The slowest stage as fast as can be, memory left aside."""
        if self.alike:
            return self.given(self.bench.balanced(micro_batch, mode, self.pipeline * interleave), kind)
        key = (micro_batch, mode, kind in schedule.V_SHAPED, interleave)
        found = self._proportioned.get(key)
        if found is None:
            found = proportion(self.bench.setting.chain, self.speeds(micro_batch, mode, kind, interleave))
            assert found is not None
            self._proportioned[key] = found
        return self.given(found, kind)

    def speeds(self, micro_batch: int, mode: int, kind: Schedule, interleave: int) -> list[Speed]:
        """By virtual stage."""
        each = [bench.speed(micro_batch, mode) for bench in self.benches]
        ranks = (schedule.pipeline_rank(kind, self.pipeline, stage) for stage in range(self.pipeline * interleave))
        return [each[rank] for rank in ranks]

    def given(self, stages: tuple[int, ...], kind: Schedule = "1f1b") -> Cut:
        key = (stages, kind in schedule.V_SHAPED)
        found = self._cuts.get(key)
        if found is None:
            interleave = len(stages) // self.pipeline
            placed = tuple(schedule.stages_of(kind, self.pipeline, interleave, rank) for rank in range(self.pipeline))
            sites = None if self.alike else [bench.site for bench in self.benches]
            found = self._cuts[key] = cut_of(self.bench.setting.chain, stages, placed, sites)
        return found

    def how(self, c: Candidate, stage: int) -> How:
        """How the layers of a virtual stage are recomputed."""
        if not c.modes:
            return c.recompute
        key = (c.cut.stages, c.modes)
        if key not in self._blends:
            self._blends[key] = blends(self.bench.setting.chain, *key)
        return self._blends[key][stage]

    # ---- memory -----------------------------------------------------------------------------------------------------

    def filling(self, c: Candidate, rank: int, parts: tuple[Part, ...]) -> memory.Filling:
        """What the rank holds besides its state; the same for every ZeRO."""
        hows = [self.how(c, stage) for stage in c.cut.placed[rank]] if c.modes else (c.recompute,) * len(parts)
        return self.filling_under(c, rank, parts, hows)

    def filling_under(self, c: Candidate, rank: int, parts: tuple[Part, ...], hows: Sequence[How]) -> memory.Filling:
        """By what the rank's virtual stages recompute."""
        turns = c.schedule in schedule.V_SHAPED and rank == self.pipeline - 1
        key = (parts, c.micro_batch, tuple(hows), turns, -1 if self.alike else rank)
        found = self._fillings.get(key)
        if found is None:
            piped, bench = self.pipeline > 1, self.benches[rank]
            stages = [bench.part(part, c.micro_batch, how, piped).bytes for part, how in zip(parts, hows, strict=True)]
            m = self.micro_batches(c.micro_batch)
            found = self._fillings[key] = memory.Filling(stages, m, bench.site.device.kind, turns)
        return found

    def moments(self, c: Candidate, rank: int, parts: tuple[Part, ...]) -> Moments:
        """Those of which one is the rank's fullest."""
        m = self.micro_batches(c.micro_batch)
        key = (c.schedule, c.interleave, m, rank, parts, c.zero, c.replicate)
        found = self._moments.get(key)
        if found is None:
            sharing = self.sharing(c.zero, c.replicate, m)
            in_place = self.bench.setting.width == 4
            experts = any(self.bench.holdings.of(part).experts for part in parts)
            mesh = (c.schedule, self.pipeline, c.interleave, m, rank, sharing.zero)
            each = moments(*mesh, loss=parts[-1].last, in_place=in_place, experts=experts)
            states = [(moment, self.bench.state(parts, sharing, moment)) for moment in each]
            found = self._moments[key] = tuple((sum(state), moment, state) for moment, state in states)
        return found

    def sharing(self, zero: int, replicate: int, micro_batches: int) -> Sharing:
        piped, few = self.pipeline > 1, min(micro_batches, 3)
        if not zero or self.replicas == 1:
            return Sharing(0, 1, 1, piped, few)
        return Sharing(zero, self.replicas, replicate, piped, few)

    def fullest(
        self, c: Candidate, rank: int, parts: tuple[Part, ...], *, tensors: bool = False
    ) -> tuple[Moment, State, memory.Held]:
        """When the rank holds the most, and what; `tensors`: without what its allocator loses."""
        filling = self.filling(c, rank, parts)
        each = (
            (bytes + sum(held := filling.at(moment)) - held.slack * tensors, (moment, state, held))
            for bytes, moment, state in self.moments(c, rank, parts)
        )
        return max(each, key=lambda found: found[0])[1]

    def rank_bytes(self, c: Candidate, rank: int, parts: tuple[Part, ...], filling: memory.Filling, limit: float = inf) -> int:
        """What the rank holds at most, or at the first moment over the limit; but for communicators that only some ways of ZeRO
        have."""
        most, context = 0, self.context_bytes
        for bytes, moment, _ in self.moments(c, rank, parts):
            found = bytes + sum(filling.at(moment)) + context
            if found > most:
                most = found
                if most > limit:
                    break
        return most

    def _fullest(self, c: Candidate) -> Sequence[tuple[int, tuple[Part, ...]]]:
        """Ranks with their parts, of which one holds the most: in a V any that run alike parts, most often the last."""
        every = c.modes or c.schedule in schedule.V_SHAPED
        return [(rank, c.cut.held(rank)) for rank in reversed(range(self.pipeline))] if every else c.cut.ranks

    @cached_property
    def slack(self) -> float:
        """By what activations take more than their bytes."""
        return 1 + memory.SLACK[self.bench.setting.device.kind]

    def least_buffers(self, micro_batch: int) -> float:
        """Bytes of the receive buffers for all micro-batches between two stages, at least, in one direction."""
        if self.pipeline == 1 or not self.bench.setting.execution.static_buffers:
            return 0.0
        return self.rows / micro_batch * self.bench.sums(micro_batch, 0).crossing

    def peak_bytes(self, c: Candidate) -> int:
        """On the fullest rank."""
        ranks = self._fullest(c)
        return max(self.rank_bytes(c, *rank, self.filling(c, *rank)) for rank in ranks) + self.more_context_bytes(c.replicate)

    def over_bytes(self, c: Candidate, limit: float = inf) -> int:
        """What a rank lacks of its device's memory at the most, or the first that lacks more than the limit; negative where all
        of them fit."""
        more, over = self.more_context_bytes(c.replicate), -self.most_bytes
        room = [bench.site.capacity_bytes - more for bench in self.benches]
        for rank, parts in c.cut.ranks if c.schedule in schedule.V_SHAPED else ():  # whose moments take long to tell
            least = self.least_rank_bytes(c, rank, parts) - room[rank]
            if least > limit:
                return least
        for rank, parts in self._fullest(c):
            used = self.rank_bytes(c, rank, parts, self.filling(c, rank, parts), room[rank] + limit)
            over = max(over, used - room[rank])
            if over > limit:
                break
        return over

    def least_rank_bytes(self, c: Candidate, rank: int, parts: tuple[Part, ...]) -> int:
        """What a rank of a V holds besides passes and gradients when its first backward pass begins."""
        m = self.micro_batches(c.micro_batch)
        held = schedule.in_flight(c.schedule, self.pipeline, c.interleave, m, rank)
        state = self.bench.state(parts, self.sharing(c.zero, c.replicate, m), Moment("loss", (1,)))
        rest = self.filling(c, rank, parts).at(Moment("reduction", held, settled=True))
        return sum(state) - state.buffers + sum(rest) + self.context_bytes

    def left_bytes(self, c: Candidate, rank: int, parts: tuple[Part, ...], filling: memory.Filling) -> int:
        """Of what a plan may use of a rank's memory."""
        used = self.rank_bytes(c, rank, parts, filling) + self.more_context_bytes(c.replicate)
        return self.benches[rank].site.capacity_bytes - used

    # ---- time -------------------------------------------------------------------------------------------------------

    def runs(self, c: Candidate) -> schedule.Runs:
        """Stages in a row that are alike: how many, forward and backward seconds with their sends, weights' gradients."""
        if c.schedule in schedule.V_SHAPED or c.modes:
            return tuple((1, *self.stage_seconds(c, stage)) for stage in range(len(c.cut.stages)))
        first = [sum(count for _, count in c.cut.runs[:i]) for i in range(len(c.cut.runs))]
        return tuple((n, *self.stage_seconds(c, at)) for (_, n), at in zip(c.cut.runs, first, strict=True))

    def stage_seconds(self, c: Candidate, stage: int) -> tuple[float, float, float]:
        """Forward and backward seconds of a virtual stage with its sends, and those of weights' gradients."""
        apart = c.schedule if stage and c.schedule in schedule.V_SHAPED else None
        where = -1 if self.alike else schedule.pipeline_rank(c.schedule, self.pipeline, stage)
        key = (c.cut.parts[stage], c.micro_batch, self.how(c, stage), *self.crossings(c, stage), apart, where)
        found = self._stage_seconds.get(key)
        if found is None:
            found = self._stage_seconds[key] = self._seconds_of(c, stage)
        return found

    def _seconds_of(self, c: Candidate, stage: int) -> tuple[float, float, float]:
        bench = self.bench_of(c, stage)
        cost = bench.part(c.cut.parts[stage], c.micro_batch, self.how(c, stage), self.pipeline > 1)
        given, handed = self.crossings(c, stage)
        onwards = self._send_seconds(cost.bytes.sent) if handed else 0.0
        back = self._send_seconds(cost.bytes.received) if given else 0.0
        apart = 0.0
        if cost.apart and c.schedule in schedule.V_SHAPED and stage:  # the first has no input to give a gradient to
            apart = cost.apart * zero_bubble.apart(c.schedule, self.pipeline, self.micro_batches(c.micro_batch))
        return cost.forward + onwards, cost.backward + back + apart, cost.weight + apart / 2

    def _send_seconds(self, size: int) -> float:
        bench = self.bench
        tensor = bench.sharding.tensor
        if tensor == 1 or bench.sharding.sequence_parallel or not bench.setting.execution.scattered_sends:
            return send_seconds(size, self.pipeline_group)
        return send_seconds(size / tensor, self.pipeline_group) + collective_seconds("all_gather", size, bench.group)

    def sums(self, micro_batch: int, mode: int) -> Sums:
        """Where pools are unlike, the least of any of them; of gradients of weights, which schedules can put off, the most."""
        if self.alike:
            return self.bench.sums(micro_batch, mode)
        each = [bench.sums(micro_batch, mode) for bench in self.distinct]
        return Sums(*map(min, zip(*each, strict=True)))._replace(weight=max(one.weight for one in each))

    def trade(self, micro_batch: int, modes: tuple[int, ...]) -> Trade:
        if self.alike:
            return self.bench.trade(micro_batch, modes)
        return cheapest([bench.trade(micro_batch, modes) for bench in self.distinct])

    def paces(self, micro_batch: int, mode: int) -> Paces:
        """Where pools are unlike."""
        found = self._paces.get((micro_batch, mode))
        if found is None:
            speeds = [bench.speed(micro_batch, mode) for bench in self.benches]
            found = self._paces[micro_batch, mode] = paces(self.bench.setting.chain, speeds)
        return found

    def least_send(self, micro_batch: int) -> float:
        """Seconds of one hand-over between stages."""
        found = self._sends.get(micro_batch)
        if found is None:
            crossing = self.bench.sums(micro_batch, 0).crossing
            found = self._sends[micro_batch] = self._send_seconds(crossing) if self.pipeline > 1 else 0.0
        return found

    def crossings(self, c: Candidate, stage: int) -> tuple[bool, bool]:
        """Whether a virtual stage is given its input by another rank, and hands its output to one."""
        return schedule.links(c.schedule, self.pipeline, c.interleave)[stage]

    def passes_seconds(self, c: Candidate, clock: schedule.Clock) -> float:
        """Of all micro-batches through the pipeline, ZeRO's gathers and reductions left aside."""
        return self._through(c, self.runs(c), clock)[0]

    def _through(self, c: Candidate, runs: schedule.Runs, clock: schedule.Clock) -> tuple[float, float]:
        """Seconds of all micro-batches, and of these the mean rank's busy ones."""
        m = self.micro_batches(c.micro_batch)
        passes = clock(c.schedule, runs, m, self.pipeline, c.interleave)
        busy = m * sum(count * (f + b) for count, f, b, _ in runs) / self.pipeline
        return busy + self.idle_share * (passes - busy), busy

    def times(self, c: Candidate, clock: schedule.Clock = schedule.pipeline_seconds) -> Times:
        """`clock`: what tells the time of all micro-batches through the pipeline; another one is a bound."""
        exchange, runs = self.exchange(c), self.with_gathers(c, self.runs(c))
        passes, busy = self._through(c, runs, clock)
        gathered, reduced = self._exposed(c, exchange, runs)
        summed = reduced + exchange.experts + exchange.tied + exchange.partial
        total = passes + gathered + summed + exchange.optimizer + self.sync_seconds
        return Times(passes, max(0.0, passes - busy) if self.pipeline > 1 else 0.0, gathered, summed, exchange.optimizer, total)

    @cached_property
    def idle_share(self) -> float:
        """Of the time that ranks of the pipeline wait for each other, what sharing cores leaves; on unlike nodes all."""
        cores = self.bench.setting.device.cores if self.alike else None
        return host.idle_share(cores, self.mesh.per_node("pipeline"), self.pipeline)

    @property
    def _overlaps(self) -> bool:
        """Whether collectives run beside kernels: on a CPU both want the same cores."""
        return self.bench.setting.device.kind != "cpu"

    @property
    def taken(self) -> float:
        """Of a collective's time, what it costs at least where something runs beside it."""
        return _TAKEN if self._overlaps else 1.0

    def with_gathers(self, c: Candidate, runs: schedule.Runs) -> schedule.Runs:
        """ZeRO 3: weights are gathered for each forward and backward pass (under a pipeline torch leaves them gathered from a
        backward to the next forward pass). ZeRO 2 and, without a pipeline, 3: gradients are reduced after each pass."""
        if not c.zero or self.replicas == 1 or (c.zero == 1 and self._overlaps):
            return runs
        e, part = self.exchange(c), 1 / c.interleave  # a virtual stage has its own weights alone
        if not self._overlaps:
            runs = tuple((n, f + part * e.hooks, b + part * e.hooks, w) for n, f, b, w in runs)
        behind = part * e.gather if c.zero == 3 else 0.0
        ahead = behind if self.pipeline == 1 else 0.0
        behind += part * e.reduce if reduces_each_pass(c.zero, self.pipeline > 1) else 0.0
        if self._overlaps:
            return tuple((n, max(f + _TAKEN * ahead, ahead), max(b + _TAKEN * behind, behind), w) for n, f, b, w in runs)
        return tuple((n, f + ahead, b + behind, w) for n, f, b, w in runs)

    def _exposed(self, c: Candidate, e: Exchange, runs: schedule.Runs) -> tuple[float, float]:
        """(gathers, reductions) once a step that no computation hides: those of one unit at least, or what hiding them costs.
        torch's pipeline stages reduce after their last backward pass."""
        if self.replicas == 1:
            return 0.0, 0.0
        if not c.zero and not self.bench.setting.execution.overlapped_sums:
            return 0.0, e.reduce
        forward, backward = min(f for _, f, _, _ in runs), min(b for _, _, b, _ in runs)
        least, execution = max(e.unit, _TAKEN), self.bench.setting.execution
        copied = max(e.copied - backward, e.copied * least) if self._overlaps else e.copied
        if c.zero == 3 and self.pipeline == 1:
            return e.gather * e.unit, e.reduce * e.unit + copied
        gathered = e.gather
        if self._overlaps and not execution.gathers_wait:
            gathered = max(e.gather - forward, e.gather * least)
        if c.zero == 2:
            return gathered, e.reduce * e.unit * self._overlaps + copied
        reduced = e.reduce + e.copied
        if self.pipeline > 1 or not self._overlaps or execution.sums_wait:
            return gathered, reduced
        return gathered, max(reduced - backward, reduced * least)

    def exchange(self, c: Candidate) -> Exchange:
        """Of the rank that has most to exchange."""
        key = (c.cut.stages, c.zero, c.replicate, c.schedule in schedule.V_SHAPED)
        found = self._exchanges.get(key)
        if found is None:
            each = [self._exchange(c, rank, parts) for rank, parts in c.cut.ranks]
            found = self._exchanges[key] = Exchange(*(max(values) for values in zip(*each, strict=True)))
        return found

    def _exchange(self, c: Candidate, rank: int, parts: tuple[Part, ...]) -> Exchange:
        setting, holdings, zero, shards = self.bench.setting, self.bench.holdings, c.zero, self.shards(c)
        site = self.benches[rank].site
        group = self.group_on(site, "replicas" if c.replicate == 1 else "shards", c.replicate)
        held, summed = [holdings.of(part) for part in parts], setting.execution.gradient_bytes
        elements = owned = sum(h.elements for h in held)
        gather, reduce, unit, copied, hooks = 0.0, collective_seconds("all_reduce", summed * elements, group), 1.0, 0.0, 0.0
        if zero and self.replicas > 1:
            owned = sum(holdings.shard(part, shards) for part in parts)
            each = [holdings.units(part, shards) for part in parts]
            units = [layer for unit in each for layer in unit.layers] + [(1, unit.root) for unit in each]
            bench, count = self.benches[rank], sum(n for n, size in units if size)
            laid_out = bench.host_seconds(host.unit_launches(count))
            hooks = bench.host_seconds(host.hook_launches(count, sum(sum(h.keys.values()) for h in held)))
            gather = sum(n * collective_seconds("all_gather", setting.width * size, group) for n, size in units if size)
            reduce = sum(n * collective_seconds("reduce_scatter", summed * size, group) for n, size in units if size)
            gather, reduce = gather + laid_out, reduce + laid_out
            unit = min(1.0, max(size for _, size in units) / max(1, elements))
            copies = self.group_on(site, "replicate", c.replicate)
            copied = sum(n * collective_seconds("all_reduce", summed * size / shards, copies) for n, size in units if size)
        sharing = self.group_on(site, "copies")
        experts = sum(
            count * collective_seconds(kind, size, sharing) for kind, size, count in self.expert_exchanges(parts, zero)
        )
        partial = collective_seconds("all_reduce", 4 * self.partial_elements(c, parts), self.benches[rank].group)
        tied = collective_seconds("all_reduce", 4 * self.tied_elements(c, parts), self._pair)
        stepped = sum(stack.times * stack.stepped for part in parts for stack in holdings.experts(part, self._zeroed(zero)))
        optimizer = site.kernels.optimizer_seconds(self.optimizer_bytes * (owned + stepped))
        return Exchange(gather, reduce, unit, copied, experts, tied, partial, optimizer, hooks)

    @property
    def optimizer_bytes(self) -> float:
        """Moved for each element that is stepped."""
        setting = self.bench.setting
        return setting.execution.optimizer_bytes or _OPTIMIZER_BYTES[setting.spec.train.precision]

    def _zeroed(self, zero: int) -> int:
        """Ranks that ZeRO shares experts' state out over, where each has all of them."""
        return self.replicas if zero else 1

    def expert_exchanges(self, parts: tuple[Part, ...], zero: int) -> Iterator[tuple[CollectiveKind, int, int]]:
        """(kind, bytes, how many) over the ranks that have the same experts, once a step: one sum of all gradients, or under
        ZeRO weight by weight."""
        holdings, width = self.bench.holdings, self.bench.setting.width
        if not zero:
            elements = sum(holdings.of(part).experts for part in parts)
            yield "all_reduce", 4 * elements, int(elements > 0)
            return
        for stack in (stack for part in parts for stack in holdings.experts(part, self.replicas)):
            if stack.stepped == stack.elements:
                yield "all_reduce", 4 * stack.elements, stack.times
            else:
                yield "reduce_scatter", 4 * stack.elements, stack.times
                yield "all_gather", width * stack.elements, stack.times

    def partial_elements(self, c: Candidate, parts: tuple[Part, ...]) -> int:
        """Local elements whose gradients the tensor axis still has to add up, as far as ZeRO leaves them here."""
        return sum(self.bench.holdings.partial(part, self.shards(c), self._zeroed(c.zero)) for part in parts)

    def tied_elements(self, c: Candidate, parts: tuple[Part, ...]) -> int:
        """Local elements of weights that other ranks of the pipeline hold too, as far as ZeRO leaves them here."""
        shared, holdings = self.bench.setting.shared_weights, self.bench.holdings
        mine = {key for part in parts for key in holdings.of(part).keys} & shared
        if self.pipeline == 1 or not mine:
            return 0
        held = [{key for part in c.cut.held(rank) for key in holdings.of(part).keys} & mine for rank in range(self.pipeline)]
        counted = Counter(key for keys in held for key in keys)
        shapes = [holdings.local_shapes[key] for key in sorted(mine) if counted[key] > 1]
        return sum(shard_elements(shape, self.shards(c)) for shape in shapes)

    @cached_property
    def _pair(self) -> Group:
        """First and last stage, for tied weights."""
        g, pair = self.pipeline_group, min(2, self.pipeline)
        crosses = g.nodes > 1
        inter, latency = g.inter_bytes_per_second, g.inter_latency
        return Group(pair, 1 if crosses else pair, g.intra_bytes_per_second, g.intra_latency, inter, latency)
