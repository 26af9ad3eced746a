"""Layers on stages of unlike devices against every contiguous distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.planner.proportion import Speed, least_seconds, proportion
from mlmdsl.planner.stages import Chain, Part, balance, parts_of
from tests.planner.test_stages import chain, distributions

SECONDS = st.integers(1, 12).map(float)
ENDS = st.one_of(st.just(0.0), st.floats(0, 15, allow_nan=False))
Room = Callable[[int, Part], bool]


def seconds(part: Part, speed: Speed) -> float:
    layers = sum(count * each for count, each in zip(part.layers, speed.layers, strict=True))
    return layers + part.first * speed.first + part.last * speed.last


def slowest(made: Chain, stages: Sequence[int], speeds: Sequence[Speed]) -> float:
    return max(map(seconds, parts_of(made, stages), speeds))


def best(made: Chain, speeds: Sequence[Speed], room: Room) -> float | None:
    """Of all distributions for which there is room."""
    cuts = distributions(made.count, len(speeds))
    roomy = (cut for cut in cuts if all(room(stage, part) for stage, part in enumerate(parts_of(made, cut))))
    return min((slowest(made, cut, speeds) for cut in roomy), default=None)


def assert_best(made: Chain, speeds: Sequence[Speed], found: tuple[int, ...] | None, room: Room) -> None:
    least = best(made, speeds, room)
    if found is None:
        assert least is None
        return
    assert len(found) == len(speeds) and sum(found) == made.count and min(found) >= 1
    assert all(room(stage, part) for stage, part in enumerate(parts_of(made, found)))
    assert least is not None and slowest(made, found, speeds) <= least * (1 + 1e-8)


@st.composite
def devices(draw: st.DrawFn, kinds: int, stages: int) -> list[Speed]:
    """Stages on one to three sorts of devices."""
    each = st.builds(Speed, st.tuples(*[SECONDS] * kinds), ENDS, ENDS)
    sorts = draw(st.lists(each, min_size=1, max_size=3))
    return draw(st.lists(st.sampled_from(sorts), min_size=stages, max_size=stages))


@given(st.data(), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_alike_layers_on_unlike_devices_within_their_memory(data: st.DataObject, layers: int, stages: int) -> None:
    stages = min(stages, layers)
    speeds = data.draw(devices(1, stages))
    most = data.draw(st.none() | st.lists(st.integers(0, layers), min_size=stages, max_size=stages))
    made = chain((0, layers))
    limits = most or [layers] * stages
    assert_best(made, speeds, proportion(made, speeds, most), lambda stage, part: part.layers[0] <= limits[stage])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_layers_of_several_kinds_on_unlike_devices_within_their_memory(data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=4))
    made = chain(*layers, (2, 1))
    stages = data.draw(st.integers(1, min(5, made.count)))
    speeds = data.draw(devices(3, stages))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=3, max_size=3))
    most = data.draw(st.lists(st.integers(2, 40), min_size=stages, max_size=stages))

    def room(stage: int, part: Part) -> bool:
        return sum(count * size for count, size in zip(part.layers, sizes, strict=True)) + 2 * part.first <= most[stage]

    assert_best(made, speeds, proportion(made, speeds, room=room), room)
    assert_best(made, speeds, proportion(made, speeds), lambda stage, part: True)


@given(st.data(), st.integers(1, 10), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_no_distribution_is_faster_than_layers_that_could_be_divided(data: st.DataObject, layers: int, stages: int) -> None:
    stages = min(stages, layers)
    made, speeds = chain((0, layers), (1, 2)), data.draw(devices(2, stages))
    found = best(made, speeds, lambda stage, part: True)
    assert found is not None and least_seconds(made, speeds) <= found * (1 + 1e-9)


@given(st.integers(2, 60), st.integers(1, 12), ENDS, ENDS)
@settings(deadline=None)
def test_on_alike_devices_the_slowest_stage_is_that_of_an_even_cut(layers: int, stages: int, first: float, last: float) -> None:
    made, stages = chain((0, layers)), min(stages, layers)
    speeds = [Speed((1.0,), first, last)] * stages
    found, even = proportion(made, speeds), balance(made, [1.0], first, last, stages)
    assert found is not None and slowest(made, found, speeds) == pytest.approx(slowest(made, even, speeds))


def test_the_faster_stage_gets_more_layers_and_the_one_with_less_memory_fewer() -> None:
    fast, slow = Speed((1.0,), 0.0, 0.0), Speed((3.0,), 0.0, 0.0)
    made = chain((0, 16))
    assert proportion(made, [fast, fast, slow, slow]) == (6, 6, 2, 2)
    assert proportion(made, [slow, fast]) == (4, 12)
    assert proportion(made, [fast, slow], [9, 16]) == (9, 7)
    assert proportion(made, [fast, fast, slow], [16, 4, 16]) == (9, 4, 3)
    assert proportion(made, [fast, slow], [9, 6]) is None


def test_of_stages_that_are_as_fast_the_last_takes_what_does_not_divide() -> None:
    alike = Speed((1.0,), 0.0, 0.0)
    assert proportion(chain((0, 7)), [alike] * 3) == (2, 2, 3)


def test_a_dear_layer_goes_to_the_stage_that_can_take_it() -> None:
    """A stage may end earlier than it could, so that the next one does not begin with what it is slow at."""
    made = chain((0, 2), (1, 1), (0, 1))
    fast, slow = Speed((1.0, 2.0), 0.0, 0.0), Speed((1.0, 50.0), 0.0, 0.0)
    assert proportion(made, [fast, slow, fast]) == (1, 1, 2)
