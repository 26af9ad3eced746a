"""What ranks hold of weights and what goes with them: gradients, optimizer state, FSDP2's copies.

Bytes per local weight element (p of them on this rank of the tensor axis; d replicas, the ranks of data and context;
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

Shards are counted as FSDP2 cuts them: along a dim that d divides, or dim 0 in chunks of ceil(rows / d).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from math import prod
from typing import NamedTuple

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Graph, Weight
from mlmdsl.planner.choice import cut
from mlmdsl.planner.moments import Moment, Turn, reduces_each_pass
from mlmdsl.planner.sharding import Sharding
from mlmdsl.planner.stages import Chain, Part
from mlmdsl.runtime.config import cut_over_copies, even_dim


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
    where there is one replica, which is all that is said of replicas without it."""

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
        return State(*map(sum, zip(sharded, self.shared(parts, sharing, width, moment.turn), strict=True)))

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

    def shared(self, parts: Iterable[Part], sharing: Sharing, width: int, turn: Turn) -> State:
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


@cache
def shard_elements(shape: tuple[int, ...], shards: int) -> int:
    """Of the largest shard of a weight."""
    dim = even_dim(shape, shards)
    return prod(shape) // shape[dim] * -(-shape[dim] // shards)


def _whole(elements: int, width: int) -> State:
    """Held without ZeRO."""
    return State(width * elements, 4 * elements if width < 4 else 0, 4 * elements, 8 * elements, 0, 0)
