"""What one build gathers: nodes in order, weights, regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar.spec import ModelSource
from mlmdsl.graph.graph import Carried, Node, Region
from mlmdsl.graph.tensor import Weight

MAX_STATEMENTS = 100_000  # that are run in all, with calls and inner repeats written out


@dataclass
class State:
    model: ModelSource
    diagnostics: Diagnostics
    nodes: list[Node] = field(default_factory=list[Node])  # of the region being built
    paths: dict[str, Node] = field(default_factory=dict[str, Node])
    weights: dict[str, Weight] = field(default_factory=dict[str, Weight])
    regions: list[Region] = field(default_factory=list[Region])
    inputs: list[str] = field(default_factory=list[str])
    first_nodes: list[Node] = field(default_factory=list[Node])  # inputs that the objective adds
    called: set[str] = field(default_factory=set[str])  # blocks whose bodies were run
    statements: int = 0  # that were run
    mistakes: int = 0  # that were met, those reported before among them

    @property
    def spent(self) -> bool:
        return self.statements > MAX_STATEMENTS

    def add(self, node: Node) -> None:
        assert node.path not in self.paths, node.path
        self.nodes.append(node)
        self.paths[node.path] = node

    def close_straight(self) -> None:
        """Ends the straight code so far as a region."""
        if self.nodes:
            self.regions.append(Region("", 1, tuple(self.nodes)))
            self.nodes = []

    def close_repeat(self, name: str, count: int, carried: Sequence[Carried]) -> None:
        self.regions.append(Region(name, count, tuple(self.nodes), tuple(carried)))
        self.nodes = []
