"""Cuts into stages against every contiguous distribution of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.planner.stages import Chain, balance, chain_of, cut_of, parts_of
from tests.planner.models import GPT, graph_of

SECONDS = st.integers(1, 12).map(float)
ENDS = st.one_of(st.just(0.0), st.integers(0, 60).map(lambda n: n / 4), st.floats(0, 15, allow_nan=False))


def chain(*layers: tuple[int, int]) -> Chain:
    """Kinds by index; the beginning is region 0, the end region 100."""
    kinds = max(kind for kind, _ in layers) + 1
    return Chain((0,), (100,), tuple((1 + kind,) for kind in range(kinds)), layers)


def distributions(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut: a layer at least in every stage."""
    for cuts in combinations(range(1, layers), stages - 1):
        edges = (0, *cuts, layers)
        yield tuple(b - a for a, b in pairwise(edges))


def slowest(costs: Sequence[float], stages: Sequence[int]) -> float:
    found, start = 0.0, 0
    for size in stages:
        found = max(found, sum(costs[start : start + size]))
        start += size
    return found


def costs_of(layers: Sequence[tuple[int, int]], seconds: Sequence[float], first: float, last: float) -> list[float]:
    costs = [seconds[kind] for kind, count in layers for _ in range(count)]
    costs[0] += first
    costs[-1] += last
    return costs


def assert_best(layers: Sequence[tuple[int, int]], seconds: Sequence[float], first: float, last: float, stages: int) -> None:
    made = chain(*layers)
    found = balance(made, seconds, first, last, stages)
    costs = costs_of(layers, seconds, first, last)
    assert len(found) == stages and sum(found) == len(costs) and min(found) >= 1
    best = min(slowest(costs, other) for other in distributions(len(costs), stages))
    assert slowest(costs, found) <= best * (1 + 1e-8)


@given(st.integers(1, 14), st.integers(1, 6), SECONDS, ENDS, ENDS)
@settings(max_examples=300, deadline=None)
def test_the_slowest_stage_of_layers_that_cost_alike(layers: int, stages: int, each: float, first: float, last: float) -> None:
    assert_best([(0, layers)], [each], first * each, last * each, min(stages, layers))


@given(st.integers(3, 130), st.integers(3, 64), SECONDS, ENDS, ENDS)
@settings(max_examples=300, deadline=None)
def test_no_stage_between_has_fewer_layers_than_if_all_were_alike(
    layers: int, stages: int, each: float, first: float, last: float
) -> None:
    """Which bounds on memory count on (`loads.interior_of`)."""
    made, stages = chain((0, layers)), min(stages, layers)
    even, found = (balance(made, [each], *ends, stages) for ends in ((0.0, 0.0), (first * each, last * each)))
    assert all(size >= least for size, least in zip(found[1:-1], even[1:-1], strict=True))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_the_slowest_stage_of_layers_of_several_kinds(data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=4))
    layers = [*layers, (1, 1)]
    count = sum(number for _, number in layers)
    seconds = data.draw(st.lists(SECONDS, min_size=3, max_size=3))
    stages = data.draw(st.integers(1, min(6, count)))
    assert_best(layers, seconds, data.draw(ENDS), data.draw(ENDS), stages)


@given(st.integers(1, 200), st.integers(1, 32))
@settings(deadline=None)
def test_equal_stages_where_the_ends_cost_nothing(layers: int, stages: int) -> None:
    """Sizes differ by one at most, and the larger ones come last, where fewer micro-batches are held."""
    stages = min(stages, layers)
    found = balance(chain((0, layers)), [2.5], 0.0, 0.0, stages)
    assert max(found) - min(found) <= 1
    assert list(found) == sorted(found)


@given(st.integers(2, 11), st.integers(2, 5), ENDS, ENDS)
@settings(max_examples=200, deadline=None)
def test_of_the_best_the_most_even(layers: int, stages: int, first: float, last: float) -> None:
    """Least sum of squares among those that are as fast."""
    stages = min(stages, layers)
    found = balance(chain((0, layers)), [1.0], first, last, stages)
    costs = costs_of([(0, layers)], [1.0], first, last)
    fast = [d for d in distributions(layers, stages) if slowest(costs, d) <= slowest(costs, found) * (1 + 1e-8)]
    assert sum(n * n for n in found) == min(sum(n * n for n in d) for d in fast)


def test_large_ends_make_room() -> None:
    assert balance(chain((0, 8)), [1.0], 3.0, 0.0, 2) == (3, 5)
    assert balance(chain((0, 8)), [1.0], 0.0, 3.0, 2) == (5, 3)
    assert balance(chain((0, 4)), [1.0], 50.0, 50.0, 4) == (1, 1, 1, 1)
    assert balance(chain((0, 126)), [1.0], 0.2, 1.0, 16) == (7, *[8] * 14, 7)


def test_a_model_without_layers_is_one_stage() -> None:
    assert balance(Chain((0,), (), (), ()), (), 1.0, 1.0, 1) == (0,)


# ---- chains and parts -----------------------------------------------------------------------------------------------

TWO = """
block Block(x: [B, S, d]) { output x + MLP(RMSNorm(x)) }
model two {
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 64, dim = 32)
  repeat 3 as lower { h = Block(h) }
  h = RMSNorm(h)
  repeat 2 as upper { h = Block(h) }
  output Linear(RMSNorm(h), out = 64, bias = false)
}
"""


def test_the_chain_of_one_stack() -> None:
    made = chain_of(graph_of(GPT))
    assert (made.first, made.last, made.kinds, made.layers, made.count) == ((0,), (2,), ((1,),), ((0, 24),), 24)


def test_straight_code_between_stacks_goes_with_the_layer_before_it() -> None:
    graph = graph_of(TWO)
    made = chain_of(graph)
    names = [region.name for region in graph.regions]
    assert names == ["", "lower", "", "upper", ""] and made.count == 5
    assert made.kinds == ((1,), (1, 2), (3,)) and made.layers == ((0, 2), (1, 1), (2, 2))


def test_a_model_without_a_repeat_is_its_beginning() -> None:
    text = "model m {\n  input t: int[B, S]\n  output Linear(Embedding(t, vocab = 8, dim = 4), out = 8)\n}\n"
    made = chain_of(graph_of(text))
    assert made.layers == () and made.first == (0,) and made.last == () and made.count == 0


@given(st.integers(1, 4).flatmap(lambda n: st.permutations([n, 1, 2])))
def test_parts_hold_every_layer_once(sizes: list[int]) -> None:
    made = chain((0, sum(sizes) - 2), (1, 2))
    parts = parts_of(made, sizes)
    assert [sum(part.layers) for part in parts] == list(sizes)
    assert [sum(part.layers[kind] for part in parts) for kind in (0, 1)] == [sum(sizes) - 2, 2]
    assert [part.first for part in parts] == [True, False, False] and [part.last for part in parts] == [False, False, True]
    assert sum(made.regions(parts[0]).count((0, 1)) for _ in (0,)) == 1


def test_alike_parts_are_one_object_and_stand_in_runs() -> None:
    made = chain((0, 12))
    cut = cut_of(made, (2, 3, 3, 3, 1), tuple((stage,) for stage in range(5)))
    assert cut.parts[1] is cut.parts[2] is cut.parts[3]
    assert [(part.layers, count) for part, count in cut.runs] == [((2,), 1), ((3,), 3), ((1,), 1)]
    assert [rank for rank, _ in cut.ranks] == [0, 1, 4]  # of alike ranks the first


def test_ranks_of_an_interleaved_cut_hold_every_pipeline_th_part() -> None:
    cut = cut_of(chain((0, 8)), (1, 1, 1, 1, 1, 1, 1, 1), tuple((rank, rank + 4) for rank in range(4)))
    assert [rank for rank, _ in cut.ranks] == [0, 1, 3]
    first, middle, last = (held for _, held in cut.ranks)
    assert first == (cut.parts[0], cut.parts[4]) and middle == (cut.parts[1], cut.parts[5]) and last[1].last


@pytest.mark.parametrize("stages", [(3, 3), (1, 2, 3, 1)])
def test_a_distribution_has_to_add_up(stages: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        parts_of(chain((0, 5)), stages)
