"""Exactness: elimination equals enumeration, on tables and on small graphs of operations, and what it finds is well typed."""

from __future__ import annotations

from itertools import product
from math import inf, isclose, prod

from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.graph.graph import Carried, Graph, Node, Region
from mlmdsl.graph.tensor import Dim, Init, TensorType, Weight
from mlmdsl.planner.choice import Problem
from mlmdsl.planner.elimination import Factor, eliminate
from mlmdsl.planner.sharding import Infeasible, Sharding, shard_graph
from mlmdsl.planner.verify_layout import verify_regions
from tests.planner.models import costs_of

SIZES = {"B": 2, "S": 512}


# ---- tables ---------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[Factor]]:
    domains = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    factors: list[Factor] = []
    for _ in range(draw(st.integers(0, 8))):
        variables = tuple(draw(st.lists(st.integers(0, len(domains) - 1), min_size=1, max_size=3, unique=True)))
        size = prod(domains[v] for v in variables)
        cost = st.one_of(st.integers(0, 9).map(float), st.just(inf))
        factors.append(Factor(variables, draw(st.lists(cost, min_size=size, max_size=size))))
    return domains, factors


def price(domains: list[int], factors: list[Factor], values: tuple[int, ...]) -> float:
    total = 0.0
    for factor in factors:
        offset = 0
        for v in factor.variables:
            offset = offset * domains[v] + values[v]
        total += factor.costs[offset]
    return total


@given(tables())
def test_elimination_equals_enumeration(case: tuple[list[int], list[Factor]]) -> None:
    domains, factors = case
    best = min(price(domains, factors, values) for values in product(*map(range, domains)))
    found = eliminate(domains, factors)
    if best == inf:
        assert found is None
    else:
        assert found is not None and found[0] == best == price(domains, factors, found[1])


def test_elimination_takes_the_lowest_of_equally_good_values() -> None:
    found = eliminate([2, 2], [Factor((0, 1), [1.0, 0.0, 0.0, 1.0])])
    assert found == (0.0, (1, 0))  # the last variable is given its value first


# ---- graphs ---------------------------------------------------------------------------------------------------------

FLOAT = TensorType("float", ("B", "S", 64))


class Maker:
    """Draws a small graph: a stretch of straight code, a repeat with one carried value, straight code again, the loss."""

    def __init__(self, draw: st.DrawFn):
        self.draw = draw
        self.weights: dict[str, Weight] = {}
        self.types: dict[str, TensorType] = {}

    def weight(self, region: str, name: str, shape: tuple[int, ...]) -> str:
        made = Weight(region, name, shape, Init("normal", 0.02))
        self.weights[made.key] = made
        return made.key

    def nodes(self, region: str, start: str, count: int) -> list[Node]:
        """`count` operations on [B, S, 64], each on values made before."""
        values, made = [start], []
        for i in range(count):
            path = f"{region or 'straight'}.{i}" if region else f"{start}.{i}"
            op = self.draw(st.sampled_from(["linear", "add", "gelu", "rms_norm", "bias", "scale"]))
            inputs = tuple(self.draw(st.sampled_from(values)) for _ in range(2 if op == "add" else 1))
            made.append(self.node(region, path, op, inputs))
            values.append(path)
        return made

    def node(self, region: str, path: str, op: str, inputs: tuple[str, ...]) -> Node:
        shapes = {"linear": (64, 64), "rms_norm": (64,), "bias": (64,)}
        attributes = {"linear": (("out", 64), ("std", 0.02)), "gelu": (("tanh", False),), "scale": (("factor", 0.5),)}
        attributes["rms_norm"] = (("eps", 1e-5),)
        keys = [k for k, w in self.weights.items() if w.region == region and w.shape == shapes.get(op)]
        if op not in shapes:
            weights: tuple[str, ...] = ()
        elif keys and self.draw(st.booleans()):
            weights = (self.draw(st.sampled_from(keys)),)  # tied to an earlier one
        else:
            weights = (self.weight(region, f"{path}.weight".removeprefix(f"{region}."), shapes[op]),)
        return Node(path, op, inputs, FLOAT, attributes.get(op, ()), weights)

    def graph(self) -> Graph:
        tokens = TensorType("int", ("B", "S"))
        vocab: Dim = self.draw(st.sampled_from([64, 63]))
        table = self.weight("", "tok.weight", (int(vocab), 64))
        embedding = Node("tok", "embedding", ("tokens",), FLOAT, (("dim", 64), ("std", 0.02), ("vocab", vocab)), (table,))
        inputs = [Node("tokens", "input", (), tokens), Node("targets", "input", (), tokens)]
        first = [*inputs, embedding, *self.nodes("", "tok", self.draw(st.integers(0, 1)))]
        entry = Node("blocks.h", "carry", (), FLOAT)
        body = [entry, *self.nodes("blocks", "blocks.h", self.draw(st.integers(1, 3)))]
        carried = Carried("h", "blocks.h", first[-1].path, body[-1].path)
        logits = TensorType("float", ("B", "S", vocab))
        head = Node("head", "linear", (body[-1].path,), logits, (("out", vocab), ("std", 0.02)), (table,))
        loss = Node("loss", "cross_entropy", ("head", "targets"), TensorType("fp32", ()))
        regions = (
            Region("", 1, tuple(first)),
            Region("blocks", self.draw(st.integers(1, 3)), tuple(body), (carried,)),
            Region("", 1, (head, loss)),
        )
        return Graph("random", regions, self.weights, ("tokens", "targets"), "head", "loss")


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    return Maker(draw).graph()


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([2, 4]), st.booleans())
def test_the_pass_equals_brute_force_on_random_graphs(graph: Graph, tensor: int, sequence: bool) -> None:
    problem = Problem(graph, tensor, sequence, costs_of(tensor, SIZES))
    chosen = problem.solve()
    best = inf
    if prod(map(len, problem.domains)) > 40_000:
        return
    for strategies in product(*problem.domains):
        best = min(best, problem.seconds(dict(zip(graph.nodes, strategies, strict=True))))
    if chosen is None:
        assert best == inf
    else:
        assert isclose(problem.seconds(chosen), best, rel_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([2, 4]), st.booleans())
def test_what_the_pass_finds_is_well_typed(graph: Graph, tensor: int, sequence: bool) -> None:
    found = shard_graph(graph, tensor, sequence, costs_of(tensor, SIZES))
    if isinstance(found, Infeasible):
        assert found.reason == "layout"
        return
    assert isinstance(found, Sharding)
    verify_regions(graph, found.layouts(SIZES, 2), tensor, sequence, SIZES, 2)
