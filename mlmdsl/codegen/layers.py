"""Operations and transitions as statements, and one nn.Module per repeated region.

`Sharded` answers what the rest of the room asks of graph and plan together: what is needed, how a value lies on the tensor and
context axes and which transitions bring it where it is wanted. On an axis of one rank every placement is "" and there are no
transitions, so that a program for one device has no trace of the axis. Where both have several, a value moves on the tensor
axis first, whose cut is the inner one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mlmdsl import words
from mlmdsl.codegen.names import attribute_path, class_name, mentions, variable
from mlmdsl.codegen.statements import Key, Kind, Step, returning, slot, write
from mlmdsl.codegen.text import INDENT, WIDTH, plain
from mlmdsl.codegen.weights import declarations
from mlmdsl.graph.graph import Carried, Graph, Node, Region
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import Emission
from mlmdsl.graph.placement import (
    REPLICATE,
    WHOLE,
    Strategy,
    WeightPlacement,
    parse_placement,
    parse_weight_placement,
)
from mlmdsl.graph.tensor import TensorType, Weight
from mlmdsl.planner.plan import NodeLayout, PlanVariables, RegionLayout, Transition

LIGHT = frozenset(
    {"add", "subtract", "multiply", "divide", "scale", "gelu", "relu", "silu", "sigmoid", "tanh", "bias", "offset"}
)
RESHAPES = frozenset({"split_heads", "merge_heads"})
PLACEHOLDERS = frozenset({"input", "carry"})

# (forward, backward) of a transition -> the runtime's function; the dims follow the axis.
FUNCTIONS: Mapping[tuple[str | None, str | None], str] = {
    ("all_gather", "reduce_scatter"): "all_gather({x}, {axis}, dim={dim})",
    ("all_gather", "split"): "gather({x}, {axis}, dim={dim})",
    ("all_gather", None): "gather({x}, {axis}, dim={dim})",  # integers
    ("all_reduce", None): "all_reduce({x}, {axis})",
    (None, "all_reduce"): "copy_to({x}, {axis})",
    ("all_reduce", "all_reduce"): "all_reduce_both({x}, {axis})",
    ("reduce_scatter", "all_gather"): "reduce_scatter({x}, {axis}, dim={dim})",
    ("split", "all_gather"): "split({x}, {axis}, dim={dim})",
    ("split", None): "split({x}, {axis}, dim={dim})",  # integers
    ("all_to_all", "all_to_all"): "all_to_all({x}, {axis}, {dim}, {target_dim})",
}


AXES = {"tp": "mesh.tensor", "cp": "mesh.context", "ep": "mesh.expert", "tally": "mesh.tally"}  # variables of programs


def axes_in(lines: Iterable[str]) -> tuple[str, ...]:
    """The axes that code mentions."""
    text = list(lines)
    return tuple(axis for axis in AXES if any(mentions(line, axis) for line in text))


def _annotated(axis: str) -> str:
    return f"{axis}: {'Tally' if axis == 'tally' else 'Axis'}"


def own_axes(lines: Iterable[str]) -> list[str]:
    """`tp = self.tp`, before a method's code that mentions the axis."""
    return [f"{INDENT * 2}{axis} = self.{axis}" for axis in axes_in(lines)]


@dataclass(frozen=True)
class Sharded:
    """The graph with the plan's placements. Of a value on both axes they are written `shard(2)|shard(1)`, the context axis'
    behind."""

    graph: Graph
    plan: PlanVariables
    layout: tuple[RegionLayout, ...]
    context_layout: tuple[RegionLayout, ...] = ()

    @property
    def axis(self) -> str | None:
        return "tp" if self.plan.tensor > 1 else None

    @property
    def expert(self) -> str | None:
        return "ep" if self.plan.expert > 1 else None

    @property
    def context(self) -> str | None:
        return "cp" if self.plan.context > 1 else None

    @cached_property
    def region_index(self) -> Mapping[str, int]:
        return {node.path: index for index, region in enumerate(self.graph.regions) for node in region.nodes}

    @cached_property
    def node_layouts(self) -> Mapping[str, NodeLayout]:
        return {node.path: node for region in self.layout for node in region.nodes}

    @cached_property
    def context_nodes(self) -> Mapping[str, NodeLayout]:
        return {node.path: node for region in self.context_layout for node in region.nodes}

    @cached_property
    def transitions(self) -> Mapping[tuple[str, str, str, str], tuple[int, Transition]]:
        """By (axis, value, target on it, consumer): the transition and the region whose code it belongs to."""
        found: dict[tuple[str, str, str, str], tuple[int, Transition]] = {}
        for axis, layout in (("tp", self.layout), ("cp", self.context_layout)):
            for index, region in enumerate(layout):
                for item in region.transitions:
                    for consumer in item.consumers or ("",):  # nothing in the graph consumes the loss
                        found[axis, item.value, item.target, consumer] = (index, item)
        return found

    def home(self, value: str, target: str, consumer: str, here: int) -> int:
        """The region that brings a value to `target` for a consumer; `here` where nothing has to."""
        tensor, context = _apart(target)
        wanted = (("tp", value, tensor, consumer), ("cp", value, context, consumer))
        return next((self.transitions[key][0] for key in wanted if key in self.transitions), here)

    @cached_property
    def carried(self) -> Mapping[str, Carried]:
        """By entry."""
        return {c.entry: c for region in self.graph.regions for c in region.carried}

    @cached_property
    def needed(self) -> frozenset[str]:
        """What the loss depends on."""
        return self._ancestors(self.graph.loss)

    def _ancestors(self, path: str) -> frozenset[str]:
        found: set[str] = set()
        todo = [path]
        while todo:
            path = todo.pop()
            if path not in found:
                found.add(path)
                carried = self.carried.get(path)
                todo += [carried.initial, carried.next] if carried else self.graph.nodes[path].inputs
        return frozenset(found)

    @cached_property
    def objective(self) -> tuple[Node, ...]:
        """What comes after the model's output: the nodes that depend on the targets."""
        model = self._ancestors(self.graph.output)
        after = {name for name in self.graph.inputs if name not in model}
        nodes: list[Node] = []
        for path, node in self.graph.nodes.items():
            if path in self.needed and any(value in after for value in node.inputs):
                after.add(path)
                nodes.append(node)
        return tuple(nodes)

    @cached_property
    def uses(self) -> Counter[str]:
        found = Counter(v for p in self.needed for v in self.graph.nodes[p].inputs)
        found.update(v for c in self.carried.values() if c.entry in self.needed for v in (c.initial, c.next))
        found[self.graph.output] += 1
        return found

    def kept(self, region: Region) -> tuple[Node, ...]:
        """The region's computations that are needed, without inputs and the objective."""
        objective = {node.path for node in self.objective}
        nodes = (n for n in region.nodes if n.path in self.needed and n.path not in objective)
        return tuple(n for n in nodes if n.op not in PLACEHOLDERS)

    def kept_carried(self, region: Region) -> tuple[Carried, ...]:
        return tuple(c for c in region.carried if c.entry in self.needed)

    # ---- placements

    def boundary(self, entry: str) -> str:
        index = self.region_index[entry]
        tensor = "" if self.axis is None else self.layout[index].boundary[entry]
        return _joined(tensor, self.context_layout[index].boundary[entry] if self.context else "")

    def placement(self, value: str, region: int) -> str:
        """How `value` lies where the code of region number `region` finds it."""
        tensor = "" if self.axis is None else self._on_tensor(value, region)
        return _joined(tensor, self._on_context(value) if self.context else "")

    def _on_context(self, value: str) -> str:
        return self.context_nodes[value].output

    def _on_tensor(self, value: str, region: int) -> str:
        node = self.graph.nodes[value]
        if node.op == "input":
            return str(REPLICATE)
        if node.op == "carry":
            return _apart(self.boundary(value))[0]
        if self.region_index[value] != region:
            for carried in self.graph.region_of[value].carried:
                if carried.next == value:
                    return _apart(self.boundary(carried.entry))[0]
        return self.node_layouts[value].output

    def strategy(self, node: Node) -> Strategy:
        if self.axis is None:
            return Strategy("replicated", (REPLICATE,) * len(node.inputs), (WHOLE,) * len(node.weights), REPLICATE)
        layout = self.node_layouts[node.path]
        inputs = tuple(parse_placement(text) for text in layout.inputs)
        weights = tuple(parse_weight_placement(text) for text in layout.weights)
        return Strategy(layout.strategy, inputs, weights, parse_placement(layout.output))

    def demand(self, node: Node, index: int) -> str:
        tensor = "" if self.axis is None else self.node_layouts[node.path].inputs[index]
        return _joined(tensor, self.context_nodes[node.path].inputs[index] if self.context else "")

    def weight_placement(self, weight: Weight) -> WeightPlacement:
        """The same in all of the weight's uses."""
        if self.axis is None:
            return WHOLE
        found = {
            layout.weights[node.weights.index(weight.key)]
            for node in self.graph.nodes.values()
            if weight.key in node.weights and (layout := self.node_layouts.get(node.path))
        }
        assert len(found) == 1, f"{weight.key} is placed in two ways: {found}"
        return parse_weight_placement(found.pop())

    def local_shape(self, type: TensorType, placement: str) -> str:
        """`[B, S/cp/tp, 64]`."""
        tensor, context = (parse_placement(text) if text else REPLICATE for text in _apart(placement))
        dims = list(map(str, type.shape))
        for place, axis in ((context, "cp"), (tensor, "tp")):
            if place.is_shard:
                dims[place.dim] += f"/{axis}"
        if not type.shape:
            return ""
        prefix = type.dtype if type.dtype == "int" else ""
        return f"{prefix}[{', '.join(dims)}]" + (", partial sums" if tensor.kind == "partial" else "")


def _joined(tensor: str, context: str) -> str:
    return f"{tensor}|{context}" if context else tensor


def _apart(placement: str) -> tuple[str, str]:
    tensor, _, context = placement.partition("|")
    return tensor, context


@dataclass
class Passage:
    """Statements in the making: the nodes of one stretch of a function, with the transitions that they ask for, each once.

    weight: how the function writes a weight. present: the keys that exist already."""

    sharded: Sharded
    region: int
    weight: Callable[[Weight], str]
    condition: str
    steps: list[Step]
    present: set[Key]

    def add(self, nodes: Sequence[Node]) -> None:
        """Appends the computation of `nodes`, a bias together with its linear where nothing lies between."""
        fused = {node.path: linear for node in nodes if (linear := self._linear_of(node)) is not None}
        skipped = {linear.path for linear in fused.values()}
        for node in nodes:
            if node.path not in skipped:
                self._compute(node, fused.get(node.path))

    def bring(self, value: str, target: str, consumer: str, scope: tuple[tuple[str, str], ...] = ()) -> Key:
        """The key of `value` in placement `target`, after the planned transition where it is not there yet."""
        source = self.sharded.placement(value, self.region)
        if source == target or (value, target) in self.present:
            return (value, target)
        (tensor, context), (wanted, around) = _apart(source), _apart(target)
        if tensor != wanted:
            source = self._moved(("tp", value, wanted, consumer), source, _joined(wanted, context), scope)
        if context != around:
            source = self._moved(("cp", value, around, consumer), source, target, scope)
        return (value, source)

    def _moved(self, key: tuple[str, str, str, str], source: str, target: str, scope: tuple[tuple[str, str], ...]) -> str:
        """How the value lies after one transition: as before where that is nothing to do."""
        value, (_, transition) = key[1], self.sharded.transitions[key]
        if transition.forward is None and transition.backward is None:
            return source
        if (value, target) not in self.present:
            self.steps.append(self._collective(transition, key[0], source, target, scope))
            self.present.add((value, target))
        return target

    def _linear_of(self, node: Node) -> Node | None:
        source = self.sharded.graph.nodes[node.inputs[0]] if node.op == "bias" else None
        if source is None or source.op != "linear" or self.sharded.uses[source.path] != 1:
            return None
        if self.sharded.strategy(node).name == "shared":  # adds its share of the bias to a partial sum
            return None
        same = self.sharded.demand(node, 0) == self.sharded.placement(source.path, self.region)
        return source if same and self.sharded.region_index[source.path] == self.region else None

    def _compute(self, node: Node, linear: Node | None) -> None:
        main = linear or node
        keys = tuple(
            self.bring(value, self.sharded.demand(main, i), main.path, main.scope) for i, value in enumerate(main.inputs)
        )
        result = (node.path, self.sharded.placement(node.path, self.region))
        self.present.add(result)
        self.steps.append(
            Step(
                kind="heavy" if linear else _kind(node.op),
                inputs=keys,
                results=(result,),
                template=self._template(main, (*main.weights, *(node.weights if linear else ()))),
                hints=(node.variable or (linear.variable if linear else ""),),
                soft=bool(node.weights),
                shape=self.sharded.local_shape(node.type, result[1]),
                scope=node.scope,
                condition=self.condition,
            )
        )

    def _template(self, node: Node, weights: tuple[str, ...]) -> str:
        graph = self.sharded.graph
        text = CATALOGUE[node.op].emit(
            Emission(
                inputs=tuple(slot(i) for i in range(len(node.inputs))),
                weights=tuple(self.weight(graph.weights[key]) for key in weights),
                attrs=node.attrs,
                axis=self.sharded.axis,
                axis_size=self.sharded.plan.tensor,
                strategy=self.sharded.strategy(node),
                input_types=tuple(graph.nodes[value].type for value in node.inputs),
                output_type=node.type,
                expert=self.sharded.expert,
                context=self.sharded.context,
            )
        )
        return re.sub(r"(?<=[\d.]e-)0(?=\d)", "", text)  # 1e-05 -> 1e-5

    def _collective(self, item: Transition, axis: str, source: str, target: str, scope: tuple[tuple[str, str], ...]) -> Step:
        template = FUNCTIONS[item.forward, item.backward]
        return Step(
            kind="collective",
            inputs=((item.value, source),),
            results=((item.value, target),),
            template=template.format(x=slot(0), axis=axis, dim=item.dim, target_dim=item.target_dim),
            comment=_reason(item),
            shape=self.sharded.local_shape(self.sharded.graph.nodes[item.value].type, target),
            scope=scope,
            condition=self.condition,
        )


def _kind(op: str) -> Kind:
    return "light" if op in LIGHT else "reshape" if op in RESHAPES else "heavy"


def _reason(item: Transition) -> str:
    """`32 KiB; backward reduce_scatter: attn.query, attn.key, attn.value are column-parallel`."""
    moved = words.size(item.bytes)
    forward = moved if item.forward not in (None, "split") else "local slice" if item.forward else ""
    backward = f"backward {item.backward}" + ("" if forward == moved else f" of {moved}") if item.backward else ""
    facts = "; ".join(part for part in (forward, backward) if part)
    return f"{facts}: {plain(item.reason)}" if item.reason else facts


# ---- modules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The module of a repeated region: `forward` takes the carried values, then what it captures from outside."""

    sharded: Sharded
    index: int

    @property
    def region(self) -> Region:
        return self.sharded.graph.regions[self.index]

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return self.sharded.kept(self.region)

    @cached_property
    def carried(self) -> tuple[Carried, ...]:
        return self.sharded.kept_carried(self.region)

    @cached_property
    def entries(self) -> tuple[Key, ...]:
        return tuple((c.entry, self.sharded.boundary(c.entry)) for c in self.carried)

    @cached_property
    def captured(self) -> Mapping[Key, str]:
        """Values of other regions with a node that uses each, as they lie there: a transition that this region's layout lists
        happens inside, on every pass."""
        uses = [(v, self.sharded.demand(n, i), n.path) for n in self.nodes for i, v in enumerate(n.inputs)]
        uses += [(c.next, self.sharded.boundary(c.entry), c.entry) for c in self.carried]
        found: dict[Key, str] = {}
        for value, target, consumer in uses:
            if self.sharded.region_index[value] != self.index:
                owner = self.sharded.home(value, target, consumer, self.index)
                here = self.sharded.placement(value, self.index)
                found.setdefault((value, here if owner == self.index else target), consumer)
        return found

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All weights that a pass uses, in the order of declaration."""
        used = {key for node in self.nodes for key in node.weights}
        return tuple(weight for key, weight in self.sharded.graph.weights.items() if key in used)

    @property
    def own(self) -> tuple[Weight, ...]:
        return tuple(w for w in self.weights if w.region == self.region.name)

    @property
    def outer(self) -> tuple[Weight, ...]:
        """Weights of straight code, shared by all passes: arguments of `forward`."""
        return tuple(w for w in self.weights if w.region != self.region.name)

    @cached_property
    def class_name(self) -> str:
        """The user's block where the body is one call of it, else the repeat's name; made unique among the program's."""
        names: list[str] = []
        for index, region in enumerate(self.sharded.graph.regions[: self.index + 1]):
            if region.repeated:
                name = class_name(self._block_name(region) or region.name)
                names.append(name if name not in names else class_name(f"{name}{index}"))
        return names[-1]

    def _block_name(self, region: Region) -> str:
        blocks = {node.scope[:1] for node in self.sharded.kept(region)}
        return blocks.pop()[0][1] if len(blocks) == 1 and () not in blocks else ""

    @cached_property
    def parameters(self) -> Mapping[Key, str]:
        """Names of the arguments."""
        names: dict[Key, str] = {}
        hints = [*(c.variable for c in self.carried), *map(self._captured_name, self.captured)]
        for key, hint in zip((*self.entries, *self.captured), hints, strict=True):
            names[key] = _unique(variable(hint or "x"), names.values())
        return names

    @cached_property
    def weight_parameters(self) -> Mapping[str, str]:
        names: dict[str, str] = {}
        for weight in self.outer:
            taken = [*self.parameters.values(), *names.values()]
            names[weight.key] = _unique(variable(weight.key.replace(".", "_")), taken)
        return names

    def _captured_name(self, key: Key) -> str:
        node = self.sharded.graph.nodes[key[0]]
        return node.variable or (node.path if node.op == "input" else "")

    def lines(self) -> list[str]:
        """The class."""
        return [
            f"class {self.class_name}(nn.Module):",
            f'{INDENT}"""One pass of `repeat {self.region.count} as {self.region.name}`."""',
            *self._init,
            "",
            self._head,
            *own_axes(self._body),
            *self._body,
        ]

    @cached_property
    def taken(self) -> tuple[str, ...]:
        """The axes that the constructor is given."""
        return axes_in((*self._body, *self._weight_lines))

    @cached_property
    def _weight_lines(self) -> tuple[str, ...]:
        weights = [(w.name, w, self.sharded.weight_placement(w), self.sharded.expert) for w in self.own]
        return tuple(line for _, line in declarations(weights, 2))

    @property
    def _init(self) -> list[str]:
        if not self.taken and not self._weight_lines:
            return []
        return [
            "",
            f"{INDENT}def __init__({', '.join(['self', *map(_annotated, self.taken)])}):",
            f"{INDENT * 2}super().__init__()",
            *(f"{INDENT * 2}self.{axis} = {axis}" for axis in axes_in(self._body)),
            *self._weight_lines,
        ]

    @property
    def _head(self) -> str:
        arguments = ["self", *self.parameters.values(), *self.weight_parameters.values()]
        shapes = [f"{name}: {self._shape(key)}" for key, name in self.parameters.items()]
        head = f"{INDENT}def forward({', '.join(arguments)}):"
        comment = f"  # {', '.join(shapes)}"
        return head + comment if shapes and len(head + comment) <= WIDTH else head

    @cached_property
    def _body(self) -> tuple[str, ...]:
        passage = Passage(self.sharded, self.index, self._weight, "", [], set(self.parameters))
        passage.add(self.nodes)
        results = tuple(passage.bring(c.next, self.sharded.boundary(c.entry), c.entry) for c in self.carried)
        shape = self._shape(self.entries[0]) if len(self.entries) == 1 else ""
        return write([*passage.steps, returning(results)], self.parameters, shape=shape).lines

    def _shape(self, key: Key) -> str:
        return self.sharded.local_shape(self.sharded.graph.nodes[key[0]].type, key[1])

    def _weight(self, weight: Weight) -> str:
        if weight.key in self.weight_parameters:
            return self.weight_parameters[weight.key]
        return f"self.{attribute_path(weight.name)}"


def _unique(name: str, taken: Iterable[str]) -> str:
    used = set(taken)
    return next(n for n in (name, *(f"{name}{i}" for i in range(2, len(used) + 3))) if n not in used)
