"""The closed forms of schedules against the simulation, and the simulation's order against torch's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from mlmdsl.planner import schedule as schedules
from mlmdsl.planner import zero_bubble
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.schedule import Runs, cannot_run, executable, in_flight, pipeline_bound, pipeline_seconds, rounds
from mlmdsl.runtime.config import Parallel
from tests.planner.simulation import Action, actions, simulate

Case = tuple[Schedule, int, int, int]  # schedule, pipeline, interleave, micro-batches


def cases(pipelines: Sequence[int] = (1, 2, 3, 4, 5, 8), most: int = 17) -> Iterator[Case]:
    for pipeline, micro_batches in product(pipelines, range(1, most)):
        choices: list[tuple[Schedule, int]] = [("gpipe", 1), ("1f1b", 1), *(("interleaved_1f1b", v) for v in (2, 3, 4))]
        for schedule, interleave in choices:
            if executable(schedule, pipeline, micro_batches) and not (pipeline == 1 and interleave > 1):
                yield schedule, pipeline, interleave, micro_batches


CASES = tuple(cases())
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved_1f1b")


def of(schedule: Schedule) -> list[Case]:
    return [case for case in CASES if case[0] == schedule]


def closed(schedule: Schedule, forward: Sequence[float], backward: Sequence[float], m: int, p: int, v: int) -> float:
    return pipeline_seconds(schedule, each_alone(forward, backward), m, p, v)


def each_alone(forward: Sequence[float], backward: Sequence[float], weight: Sequence[float] = ()) -> Runs:
    return tuple((1, f, b, w) for f, b, w in zip(forward, backward, weight or [0.0] * len(forward), strict=True))


# ---- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pass_runs_once(schedule: Schedule) -> None:
    for (_, p, v, m), rank in ((case, rank) for case in of(schedule) for rank in range(case[1])):
        found = actions(schedule, p, v, m, rank)
        expected = {Action(back, stage, i) for back, stage, i in product((False, True), range(rank, p * v, p), range(m))}
        assert len(found) == len(expected) and set(found) == expected


def torch_order(schedule: Schedule, p: int, v: int, m: int, rank: int) -> list[Action]:
    """What torch's schedule computes, without a process group: the methods ask for these attributes alone."""
    if schedule == "1f1b":
        fake = SimpleNamespace(_num_stages=p, _n_microbatches=m)
        order = torch_schedules.Schedule1F1B._get_pipeline_order(fake)[rank]
    else:
        turns = max(1, m // p)
        fake = SimpleNamespace(n_local_stages=v, microbatches_per_round=m // turns, pp_group_size=p, _n_microbatches=m)
        order = torch_schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations(fake, rank)
    passes = {torch_schedules.FORWARD: False, torch_schedules.FULL_BACKWARD: True}
    return [
        Action(passes[action.computation_type], action.stage_index, action.microbatch_index)
        for action in order
        if action is not None and action.computation_type in passes
    ]


def test_the_interleaved_order_is_torchs() -> None:
    for (schedule, p, v, m), rank in ((case, rank) for case in of("interleaved_1f1b") for rank in range(case[1])):
        assert actions(schedule, p, v, m, rank) == torch_order(schedule, p, v, m, rank)


def test_the_order_of_1f1b_is_torchs() -> None:
    """torch's drawing of the order misnumbers the last rank's forward passes; what is forward and what is backward it has
    right."""
    for (schedule, p, v, m), rank in ((case, rank) for case in of("1f1b") for rank in range(case[1])):
        mine, theirs = actions(schedule, p, v, m, rank), torch_order(schedule, p, v, m, rank)
        assert [action.backward for action in mine] == [action.backward for action in theirs]
        assert [a.micro_batch for a in mine if a.backward] == [a.micro_batch for a in theirs if a.backward]


def test_torch_refuses_what_is_not_executable() -> None:
    """The two conditions as torch states them."""
    for p, m in product(range(1, 9), range(1, 33)):
        assert executable("interleaved_1f1b", p, m) == (m % max(1, m // p) == 0)
        assert executable("1f1b", p, m) == (m >= p or p == 1)
        assert executable("gpipe", p, m)
    assert cannot_run("1f1b", 4, 1) == "1f1b over 4 stages cannot run 1 micro-batch"
    assert cannot_run("1f1b", 4, 3) == "1f1b over 4 stages cannot run 3 micro-batches"
    assert (rounds(4, 12), rounds(4, 3), rounds(4, 10)) == (3, 1, 2)


# ---- micro-batches held ---------------------------------------------------------------------------------------------


def most_held(found: Sequence[Action], stages: Sequence[int]) -> tuple[int, ...]:
    """Of each stage the most micro-batches between forward and backward pass."""
    held, most = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    for action in found:
        held[action.stage] += -1 if action.backward else 1
        most[action.stage] = max(most[action.stage], held[action.stage])
    return tuple(most[stage] for stage in stages)


def most_at_once(found: Sequence[Action]) -> int:
    held = most = 0
    for action in found:
        held += -1 if action.backward else 1
        most = max(most, held)
    return most


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_in_flight(schedule: Schedule) -> None:
    """The sum is the most that a rank holds at once; no virtual stage is said to hold more than it does."""
    for (_, p, v, m), rank in ((case, rank) for case in of(schedule) for rank in range(case[1])):
        found, counts = actions(schedule, p, v, m, rank), in_flight(schedule, p, v, m, rank)
        assert sum(counts) == most_at_once(found)
        most = most_held(found, range(rank, p * v, p))
        assert len(counts) == v and all(count <= limit for count, limit in zip(counts, most, strict=True))
        if v == 1:
            assert counts == most


# ---- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_equal_stages(schedule: Schedule, ratio: float) -> None:
    for _, p, v, m in of(schedule):
        forward, backward = [1.0] * (p * v), [ratio] * (p * v)
        found = closed(schedule, forward, backward, m, p, v)
        assert found == pytest.approx(simulate(schedule, forward, backward, m, p, v).seconds, rel=1e-12)
        if m % p == 0:  # the textbook's bubble: (p - 1) / v passes (arXiv:2104.04473, section 2.2)
            assert found == pytest.approx((m * v + p - 1) * (1 + ratio), rel=1e-12)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_stages_of_any_cost(data: st.DataObject) -> None:
    """Exact; of interleaved schedules up to four rounds, and within a tenth after them."""
    schedule, p, v, m = data.draw(st.sampled_from(CASES))
    seconds = st.lists(st.integers(1, 40).map(float), min_size=p * v, max_size=p * v)
    forward, backward = data.draw(seconds), data.draw(seconds)
    found, simulated = closed(schedule, forward, backward, m, p, v), simulate(schedule, forward, backward, m, p, v).seconds
    if schedule == "interleaved_1f1b" and rounds(p, m) > 4:
        assert found == pytest.approx(simulated, rel=0.1)
    else:
        assert found == pytest.approx(simulated, rel=1e-12)
    assert pipeline_bound(schedule, each_alone(forward, backward), m, p, v) <= found * (1 + 1e-12)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rounds_after_the_fourth_take_as_long_as_it(data: st.DataObject) -> None:
    """Or as the busiest rank. Rounds of p micro-batches and more, as torch makes them."""
    p, v, turns = data.draw(st.sampled_from([2, 3, 5])), data.draw(st.sampled_from([2, 3, 4])), data.draw(st.integers(5, 9))
    each = p + data.draw(st.integers(0, (p - 1) // turns))
    seconds = st.lists(st.integers(1, 40).map(float), min_size=p * v, max_size=p * v)
    forward, backward = data.draw(seconds), data.draw(seconds)
    less, most = (simulate("interleaved_1f1b", forward, backward, n * each, p, v).seconds for n in (3, 4))
    work = [f + b for f, b in zip(forward, backward, strict=True)]
    busiest = max(sum(work[:rank]) + each * turns * sum(work[rank::p]) for rank in range(p))
    found = closed("interleaved_1f1b", forward, backward, each * turns, p, v)
    assert found == pytest.approx(max(most + (turns - 4) * (most - less), busiest), rel=1e-12)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_many_rounds_of_interleaved_stages(data: st.DataObject) -> None:
    """Within a twentieth of the simulation where stages differ as balanced ones do: the fifth round may take less than the
    fourth, or more."""
    p, v, turns = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.sampled_from([2, 3, 4])), data.draw(st.integers(5, 24))
    layers = data.draw(st.lists(st.integers(2, 3).map(float), min_size=p * v, max_size=p * v))
    layers[0] += data.draw(st.floats(0, 0.5))
    layers[-1] += data.draw(st.floats(0, 1))
    backward = [2 * seconds for seconds in layers]
    found = closed("interleaved_1f1b", layers, backward, p * turns, p, v)
    simulated = simulate("interleaved_1f1b", layers, backward, p * turns, p, v).seconds
    assert found == pytest.approx(simulated, rel=0.05)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_alike_stages_may_be_given_together(data: st.DataObject) -> None:
    runs = data.draw(st.lists(st.tuples(st.integers(1, 4), *(st.integers(1, 9).map(float),) * 3), min_size=1, max_size=4))
    p = sum(count for count, *_ in runs)
    forward = [f for count, f, _, _ in runs for _ in range(count)]
    backward = [b for count, _, b, _ in runs for _ in range(count)]
    m = data.draw(st.integers(p, 3 * p))
    for schedule in ("gpipe", "1f1b"):
        assert pipeline_seconds(schedule, tuple(runs), m, p, 1) == pytest.approx(
            closed(schedule, forward, backward, m, p, 1), rel=1e-12
        )


def test_busy_ranks_and_their_bubble() -> None:
    timeline = simulate("1f1b", [1.0] * 4, [2.0] * 4, 8, 4, 1)
    assert timeline.seconds == (8 + 3) * 3.0
    assert [timeline.busy_seconds(rank) for rank in range(4)] == [24.0] * 4


# ---- stages in a V --------------------------------------------------------------------------------------------------

V_CASES = [(name, p, m) for name in schedules.V_SHAPED for p in (2, 3, 4, 5, 8) for m in range(1, 36) if executable(name, p, m)]


TORCH: dict[object, zero_bubble.Kind] = {
    torch_schedules.FORWARD: "F",
    torch_schedules.BACKWARD_INPUT: "I",
    torch_schedules.BACKWARD_WEIGHT: "W",
    torch_schedules.FULL_BACKWARD: "B",
}


def torch_v_order(schedule: str, p: int, m: int, rank: int) -> list[zero_bubble.Pass]:
    """Pairs of passes that torch would run at once one after the other, as it does run them."""
    fake = SimpleNamespace(pp_group_size=p, _n_microbatches=m, num_stages=2 * p)
    kind = torch_schedules.ScheduleZBVZeroBubble if schedule == "zb_v" else torch_schedules.ScheduleDualPipeV
    each = (a for a in kind._calculate_single_rank_operations(fake, rank) if a is not None)
    alone = [part for action in each for part in action.sub_actions or (action,)]
    return [zero_bubble.Pass(TORCH[a.computation_type], a.stage_index, a.microbatch_index) for a in alone]


def test_the_order_in_a_v_is_torchs() -> None:
    for (schedule, p, m), rank in ((case, rank) for case in V_CASES for rank in range(case[1])):
        assert list(zero_bubble.order(schedule, p, m, rank)) == torch_v_order(schedule, p, m, rank)


def test_stages_and_ranks_as_torch_and_the_runtime_have_them() -> None:
    for name, p in product(("interleaved_1f1b", *schedules.V_SHAPED), (2, 3, 4)):
        mine = {s: schedules.pipeline_rank(name, p, s) for s in range(2 * p)}
        style = "v" if name in schedules.V_SHAPED else "loop"
        assert mine == generate_stage_to_rank_mapping(p, 2 * p, style=style)
        parallel = Parallel(pipeline=p, interleave=2, schedule=name, stages=(1,) * (2 * p))
        for rank in range(p):
            assert schedules.stages_of(name, p, 2, rank) == parallel.stages_of(rank)
    assert schedules.links("zb_v", 2, 2) == ((False, True), (True, False), (False, True), (True, False))


@pytest.mark.parametrize("schedule", schedules.V_SHAPED)
def test_equal_stages_in_a_v(schedule: Schedule) -> None:
    """The paper's bubble: p - 1 passes of a stage, where forward, input and weight passes take alike."""
    for _, p, m in (case for case in V_CASES if case[0] == schedule and case[2] >= 2 * case[1] - 1):
        found = pipeline_seconds(schedule, each_alone([1.0] * 2 * p, [2.0] * 2 * p, [1.0] * 2 * p), m, p, 2)
        assert found == pytest.approx(6 * m + p - 1)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_v_of_any_cost(data: st.DataObject) -> None:
    """Not below the bound; like the whole schedule where it is long, within a twentieth."""
    schedule, p, m = data.draw(st.sampled_from(V_CASES))
    forward, inner, weight = (data.draw(st.lists(st.integers(1, 9).map(float), min_size=2 * p, max_size=2 * p)) for _ in "FIW")
    backward = [i + w for i, w in zip(inner, weight, strict=True)]
    runs = each_alone(forward, backward, weight)
    found = pipeline_seconds(schedule, runs, m, p, 2)
    assert pipeline_bound(schedule, runs, m, p, 2) <= found * (1 + 1e-12)
    assert found == pytest.approx(zero_bubble.seconds(schedule, forward, backward, weight, m, p), rel=0.05)


def test_held_in_a_v() -> None:
    """2 p of the halves: as much as 1f1b holds of whole stages; DualPipeV one more (arXiv:2412.19437, table 2)."""
    for (schedule, p, m), rank in ((case, rank) for case in V_CASES for rank in range(case[1])):
        counts = in_flight(schedule, p, 2, m, rank)
        if m >= 2 * p:
            assert sum(counts) == 2 * p + (schedule == "dualpipe_v")
        assert all(count <= m for count in counts)
