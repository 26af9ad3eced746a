"""The Stage class: the part of the model that one virtual stage of the pipeline holds.

The layers of all repeats are numbered through; virtual stage v holds those from `lo` to `hi` of PARALLEL.stages. Straight code
before the first repeat runs on the first stage, after the last one on the last, between two repeats with the layer before it.
What is live at a cut travels: the carried values, and others that later code still needs. Model inputs do not travel; stages
that need them again are given them by keyword.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from mlmdsl.codegen.layers import AXES, Layer, Passage, Sharded, axes_in, own_axes
from mlmdsl.codegen.names import attribute, attribute_path, mentions, variable
from mlmdsl.codegen.statements import Body, Key, Step, returning, slot, write
from mlmdsl.codegen.text import INDENT, WIDTH
from mlmdsl.codegen.weights import Placed, declarations, late, skeleton
from mlmdsl.graph.graph import Region
from mlmdsl.graph.tensor import Weight


@dataclass(frozen=True)
class StageModule:
    sharded: Sharded
    layers: Mapping[int, Layer]  # by region number

    @property
    def several(self) -> bool:
        return len(self.sharded.plan.stages) > 1

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Layers before each region; one entry more at the end."""
        return tuple(accumulate((r.count if r.repeated else 0 for r in self.sharded.graph.regions), initial=0))

    @cached_property
    def cut_regions(self) -> tuple[int, ...]:
        """The repeats in which stages begin, in order; a stage without layers at the very end begins after the last pass."""
        cuts = list(accumulate(self.sharded.plan.stages))[:-1]
        repeats = list(self.layers)
        found = {next((r for r in repeats if self.starts[r] <= cut < self.starts[r + 1]), repeats[-1]) for cut in cuts}
        return tuple(sorted(found))

    def condition(self, region: int, prefix: str = "self.") -> str:
        """When a stage runs what stands before the repeat `region`, or the straight code `region`."""
        if not self.several:
            return ""
        before = self.starts[region]
        if before == 0:
            return "self.first"
        if before == self.starts[-1]:
            return "self.last"
        return f"{prefix}lo < {before} <= {prefix}hi"

    # ---- forward ----------------------------------------------------------------------------------------------------

    @cached_property
    def computations(self) -> tuple[Step, ...]:
        """All steps of the forward pass without what cuts add."""
        steps: list[Step] = []
        present: set[Key] = {self._input_key(name) for name in self.sharded.graph.inputs}
        for index, region in enumerate(self.sharded.graph.regions):
            condition = self.condition(index)
            last = self.several and self.starts[index] == self.starts[-1] and not region.repeated
            passage = Passage(self.sharded, index, self._weight, "" if last else condition, steps, present)
            if region.repeated:
                self._enter(passage, region)
            else:
                passage.add(self.sharded.kept(region))
        return tuple(steps)

    def _enter(self, passage: Passage, region: Region) -> None:
        """First values of the carried variables, then the loop."""
        layer = self.layers[passage.region]
        for carried, entry in zip(layer.carried, layer.entries, strict=True):
            first = passage.bring(carried.initial, entry[1], carried.entry)
            passage.steps.append(
                Step("alias", (first,), (entry,), slot(0), hints=(carried.variable,), condition=passage.condition)
            )
        captured = tuple(passage.bring(value, place, user) for (value, place), user in layer.captured.items())
        results = tuple((c.next, self.sharded.boundary(c.entry)) for c in layer.carried)
        passage.present.update(results)
        inputs = (*layer.entries, *captured)
        passage.steps.append(Step("block", inputs, results, lines=lambda names: self._loop(layer, inputs, names)))

    def _loop(self, layer: Layer, inputs: tuple[Key, ...], names: Mapping[Key, str]) -> list[str]:
        """`for block in self.blocks.values(): h = block(h)`."""
        results = ", ".join(names[key] for key in layer.entries)
        weights = (f"self.{attribute_path(w.key)}" for w in layer.outer)
        arguments = ", ".join([*(names[key] for key in inputs), *weights])
        how = self.sharded.plan.recompute
        blocks = f"self.{attribute(layer.region.name)}"
        if isinstance(how, str):
            block = "block" if how == "none" else "recomputed(block, PARALLEL.recompute)"
            return [f"for block in {blocks}.values():", f"{INDENT}{results} = {block}({arguments})"]
        ways = f"PARALLEL.recompute[{before}:]" if (before := self.starts[layer.index]) else "PARALLEL.recompute"
        return [f"for block in recomputed_blocks({blocks}, {ways}):", f"{INDENT}{results} = block({arguments})"]

    @cached_property
    def output(self) -> Key:
        last = len(self.sharded.graph.regions) - 1
        return (self.sharded.graph.output, self.sharded.placement(self.sharded.graph.output, last))

    def live(self, region: int) -> tuple[Key, ...]:
        """What a stage that begins in repeat `region` is given: the carried values, then others that are needed still."""
        loop = self._loop_index(region)
        entries = self.layers[region].entries
        before = {key: None for step in self.computations[:loop] for key in step.results}
        after = {key for step in self.computations[loop:] for key in step.inputs} | {self.output}
        return (*entries, *(key for key in before if key in after and key not in entries))

    def _loop_index(self, region: int) -> int:
        entries = self.layers[region].entries
        return next(i for i, s in enumerate(self.computations) if s.kind == "block" and s.inputs[: len(entries)] == entries)

    @cached_property
    def later_inputs(self) -> tuple[str, ...]:
        """Model inputs that other stages than the first use."""
        used = {key for step in self.computations if step.condition != "self.first" for key in step.inputs}
        return tuple(name for name in self.sharded.graph.inputs if self.several and self._input_key(name) in used)

    @cached_property
    def first_inputs(self) -> tuple[str, ...]:
        """Model inputs that only the first stage uses: its positional arguments."""
        used = {key for step in self.computations for key in step.inputs}
        names = (name for name in self.sharded.graph.inputs if self._input_key(name) in used)
        return tuple(name for name in names if name not in self.later_inputs)

    def forward(self) -> list[str]:
        """The method, without the axis' line."""
        single = all(len(self.live(r)) == 1 for r in self.cut_regions) and len(self.first_inputs) <= 1
        body, names = self._written(single)
        if single and len(names) > 1:
            body, names = self._written(False)
            single = False
        keywords = [*(["*"] if single else []), *map(variable, self.later_inputs)] if self.later_inputs else []
        if not self.several:
            arguments = [variable(name) for name in self.first_inputs]
            comment = ", ".join(f"{variable(n)}: {self._input_shape(n)}" for n in self.first_inputs)
        else:
            arguments = [next(iter(names)) if single else "*values", *keywords]
            comment = "the first stage is given " + ", ".join(f"{n}: {self._input_shape(n)}" for n in self._given_first)
        head = f"{INDENT}def forward({', '.join(['self', *arguments])}):"
        head = f"{head}  # {comment}" if len(head) + len(comment) + 4 <= WIDTH else head
        return [head, *own_axes(body.lines), *body.lines]

    @property
    def _given_first(self) -> tuple[str, ...]:
        return self.first_inputs or self.later_inputs

    def _written(self, single: bool) -> tuple[Body, set[str]]:
        """The body, and the names of what travels in the single-value form."""
        given = {self._input_key(n): variable(n) for n in (self.later_inputs if self.several else self.first_inputs)}
        steps = [*self._with_cuts(), returning((self.output,))]
        if self.several and (self.first_inputs or not single):
            steps.insert(0, self._entry(single))
        body = write(steps, given)
        travelling = {body.names[key] for r in self.cut_regions for key in self.live(r)}
        return body, travelling or {"h"}

    def _entry(self, single: bool) -> Step:
        keys = tuple(self._input_key(name) for name in self.first_inputs)
        return Step(
            "block",
            (),
            keys,
            lines=self._receive_one if single else self._receive,
            hints=self.first_inputs,
            condition="self.first" if single else "",
        )

    def _receive_one(self, names: Mapping[Key, str]) -> list[str]:
        """`tokens = h`."""
        given = names[self.live(self.cut_regions[0])[0]]
        name = names[self._input_key(self.first_inputs[0])]
        return [f"{name} = {given}"] if name != given else []

    def _receive(self, names: Mapping[Key, str]) -> list[str]:
        """The arguments by their names, which depend on where the stage begins."""
        cases = [(["self.first"], tuple(map(self._input_key, self.first_inputs)))] if self.first_inputs else []
        for region in self.cut_regions:
            more = [f"self.lo < {self.starts[region + 1]}"] if region != self.cut_regions[-1] else []
            cases.append(([*(["not self.first"] if not self.first_inputs else []), *more], self.live(region)))
        lines: list[str] = []
        for position, (tests, keys) in enumerate(cases):
            word = "elif" if position else "if"
            target = ", ".join(names[key] for key in keys)
            head = f"{word} {' and '.join(tests)}:" if tests else "else:"
            lines += [head, f"{INDENT}{f'({target},)' if len(keys) == 1 else target} = values"]
        return lines

    def _with_cuts(self) -> Iterable[Step]:
        """The computations, and after each repeat the return of stages that end in it."""
        loops = {self._loop_index(r): r for r in self.cut_regions} if self.several else {}
        for index, step in enumerate(self.computations):
            yield step
            if index in loops:
                layer, end = self.layers[loops[index]], self.starts[loops[index] + 1]
                passed = dict(zip(layer.entries, step.results, strict=True))
                keys = tuple(passed.get(key, key) for key in self.live(loops[index]))
                condition = "not self.last" if end == self.starts[-1] else f"self.hi < {end}"
                yield returning(keys, condition)

    def _input_key(self, name: str) -> Key:
        return (name, self.sharded.placement(name, 0))

    def _input_shape(self, name: str) -> str:
        return self.sharded.local_shape(self.sharded.graph.nodes[name].type, self._input_key(name)[1])

    def _weight(self, weight: Weight) -> str:
        return f"self.{attribute_path(weight.key)}"

    # ---- constructor ------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """The class."""
        forward = self.forward()
        made = list(self._made())
        uses = {name: any(mentions(line, name) for line in (*forward, *made)) for name in ("self.lo", "self.hi")}
        own = [name for name in ("first", "last") if any(f"self.{name}" in line for line in (*forward, *made))]
        return [
            "class Stage(nn.Module):",
            f'{INDENT}"""{self._doc()}"""',
            "",
            f"{INDENT}def __init__(self, index: int, mesh: Mesh):",
            f"{INDENT * 2}super().__init__()",
            *self._axes(forward, made),
            *([f"{INDENT * 2}{', '.join(f'self.{n}' for n in own)} = {', '.join(_OWN[n] for n in own)}"] if own else []),
            *self._bounds(any(uses[n] for n in ("self.lo", "self.hi"))),
            *made,
            "",
            *forward,
        ]

    def _axes(self, forward: Sequence[str], made: Sequence[str]) -> list[str]:
        """`self.tp = tp = mesh.tensor`, or without the attribute where the forward pass does not ask for it."""
        kept = {axis for axis in AXES for line in forward if line.strip() == f"{axis} = self.{axis}"}
        return [
            f"{INDENT * 2}{f'self.{axis} = ' if axis in kept else ''}{axis} = {AXES[axis]}"
            for axis in axes_in((*forward, *made))
        ]

    def _bounds(self, kept: bool) -> list[str]:
        if not self.several:
            return []
        lines = [f"{INDENT * 2}lo = sum(PARALLEL.stages[:index])", f"{INDENT * 2}hi = lo + PARALLEL.stages[index]"]
        return [*lines, f"{INDENT * 2}self.lo, self.hi = lo, hi"] if kept else lines

    def _doc(self) -> str:
        if not self.several:
            return "The whole model."
        return (
            "Virtual stage `index` of the pipeline: its share of the layers, and on the first and last what stands around them."
        )

    def _made(self) -> Iterable[str]:
        """Weights and layers, under conditions where there are several stages."""
        items = list(self._declared())
        for condition, group in groupby(items, key=lambda item: item[0]):
            if condition:
                yield f"{INDENT * 2}if {condition}:"
            for _, line in group:
                yield f"{INDENT * (2 + bool(condition))}{line}"

    def _declared(self) -> Iterable[tuple[str, str]]:
        """(condition, line at indent 0), in the order of first use."""
        seen: set[str] = set()
        for index in range(len(self.sharded.graph.regions)):
            heads = [weight.key.partition(".")[0] for weight in self._used_in(index)]
            for head in dict.fromkeys(heads):
                if head not in seen:
                    seen.add(head)
                    yield from self._scope(head)
            if index in self.layers:
                yield "", self._module_dict(index)

    def _used_in(self, region: int) -> tuple[Weight, ...]:
        """The straight code's weights that a region uses, in the order of declaration."""
        if region in self.layers:
            return self.layers[region].outer
        nodes = self.sharded.kept(self.sharded.graph.regions[region])
        used = {key for node in nodes for key in node.weights}
        return tuple(weight for key, weight in self.sharded.graph.weights.items() if key in used)

    @cached_property
    def _places(self) -> Mapping[str, tuple[str, ...]]:
        """Weight -> the conditions under which a stage uses it; () where all do."""
        found: dict[str, dict[str, None]] = {}
        for index in range(len(self.sharded.graph.regions)):
            inside = index in self.layers
            everywhere = inside and len(self.layers) == 1 and 0 not in self.sharded.plan.stages
            text = f"max(lo, {self.starts[index]}) < min(hi, {self.starts[index + 1]})" if inside else self.condition(index, "")
            for weight in self._used_in(index):
                found.setdefault(weight.key, {})["" if everywhere or not self.several else text] = None
        return {key: () if "" in places else tuple(places) for key, places in found.items()}

    def _scope(self, head: str) -> Iterable[tuple[str, str]]:
        """The declaration of one outermost scope; a weight used on several stages is declared on each of them."""
        weights = [w for key, w in self.sharded.graph.weights.items() if key in self._places and key.partition(".")[0] == head]
        placed: list[Placed] = [(w.key, w, self.sharded.weight_placement(w), self.sharded.expert) for w in weights]
        places = {w.key: self._places[w.key] for w in weights}
        conditions = list(dict.fromkeys(c for found in places.values() for c in found))
        union = "" if () in places.values() else _any(conditions)
        if len(set(places.values())) == 1:
            if len(conditions) > 1:
                yield union, "# used on several stages: the runtime sums their gradients"
            for _, line in declarations(placed, 0):
                yield union, line
            return
        for line in skeleton(placed):
            yield union, line
        for item in placed:
            for line in late(item):
                yield _any(places[item[0]]), line

    def _module_dict(self, region: int) -> str:
        layer, start, end = self.layers[region], self.starts[region], self.starts[region + 1]
        made = f"{layer.class_name}({', '.join(layer.taken)})"
        lo = f"max(lo, {start})" if start else "lo"
        hi = f"min(hi, {end})" if end < self.starts[-1] else "hi"
        bounds = f"{lo}, {hi}" if self.several else str(end - start)
        key = f"i - {start}" if self.several and start else "i"
        return f"self.{attribute(layer.region.name)} = nn.ModuleDict({{str({key}): {made} for i in range({bounds})}})"


_OWN = {"first": "index == 0", "last": "index == len(PARALLEL.stages) - 1"}


def _any(conditions: Sequence[str]) -> str:
    """The disjunction."""
    return " or ".join(f"({c})" if " " in c and len(conditions) > 1 else c for c in conditions)
