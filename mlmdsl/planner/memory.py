"""The ledger: bytes on the fullest rank of each pipeline stage at its peak.

State, per local weight element (p of them on this rank of the tensor axis; d replicas, the ranks of data and context;
w = 2 bytes in bf16, 4 in fp32):

    0: w of weights, 4 of masters in bf16, 4 of gradients, 8 of AdamW (Rajbhandari et al. 2020, arXiv:1910.02054, table 1)
    1: w of weights, that FSDP2 keeps gathered; 4 / d of masters; 4 / d of gradients, and their unsharded sums; 8 / d of AdamW
    2: of unsharded gradients those of two layers, the rest as 1
    3: of weights those of two layers too, the rest as 2; with a pipeline torch gathers and sums as for 1

With hybrid sharding d is the number of ranks that share one copy: replicas / replicate.

Experts that the expert axis shares out are held as for 0, a share of them on each of its ranks; under ZeRO their masters, 4 / c
of gradients beside the sums, and AdamW's 8 / c are cut over the c replicas that have the same ones.

Shards are counted as FSDP2 cuts them: along a dim that d divides, or dim 0 in chunks of ceil(rows / d). Passes: what one
micro-batch leaves on a stage, times the micro-batches that the schedule holds there, and what recomputing brings back for one
layer. torch's pipeline stages keep a receive buffer for every micro-batch, in both directions, and a stage's outputs until
their backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

from mlmdsl.grammar.spec import Device
from mlmdsl.graph.graph import Graph, Weight
from mlmdsl.planner.blend import How, first_of, regions_of
from mlmdsl.planner.choice import cut
from mlmdsl.planner.passes import PassCost, Passes
from mlmdsl.planner.plan import StageMemory
from mlmdsl.planner.sharding import Sharding
from mlmdsl.planner.stages import Chain, Part
from mlmdsl.runtime.config import cut_over_copies, even_dim

MIB = 2**20
# What a process takes before any tensor: driver context, kernels and cuBLAS workspaces on a GPU; Python with torch (resident,
# measured with torch 2.13) on a CPU. Each communicator of NCCL or RCCL adds its channels' buffers.
CONTEXT_BYTES = {"cuda": 700 * MIB, "rocm": 900 * MIB, "cpu": 320 * MIB}
COMMUNICATOR_BYTES = {"cuda": 200 * MIB, "rocm": 200 * MIB, "cpu": 2 * MIB}
# Share by which an allocator's blocks exceed what is asked for (expandable segments on a GPU; arenas of malloc on a CPU)
SLACK = {"cuda": 0.04, "rocm": 0.04, "cpu": 0.15}
# Share of the device's memory that a plan leaves free
HEADROOM = 0.05


def capacity_bytes(device: Device) -> int:
    """What a plan may use of the device."""
    return usable_bytes(device.memory_bytes)


def usable_bytes(memory_bytes: int) -> int:
    """Of a device's memory what a plan may use."""
    return int(memory_bytes * (1 - HEADROOM))


def context_bytes(kind: Literal["cuda", "rocm", "cpu"], communicators: int) -> int:
    return CONTEXT_BYTES[kind] + communicators * COMMUNICATOR_BYTES[kind]


# ---- state ----------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Bytes of weights and what goes with them, on one rank."""

    weights: int
    master: int
    gradients: int
    optimizer: int
    unsharded: int
    buffers: int


@dataclass(frozen=True)
class Holding:
    """Local weight elements of one part: all but `experts`, those of its largest single weight, and `experts` that the expert
    axis shares out. `keys`: how many of each other weight; `expert_keys` of those. FSDP2's units, by weight: `layers` of each
    kind and how many there are, `root` of what stands around them."""

    elements: int
    largest: int
    experts: int
    keys: Mapping[str, int]
    expert_keys: Mapping[str, int]
    layers: tuple[tuple[int, tuple[str, ...]], ...]
    root: tuple[str, ...]


class Units(NamedTuple):
    """Elements of FSDP2's units with what it pads them by: of the layers of each kind and how many there are, of the root."""

    layers: tuple[tuple[int, int], ...]
    root: int

    @property
    def layer(self) -> int:
        """The largest."""
        return max((size for _, size in self.layers), default=0)


class Stack(NamedTuple):
    """A weight of experts that are shared out: how many like it, its local elements, and those that this rank steps."""

    key: str
    times: int
    elements: int
    stepped: int


@dataclass(frozen=True)
class Holdings:
    """Weights of parts under one sharding."""

    graph: Graph
    sharding: Sharding
    chain: Chain

    @cached_property
    def _parts(self) -> dict[Part, Holding]:
        return {}

    @cached_property
    def _units(self) -> dict[tuple[Part, int], Units]:
        return {}

    @cached_property
    def _shards(self) -> dict[tuple[Part, int], int]:
        return {}

    @cached_property
    def local_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {key: self._local_shape(weight) for key, weight in self.graph.weights.items()}

    def _local_shape(self, weight: Weight) -> tuple[int, ...]:
        return cut(weight.shape_over(self.sharding.expert), self.sharding.weights[weight.key].dim, self.sharding.tensor)

    def _shared_out(self, key: str) -> bool:
        return self.sharding.expert > 1 and self.graph.weights[key].expert

    def of(self, part: Part) -> Holding:
        if part not in self._parts:
            self._parts[part] = self._make(part)
        return self._parts[part]

    def _make(self, part: Part) -> Holding:
        keys: dict[str, int] = {}
        layers: list[tuple[int, tuple[str, ...]]] = []
        for kind, count in enumerate(part.layers):
            if count:
                own = self._used(self.chain.kinds[kind][:1], own=True)
                layers.append((count, tuple(key for key in own if not self._shared_out(key))))
                keys |= {key: keys.get(key, 0) + count for key in own}
                keys |= dict.fromkeys(self._used(self.chain.kinds[kind], own=False), 1)
        for straight in (self.chain.first * part.first, self.chain.last * part.last):
            keys |= dict.fromkeys(self._used(straight, own=False), 1)
        largest = max((prod(self.local_shapes[key]) for key in keys), default=0)
        shared_out = {key: count for key, count in keys.items() if self._shared_out(key)}
        common = {key: count for key, count in keys.items() if key not in shared_out}
        elements, experts = (sum(prod(self.local_shapes[key]) * n for key, n in each.items()) for each in (common, shared_out))
        root = tuple(key for key, count in common.items() if not self.graph.weights[key].region and count)
        return Holding(elements, largest, experts, common, shared_out, tuple(layers), root)

    def _used(self, regions: Iterable[int], *, own: bool) -> tuple[str, ...]:
        """Weights of the regions: those of each pass, or those that all passes share."""
        found: dict[str, None] = {}
        for index in regions:
            region = self.graph.regions[index]
            for node in region.nodes:
                for key in node.weights:
                    if own == (region.repeated and self.graph.weights[key].region == region.name):
                        found[key] = None
        return tuple(found)

    def units(self, part: Part, shards: int) -> Units:
        key = (part, shards)
        if key not in self._units:
            held = self.of(part)
            layers = tuple((count, shards * self._cut(dict.fromkeys(keys, 1), shards)) for count, keys in held.layers)
            self._units[key] = Units(layers, shards * self._cut(dict.fromkeys(held.root, 1), shards))
        return self._units[key]

    def shard(self, part: Part, shards: int) -> int:
        """Elements that FSDP2 leaves the first of the ranks that share the weights out."""
        key = (part, shards)
        if key not in self._shards:
            self._shards[key] = self._cut(self.of(part).keys, shards)
        return self._shards[key]

    def partial(self, part: Part, shards: int, replicas: int) -> int:
        """Elements whose gradients are partial sums over the tensor axis, as far as the first of the replicas has them, which
        share a weight out over `shards` ranks."""
        held = self.of(part)
        common = {key: count for key, count in held.keys.items() if self._is_partial(key)}
        experts = (stack for stack in self.experts(part, replicas) if self._is_partial(stack.key))
        return self._cut(common, shards) + sum(stack.times * stack.stepped for stack in experts)

    def experts(self, part: Part, replicas: int) -> Iterator[Stack]:
        """Of the part's experts that are shared out, as ZeRO over the replicas (1: none) leaves them."""
        copies = max(1, replicas // self.sharding.expert)
        for key, count in self.of(part).expert_keys.items():
            shape = self.local_shapes[key]
            yield Stack(key, count, prod(shape), prod(shape) // (copies if cut_over_copies(shape, copies) else 1))

    def _is_partial(self, key: str) -> bool:
        return self.sharding.weights[key].partial_gradient

    def _cut(self, keys: Mapping[str, int], shards: int) -> int:
        return sum(count * shard_elements(self.local_shapes[key], shards) for key, count in keys.items())

    def state(
        self,
        parts: Iterable[Part],
        zero: int,
        replicas: int,
        width: int,
        pipeline: int,
        micro_batches: int,
        replicate: int = 1,
    ) -> State:
        """Of a rank that runs `parts`. A weight's gradient is made before it is added to the sum, or sent."""
        parts = tuple(parts)
        held = [self.of(part) for part in parts]
        p, experts = sum(h.elements for h in held), sum(h.experts for h in held)
        if not zero or replicas == 1:
            return _whole(p + experts, width, width * max(h.largest for h in held))
        shards = replicas // replicate
        shard = sum(self.shard(part, shards) for part in parts)
        units = [self.units(part, shards) for part in parts]
        layer, root = max(u.layer for u in units), max(u.root for u in units)
        sums = p * (4 if micro_batches > 1 else width)
        if zero == 2 or (pipeline == 1 and (zero == 3 or micro_batches == 1)):
            sums = width * min(p, 2 * max(layer, root))
        gathered = width * min(p, 2 * layer + root) if pipeline == 1 else width * p
        weights, unsharded = (0, gathered) if zero == 3 else (width * p, 0)
        common = State(weights, 4 * shard, sums + 4 * shard, 8 * shard, unsharded, (2 * width + 4) * max(layer, root))
        return State(*map(sum, zip(common, self._shared(parts, replicas, width), strict=True)))

    def _shared(self, parts: Iterable[Part], replicas: int, width: int) -> State:
        """Experts that are shared out, under ZeRO."""
        state = State(0, 0, 0, 0, 0, 0)
        for stack in (stack for part in parts for stack in self.experts(part, replicas)):
            whole, stepped = stack.times * stack.elements, stack.times * stack.stepped
            cut = stepped < whole
            master, gradients = 4 * stepped * (cut or width < 4), 4 * whole + 4 * stepped * cut
            one = State(width * whole, master, gradients, 8 * stepped, 0, 0)
            state = State(*map(sum, zip(state, one, strict=True)))
        return state


def shard_elements(shape: Sequence[int], shards: int) -> int:
    """Of the largest shard of a weight."""
    dim = even_dim(shape, shards)
    return prod(shape) // shape[dim] * -(-shape[dim] // shards)


def _whole(elements: int, width: int, buffers: int) -> State:
    """Held without ZeRO."""
    return State(width * elements, 4 * elements if width < 4 else 0, 4 * elements, 8 * elements, 0, buffers)


# ---- passes ---------------------------------------------------------------------------------------------------------


class Passing(NamedTuple):
    """Bytes that one micro-batch leaves on one part, for one way of recomputing; at the end of the step's peak.

    kept: until its backward pass; received: of a receive buffer, one direction; working, transient: while one layer's backward
    pass runs; loss: kept by the loss and model output; loss_transient."""

    kept: int
    received: int
    sent: int
    working: int
    transient: int
    loss: int
    loss_transient: int


def passing(passes: Passes, chain: Chain, part: Part, how: How, pipeline: int) -> Passing:
    costs, kinds = passes.costs, [chain.kinds[kind] for kind, count in enumerate(part.layers) if count]
    regions = regions_of(chain, part, how)
    kept = sum(count * costs[i].saved_bytes[mode] for i, mode, count in regions)
    running = [costs[i] for i, _, _ in regions]
    received = 0 if part.first else _crossing(passes, kinds[0])
    sent = 0 if part.last else _crossing(passes, kinds[-1])
    if not part.first:  # lies in the receive buffer
        kept -= min(received, costs[kinds[0][0]].entry_bytes[first_of(how)])
    return Passing(
        kept=kept + sent,
        received=received,
        sent=sent,
        working=max((costs[i].working_bytes[mode] for i, mode, _ in regions), default=0),
        transient=max((cost.transient_bytes for cost in running), default=0),
        loss=_loss(running, pipeline) if part.last else 0,
        loss_transient=max((cost.loss_transient_bytes for cost in running), default=0) if part.last else 0,
    )


def _crossing(passes: Passes, kind: tuple[int, ...]) -> int:
    return passes.crossing_bytes[kind[0]]


def _loss(running: Iterable[PassCost], pipeline: int) -> int:
    """A pipeline's last stage keeps the model's output, too."""
    return sum(cost.loss_bytes + (cost.logits_bytes if pipeline > 1 else 0) for cost in running)


class Held(NamedTuple):
    """Bytes on a rank besides its state."""

    activations: int
    loss: int
    buffers: int
    workspace: int
    slack: int


def held(stages: Sequence[Passing], counts: Sequence[int], micro_batches: int, kind: str) -> Held:
    """Of a rank with these virtual stages; `counts`: micro-batches in flight on each. The fullest moment's larger counts are
    charged to the larger stages: which of a rank's stages holds more changes in the course of an interleaved step."""
    counted = zip(sorted((s.kept for s in stages), reverse=True), sorted(counts, reverse=True), strict=True)
    activations = sum(kept * count for kept, count in counted) + max(s.working for s in stages)
    last = stages[-1]
    loss = last.loss * counts[-1] + last.loss_transient
    buffers = micro_batches * sum(s.received + s.sent for s in stages)
    transient = max(s.transient for s in stages)
    return Held(activations, loss, buffers, transient, int(SLACK[kind] * (activations + loss + buffers + transient)))


def stage_memory(stage: int, state: State, rest: Held, context: int) -> StageMemory:
    """The ledger's entry."""
    return StageMemory(
        stage=stage,
        weights_bytes=state.weights,
        master_weights_bytes=state.master,
        gradients_bytes=state.gradients,
        optimizer_bytes=state.optimizer,
        activations_bytes=rest.activations,
        logits_and_loss_bytes=rest.loss,
        unsharded_weights_bytes=state.unsharded,
        buffers_bytes=rest.buffers + state.buffers,
        workspace_bytes=rest.workspace + rest.slack,
        slack_bytes=rest.slack,
        context_bytes=context,
        total_bytes=sum(state) + sum(rest) + context,
    )
