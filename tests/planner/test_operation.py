"""Failures, checkpoints, money and energy; the cheapest cluster in time; what if one thing were different."""

from __future__ import annotations

import json
import random
from math import sqrt
from pathlib import Path

import pytest

from mlmdsl.cli import main
from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import UsageError
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.accuracy import accuracy
from mlmdsl.planner.operation import bill, goodput, kept_share
from mlmdsl.planner.plan import Plan
from mlmdsl.planner.whatif import what_if
from mlmdsl.planner.within import days_of, sized, within

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "specs" / "models" / "llama3_8b.mlm"


def planned(*overrides: str, pins: tuple[str, ...] = ()) -> tuple[Spec, Graph, Plan]:
    done = compile_spec(LLAMA.read_text(), path=str(LLAMA), overrides=overrides, pins=pins, until="plan")
    assert done.spec and done.graph and done.plan
    return done.spec, done.graph, done.plan


# ---- failures -------------------------------------------------------------------------------------------------------


def test_the_default_is_what_was_seen_at_scale() -> None:
    """16,384 devices of the default fail 419 times in 54 days (arXiv:2407.21783)."""
    spec, _, _ = planned()
    assert 16_384 * 54 * 86_400 / spec.cluster.operation.mtbf_seconds == pytest.approx(419)


def simulated(interval: float, save: float, restart: float, failure: float, intervals: int = 20_000) -> float:
    """Useful share of a run that is played out, failure by failure."""
    dice, clock = random.Random(7), 0.0
    for _ in range(intervals):
        while (left := dice.expovariate(1 / failure)) < interval + save:
            clock += left
            while (again := dice.expovariate(1 / failure)) < restart:
                clock += again
            clock += restart
        clock += interval + save
    return intervals * interval / clock


@pytest.mark.parametrize(("interval", "save", "restart", "failure"), [(600, 30, 600, 11_000), (300, 60, 300, 2_000)])
def test_the_share_is_that_of_a_simulated_run(interval: float, save: float, restart: float, failure: float) -> None:
    assert kept_share(interval, save, restart, failure) == pytest.approx(simulated(interval, save, restart, failure), rel=0.02)


@pytest.mark.parametrize(("save", "failure"), [(5.0, 3_600.0), (60.0, 11_000.0), (300.0, 86_400.0)])
def test_no_other_interval_keeps_much_more(save: float, failure: float) -> None:
    best = kept_share(sqrt(2 * save * failure) - save, save, 600.0, failure)
    assert all(kept_share(best_s, save, 600.0, failure) <= best * 1.001 for best_s in range(10, 40_000, 10))


def test_more_devices_fail_more_often_and_days_grow_by_the_share() -> None:
    spec, _, plan = planned("cluster.nodes=4")
    often, _, _ = planned("cluster.nodes=4", "cluster.mtbf=500 hours")
    few, many = goodput(spec, plan), goodput(often, plan)
    assert many.share < few.share < 1 and many.interval_s < few.interval_s
    assert many.train_days == pytest.approx(plan.predicted.train_days / many.share)
    assert few.checkpoint_bytes == 12 * plan.model.parameters
    faster, _, _ = planned("cluster.nodes=4", "cluster.storage=10 GB/s per node")
    assert goodput(faster, plan).checkpoint_s == pytest.approx(few.checkpoint_s / 10)


# ---- bills ----------------------------------------------------------------------------------------------------------


def test_a_bill_adds_up() -> None:
    settings = ("cluster.price=2 USD/gpu/hour", "cluster.energy=0.1 USD/kWh", "cluster.pue=1.5", "cluster.carbon=100 g/kWh")
    spec, _, _ = planned("cluster.nodes=2", *settings)
    found = bill(spec, 10.0)
    watts = spec.cluster.world_size * spec.cluster.pools[0].device.power_watts
    assert found.energy_kwh == pytest.approx(240 * watts * 1.5 / 1000)
    assert found.usd == pytest.approx(240 * 16 * 2 + 0.1 * found.energy_kwh)
    assert found.co2_kg == pytest.approx(0.1 * found.energy_kwh) and not found.default_price


# ---- in time --------------------------------------------------------------------------------------------------------


def test_the_cheapest_cluster_is_in_time_and_none_that_was_seen_is_cheaper() -> None:
    spec, graph, _ = planned()
    asked = 2.0 * (sized(spec, graph, 8) or pytest.fail("eight nodes fit")).bill.days
    found = within(spec, graph, asked)
    assert found.cheapest is not None and found.cheapest.bill.days <= asked
    meeting = [size for size in found.sizes if size.bill.days <= asked]
    assert found.cheapest.bill.usd == min(size.bill.usd or 0.0 for size in meeting)
    assert found.cheapest.nodes <= 8


def test_a_cluster_without_links_for_more_says_so() -> None:
    path = ROOT / "specs" / "quickstart.mlm"
    done = compile_spec(path.read_text(), path=str(path), until="plan")
    assert done.spec and done.graph
    found = within(done.spec, done.graph, 1e-9)
    assert found.cheapest is None and "no `inter` link" in found.reason


@pytest.mark.parametrize(("text", "days"), [("30 days", 30.0), ("36 hours", 1.5), ("90 min", 0.0625)])
def test_times_are_read_with_their_units(text: str, days: float) -> None:
    assert days_of(text) == pytest.approx(days)


@pytest.mark.parametrize("text", ["30", "soon", "30 GiB", "-1 days", "0 days", "nan days"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        days_of(text)


# ---- what if --------------------------------------------------------------------------------------------------------


def test_better_machines_are_no_slower_and_constraints_cost_something() -> None:
    spec, graph, plan = planned("cluster.nodes=4", pins=("tensor=8",))
    found = {each.change: each for each in what_if(spec, graph)}
    step = plan.predicted.step_time_s
    for change in ("nvlink twice as fast", "infiniband twice as fast", "twice the memory", "without pin tensor = 8"):
        assert (found[change].step_time_s or 0.0) <= step * 1.0001, change
    assert (found["without pin tensor = 8"].step_time_s or step) < step
    assert (found["twice the nodes"].tokens_per_s or 0.0) > plan.batch * plan.seq_len / step


# ---- the band, and the command --------------------------------------------------------------------------------------


def test_the_band_holds_the_step_and_says_what_was_measured() -> None:
    spec, _, plan = planned()
    found = accuracy(spec, plan)
    assert found.low_s < found.high_s < 1.5 * plan.predicted.step_time_s
    assert found.runs > 100 and found.measured and found.origin


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(LLAMA), "--set", "cluster.nodes=2", "--what-if", "--within", "100000 days"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("error   ", "goodput ", "what if ", "within 100,000.0 days", "t CO2"))
    assert max(map(len, printed.splitlines())) <= 80
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) >= {"accuracy", "goodput", "what_if", "within"}
    assert told["within"]["cheapest"]["bill"]["co2_kg"] > 0
