"""What one pass of each region costs one rank for one micro-batch: time, and the bytes that stay until its backward pass.

Saved values are counted by storage: a value that two operations save counts once, views count with what they look at, a
gathered copy of a value is a value of its own. What stays under each way of recomputing follows torch.utils.checkpoint as the
runtime calls it:

    none       what autograd saves
    selective  the pass's arguments, and the results of matrix products, attention and collectives (Korthikanti et al. 2022,
               arXiv:2205.05198, section 5), but for what is gathered, which is gathered again, and partial sums that a
               collective adds up, which nobody needs again; everything cheap runs again
    full       the pass's arguments; everything runs again, up to the last operation that saves something (early stop)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import field, replace
from functools import cached_property
from math import prod
from typing import NamedTuple, get_args

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Graph, Node, Region
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import Local, Work
from mlmdsl.graph.placement import PARTIAL
from mlmdsl.planner.choice import width
from mlmdsl.planner.communication import Group, collective_seconds
from mlmdsl.planner.compute import Kernels
from mlmdsl.planner.execution import OURS, Execution
from mlmdsl.planner.layout import Form, Key, Layout
from mlmdsl.planner.plan import CollectiveKind, Recompute
from mlmdsl.planner.sharding import Lie, Move, Sharding

MODES: tuple[Recompute, ...] = get_args(Recompute)
# Composed of simple operations (on a CPU torch has no kernel): what is divided by the root mean square stays, too, in fp32
_SIMPLE = frozenset({"rms_norm"})
_COMPOSED = {"cpu": _SIMPLE}
_SUMS = ("reduce_scatter", "all_reduce")


@frozen
class Again:
    """What runs a second time before the backward pass: seconds of kernels, FLOPs of matrix products, seconds of collectives by
    axis, and which moves."""

    kernel_seconds: float = 0.0
    flops: float = 0.0
    tensor_seconds: float = 0.0
    context_seconds: float = 0.0
    expert_seconds: float = 0.0
    deliveries: tuple[Node, ...] = ()  # operations whose exchanges over the expert axis are made again
    moves: tuple[Move, ...] = ()


@frozen
class PassCost:
    """One pass of one region. Tuples have an entry per way of recomputing, in the order of MODES.

    saved_bytes: from forward to backward, the pass's arguments included; entry_bytes: of these, what came from the pass before;
    working_bytes: what recomputing brings back while the backward pass runs, and what all passes share; transient_bytes: the
    most that one operation needs besides; making_bytes: the same with the gradients of the weights that the backward pass has
    made by then; adding_bytes: with those of that operation alone, which are added to their sums at once; waiting_bytes:
    gradients that wait where those of weights are put off; given_bytes: gradients of values that every pass is given, which
    are added up over the passes; loss_bytes: of the last region, what the loss keeps, but for the
    model's output, which has logits_bytes; keeps_logits: whether the loss keeps that, too."""

    flops: float  # of matrix products and attention as the kernels compute them, forward and backward
    backward_kernels: int
    forward_seconds: float
    backward_seconds: float
    weight_seconds: float  # of backward_seconds those that go to gradients of weights
    tensor_forward_seconds: float
    tensor_backward_seconds: float
    context_forward_seconds: float
    context_backward_seconds: float
    expert_forward_seconds: float
    expert_backward_seconds: float
    again: tuple[Again, Again, Again]
    saved_bytes: tuple[int, int, int]
    entry_bytes: tuple[int, int, int]
    working_bytes: tuple[int, int, int]
    transient_bytes: int
    making_bytes: int
    adding_bytes: int
    waiting_bytes: int
    given_bytes: int
    loss_bytes: int = 0
    loss_transient_bytes: int = 0
    logits_bytes: int = 0
    keeps_logits: bool = False


class Priced(NamedTuple):
    """A node's work, and how long the device is busy with it: forward, backward, of these the seconds of weights' gradients."""

    work: Work
    forward: float
    backward: float
    weight: float


Shapes = tuple[tuple[int, ...], ...]
Prices = dict[tuple[str, Shapes, tuple[int, ...], Shapes, Callable[[Local], Work]], Priced]  # nodes by local shapes


def computed_flops(work: Work) -> tuple[float, float]:
    """(forward, backward), what a kernel computes under its mask included."""
    return work.flops_forward * work.computed, work.flops_backward * work.computed


@frozen
class Passes:
    """The costs of all regions under one sharding and one size of micro-batch."""

    graph: Graph
    sharding: Sharding
    kernels: Kernels
    group: Group
    sizes: Mapping[str, int]
    float_bytes: int
    context_group: Group | None = None
    expert_group: Group | None = None
    execution: Execution = OURS
    layout: Layout = field(default_factory=Layout)
    prices: Prices = field(default_factory=Prices)  # of nodes by their local shapes, which several shardings have in common
    _shapes: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])

    @cached_property
    def costs(self) -> tuple[PassCost, ...]:
        """By region, in the graph's order."""
        return tuple(self._cost(index, region) for index, region in enumerate(self.graph.regions))

    # ---- time -------------------------------------------------------------------------------------------------------

    def _cost(self, index: int, region: Region) -> PassCost:
        moves = [move for move in self.sharding.moves if move.region == index]
        over = {axis: [move for move in moves if move.axis == axis] for axis in ("tensor", "context")}
        works = [(node, self._works[node.path]) for node in region.nodes]
        kept = self._kept(region, moves)
        again = (Again(), Again(), Again())
        if region.repeated:
            again = (Again(), self._again(region, moves, "selective"), self._again(region, moves, "full"))
        tensor = self._moved(over["tensor"]) + sum(self._inner_seconds(node) for node in region.nodes)
        tensor_back = self._moved_back(over["tensor"])
        transient, making, adding = self._most_transient(region)
        loss = self._works[self.graph.loss] if self.graph.region_of[self.graph.loss] is region else None
        return PassCost(
            flops=sum(sum(computed_flops(work)) for _, work in works),
            backward_kernels=sum(work.kernels_backward for _, work in works),
            forward_seconds=self._forward_seconds(region.nodes, tensor),
            backward_seconds=self._backward_seconds(region.nodes, tensor_back) + self._accumulating_seconds(region.nodes),
            weight_seconds=sum(self._priced[node.path].weight for node in region.nodes),
            tensor_forward_seconds=tensor,
            tensor_backward_seconds=tensor_back,
            context_forward_seconds=self._moved(over["context"]),
            context_backward_seconds=self._moved_back(over["context"]),
            expert_forward_seconds=sum(self._delivery_seconds(node)[0] for node in region.nodes),
            expert_backward_seconds=sum(self._delivery_seconds(node)[1] for node in region.nodes),
            again=again,
            loss_bytes=int(loss.extra_saved_bytes) if loss else 0,
            loss_transient_bytes=int(loss.transient_bytes) if loss else 0,
            logits_bytes=self._bytes(self.graph.output, self.sharding.left(self.graph.output)) if loss else 0,
            keeps_logits=loss is not None and "in0" in loss.saved,
            transient_bytes=transient,
            making_bytes=making,
            adding_bytes=adding,
            waiting_bytes=self._waiting(region),
            given_bytes=self._given(index) if region.repeated else 0,
            **kept,
        )

    def _forward_seconds(self, nodes: Iterable[Node], waiting: float) -> float:
        each = [self._priced[node.path] for node in nodes]
        busy, kernels = sum(priced.forward for priced in each), sum(priced.work.kernels_forward for priced in each)
        return self.kernels.joined(busy, kernels, waiting)

    def _backward_seconds(self, nodes: Iterable[Node], waiting: float) -> float:
        each = [self._priced[node.path] for node in nodes]
        busy, kernels = sum(priced.backward for priced in each), sum(priced.work.kernels_backward for priced in each)
        return self.kernels.joined(busy, kernels, waiting)

    def _accumulating_seconds(self, nodes: Iterable[Node]) -> float:
        """Gradients of weights added to the sum over the micro-batches."""
        elements = sum(prod(shape) for node in nodes for shape in self._locals[node.path].weights)
        return self.kernels.memory_seconds(self.execution.accumulated_bytes * elements)

    @cached_property
    def _works(self) -> Mapping[str, Work]:
        return {path: priced.work for path, priced in self._priced.items()}

    @cached_property
    def _priced(self) -> Mapping[str, Priced]:
        plain = {path: self._plainly(node, self._locals[path]) for path, node in self.graph.nodes.items()}
        works = self.execution.works(self.graph, {path: priced.work for path, priced in plain.items()}, self._locals)
        nodes = self.graph.nodes
        return {p: plain[p] if plain[p].work is work else self._price(work, nodes[p]) for p, work in works.items()}

    def _plainly(self, node: Node, local: Local) -> Priced:
        """As the emitted program executes it."""
        op, strategy = CATALOGUE[node.op], self.sharding.strategies[node.path].name
        work = op.work if self.execution.probabilities else op.work_under.get(strategy, op.work)
        if op.work_learned is not None and self.kernels.device.kind == "cpu" and any(map(self._learned, node.inputs[3:])):
            work = op.work_learned
        key = (node.path, local.inputs, local.output, local.weights, work)
        found = self.prices.get(key)
        if found is None:
            found = self.prices[key] = self._price(work(local), node)
        return found

    def _learned(self, value: str) -> bool:
        """Whether it is made of weights."""
        node = self.graph.nodes[value]
        return bool(node.weights) or (not CATALOGUE[node.op].of_shape and any(map(self._learned, node.inputs)))

    def _price(self, work: Work, node: Node) -> Priced:
        kernels = self.kernels
        weight = kernels.weight_seconds(work) if node.weights else 0.0
        return Priced(work, kernels.forward_busy(work), kernels.backward_busy(work), weight)

    @cached_property
    def _locals(self) -> Mapping[str, Local]:
        return {path: self._local(self._form(node), node) for path, node in self.graph.nodes.items()}

    def _local(self, form: Form, node: Node) -> Local:
        inputs, output = tuple(map(self._shape, form.inputs)), self._shape(form.output)
        return Local(inputs, form.input_bytes, output, form.output_bytes, form.weights, self.float_bytes, node.attrs)

    def _form(self, node: Node) -> Form:
        found = self.layout.forms.get(node.path)
        if found is None:
            lies = [self._number(value, self.sharding.asked(node, i)) for i, value in enumerate(node.inputs)]
            output = self._number(node.path, self.sharding.left(node.path))
            local = self.sharding.local(node, self.sizes, self.float_bytes)
            found = Form(tuple(lies), local.input_bytes, output, local.output_bytes, local.weights)
            self.layout.forms[node.path] = found
        return found

    def _number(self, value: str, lie: Lie) -> int:
        return self.layout.number(self.graph.nodes[value].type, lie)

    def _shape(self, number: int) -> tuple[int, ...]:
        """On one rank."""
        found = self._shapes.get(number)
        if found is None:
            found = self._shapes[number] = self.sharding.local_shape(*self.layout.lies[number], self.sizes)
        return found

    def move_bytes(self, move: Move, kind: CollectiveKind | None) -> int:
        """Of one of its calls. A CPU adds up in fp32."""
        size = self.sharding.move_bytes(move, self.sizes, self.float_bytes)
        if kind not in _SUMS or self.kernels.device.kind != "cpu":
            return size
        given = width(self.graph.nodes[move.value].type, self.float_bytes)
        return size * max(4, given) // given

    def _group(self, move: Move) -> Group:
        group = self.group if move.axis == "tensor" else self.context_group
        assert group is not None
        return group

    def _moved(self, moves: Iterable[Move]) -> float:
        return sum(self._call_seconds(move.step.forward, move) for move in moves)

    def _moved_back(self, moves: Iterable[Move]) -> float:
        return sum(self._call_seconds(move.step.backward, move) for move in moves)

    def _call_seconds(self, kind: CollectiveKind | None, move: Move) -> float:
        return collective_seconds(kind, self.move_bytes(move, kind), self._group(move))

    def inner(self, node: Node) -> tuple[tuple[str, int, int], ...]:
        """Collectives that the operation itself makes, forward only: (kind, bytes, count)."""
        if self.sharding.tensor == 1:
            return ()
        return CATALOGUE[node.op].collectives(self.sharding.strategies[node.path], self._locals[node.path])

    def _inner_seconds(self, node: Node) -> float:
        return sum(count * collective_seconds(kind, size, self.group) for kind, size, count in self.inner(node))

    def delivered(self, node: Node) -> tuple[int, int]:
        """Bytes that the operation exchanges over the expert axis, forward and backward, rows being spread evenly."""
        if self.sharding.expert == 1:
            return 0, 0
        return CATALOGUE[node.op].deliveries(self._locals[node.path])

    def _delivery_seconds(self, node: Node) -> tuple[float, float]:
        if self.expert_group is None:
            return 0.0, 0.0
        group = self.expert_group
        forward, backward = (collective_seconds("all_to_all", size, group) if size else 0.0 for size in self.delivered(node))
        return forward, backward

    def _again(self, region: Region, moves: Iterable[Move], mode: str) -> Again:
        """Everything up to the last operation that saves something; under "selective" of that what is cheap, and gathers."""
        upto = -1
        for position, node in enumerate(region.nodes):
            if self._works[node.path].saved:
                upto = position if "out" in self._works[node.path].saved else position - 1
        if mode == "full" and not self.execution.early_stop:
            upto = len(region.nodes) - 1
        names = {node.path for node in region.nodes[: upto + 2]}
        rerun = region.nodes[: upto + 1] if mode == "full" else self.execution.reruns(region.nodes[: upto + 1])
        again = mode == "full" or self.execution.selective != "attention"
        meant = [move for move in moves if again and (mode == "full" or move.step.forward == "all_gather")]
        repeated = tuple(move for move in meant if names & set(move.consumers) - self._entries)
        inner = sum(self._inner_seconds(node) for node in rerun) if mode == "full" else 0.0
        tensor, context = (self._moved(move for move in repeated if move.axis == axis) for axis in ("tensor", "context"))
        kernels = self._forward_seconds(rerun, tensor + inner)
        arriving = region.nodes[: upto + 2] if mode == "full" else ()  # what an operation saves has come to it by an exchange
        delivering = tuple(node for node in arriving if self.delivered(node)[0])
        expert = sum(self._delivery_seconds(node)[0] for node in delivering)
        flops = sum(computed_flops(self._works[node.path])[0] for node in rerun)
        return Again(kernels, flops, tensor + inner, context, expert, delivering, repeated)

    # ---- bytes ------------------------------------------------------------------------------------------------------

    @cached_property
    def _entries(self) -> frozenset[str]:
        return frozenset(c.entry for region in self.graph.regions for c in region.carried)

    @cached_property
    def _carried_as(self) -> Mapping[str, str]:
        """By a pass's result what it is in the next pass."""
        return {c.next: c.entry for region in self.graph.regions for c in region.carried}

    @cached_property
    def _brought(self) -> Mapping[tuple[str, str, Lie], Move]:
        return {(move.value, move.axis, move.lie): move for move in self.sharding.moves}

    @cached_property
    def _aliases(self) -> Mapping[str, str]:
        """Views look at their input; a product whose bias follows at once is computed together with it; the last value of a
        pass is the first of the next."""
        found = self.layout.aliases
        if found:
            return found
        users: dict[str, list[Node]] = {}
        for node in self.graph.nodes.values():
            for source in node.inputs:
                users.setdefault(source, []).append(node)
        for node in self.graph.nodes.values():
            work = self._works[node.path]
            if node.inputs and work.kind == "none":
                found[node.path] = node.inputs[0]
            following = users.get(node.path, [])
            if node.op == "linear" and len(following) == 1 and following[0].op == "bias" and not self._moves_of(node.path):
                found[node.path] = following[0].path
        for carried in (c for region in self.graph.regions for c in region.carried):
            if not any(move.step.forward for move in self._moves_of(carried.next)):
                found.setdefault(carried.next, carried.entry)
        return found

    def _moves_of(self, value: str) -> list[Move]:
        return [move for move in self.sharding.moves if move.value == value]

    def _storage(self, value: str, lie: Lie | None = None) -> Key:
        if lie is not None:
            inner = self._brought.get((value, "tensor", (lie[0], self.sharding.left(value)[1])))
            copies = (inner, self._brought.get((value, "context", lie)))
            made = [str(move.target) for move in copies if move is not None and move.step.forward is not None]
            if made:
                return value, " ".join(made)
        for _ in range(len(self.graph.nodes)):
            if value not in self._aliases:
                break
            value = self._aliases[value]
        return value, ""

    def _kept(self, region: Region, moves: Iterable[Move]) -> Mapping[str, tuple[int, int, int]]:
        """saved_bytes, entry_bytes and working_bytes by mode. Values made before the region count where they are made, if that
        is straight code, but for the last pass's results: a repeat counts what its passes are given."""
        made = self._made_in(region)
        using = self.graph.regions[self.graph.regions.index(region) :] if not region.repeated else (region,)
        plain = {key: size for user in using for _, key, size in self._saved_plain(user) if made(key)}
        extra = sum(int(self._works[n.path].extra_saved_bytes) for n in region.nodes if n.path != self.graph.loss)
        if not region.repeated:
            whole = sum(plain.values()) + extra
            return {"saved_bytes": (whole, whole, whole), "entry_bytes": (0, 0, 0), "working_bytes": (0, 0, 0)}
        entries = {self._storage(c.entry): self.boundary_bytes(c.entry) for c in region.carried}
        dear = entries | {key: size for key, size in self._saved_dear(region, moves) if made(key)}
        if self.execution.selective == "attention":
            dear = dict(plain)
        dear_works = [self._works[n.path] for n in region.nodes if not CATALOGUE[n.op].cheap]
        lse = sum(int(work.extra_saved_bytes - work.extra_cheap_bytes) for work in dear_works)
        saved = (sum(plain.values()) + extra, sum(dear.values()) + lse, sum(entries.values()))
        cheap = sum(size for key, size in plain.items() if key not in dear) + extra - lse
        back = sum(size for key, size in plain.items() if key not in entries) + extra
        once = max(int(self._works[n.path].standing_bytes) for n in region.nodes)
        came = sum(size for key, size in plain.items() if key in entries)
        return {
            "saved_bytes": saved,
            "entry_bytes": (came, saved[2], saved[2]),
            "working_bytes": (once, once + cheap, once + back),
        }

    def _made_in(self, region: Region) -> Callable[[Key], bool]:
        found = self.layout.made.get(id(region))
        if found is None:
            found = self.layout.made[id(region)] = self._find_made_in(region)
        return found

    def _find_made_in(self, region: Region) -> Callable[[Key], bool]:
        index = self.graph.regions.index(region)
        inside = {node.path for node in region.nodes if node.op != "input"}
        if not region.repeated:
            inside |= {name for r in self.graph.regions[:index] for c in r.carried for name in (c.entry, c.next)}
        brought = {self._storage(m.value, m.lie): m.region for m in self.sharding.moves if m.step.forward is not None}
        return lambda key: brought[key] == index if key in brought else key[0] in inside

    def _saved_plain(self, region: Region) -> Iterator[tuple[str, Key, int]]:
        """Which operation saves what, and its bytes."""
        found = self.layout.plain.get(id(region))
        if found is None:
            found = self.layout.plain[id(region)] = tuple(self._find_plain(region))
        return ((path, key, self._size(number)) for path, key, number in found)

    def _find_plain(self, region: Region) -> Iterator[tuple[str, Key, int]]:
        for node in region.nodes:
            left = self.sharding.left(node.path)
            wide = self.layout.number(replace(node.type, dtype="fp32"), left)
            for name in self._works[node.path].saved:
                if node.path == self.graph.loss and name == "in0":
                    continue  # `keeps_logits`
                if name == "out":
                    yield node.path, self._storage(node.path), self._number(node.path, left)
                elif name == "in0" and self._widens(node):
                    yield node.path, (node.path, "widened"), wide
                else:
                    value, lie = node.inputs[int(name[2:])], self.sharding.asked(node, int(name[2:]))
                    yield node.path, self._storage(value, lie), self._number(value, lie)
            composed = _SIMPLE if self.execution.composed else _COMPOSED.get(self.kernels.device.kind, frozenset[str]())
            if node.op in composed:
                yield node.path, (node.path, "inside"), wide

    def _widens(self, node: Node) -> bool:
        """Whether it is composed of operations in fp32, of which the first saves a copy of the input."""
        return node.op in _COMPOSED.get(self.kernels.device.kind, ()) and width(node.type, self.float_bytes) < 4

    def _saved_dear(self, region: Region, moves: Iterable[Move]) -> Iterator[tuple[Key, int]]:
        found = self.layout.dear.get(id(region))
        if found is None:
            found = self.layout.dear[id(region)] = tuple(self._find_dear(region, moves))
        for key, number in found:
            yield key, self._size(number)
        for node in region.nodes:
            if size := self.delivered(node)[0]:
                yield (node.path, "delivered"), size

    def _find_dear(self, region: Region, moves: Iterable[Move]) -> Iterator[tuple[Key, int]]:
        users: dict[str, list[Node]] = {}
        for node in region.nodes:
            for source in node.inputs:
                users.setdefault(source, []).append(node)
        rerun = {node.path for node in self.execution.reruns(region.nodes)}
        for node in region.nodes:
            if node.path not in rerun and not self._only_summed(node.path, users):
                yield self._storage(node.path), self._number(node.path, self.sharding.left(node.path))
        for move in moves:
            if move.step.forward in (*_SUMS, "all_to_all"):
                yield self._storage(move.value, move.lie), self._number(move.value, move.lie)

    def _only_summed(self, value: str, users: Mapping[str, list[Node]]) -> bool:
        """Whether a product is a partial sum that a collective adds up, by itself or added to others."""
        moves = [move for move in self._moves_of(value) if move.axis == "tensor"]
        onwards = [node for node in users.get(value, ()) if not any(node.path in move.consumers for move in moves)]
        summed = any(move.step.forward in _SUMS for move in moves) or bool(onwards)
        return (
            summed
            and all(move.step.forward in _SUMS for move in moves)
            and all(self._passes_on(node) and self._only_summed(node.path, users) for node in onwards)
        )

    def _passes_on(self, node: Node) -> bool:
        """Whether it adds up products that are partial sums, or views one."""
        partial = self.sharding.strategies[node.path].output == PARTIAL
        passing = partial and (node.op == "add" or self._works[node.path].kind == "none")
        return passing and all(self._of_products(self.graph.nodes[source]) for source in node.inputs)

    def _of_products(self, node: Node) -> bool:
        return not CATALOGUE[node.op].cheap or self._passes_on(node)

    def _bytes(self, value: str, lie: Lie) -> int:
        return self._size(self._number(value, lie))

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return {}

    def _size(self, number: int) -> int:
        """Bytes on one rank."""
        found = self._sizes.get(number)
        if found is None:
            found = self._sizes[number] = prod(self._shape(number)) * width(self.layout.lies[number][0], self.float_bytes)
        return found

    def _most_transient(self, region: Region) -> tuple[int, int, int]:
        """The most that an operation's backward pass needs over what the region has saved: when its turn comes, what only later
        ones saved is free again. The second counts the gradients of weights in, those made so far; the third those of the
        operation."""
        made, seen = self._made_in(region), set[Key]()
        kept = dict.fromkeys((node.path for node in region.nodes), 0)
        for path, key, size in self._saved_plain(region):
            kept[path] += size if made(key) and key not in seen else 0
            seen.add(key)
        most = making = adding = free = gradients = 0
        for node in reversed(region.nodes):
            (own, apart), inside = self._own_weight_bytes(region, node), self._transient(node) - free
            gradients += own
            most, making, adding = max(most, inside), max(making, inside + gradients + apart), max(adding, inside + own + apart)
            free += kept[node.path]
        return most, max(making, gradients - free), adding

    def _own_weight_bytes(self, region: Region, node: Node) -> tuple[int, int]:
        """Of the node's weights that are no other pass' too: common ones, and experts that are shared out, whose gradients are
        added up at once."""
        found = [0, 0]
        for key, shape in zip(node.weights, self._locals[node.path].weights, strict=True):
            weight = self.graph.weights[key]
            apart = weight.expert and self.sharding.expert > 1
            if not region.repeated or weight.region == region.name:
                found[apart] += self.float_bytes * prod(shape)
        return found[0], found[1]

    def straight_weights(self, index: int) -> Mapping[str, int]:
        """Bytes of the weights of straight code."""
        region = self.graph.regions[index]
        pairs = ((n.weights, self._locals[n.path].weights) for n in region.nodes if not region.repeated)
        return {key: self.float_bytes * prod(shape) for each in pairs for key, shape in zip(*each, strict=True)}

    def _waiting(self, region: Region) -> int:
        """Gradients of the results of operations with weights, which those of the weights need."""
        results: dict[Key, int] = {}
        for node in (node for node in region.nodes if node.weights):
            size = self._bytes(node.path, self.sharding.left(node.path))
            results[self._storage(node.path)] = size * 4 // self.float_bytes if self._widens(node) else size
        return sum(results.values())

    def _given(self, index: int) -> int:
        """Of values that are made of weights, outside of the repeat: its passes use them all."""
        used = {value for node in self.graph.regions[index].nodes for value in node.inputs}
        return sum(self._bytes(v, lie) for v, lie in self._captured(index) if v in used and self._learned(v))

    def _transient(self, node: Node) -> int:
        """Its results and their gradients at one moment: output and inputs, and what the operation needs inside."""
        if node.op in ("input", "carry"):
            return 0
        form = self._form(node)
        inside = 0 if node.path == self.graph.loss else int(self._works[node.path].transient_bytes)
        return sum(map(self._size, form.inputs)) + self._size(form.output) + inside + max(self.delivered(node))

    def boundary_bytes(self, entry: str) -> int:
        """A carried value as it lies between passes and stages."""
        return self._bytes(entry, self.sharding.left(entry))

    # ---- between stages ---------------------------------------------------------------------------------------------

    @cached_property
    def crossings(self) -> tuple[tuple[int, ...], ...]:
        """By region: bytes of each value that a stage hands on before a pass of it (none for straight code): what is carried,
        and values of earlier regions that it or later ones still use."""
        return tuple(self._crossing(i) if region.repeated else () for i, region in enumerate(self.graph.regions))

    def _crossing(self, index: int) -> tuple[int, ...]:
        carried = [self.boundary_bytes(c.entry) for c in self.graph.regions[index].carried]
        return (*carried, *(self._bytes(value, lie) for value, lie in self._captured(index)))

    def _captured(self, index: int) -> list[tuple[str, Lie]]:
        """Floating-point values made before region `index` and used in it or after it (other than by being carried into it), as
        they lie by then: the region and those before it have brought theirs, of others the users bring what they want."""
        regions = self.graph.regions
        made = {n.path for region in regions[:index] for n in region.nodes if n.op not in ("input", "carry")}
        present = {(value, lie) for region in regions[: index + 1] for value, lie in self._asked_in(region)}
        asked = [pair for region in regions[index + 1 :] for pair in self._asked_in(region)]
        asked += [(v, self.sharding.asked(n, i)) for n in regions[index].nodes for i, v in enumerate(n.inputs)]
        return sorted({(v, self._latest(v, lie, present)) for v, lie in asked if v in made}, key=str)

    def _asked_in(self, region: Region) -> Iterator[tuple[str, Lie]]:
        """Values that a region uses, as it wants them."""
        for node in region.nodes:
            for position, value in enumerate(node.inputs):
                yield value, self.sharding.asked(node, position)
        for carried in region.carried:
            yield carried.initial, self.sharding.left(carried.entry)

    def _latest(self, value: str, lie: Lie, present: Collection[tuple[str, Lie]]) -> Lie:
        """On a value's way to where it is wanted, over the tensor axis first, the last place that it has come to."""
        left = self.sharding.left(self._carried_as.get(value, value))
        return next((there for there in (lie, (lie[0], left[1])) if (value, there) in present), left)
