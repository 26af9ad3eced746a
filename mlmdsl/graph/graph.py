"""The computation graph: regions in order, each a straight piece of code or a folded `repeat`.

A value is named by the path of the node that makes it; paths are unique in the whole graph. Inside a repeat a variable that is
carried from one pass to the next is made by a node of operation "carry"; `Carried` says where its first value comes from and
which node gives the next one. After the repeat, `Carried.next` names the value of the last pass. A node of a repeat may also
use a value made outside (a captured value): the same on every pass.

Operations without computation: "input" (a model input, or the targets of the objective) and "carry".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import cached_property

from mlmdsl.diagnostics import Span
from mlmdsl.frozen import frozen
from mlmdsl.graph.tensor import TensorType, Weight, symbols_of

Scalar = int | float | bool | str | None | tuple[int, ...]


@frozen
class Node:
    """One primitive operation. `attributes` are the operation's settings, sorted by name; `weights` are keys of
    `Graph.weights` in the operation's order; `scope` is the chain of block calls around it, outermost first, as
    (path, block name) pairs: (("blocks.attn", "Attention"),)."""

    path: str
    op: str
    inputs: tuple[str, ...]
    type: TensorType
    attributes: tuple[tuple[str, Scalar], ...] = ()
    weights: tuple[str, ...] = ()
    scope: tuple[tuple[str, str], ...] = ()
    variable: str = ""  # the user's name for this value where there is one: `h`
    span: Span | None = field(default=None, compare=False)

    @cached_property
    def attrs(self) -> Mapping[str, Scalar]:
        return dict(self.attributes)


@frozen
class Carried:
    variable: str
    entry: str  # path of the "carry" node
    initial: str  # path of the value before the first pass
    next: str  # path of the node, inside the region, that gives the next pass its value


@frozen
class Region:
    """`name` is "" for straight code (any number of such regions), else the repeat's name."""

    name: str
    count: int
    nodes: tuple[Node, ...]  # in the order of computation
    carried: tuple[Carried, ...] = ()

    @property
    def repeated(self) -> bool:
        return self.name != ""


@frozen
class Graph:
    """`output` is the model's (first) output, `loss` the node that ends the training graph."""

    model: str
    regions: tuple[Region, ...]
    weights: Mapping[str, Weight]  # by folded key, in the order of declaration
    inputs: tuple[str, ...]  # what the data loader feeds: ("tokens", "targets")
    output: str
    loss: str
    lengths: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())  # of symbols that are not seq_len

    def sizes(self, batch: int, seq_len: int) -> dict[str, int]:
        """What the symbols of shapes stand for."""
        found = {name for node in self.nodes.values() for dim in node.type.shape for name in symbols_of(dim)}
        return {"B": batch, **dict.fromkeys(sorted(found - {"B"}), seq_len), **self.lengths}

    @cached_property
    def nodes(self) -> Mapping[str, Node]:
        return {n.path: n for r in self.regions for n in r.nodes}

    @cached_property
    def region_of(self) -> Mapping[str, Region]:
        return {n.path: r for r in self.regions for n in r.nodes}

    def count_of(self, weight: Weight) -> int:
        """How many tensors this folded weight stands for."""
        return next((r.count for r in self.regions if r.name == weight.region and r.repeated), 1)

    @cached_property
    def parameters(self) -> int:
        """Exact number of values that gradients train; a tied weight counts once."""
        return sum(w.elements * self.count_of(w) for w in self.weights.values() if not w.balance)

    @property
    def layers(self) -> int:
        """Passes of all repeats: the unit in which pipeline stages are cut."""
        return sum(r.count for r in self.regions if r.repeated)
