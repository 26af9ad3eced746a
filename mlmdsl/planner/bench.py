"""What one micro-batch costs under a sharding, wherever its layers lie: sums that all candidates of a bench have in common.

Plain floats and tuples: a search asks tens of thousands of times.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import NamedTuple

from mlmdsl.frozen import frozen
from mlmdsl.grammar.constraints import USUAL, Order
from mlmdsl.grammar.spec import Device, Spec
from mlmdsl.graph.flops import flops_per_token
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import host, memory
from mlmdsl.planner.blend import How, regions_of
from mlmdsl.planner.communication import Group, group_of
from mlmdsl.planner.compute import Kernels
from mlmdsl.planner.context import over_context
from mlmdsl.planner.execution import OURS, Execution
from mlmdsl.planner.holdings import Holdings, Sharing, State
from mlmdsl.planner.layout import Layout
from mlmdsl.planner.mesh import Mesh, Network
from mlmdsl.planner.moments import Moment
from mlmdsl.planner.passes import MODES, Passes, Prices
from mlmdsl.planner.pools import Site, Sites, group_on, mean_peak
from mlmdsl.planner.proportion import Speed
from mlmdsl.planner.sharding import Costs, Infeasible, Sharding, reference_micro_batch, replicated, shard_graph
from mlmdsl.planner.stages import Chain, Part, balance, chain_of
from mlmdsl.planner.trade import Trade, trade_of

_WIDTH = {"fp32": 4, "bf16": 2}


@frozen
class Setting:
    """What all candidates share."""

    spec: Spec
    graph: Graph
    execution: Execution = OURS

    @cached_property
    def sites(self) -> Sites:
        precision = self.execution.products or self.spec.train.precision
        return Sites(self.spec.cluster, precision, self.execution.launches)

    @cached_property
    def alike(self) -> bool:
        """Whether it makes no difference where a stage lies."""
        return self.sites.alike

    @cached_property
    def site(self) -> Site:
        """Where pools are unlike, the weakest in every respect."""
        return self.sites.weakest

    @property
    def device(self) -> Device:
        return self.site.device

    @property
    def kernels(self) -> Kernels:
        return self.site.kernels

    @property
    def network(self) -> Network:
        return self.site.network

    @cached_property
    def peak(self) -> float:
        """FLOP/s of a device; of unlike ones the mean."""
        return mean_peak(self.spec.cluster, self.spec.train.precision)

    @cached_property
    def chain(self) -> Chain:
        return chain_of(self.graph)

    @cached_property
    def _prices(self) -> dict[Site, Prices]:
        return {}

    def prices_on(self, site: Site) -> Prices:
        """Of nodes on a device, which several shardings have in common."""
        return self._prices.setdefault(site, {})

    @property
    def width(self) -> int:
        return _WIDTH[self.spec.train.precision]

    @property
    def capacity_bytes(self) -> int:
        return self.site.capacity_bytes

    @cached_property
    def most_bytes(self) -> int:
        """What a plan may use of the largest memory."""
        return max(site.capacity_bytes for site in self.sites.single)

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

    def mesh(
        self,
        tensor: int,
        data: int,
        pipeline: int,
        context: int = 1,
        expert: int = 1,
        replicate: int = 1,
        order: Order = USUAL,
    ) -> Mesh:
        key = (tensor, data, pipeline, self.network.devices_per_node, context, expert, replicate, order)
        return self._meshes.get(key) or self._meshes.setdefault(key, Mesh(*key))

    @cached_property
    def _meshes(self) -> dict[tuple[object, ...], Mesh]:
        """Equal ones are one object."""
        return {}

    @cached_property
    def _costs(self) -> dict[int, Costs]:
        """By tensor degree, what a sharding is chosen by."""
        return {}

    def shard(self, tensor: int, sequence_parallel: bool) -> Bench | Infeasible:
        """The sharding does not depend on the micro-batch: it is chosen for one sequence."""
        if tensor == 1:
            return Bench(self, replicated(self.graph), group_of(self.mesh(1, 1, 1), "tensor", self.network))
        costs = self._costs.get(tensor)
        if costs is None:
            group = group_of(self.mesh(tensor, 1, 1), "tensor", self.network)
            sizes = self.graph.sizes(reference_micro_batch(self.spec.train.seq_len), self.spec.train.seq_len)
            share = self.network.inter_bytes_per_second
            costs = self._costs[tensor] = Costs(self.kernels, group, share, self.width, sizes)
        found = shard_graph(self.graph, tensor, sequence_parallel, costs)
        return found if isinstance(found, Infeasible) else Bench(self, found, costs.group)


class PartCost(NamedTuple):
    """One virtual stage, one micro-batch: seconds without sends, of the backward ones those of weights' gradients and what they
    take longer in two parts; bytes that stay."""

    forward: float
    backward: float
    weight: float
    apart: float
    bytes: memory.Passing


class Sums(NamedTuple):
    """Of one micro-batch through the whole model: forward and backward seconds without sends, of the backward ones those of
    weights' gradients; of the quickest layer forward and all seconds; bytes that a stage hands on at least."""

    forward: float
    backward: float
    weight: float
    quickest_forward: float
    quickest: float
    crossing: int


class LeastKept(NamedTuple):
    """Bytes that no plan has fewer of for one micro-batch. By way of recomputing: what all layers keep, and what a rank with
    layers needs while the backward pass of one runs; besides, where it adds gradients to their sums one by one, and where it
    makes those of a layer first; what the loss keeps."""

    kept: tuple[int, ...]
    working: tuple[int, ...]
    adding: int
    making: int
    loss: int


@dataclass(frozen=True, repr=False)
class Bench:
    """Everything that depends on the sharding over the tensor, context and expert axes; what is asked for is made once."""

    setting: Setting
    sharding: Sharding
    group: Group
    context_group: Group | None = None
    expert_group: Group | None = None
    lies_on: Site | None = None  # None: the setting's
    _speeds: dict[tuple[int, int], Speed] = field(default_factory=dict[tuple[int, int], Speed])
    _experts: dict[tuple[int, int], Bench] = field(default_factory=dict[tuple[int, int], "Bench"])
    _sites: dict[Site, Bench] = field(default_factory=dict[Site, "Bench"])
    _passes: dict[int, Passes] = field(default_factory=dict[int, Passes])
    _layout: Layout = field(default_factory=Layout)
    _parts: dict[tuple[Part, int, How, bool], PartCost] = field(default_factory=dict[tuple[Part, int, How, bool], PartCost])
    _states: dict[tuple[object, ...], State] = field(default_factory=dict[tuple[object, ...], State])
    _least: dict[int, LeastKept] = field(default_factory=dict[int, LeastKept])
    _trades: dict[tuple[int, tuple[int, ...]], Trade] = field(default_factory=dict[tuple[int, tuple[int, ...]], Trade])
    _balanced: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict[tuple[int, int, int], tuple[int, ...]])
    _sums: dict[tuple[int, int], Sums] = field(default_factory=dict[tuple[int, int], Sums])
    _seconds: dict[tuple[int, int], list[tuple[float, float, float]]] = field(
        default_factory=dict[tuple[int, int], "list[tuple[float, float, float]]"]
    )

    def over_context(self, context: int) -> Bench | Infeasible:
        """The same with ranks on the context axis, which are next to each other but for the tensor axis' ones."""
        found = over_context(self.sharding, context, self.setting.graph.sizes(1, self.setting.spec.train.seq_len))
        if isinstance(found, Infeasible) or context == 1:
            return found if isinstance(found, Infeasible) else self
        mesh = self.setting.mesh(self.sharding.tensor, 1, 1, context)
        return Bench(self.setting, found, self.group, group_of(mesh, "context", self.setting.network))

    def over_experts(self, expert: int, between: int = 1) -> Bench:
        """The same with `expert` neighbours among the replicas that share one set of experts; `between`: stages that lie
        between ranks of data and of context."""
        context = self.sharding.context
        key = (expert, between if expert > context else 1)
        if expert == 1:
            return self
        if key not in self._experts:
            mesh = self.setting.mesh(
                self.sharding.tensor, expert, key[1], context, expert, order="data_pipeline_context_tensor"
            )
            group = group_of(mesh, "expert", self.setting.network)
            found = replace(self.sharding, expert=expert)
            self._experts[key] = Bench(self.setting, found, self.group, self.context_group, group)
        return self._experts[key]

    @property
    def site(self) -> Site:
        return self.lies_on or self.setting.site

    def on(self, site: Site) -> Bench:
        """The same for ranks that lie there: what passes cost."""
        if site is self.site:
            return self
        if site not in self._sites:
            setting, tensor, context, expert = self.setting, self.sharding.tensor, self.sharding.context, self.sharding.expert
            self._sites[site] = Bench(
                setting,
                self.sharding,
                group_on(site, setting.mesh(tensor, 1, 1), "tensor"),
                self.context_group and group_on(site, setting.mesh(tensor, 1, 1, context), "context"),
                self.expert_group and group_on(site, setting.mesh(tensor, expert, 1, context, expert), "expert"),
                site,
            )
        return self._sites[site]

    @cached_property
    def holdings(self) -> Holdings:
        return Holdings(self.setting.graph, self.sharding, self.setting.chain)

    def passes(self, micro_batch: int) -> Passes:
        if micro_batch not in self._passes:
            sizes = self.setting.graph.sizes(micro_batch, self.setting.spec.train.seq_len)
            setting = self.setting
            common = (setting.graph, self.sharding, self.site.kernels, self.group, sizes, setting.width)
            around = (self.context_group, self.expert_group, setting.execution)
            self._passes[micro_batch] = Passes(*common, *around, self._layout, setting.prices_on(self.site))
        return self._passes[micro_batch]

    def balanced(self, micro_batch: int, mode: int, stages: int) -> tuple[int, ...]:
        """Layers of each virtual stage."""
        key = (micro_batch, mode, stages)
        found = self._balanced.get(key)
        if found is None:
            found = self._balanced[key] = balance(self.setting.chain, *self.speed(micro_batch, mode), stages)
        return found

    def speed(self, micro_batch: int, mode: int) -> Speed:
        """Of one micro-batch, forward and backward."""
        key, chain = (micro_batch, mode), self.setting.chain
        if key in self._speeds:
            return self._speeds[key]
        whole = [forward + backward for forward, backward, _ in self._region_seconds(micro_batch, mode)]
        kinds = tuple(sum(whole[i] for i in kind) for kind in chain.kinds)
        found = self._speeds[key] = Speed(kinds, sum(whole[i] for i in chain.first), sum(whole[i] for i in chain.last))
        return found

    def least_activations(self, micro_batch: int) -> LeastKept:
        found = self._least.get(micro_batch)
        if found is None:
            found = self._least[micro_batch] = self._least_activations(micro_batch)
        return found

    def _least_activations(self, micro_batch: int) -> LeastKept:
        chain, costs, modes = self.setting.chain, self.passes(micro_batch).costs, range(len(MODES))
        each = [[costs[i] for i in kind] for kind in chain.kinds]
        transient = [max(cost.transient_bytes for cost in layer) for layer in each]
        adding = (max(cost.adding_bytes for cost in layer) for layer in each)
        making = (max(cost.making_bytes for cost in layer) for layer in each)
        return LeastKept(
            tuple(sum(n * cost.saved_bytes[mode] for kind, n in chain.layers for cost in each[kind]) for mode in modes),
            tuple(
                min(
                    (max(c.working_bytes[mode] for c in layer) + t for layer, t in zip(each, transient, strict=True)), default=0
                )
                for mode in modes
            ),
            min((max(0, more - t) for more, t in zip(adding, transient, strict=True)), default=0),
            min((max(0, more - t) for more, t in zip(making, transient, strict=True)), default=0),
            sum(cost.loss_bytes + cost.logits_bytes * cost.keeps_logits for cost in costs),
        )

    def _region_seconds(self, micro_batch: int, mode: int) -> list[tuple[float, float, float]]:
        """(forward, backward, weights' share of it) of one pass, with what is recomputed in the backward pass."""
        found = self._seconds.get((micro_batch, mode))
        if found is None:
            found = self._seconds[micro_batch, mode] = self._seconds_of_regions(micro_batch, mode)
        return found

    def _seconds_of_regions(self, micro_batch: int, mode: int) -> list[tuple[float, float, float]]:
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

    def sums(self, micro_batch: int, mode: int) -> Sums:
        """What bounds on time are made of (bounds.py)."""
        found = self._sums.get((micro_batch, mode))
        if found is None:
            found = self._sums[micro_batch, mode] = self._summed(micro_batch, mode)
        return found

    def _summed(self, micro_batch: int, mode: int) -> Sums:
        chain, seconds = self.setting.chain, self._region_seconds(micro_batch, mode)
        each = [[sum(seconds[i][k] for i in kind) for k in range(3)] for kind in chain.kinds]
        ends = [[seconds[i][k] for i in chain.first + chain.last] for k in range(3)]
        forward, backward, weight = (sum(n * each[kind][k] for kind, n in chain.layers) + sum(ends[k]) for k in range(3))
        crossing = min((sum(self.passes(micro_batch).crossings[kind[0]]) for kind in chain.kinds), default=0)
        quickest = min((f + b for f, b, _ in each), default=0.0)
        return Sums(forward, backward, weight, min((f for f, _, _ in each), default=0.0), quickest, crossing)

    def trade(self, micro_batch: int, modes: tuple[int, ...]) -> Trade:
        """Between ways of recomputing, the mildest first."""
        found = self._trades.get((micro_batch, modes))
        if found is None:
            ways = [[f + b for f, b, _ in self._region_seconds(micro_batch, mode)] for mode in modes]
            chain, costs = self.setting.chain, self.passes(micro_batch).costs
            points = [
                [
                    (sum(costs[i].saved_bytes[mode] for i in kind), sum(seconds[i] for i in kind))
                    for mode, seconds in zip(modes, ways, strict=True)
                ]
                for kind in chain.kinds
            ]
            found = self._trades[micro_batch, modes] = trade_of((count, points[kind]) for kind, count in chain.layers)
        return found

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
        passes = self.passes(micro_batch)
        passing = memory.passing(passes, chain, part, how, 2 if piped else 1)
        apart = self.host_seconds(host.apart_launches(sum(n * passes.costs[i].backward_kernels for i, _, n in regions)))
        each = self.host_seconds(host.PASS) if piped else 0.0
        return PartCost(forward + each, backward + each, weight, apart, passing)

    def host_seconds(self, launches: float) -> float:
        """Of the runtime's work, where nothing hides it."""
        kernels = self.site.kernels
        return launches * kernels.launch if kernels.device.kind == "cpu" else 0.0

    def state(self, parts: tuple[Part, ...], sharing: Sharing, moment: Moment) -> State:
        key = (parts, sharing, *moment.of_state)
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = self.holdings.state(parts, sharing, self.setting.width, moment)
        return found
