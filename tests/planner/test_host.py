"""Ranks that share cores, and what the runtime does besides kernels."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.compile import compile_spec
from mlmdsl.planner import host, zero_bubble
from mlmdsl.planner.host import idle_share
from tests.planner.small import on_cpu


def seconds(*plan: str, cores: str = "1", launch: str = "1 us", ranks: int = 4) -> float:
    """Of a step of the best plan."""
    found = compile_spec(on_cpu(*plan, cores=cores, launch=launch, ranks=ranks), path="/specs/x.mlm", until="plan").plan
    assert found is not None
    return found.predicted.step_time_s


# ---- sharing cores --------------------------------------------------------------------------------------------------


def filled(stages: int, cores: float, micro_batches: int) -> float:
    """Seconds of forward passes of one second each (all stages busy) through a pipeline whose stages share the processor: while
    j of them run, each is min(1 / cores, stages / j) times as fast."""
    left, done, now = [0.0] * stages, [0] * stages, 0.0
    while done[-1] < micro_batches:
        for stage in range(stages):
            ready = done[stage] < (micro_batches if stage == 0 else done[stage - 1])
            if left[stage] == 0.0 and ready:
                left[stage] = 1.0
        running = [stage for stage in range(stages) if left[stage] > 0.0]
        speed = min(1 / cores, stages / len(running))
        turn = min(left[stage] for stage in running)
        now += turn / speed
        for stage in running:
            left[stage] = 0.0 if left[stage] <= turn else left[stage] - turn
            done[stage] += left[stage] == 0.0
    return now


@given(st.integers(2, 8), st.sampled_from([0.125, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0]), st.integers(8, 20))
def test_filling_a_pipeline_on_shared_cores_is_simulated(stages: int, cores: float, micro_batches: int) -> None:
    share = idle_share(cores, stages, stages)
    assert filled(stages, cores, micro_batches) == pytest.approx(micro_batches + share * (stages - 1))


def test_the_fewer_cores_the_less_a_pipeline_waits() -> None:
    shares = [idle_share(cores, 4, 4) for cores in (0.25, 0.5, 0.75, 1.0)]
    assert all(less < more for less, more in pairwise(shares)) and shares[-1] == idle_share(None, 4, 4) == 1.0
    assert shares[0] == pytest.approx(0.0)
    assert idle_share(0.5, 1, 4) == 1.0  # each stage on a node of its own
    assert idle_share(0.25, 4, 4) < idle_share(0.25, 2, 4) < 1.0


def test_a_pipeline_waits_less_in_a_plan_too() -> None:
    """8 micro-batches through 3 stages, which share two cores: of 2 / 10 of the time a sixth is left."""
    pins = ("pin pipeline = 3", "pin schedule = gpipe", "pin micro_batch = 1", "pin recompute = none")
    alone, shared = (seconds(*pins, cores=cores, ranks=3) for cores in ("1", "0.6667"))
    assert 0.8 * alone < shared < 0.95 * alone


def test_the_parts_of_a_step_on_shared_cores_add_up_to_it() -> None:
    """Where the busiest rank has more to do than the mean one, and works faster while others wait."""
    pins = ("pin pipeline = 4", "pin schedule = gpipe", "pin micro_batch = 8", "pin recompute = none")
    found = compile_spec(on_cpu(*pins, cores="0.25"), path="/specs/x.mlm", until="plan").plan
    assert found is not None
    parts = found.predicted.breakdown_s
    assert min(parts.values()) >= 0 and sum(parts.values()) == pytest.approx(found.predicted.step_time_s)


# ---- the runtime ----------------------------------------------------------------------------------------------------


def test_passes_taken_apart_are_counted() -> None:
    assert zero_bubble.apart("zb_v", 4, 16) == 1.0
    assert 0 < zero_bubble.apart("dualpipe_v", 4, 64) < zero_bubble.apart("dualpipe_v", 4, 8) < 1


def test_the_runtime_s_work_is_counted_in_launches() -> None:
    """What a launch of 1 ms for 0 adds to a step of 1f1b on two ranks is that of its kernels and passes; taken apart they are
    more; ZeRO adds its units and hooks."""
    pins = ("pin pipeline = 2", "pin data = 2", "pin micro_batch = 1", "pin recompute = none")

    def launches(*more: str) -> float:
        slow, quick = (seconds(*pins, *more, launch=each, cores="1") for each in ("1.001 ms", "0.001 ms"))
        return (slow - quick) / 1e-3

    plain = launches("pin schedule = gpipe", "pin zero = 0")
    apart = launches("pin schedule = zb_v", "pin zero = 0")
    sharded = launches("pin schedule = gpipe", "pin zero = 1")
    m, stages = 4, 2
    assert plain > (m + stages - 1) * 2 * host.PASS
    assert apart > plain + m * host.apart_launches(0)
    units, weights = 3 + 1, 3 * 9 + 1  # of a stage: layers, and embedding or head around them
    assert sharded - plain > m * 2 * host.hook_launches(units, weights)
