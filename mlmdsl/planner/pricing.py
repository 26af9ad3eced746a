"""What a candidate plan costs: seconds of a step and bytes on each rank, from sums that are made once per sharding and
micro-batch.

Plain floats and tuples: a search asks tens of thousands of times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import NamedTuple

from mlmdsl.grammar.spec import Device, Pool, Spec
from mlmdsl.graph.flops import flops_per_token
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import memory, schedule
from mlmdsl.planner.blend import Blend, How, blends, regions_of
from mlmdsl.planner.communication import Group, collective_seconds, group_of, send_seconds
from mlmdsl.planner.compute import Kernels, slowest_of
from mlmdsl.planner.context import over_context
from mlmdsl.planner.execution import OURS, Execution
from mlmdsl.planner.mesh import Mesh, Network, network_of
from mlmdsl.planner.moments import Moment, moments, reduces_each_pass
from mlmdsl.planner.passes import MODES, Passes
from mlmdsl.planner.plan import CollectiveKind, Recompute, Schedule
from mlmdsl.planner.sharding import Costs, Infeasible, Sharding, reference_micro_batch, replicated, shard_graph
from mlmdsl.planner.stages import Chain, Cut, Part, balance, chain_of, cut_of

_WIDTH = {"fp32": 4, "bf16": 2}
# AdamW reads and writes weight and two moments and reads the gradient, in fp32; clipping reads the gradient; in bf16 the weight
# is written a second time (docs of torch.optim.AdamW, fused)
_OPTIMIZER_BYTES = {"fp32": 32.0, "bf16": 38.0}
# Of a GPU that computes while a collective runs, what the collective takes: its kernels hold 20 of 132 multiprocessors
# (DeepSeek-V3, arXiv:2412.19437, section 3.2.2), and its bytes pass through the same memory; kernels were measured to take
# 1.1 to 1.3 times as long beside one
_TAKEN = 0.2


Moments = tuple[tuple[int, Moment, memory.State], ...]  # bytes of state, when, what they are made of


class Candidate(NamedTuple):
    """The plan's variables, and how its layers are cut."""

    tensor: int
    sequence_parallel: bool
    pipeline: int
    data: int
    micro_batch: int
    schedule: Schedule
    interleave: int
    recompute: int  # index into MODES
    zero: int
    cut: Cut
    context: int = 1
    expert: int = 1
    replicate: int = 1
    modes: tuple[int, ...] = ()  # of every layer, where they are not all recomputed alike; `recompute` is the largest of them

    @property
    def recomputed(self) -> Recompute | tuple[Recompute, ...]:
        """In words."""
        each: tuple[Recompute, ...] = tuple(MODES[mode] for mode in self.modes)
        return each or MODES[self.recompute]


class Times(NamedTuple):
    """Seconds of a step. pipeline: all micro-batches through the stages; bubble: of these, the mean rank's idle ones; gathered:
    ZeRO's gathers that nothing hides, once a step; summed: gradients over replicas, partial and tied ones; optimizer; total."""

    pipeline: float
    bubble: float
    gathered: float
    summed: float
    optimizer: float
    total: float


@dataclass(frozen=True)
class Setting:
    """What all candidates share."""

    spec: Spec
    graph: Graph
    execution: Execution = OURS

    @cached_property
    def pool(self) -> Pool:
        """The weakest: least peak, then least memory."""
        return min(
            self.spec.cluster.pools, key=lambda p: (Kernels(p.device, self.spec.train.precision).peak, p.device.memory_bytes)
        )

    @cached_property
    def device(self) -> Device:
        """The weakest device, with the least memory of all."""
        least = min(pool.device.memory_bytes for pool in self.spec.cluster.pools)
        device = self.pool.device
        return device if device.memory_bytes == least else device.model_copy(update={"memory_bytes": least})

    @cached_property
    def kernels(self) -> Kernels:
        world = self.spec.cluster.world_size
        return Kernels(self.device, self.spec.train.precision, self.execution.launches, slowest_of(self.device.kind, world))

    @cached_property
    def network(self) -> Network:
        return network_of(self.spec.cluster)

    @cached_property
    def chain(self) -> Chain:
        return chain_of(self.graph)

    @property
    def width(self) -> int:
        return _WIDTH[self.spec.train.precision]

    @cached_property
    def capacity_bytes(self) -> int:
        return memory.capacity_bytes(self.device)

    @cached_property
    def step_flops(self) -> float:
        """Model FLOPs of one step."""
        train = self.spec.train
        return flops_per_token(self.graph, train.seq_len) * train.seq_len * train.batch

    @cached_property
    def experts(self) -> int:
        """What degrees of the expert axis have to divide: the experts of every layer; 0 without any."""
        return gcd(*(weight.shape[0] for weight in self.graph.weights.values() if weight.expert))

    @cached_property
    def shared_weights(self) -> frozenset[str]:
        """Weights outside the repeats that more than one region uses: several stages may hold them."""
        used: dict[str, set[int]] = {}
        for index, region in enumerate(self.graph.regions):
            for key in (key for node in region.nodes for key in node.weights):
                if not region.repeated or self.graph.weights[key].region != region.name:
                    used.setdefault(key, set()).add(index)
        return frozenset(key for key, regions in used.items() if len(regions) > 1)

    def mesh(self, tensor: int, data: int, pipeline: int, context: int = 1, expert: int = 1, replicate: int = 1) -> Mesh:
        return Mesh(tensor, data, pipeline, self.network.devices_per_node, context, expert, replicate)

    def shard(self, tensor: int, sequence_parallel: bool) -> Bench | Infeasible:
        """The sharding does not depend on the micro-batch: it is chosen for one sequence."""
        if tensor == 1:
            return Bench(self, replicated(self.graph), group_of(self.mesh(1, 1, 1), "tensor", self.network))
        group = group_of(self.mesh(tensor, 1, 1), "tensor", self.network)
        sizes = self.graph.sizes(reference_micro_batch(self.spec.train.seq_len), self.spec.train.seq_len)
        share = self.network.inter_bytes_per_second
        found = shard_graph(self.graph, tensor, sequence_parallel, Costs(self.kernels, group, share, self.width, sizes))
        return found if isinstance(found, Infeasible) else Bench(self, found, group)


class PartCost(NamedTuple):
    """One virtual stage, one micro-batch: seconds without sends, of the backward ones those of weights' gradients, bytes that
    stay."""

    forward: float
    backward: float
    weight: float
    bytes: memory.Passing


class Least(NamedTuple):
    """Bytes that all layers keep for one micro-batch, and that a rank with layers needs while the backward pass of one runs."""

    kept: int
    working: int


@dataclass(frozen=True)
class Bench:
    """Everything that depends on the sharding over the tensor, context and expert axes; what is asked for is made once."""

    setting: Setting
    sharding: Sharding
    group: Group
    context_group: Group | None = None
    expert_group: Group | None = None
    _experts: dict[int, Bench] = field(default_factory=dict[int, "Bench"])
    _passes: dict[int, Passes] = field(default_factory=dict[int, Passes])
    _parts: dict[tuple[Part, int, How, bool], PartCost] = field(default_factory=dict[tuple[Part, int, How, bool], PartCost])
    _states: dict[tuple[object, ...], memory.State] = field(default_factory=dict[tuple[object, ...], memory.State])
    _least: dict[int, tuple[tuple[Least, ...], int]] = field(default_factory=dict[int, "tuple[tuple[Least, ...], int]"])
    _balanced: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict[tuple[int, int, int], tuple[int, ...]])

    def over_context(self, context: int) -> Bench | Infeasible:
        """The same with ranks on the context axis, which are next to each other but for the tensor axis' ones."""
        found = over_context(self.sharding, context, self.setting.graph.sizes(1, self.setting.spec.train.seq_len))
        if isinstance(found, Infeasible) or context == 1:
            return found if isinstance(found, Infeasible) else self
        mesh = self.setting.mesh(self.sharding.tensor, 1, 1, context)
        return Bench(self.setting, found, self.group, group_of(mesh, "context", self.setting.network))

    def over_experts(self, expert: int) -> Bench:
        """The same with `expert` neighbours among the replicas that share one set of experts."""
        if expert == 1:
            return self
        if expert not in self._experts:
            mesh = self.setting.mesh(self.sharding.tensor, expert, 1, self.sharding.context, expert)
            group = group_of(mesh, "expert", self.setting.network)
            found = replace(self.sharding, expert=expert)
            self._experts[expert] = Bench(self.setting, found, self.group, self.context_group, group)
        return self._experts[expert]

    @cached_property
    def holdings(self) -> memory.Holdings:
        return memory.Holdings(self.setting.graph, self.sharding, self.setting.chain)

    def passes(self, micro_batch: int) -> Passes:
        if micro_batch not in self._passes:
            sizes = self.setting.graph.sizes(micro_batch, self.setting.spec.train.seq_len)
            setting = self.setting
            common = (setting.graph, self.sharding, setting.kernels, self.group, sizes, setting.width)
            self._passes[micro_batch] = Passes(*common, self.context_group, self.expert_group, setting.execution)
        return self._passes[micro_batch]

    def balanced(self, micro_batch: int, mode: int, stages: int) -> tuple[int, ...]:
        """Layers of each virtual stage."""
        key = (micro_batch, mode, stages)
        found = self._balanced.get(key)
        if found is None:
            chain = self.setting.chain
            whole = [forward + backward for forward, backward, _ in self._region_seconds(micro_batch, mode)]
            kinds = tuple(sum(whole[i] for i in kind) for kind in chain.kinds)
            first, last = sum(whole[i] for i in chain.first), sum(whole[i] for i in chain.last)
            found = self._balanced[key] = balance(chain, kinds, first, last, stages)
        return found

    def least_activations(self, micro_batch: int) -> tuple[tuple[Least, ...], int]:
        """By way of recomputing, and what the loss keeps."""
        found = self._least.get(micro_batch)
        if found is None:
            found = self._least[micro_batch] = self._least_activations(micro_batch)
        return found

    def _least_activations(self, micro_batch: int) -> tuple[tuple[Least, ...], int]:
        chain, costs = self.setting.chain, self.passes(micro_batch).costs
        each = [
            Least(
                sum(count * costs[i].saved_bytes[mode] for kind, count in chain.layers for i in chain.kinds[kind]),
                min((max(costs[i].working_bytes[mode] for i in kind) for kind in chain.kinds), default=0),
            )
            for mode in range(len(MODES))
        ]
        return tuple(each), sum(cost.loss_bytes for cost in costs)

    def _region_seconds(self, micro_batch: int, mode: int) -> list[tuple[float, float, float]]:
        """(forward, backward, weights' share of it) of one pass, with what is recomputed in the backward pass."""
        return [
            (
                cost.forward_seconds + cost.tensor_forward_seconds + cost.context_forward_seconds + cost.expert_forward_seconds,
                cost.backward_seconds
                + cost.tensor_backward_seconds
                + cost.context_backward_seconds
                + cost.expert_backward_seconds
                + cost.again[mode].expert_seconds
                + cost.again[mode].kernel_seconds
                + cost.again[mode].tensor_seconds
                + cost.again[mode].context_seconds,
                cost.weight_seconds,
            )
            for cost in self.passes(micro_batch).costs
        ]

    def least_layer(self, micro_batch: int, mild: int, dear: int) -> float:
        """What a pass through a layer takes at least under one way of recomputing, as a share of that under another."""
        ways = [[f + b for f, b, _ in self._region_seconds(micro_batch, mode)] for mode in (mild, dear)]
        return min(sum(ways[0][i] for i in kind) / sum(ways[1][i] for i in kind) for kind in self.setting.chain.kinds)

    def part(self, part: Part, micro_batch: int, how: How, piped: bool) -> PartCost:
        key = (part, micro_batch, how, piped)
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._part(part, micro_batch, how, piped)
        return found

    def _part(self, part: Part, micro_batch: int, how: How, piped: bool) -> PartCost:
        chain = self.setting.chain
        ways = [self._region_seconds(micro_batch, mode) for mode in range(len(MODES))]
        regions = regions_of(chain, part, how)
        forward, backward, weight = (sum(n * ways[mode][i][k] for i, mode, n in regions) for k in range(3))
        passing = memory.passing(self.passes(micro_batch), chain, part, how, 2 if piped else 1)
        return PartCost(forward, backward, weight, passing)

    def state(self, parts: tuple[Part, ...], sharing: memory.Sharing, moment: Moment) -> memory.State:
        key = (parts, sharing, *moment.of_state)
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = self.holdings.state(parts, sharing, self.setting.width, moment)
        return found


class Exchange(NamedTuple):
    """Seconds of one rank's traffic over weights and gradients: all gathers once, all reductions once, the share of the largest
    unit in them; sums over hybrid sharding's copies; those of experts that are shared out; tied and partial gradients; the
    optimizer."""

    gather: float
    reduce: float
    unit: float
    copied: float
    experts: float
    tied: float
    partial: float
    optimizer: float


@dataclass(frozen=True)
class Place:
    """One mesh: a bench, the degrees, the groups."""

    bench: Bench
    pipeline: int
    data: int
    _cuts: dict[tuple[object, ...], Cut] = field(default_factory=dict[tuple[object, ...], Cut])
    _exchanges: dict[tuple[object, ...], Exchange] = field(default_factory=dict[tuple[object, ...], Exchange])
    _least: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    _moments: dict[tuple[object, ...], Moments] = field(default_factory=dict[tuple[object, ...], "Moments"])
    _blends: dict[tuple[object, ...], tuple[Blend, ...]] = field(default_factory=dict[tuple[object, ...], "tuple[Blend, ...]"])

    @cached_property
    def mesh(self) -> Mesh:
        return self.bench.setting.mesh(self.bench.sharding.tensor, self.data, self.pipeline, self.context, self.expert)

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
        return self.mesh if replicate == 1 else self.bench.setting.mesh(*degrees)

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
    def pipeline_group(self) -> Group:
        return group_of(self.mesh, "pipeline", self.bench.setting.network)

    @cached_property
    def context_bytes(self) -> int:
        axes = ("tensor", "context", "replicas", "pipeline", "expert")
        several = sum(self.mesh.size(axis) > 1 for axis in axes) + (1 < self.expert < self.replicas)
        return memory.context_bytes(self.bench.setting.device.kind, several)

    def more_context_bytes(self, c: Candidate) -> int:
        """Of two communicators more: of the shards, and of their copies."""
        return 2 * (c.replicate > 1) * memory.COMMUNICATOR_BYTES[self.bench.setting.device.kind]

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

    def micro_batches(self, micro_batch: int) -> int:
        return self.bench.setting.spec.train.batch // (self.data * micro_batch)

    def cut(self, micro_batch: int, mode: int, kind: Schedule, interleave: int) -> Cut:
        return self.given(self.bench.balanced(micro_batch, mode, self.pipeline * interleave), kind)

    def given(self, stages: tuple[int, ...], kind: Schedule = "1f1b") -> Cut:
        key = (stages, kind in schedule.V_SHAPED)
        found = self._cuts.get(key)
        if found is None:
            interleave = len(stages) // self.pipeline
            placed = tuple(schedule.stages_of(kind, self.pipeline, interleave, rank) for rank in range(self.pipeline))
            found = self._cuts[key] = cut_of(self.bench.setting.chain, stages, placed)
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
        """What the rank holds besides its state."""
        if not c.modes:
            return self.filling_under(c, rank, parts, (c.recompute,) * len(parts))
        return self.filling_under(c, rank, parts, [self.how(c, stage) for stage in c.cut.placed[rank]])

    def filling_under(self, c: Candidate, rank: int, parts: tuple[Part, ...], hows: Sequence[How]) -> memory.Filling:
        """By what the rank's virtual stages recompute."""
        piped, m = self.pipeline > 1, self.micro_batches(c.micro_batch)
        stages = [self.bench.part(part, c.micro_batch, how, piped).bytes for part, how in zip(parts, hows, strict=True)]
        turns = c.schedule in schedule.V_SHAPED and rank == self.pipeline - 1
        return memory.Filling(stages, m, self.bench.setting.device.kind, turns)

    def fillings(self, c: Candidate) -> list[memory.Filling]:
        """By the cut's ranks; the same for every ZeRO."""
        return [self.filling(c, rank, parts) for rank, parts in self._fullest(c)]

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

    def sharing(self, zero: int, replicate: int, micro_batches: int) -> memory.Sharing:
        shared = zero if self.replicas > 1 else 0
        return memory.Sharing(shared, self.replicas, replicate, self.pipeline > 1, min(micro_batches, 3))

    def fullest(self, c: Candidate, rank: int, parts: tuple[Part, ...]) -> tuple[Moment, memory.State, memory.Held]:
        """When the rank holds the most, and what."""
        filling = self.filling(c, rank, parts)
        each = (
            (bytes + sum(held := filling.at(moment)), (moment, state, held))
            for bytes, moment, state in self.moments(c, rank, parts)
        )
        return max(each, key=lambda found: found[0])[1]

    def rank_bytes(self, c: Candidate, rank: int, parts: tuple[Part, ...], filling: memory.Filling) -> int:
        """What the rank holds at most, but for communicators that only some ways of ZeRO have."""
        return max(bytes + sum(filling.at(moment)) for bytes, moment, _ in self.moments(c, rank, parts)) + self.context_bytes

    def _fullest(self, c: Candidate) -> Sequence[tuple[int, tuple[Part, ...]]]:
        """Ranks with their parts, of which one holds the most."""
        return [(rank, c.cut.held(rank)) for rank in range(self.pipeline)] if c.modes else c.cut.ranks

    def least_bytes(self, micro_batch: int, zero: int, replicate: int) -> int:
        """What the fullest rank of any plan here holds at least: even shares of state, of what one micro-batch leaves and of
        the loss. Grows with the micro-batch."""
        each, loss = self.bench.least_activations(micro_batch)
        passing = min(least.kept / self.pipeline + max(loss / self.pipeline, least.working) for least in each)
        return self._bound(self._least_state(zero, replicate) / self.pipeline, passing)

    def least_under(self, micro_batch: int, mode: int, kind: Schedule, interleave: int, zero: int, replicate: int) -> int:
        """The same under a way of recomputing and a schedule, whose ranks hold different numbers of micro-batches."""
        each, loss = self.bench.least_activations(micro_batch)
        share, most = schedule.least_in_flight(kind, self.pipeline, interleave, self.micro_batches(micro_batch))
        state, least = self._least_state(zero, replicate), each[mode]
        even = self._bound(state / self.pipeline, least.kept / self.pipeline + max(loss / self.pipeline, least.working))
        return max(even, self._bound(state * share / most, least.kept * share + least.working))

    def _bound(self, state: float, passing: float) -> int:
        return int(state + (1 + memory.SLACK[self.bench.setting.device.kind]) * passing) + self.context_bytes

    def _least_state(self, zero: int, replicate: int) -> float:
        """Of all pipeline ranks together when the first backward pass begins, but for what torch makes room for one unit at a
        time."""
        found = self._least.get((zero, replicate))
        if found is None:
            whole, sharing = self.bench.setting.chain.whole, self.sharing(zero, replicate, 1)
            state = self.bench.state(whole, sharing, Moment("loss", (1,)))
            found = self._least[zero, replicate] = sum(state) - state.buffers
            if zero == 3 and sharing.piped:
                found -= state.unsharded
        return found

    def peak_bytes(self, c: Candidate, fillings: Sequence[memory.Filling] | None = None) -> int:
        """On the fullest rank."""
        ranks = zip(self._fullest(c), self.fillings(c) if fillings is None else fillings, strict=True)
        return max(self.rank_bytes(c, rank, parts, filling) for (rank, parts), filling in ranks) + self.more_context_bytes(c)

    # ---- time -------------------------------------------------------------------------------------------------------

    def runs(self, c: Candidate) -> schedule.Runs:
        """Stages in a row that are alike: how many, forward and backward seconds with their sends, weights' gradients."""
        if c.schedule in schedule.V_SHAPED or c.modes:
            return tuple((1, *self.stage_seconds(c, stage)) for stage in range(len(c.cut.stages)))
        first = [sum(count for _, count in c.cut.runs[:i]) for i in range(len(c.cut.runs))]
        return tuple((n, *self.stage_seconds(c, at)) for (_, n), at in zip(c.cut.runs, first, strict=True))

    def stage_seconds(self, c: Candidate, stage: int) -> tuple[float, float, float]:
        """Forward and backward seconds of a virtual stage with its sends, and those of weights' gradients."""
        cost = self.bench.part(c.cut.parts[stage], c.micro_batch, self.how(c, stage), self.pipeline > 1)
        given, handed = self.crossings(c, stage)
        onwards = self._send_seconds(cost.bytes.sent) if handed else 0.0
        back = self._send_seconds(cost.bytes.received) if given else 0.0
        return cost.forward + onwards, cost.backward + back, cost.weight

    def _send_seconds(self, size: int) -> float:
        bench = self.bench
        tensor = bench.sharding.tensor
        if tensor == 1 or bench.sharding.sequence_parallel or not bench.setting.execution.scattered_sends:
            return send_seconds(size, self.pipeline_group)
        return send_seconds(size / tensor, self.pipeline_group) + collective_seconds("all_gather", size, bench.group)

    def crossings(self, c: Candidate, stage: int) -> tuple[bool, bool]:
        """Whether a virtual stage is given its input by another rank, and hands its output to one."""
        mesh = (c.schedule, self.pipeline, c.interleave)
        return stage > 0 and schedule.hands_on(*mesh, stage - 1), schedule.hands_on(*mesh, stage)

    def times(self, c: Candidate, clock: schedule.Clock = schedule.pipeline_seconds) -> Times:
        """`clock`: what tells the time of all micro-batches through the pipeline; another one is a bound."""
        m = self.micro_batches(c.micro_batch)
        exchange, runs = self.exchange(c), self.with_gathers(c, self.runs(c))
        passes = clock(c.schedule, runs, m, self.pipeline, c.interleave)
        busy = m * sum(count * (f + b) for count, f, b, _ in runs) / self.pipeline
        gathered, reduced = self._exposed(c, exchange, runs)
        summed = reduced + exchange.experts + exchange.tied + exchange.partial
        total = passes + gathered + summed + exchange.optimizer + self.sync_seconds
        return Times(passes, max(0.0, passes - busy) if self.pipeline > 1 else 0.0, gathered, summed, exchange.optimizer, total)

    @property
    def _overlaps(self) -> bool:
        """Whether collectives run beside kernels: on a CPU both want the same cores."""
        return self.bench.setting.device.kind != "cpu"

    def with_gathers(self, c: Candidate, runs: schedule.Runs) -> schedule.Runs:
        """ZeRO 3: weights are gathered for each forward and backward pass (under a pipeline torch leaves them gathered from a
        backward to the next forward pass). ZeRO 2 and, without a pipeline, 3: gradients are reduced after each pass."""
        if c.zero < 2 or self.replicas == 1:
            return runs
        e = self.exchange(c)
        behind = e.gather if c.zero == 3 else 0.0
        ahead = behind if self.pipeline == 1 else 0.0
        behind += e.reduce if reduces_each_pass(c.zero, self.pipeline > 1) else 0.0
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
            each = [self._exchange(c, parts) for _, parts in c.cut.ranks]
            found = self._exchanges[key] = Exchange(*(max(values) for values in zip(*each, strict=True)))
        return found

    def _exchange(self, c: Candidate, parts: tuple[Part, ...]) -> Exchange:
        setting, holdings, zero, shards = self.bench.setting, self.bench.holdings, c.zero, self.shards(c)
        mesh = self.mesh_of(c.replicate)
        group = self.replica_group if c.replicate == 1 else group_of(mesh, "shards", setting.network)
        held, summed = [holdings.of(part) for part in parts], setting.execution.gradient_bytes
        elements = owned = sum(h.elements for h in held)
        gather, reduce, unit, copied = 0.0, collective_seconds("all_reduce", summed * elements, group), 1.0, 0.0
        if zero and self.replicas > 1:
            owned = sum(holdings.shard(part, shards) for part in parts)
            each = [holdings.units(part, shards) for part in parts]
            units = [layer for unit in each for layer in unit.layers] + [(1, unit.root) for unit in each]
            gather = sum(n * collective_seconds("all_gather", setting.width * size, group) for n, size in units if size)
            reduce = sum(n * collective_seconds("reduce_scatter", summed * size, group) for n, size in units if size)
            unit = min(1.0, max(size for _, size in units) / max(1, elements))
            copies = group_of(mesh, "replicate", setting.network)
            copied = sum(n * collective_seconds("all_reduce", summed * size / shards, copies) for n, size in units if size)
        experts = sum(
            count * collective_seconds(kind, size, self._copies) for kind, size, count in self.expert_exchanges(parts, zero)
        )
        partial = collective_seconds("all_reduce", 4 * self.partial_elements(c, parts), self.bench.group)
        tied = collective_seconds("all_reduce", 4 * self.tied_elements(c, parts), self._pair)
        stepped = sum(stack.times * stack.stepped for part in parts for stack in holdings.experts(part, self._zeroed(zero)))
        each_element = setting.execution.optimizer_bytes or _OPTIMIZER_BYTES[setting.spec.train.precision]
        optimizer = setting.kernels.optimizer_seconds(each_element * (owned + stepped))
        return Exchange(gather, reduce, unit, copied, experts, tied, partial, optimizer)

    def _zeroed(self, zero: int) -> int:
        """Ranks that ZeRO shares experts' state out over, where each has all of them."""
        return self.replicas if zero else 1

    @cached_property
    def _copies(self) -> Group:
        return group_of(self.mesh, "copies", self.bench.setting.network)

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
        shared = self.bench.setting.shared_weights
        if self.pipeline == 1 or not shared:
            return 0
        holdings = self.bench.holdings
        held = [{key for part in c.cut.held(rank) for key in holdings.of(part).keys} & shared for rank in range(self.pipeline)]
        counted = Counter(key for keys in held for key in keys)
        mine = {key for part in parts for key in holdings.of(part).keys}
        shapes = [holdings.local_shapes[key] for key in sorted(mine & shared) if counted[key] > 1]
        return sum(memory.shard_elements(shape, self.shards(c)) for shape in shapes)

    @cached_property
    def _pair(self) -> Group:
        """First and last stage, for tied weights."""
        g, pair = self.pipeline_group, min(2, self.pipeline)
        crosses = g.nodes > 1
        inter, latency = g.inter_bytes_per_second, g.inter_latency
        return Group(pair, 1 if crosses else pair, g.intra_bytes_per_second, g.intra_latency, inter, latency)
