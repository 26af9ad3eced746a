"""The ledger: bytes on the fullest rank of each pipeline stage, at the moment when it holds the most (moments.py).

State, per local weight element (p of them on this rank of the tensor axis; d replicas, the ranks of data and context;
w = 2 bytes in bf16, 4 in fp32):

    0: w of weights, 4 of masters in bf16, 4 of gradients, 8 of AdamW (Rajbhandari et al. 2020, arXiv:1910.02054, table 1)
    1: 4 / d of masters, 8 / d of AdamW; w of weights from a stage's first pass until its gradients are reduced; 4 of sums from
       its first backward pass till then (without a pipeline and with one micro-batch only those being made); then 4 / d
    2: sums of 4 / d from the first backward pass on, the rest as 1
    3: of weights those of two layers and what stands around them, the rest as 2; with a pipeline torch sums as for 1, and
       leaves gathered what a backward pass has gathered

With hybrid sharding d is the number of ranks that share one copy: replicas / replicate. FSDP2 makes the gradients of a unit (a
layer, or what stands around the layers), copies them in fp32 and reduce-scatters the copy, which stays until the next unit's
turn.

Experts that the expert axis shares out are held as for 0, a share of them on each of its ranks; under ZeRO their masters, 4 / c
of gradients beside the sums, and AdamW's 8 / c are cut over the c replicas that have the same ones.

Shards are counted as FSDP2 cuts them: along a dim that d divides, or dim 0 in chunks of ceil(rows / d). Passes: what one
micro-batch leaves on a stage, times the micro-batches that the schedule holds there; while the loss is computed, what that
needs; in a layer's backward pass what recomputing brings back and what one operation needs. torch's pipeline stages keep a
receive buffer for every micro-batch, in both directions, and a stage's outputs until their backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from operator import mul
from typing import Literal, NamedTuple

from mlmdsl.frozen import frozen
from mlmdsl.grammar.spec import Device
from mlmdsl.graph.graph import Graph, Weight
from mlmdsl.planner.blend import How, first_of, regions_of, runs_of
from mlmdsl.planner.choice import cut
from mlmdsl.planner.moments import Moment, Turn, reduces_each_pass
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


@frozen
class Holding:
    """Local weight elements of one part: all but `experts`, those of its largest single weight, and `experts` that the expert
    axis shares out. `keys`: how many of each other weight; `expert_keys` of those. FSDP2's units, by weight: `layers` of each
    kind and how many there are, `root` of what stands around them, of which `head` after them."""

    elements: int
    largest: int
    experts: int
    keys: Mapping[str, int]
    expert_keys: Mapping[str, int]
    layers: tuple[tuple[int, tuple[str, ...]], ...]
    root: tuple[str, ...]
    head: tuple[str, ...]


class Units(NamedTuple):
    """Elements of FSDP2's units with what it pads them by: of the layers of each kind and how many there are, of the root, and
    of what in the root stands after the layers."""

    layers: tuple[tuple[int, int], ...]
    root: int
    head: int

    @property
    def layer(self) -> int:
        """The largest."""
        return max((size for _, size in self.layers), default=0)


class Sharing(NamedTuple):
    """How replicas share the weights out; whether there are several stages; micro-batches in a step, 3 for more. `zero` is 0
    where there is one replica."""

    zero: int
    replicas: int
    replicate: int
    piped: bool
    micro_batches: int

    @property
    def several(self) -> bool:
        return self.micro_batches > 1

    @property
    def shards(self) -> int:
        return self.replicas // self.replicate if self.zero else 1


@frozen
class Shares:
    """A rank's local elements, by stage: of all weights, of its shards, of the largest layer, of what stands around the layers;
    of what stands behind the last stage's, of experts that are shared out."""

    elements: tuple[int, ...]
    shards: tuple[int, ...]
    layers: tuple[int, ...]
    roots: tuple[int, ...]
    head: int
    experts: int

    @cached_property
    def whole(self) -> int:
        return sum(self.elements)

    @cached_property
    def owned(self) -> int:
        return sum(self.shards)

    def made(self, moment: Moment) -> int:
        """Gradients that a backward pass has made and not yet added to their sums, but for a layer's: of the head until its
        end, unless they are added one by one."""
        return self.head * (moment.turn != "loss" and (moment.makes or not moment.summed))


class Stack(NamedTuple):
    """A weight of experts that are shared out: how many like it, its local elements, and those that this rank steps."""

    key: str
    times: int
    elements: int
    stepped: int


@frozen
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
    def _shares(self) -> dict[tuple[tuple[Part, ...], int], Shares]:
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
        after = set(self._used(self.chain.last * part.last, own=False))
        head = tuple(key for key in root if key in after)
        return Holding(elements, largest, experts, common, shared_out, tuple(layers), root, head)

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
            root, head = (shards * self._cut(dict.fromkeys(keys, 1), shards) for keys in (held.root, held.head))
            self._units[key] = Units(layers, root, head)
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

    def state(self, parts: tuple[Part, ...], sharing: Sharing, width: int, moment: Moment) -> State:
        """Of a rank that runs `parts`, at a moment."""
        has = self._shares_of(parts, sharing.shards)
        if not sharing.zero:
            return _whole(has.whole + has.experts, width)
        piped = _each_pass if reduces_each_pass(sharing.zero, sharing.piped) else _once
        sharded = (piped if sharing.piped else _layer_by_layer)(has, sharing, width, moment)
        if not has.experts:
            return sharded
        return State(*map(sum, zip(sharded, self._shared(parts, sharing, width, moment.turn), strict=True)))

    def _shares_of(self, parts: tuple[Part, ...], shards: int) -> Shares:
        key = (parts, shards)
        if key not in self._shares:
            held, units = [self.of(part) for part in parts], [self.units(part, shards) for part in parts]
            self._shares[key] = Shares(
                tuple(h.elements for h in held),
                tuple(self.shard(part, shards) for part in parts),
                tuple(unit.layer for unit in units),
                tuple(unit.root for unit in units),
                units[-1].head,
                sum(h.experts for h in held),
            )
        return self._shares[key]

    def _shared(self, parts: Iterable[Part], sharing: Sharing, width: int, turn: Turn) -> State:
        """Experts that are shared out, under ZeRO: in the step one weight at a time is copied and sent."""
        weights = master = gradients = optimizer = buffers = 0
        for stack in (stack for part in parts for stack in self.experts(part, sharing.replicas)):
            whole, stepped = stack.times * stack.elements, stack.times * stack.stepped
            cut = stepped < whole
            weights += width * whole
            master += 4 * stepped * (cut or width < 4)
            gradients += 4 * whole + 4 * stepped * cut
            optimizer += 8 * stepped
            buffers = max(buffers, 4 * stack.elements * cut * (turn == "step"))
        return State(weights, master, gradients, optimizer, 0, buffers)


def _once(has: Shares, sharing: Sharing, width: int, moment: Moment) -> State:
    """A pipeline's stages, whose gradients are reduced after their last backward pass. torch reduces the root first."""
    summed, fresh, reduced, reducing = moment.summed, moment.fresh, moment.reduced, moment.reducing
    owned = has.owned
    if moment.turn == "step":
        return State(0, 4 * owned, 4 * owned, 8 * owned, 0, 0)
    sums = 4 * sum(has.elements[i] for i in summed) + 4 * sum(has.shards[i] for i in reduced)
    sums += width * sum(has.elements[i] for i in fresh if width < 4 or i not in summed)  # in fp32 they are the sums themselves
    stages = [i for i in range(len(has.elements)) if i not in reduced and i != reducing]
    gathered = sum(has.elements[i] for i in stages if sharing.zero < 3 or i in summed)
    if sharing.zero == 3 and (others := [i for i in stages if i not in summed]):  # before their first backward pass
        gathered += sum(has.roots[i] for i in others) + 2 * max(has.layers[i] for i in others)
    if reducing >= 0:
        layer, root = has.layers[reducing], has.roots[reducing]
        gathered += has.elements[reducing] - (root or layer)
        buffers = 4 * max(root, layer - root + root // sharing.shards)
    else:
        buffers = width * has.made(moment)
    weights, unsharded = (0, width * gathered) if sharing.zero == 3 else (width * gathered, 0)
    return State(weights, 4 * owned, sums, 8 * owned, unsharded, buffers)


def _each_pass(has: Shares, sharing: Sharing, width: int, moment: Moment) -> State:
    """A pipeline's stages whose backward passes reduce the gradients of each layer as soon as they are there, the root's at the
    end. Of a stage what was sent last lies there until its next backward pass sends something."""
    owned, turn, at = has.owned, moment.turn, moment.reducing
    if turn == "step":
        return State(0, 4 * owned, 4 * owned, 8 * owned, 0, 0)
    sent = sum(4 * (has.roots[i] or has.layers[i]) for i in moment.summed if i != at)
    reduced, made = sum(has.shards[i] for i in moment.summed), has.made(moment)
    if at >= 0:
        layer, root, head, first = (
            has.layers[at],
            has.roots[at],
            has.head * (at == len(has.shards) - 1),
            at not in moment.summed,
        )
        sent += 4 * (root if turn == "reduction" else layer)
        made = root if turn == "reduction" else head + layer * (turn == "layer")
        reduced += first * (has.shards[at] if turn == "reduction" else layer // sharing.shards * (turn == "next"))
    return State(width * has.whole, 4 * owned, 4 * reduced, 8 * owned, 0, sent + width * made)


def _layer_by_layer(has: Shares, sharing: Sharing, width: int, moment: Moment) -> State:
    """Every layer's gradients are reduced as soon as they are there, by every backward pass or by the last; the root's at its
    end."""
    whole, owned, layer, root = has.whole, has.owned, max(has.layers), max(has.roots)
    each, turn = sharing.zero > 1, moment.turn
    if turn == "step":
        return State(0, 4 * owned, 4 * owned, 8 * owned, 0, 0)
    sent = reduced = made = 0
    if turn == "reduction":
        gathered = 0
        sums, sent = (4 if sharing.several and not each else width) * root, 4 * root
    else:
        last = sharing.zero == 1 or sharing.micro_batches < 3  # the last backward pass lets go
        gathered = whole - layer * (last and turn in ("layer", "next"))
        if sharing.zero == 3:
            gathered = min(whole, (1 + (turn not in ("gather", "layer"))) * layer + root)
        sums = 4 * (whole - layer * (turn == "next")) if moment.summed else 0
        made = has.made(moment) if turn != "gather" else 2 * layer
        sent = 4 * root * (each and sharing.several)  # of the micro-batch before, until a layer's turn
    if turn in ("layer", "next"):
        sent, reduced = 4 * layer, layer // sharing.shards * (turn == "next")
    if turn == "layer":
        made = has.head + layer * (not moment.summed)
    if (each and sharing.several) or turn == "reduction":
        reduced = owned
    weights, unsharded = (0, width * gathered) if sharing.zero == 3 else (width * gathered, 0)
    return State(weights, 4 * owned, sums + 4 * reduced, 8 * owned, unsharded, width * made + sent)


def shard_elements(shape: Sequence[int], shards: int) -> int:
    """Of the largest shard of a weight."""
    dim = even_dim(shape, shards)
    return prod(shape) // shape[dim] * -(-shape[dim] // shards)


def _whole(elements: int, width: int) -> State:
    """Held without ZeRO."""
    return State(width * elements, 4 * elements if width < 4 else 0, 4 * elements, 8 * elements, 0, 0)


# ---- passes ---------------------------------------------------------------------------------------------------------


Needs = tuple[int, int, int]  # bytes, as Turnovers has them


class Turnover(NamedTuple):
    """While a layer's backward pass runs, at the most: `working`, what recomputing brings back and the layers behind it have
    made for all, less what they have left; `transient`, what one operation needs."""

    working: int
    transient: int


class Turnovers(NamedTuple):
    """plain: without gradients of weights; making: with those of the layer's weights; adding: with those of one operation."""

    plain: Turnover
    making: Turnover
    adding: Turnover


class Passing(NamedTuple):
    """Bytes that one micro-batch leaves on one part, for one way of recomputing.

    kept: until its backward pass; layer: of these, what the last layer keeps; received: of a receive buffer, one direction;
    working, transient: at the most in any layer's backward pass; backward: in the course of all, further: of all but the last
    layer's; waiting: gradients of weights that are put off; loss: kept by the loss and model output; output: of these, what
    stays until the end of the backward pass; loss_transient: besides, with the gradients of the head's weights, and
    least_transient without; spare: room that the model's output leaves to nothing as small."""

    kept: int
    layer: int
    received: int
    sent: int
    working: int
    transient: int
    backward: Turnovers
    further: Turnovers
    waiting: int
    loss: int
    output: int
    loss_transient: int
    least_transient: int
    spare: int


def passing(passes: Passes, chain: Chain, part: Part, how: How, pipeline: int) -> Passing:
    costs, kinds = passes.costs, [chain.kinds[kind] for kind, count in enumerate(part.layers) if count]
    regions = regions_of(chain, part, how)
    kept = sum(count * costs[i].saved_bytes[mode] for i, mode, count in regions)
    beginning = [costs[i] for i in chain.first] if part.first else []
    layered, ending = [costs[i] for kind in kinds for i in kind], [costs[i] for i in chain.last] if part.last else []
    layers = [(_layer(costs, chain.kinds[kind], mode), count) for kind, mode, count in runs_of(part, how)]
    straight = [chain.first * part.first, *(chain.kinds[kind][1:] for kind, _, _ in runs_of(part, how)), chain.last * part.last]
    backward, further = _turnovers(layers, beginning, kept, _tied(passes, straight))
    logits = sum(cost.logits_bytes for cost in ending)
    output = logits if pipeline > 1 else 0
    loss = sum(cost.loss_bytes + cost.logits_bytes * (pipeline > 1 or cost.keeps_logits) for cost in ending)
    received, sent = map(sum, crossings(passes, chain, part))
    if not part.first:  # lies in the receive buffer
        kept -= min(received, costs[kinds[0][0]].entry_bytes[first_of(how)])
    return Passing(
        kept=kept + sent,
        layer=layers[-1][0].kept if layers else 0,
        received=received,
        sent=sent,
        working=max((costs[i].working_bytes[mode] for i, mode, _ in regions), default=0),
        transient=max([*(c.transient_bytes for c in layered), *(c.transient_bytes - kept for c in beginning)], default=0),
        backward=backward,
        further=further,
        waiting=max(0, sum(count * costs[i].waiting_bytes for i, _, count in regions) - sent),  # which lies in a receive buffer
        loss=loss,
        output=output,
        least_transient=sum(c.loss_transient_bytes for c in ending),
        loss_transient=max(
            [*(c.loss_transient_bytes for c in ending), *(c.making_bytes - (loss - output) for c in ending)], default=0
        ),
        spare=logits if pipeline == 1 and passes.float_bytes < 4 and not any(cost.keeps_logits for cost in ending) else 0,
    )


class _Layer(NamedTuple):
    """What a layer keeps, what recomputing brings back, and what one operation of its backward pass needs (as Turnovers);
    the repeat that it is a pass of, and the bytes of gradients that its passes add up."""

    kept: int
    working: int
    needed: Needs
    repeat: int
    given: int


def _layer(costs: Sequence[PassCost], regions: Sequence[int], mode: int) -> _Layer:
    each = [costs[i] for i in regions]
    needed = (max(c.transient_bytes for c in each), max(c.making_bytes for c in each), max(c.adding_bytes for c in each))
    kept, working = sum(c.saved_bytes[mode] for c in each), max(c.working_bytes[mode] for c in each)
    return _Layer(kept, working, needed, regions[0], each[0].given_bytes)


def _turnovers(
    layers: Sequence[tuple[_Layer, int]], beginning: Sequence[PassCost], kept: int, tied: Sequence[Needs]
) -> tuple[Turnovers, Turnovers]:
    """Of a stage's layers (in model order, each so many times), the last of which is the first to have its backward pass, and
    of what stands before them; and the same without the last layer. `tied`: what their weights need besides, of what stands
    before them first."""
    found: list[tuple[int, int, Needs]] = []
    freed, begun = 0, -1
    for (layer, count), more in zip(reversed(layers), reversed(tied[1:]), strict=True):
        for n in range(min(count, 2)):
            sums = layer.given * (n > 0 or layer.repeat == begun)
            found.append((layer.working + sums, freed + n * layer.kept, _sum(layer.needed, more)))
        freed, begun = freed + count * layer.kept, layer.repeat
    found += [(0, kept, _sum((c.transient_bytes, c.making_bytes, c.adding_bytes), tied[0])) for c in beginning]
    return _most(found), _most(found[1:] or [(0, freed, (0, 0, 0))])


def _tied(passes: Passes, straight: Sequence[Sequence[int]]) -> list[Needs]:
    """Of a stage's straight code but the last, what gradients take of weights that come in several places: they wait for those
    of the first place, and are added up into new ones. Those that the last code has made count elsewhere where all of a layer
    are made."""
    bytes = [{key: size for i in each for key, size in passes.straight_weights(i).items()} for each in straight]
    found: list[Needs] = []
    for place, own in enumerate(bytes[:-1]):
        later = {key for each in bytes[place + 1 : -1] for key in each}
        last, here = bytes[-1], {key: size for each in bytes[: place + 1] for key, size in each.items()}
        waiting = sum(size for key, size in here.items() if key in later)
        heads = sum(size for key, size in here.items() if key in last and key not in later)
        added = sum(size for key, size in own.items() if key in later or key in last)
        found.append((0, waiting + added, waiting + heads + added))
    return found


def _sum(one: Needs, other: Needs) -> Needs:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _most(found: Sequence[tuple[int, int, Needs]]) -> Turnovers:
    """Of (what is brought back, what is gone, what is needed)."""
    each = ([Turnover(working - freed, needed[i]) for working, freed, needed in found] for i in range(3))
    return Turnovers(*(max(turnovers, key=sum, default=Turnover(0, 0)) for turnovers in each))


def crossings(passes: Passes, chain: Chain, part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of each value that a stage is given by the one before, and hands to the next: what the next layer is given, of the
    same repeat, or after the straight code behind its last pass of the next one."""
    kinds = [chain.kinds[kind] for kind, count in enumerate(part.layers) if count]
    received = () if part.first else passes.crossings[kinds[0][0]]
    if part.last:
        return received, ()
    last = kinds[-1]
    following = last[0] if len(last) == 1 else next(kind[0] for kind in chain.kinds if kind[0] > last[-1])
    return received, passes.crossings[following]


class Held(NamedTuple):
    """Bytes on a rank besides its state."""

    activations: int
    loss: int
    buffers: int
    workspace: int
    slack: int


def _largest(each: Sequence[Turnovers]) -> Turnovers:
    return each[0] if len(each) == 1 else Turnovers(*(max(turnovers, key=sum) for turnovers in zip(*each, strict=True)))


class Filling:
    """What a rank with these virtual stages holds besides its state, at any moment."""

    def __init__(self, stages: Sequence[Passing], micro_batches: int, kind: str, turns: bool = False):
        """`turns`: the first of two stages hands its results to the second: they are the second's receive buffers."""
        self.last = stages[-1]
        self.each = [s.kept - s.sent * (turns and i == 0) for i, s in enumerate(stages)]
        self.kept = sorted(self.each, reverse=True)
        self.waiting = [s.waiting for s in stages]
        self.layer = min(s.layer for s in stages)
        unlike = list({id(s): s for s in stages}.values())
        working, transient = max([s.working for s in unlike]), max([s.transient for s in unlike])
        self.backward, self.further = _largest([s.backward for s in unlike]), _largest([s.further for s in unlike])
        self.buffers = micro_batches * sum([s.received + s.sent for s in stages])
        self.slack, self.unused = SLACK[kind], (working + transient + self.last.spare) * (kind != "cpu")

    def at(self, moment: Moment) -> Held:
        """The larger of its counts are charged to the larger stages: which of a rank's stages holds more changes in the course
        of an interleaved step."""
        turn, last = moment.turn, self.last
        counts = sorted(moment.held, reverse=True) if len(moment.held) > 1 else moment.held
        activations = sum(map(mul, self.each, moment.held) if moment.settled else map(mul, self.kept, counts))
        if moment.waiting:
            activations += sum(map(mul, self.waiting, moment.waiting))
        loss, transient = last.loss * (moment.held[len(moment.held) - 1] - moment.past), 0
        if turn == "loss":
            loss += last.least_transient if moment.apart else last.loss_transient
        elif turn in ("backward", "next"):
            each = self.backward if turn == "backward" else self.further
            turnover = each.plain if moment.apart else each.making if moment.makes else each.adding
            activations, transient = activations + turnover.working, turnover.transient
        if turn in ("gather", "backward", "layer", "next") and loss and not moment.apart:
            loss += last.output - last.loss
        if turn in ("gather", "layer"):
            activations -= self.layer
        slack = int(self.slack * (activations + loss + self.buffers + transient))
        return Held(activations, loss, self.buffers, transient, slack + self.unusable(moment))

    def unusable(self, moment: Moment) -> int:
        """What a GPU's allocator has from layers' passes and the model's output, in blocks that are smaller than the loss' (a
        CPU's gives such large ones back)."""
        return self.unused if moment.turn == "loss" else 0


def stage_memory(stage: int, turn: Turn, state: State, rest: Held, context: int) -> StageMemory:
    """The ledger's entry."""
    return StageMemory(
        stage=stage,
        moment=turn,
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
