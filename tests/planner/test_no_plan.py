"""Where no plan fits: the code, where it points, and help that is true. Saved plans that cannot be read or used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import Diagnostic, PlanError
from mlmdsl.planner.plan import Plan, load_plan, verify_spec
from tests.planner.small import fits, legal, planned, problem, text_of


def refused(*plan: str, **changes: int | str) -> Diagnostic:
    with pytest.raises(PlanError) as caught:
        planned(*plan, **changes)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def pointed_at(diagnostic: Diagnostic, *plan: str, **changes: int | str) -> str:
    """The line of the text that the diagnostic marks."""
    assert diagnostic.span is not None
    text = text_of(*plan, **changes)  # pyright: ignore[reportArgumentType]
    return text.splitlines()[diagnostic.span.line - 1].strip()


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_nothing_fits_in_memory() -> None:
    found = refused(memory="930 MiB")
    assert (found.code, found.message) == ("MLM0601", "none of 1,711 plans for small fits the memory of 8 x gpu")
    assert pointed_at(found, memory="930 MiB") == "cluster here {"
    spec, graph = problem(memory="930 MiB")
    every = [(p.peak_bytes(c), p) for p, c in legal(spec, graph)]
    assert not any(fits(p, c) for p, c in legal(spec, graph))
    size, place = min(every, key=lambda item: item[0])
    over = (size - place.bench.setting.capacity_bytes) / 2**20
    assert f"the closest: data 8, ZeRO 3, micro-batch 1, recompute full needs {over:.0f} MiB more than the" in found.help


def test_pins_that_leave_no_memory_are_named() -> None:
    """One of them given up is enough, and what then fits is what a search without it finds."""
    pins = ("pin zero = 0", "pin recompute = none")
    found = refused(*pins, memory="1030 MiB")
    assert found.code == "MLM0601" and [label.text for label in found.secondary] == [
        "zero is pinned here",
        "recompute is pinned here",
    ]
    best = planned(pins[1], memory="1030 MiB")
    assert f"without the pin zero = 0 the best plan is {best.plan.described}" in found.help


def test_more_nodes_help() -> None:
    """Where state is what does not fit, and more ranks divide it: the fewest of twice, four times and so on as many."""

    def compiled(nodes: int) -> Plan:
        text = text_of(nodes=nodes, per_node=1, memory="2800 MiB")
        found = compile_spec(text, path="/specs/x.mlm", overrides=["small.d=2048"], until="plan").plan
        assert found is not None
        return found

    with pytest.raises(PlanError, match="MLM0601") as caught:
        compiled(1)
    with pytest.raises(PlanError, match="MLM0601"):
        compiled(2)
    best = compiled(4)
    assert f"on 4 devices the best plan is {best.plan.described}" in caught.value.diagnostics[0].help


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["require memory <= 10 MiB", "require step_time < 1 us", "forbid mfu < 0.99"])
def test_a_rule_that_no_plan_keeps(rule: str) -> None:
    found = refused(rule)
    assert (found.code, found.message) == ("MLM0602", f"no plan that fits keeps `{rule}`")
    assert pointed_at(found, rule) == rule
    assert f"without this rule the best plan is {planned().plan.described}" in found.help
    assert "breaks it, at" in found.help


def test_of_two_rules_both_are_shown() -> None:
    """The one that more plans fail at is blamed, the other named."""
    rules = ("forbid data == 8", "require step_time < 1 us")
    found = refused(*rules)
    assert pointed_at(found, *rules) == rules[1] and [label.text for label in found.secondary] == ["so does this"]
    assert f"without this rule the best plan is {planned(rules[0]).plan.described}" in found.help


# ---- pins and devices -----------------------------------------------------------------------------------------------


def test_pins_that_no_plan_has_together() -> None:
    pins = ("pin pipeline = 4", "pin micro_batch = 16", "pin schedule = 1f1b")
    found = refused(*pins)
    assert found.code == "MLM0603" and pointed_at(found, *pins) == pins[0]
    assert found.message == "no plan can have pipeline = 4 and micro_batch = 16 and schedule = 1f1b"
    assert "1f1b over 4 stages cannot run 1 micro-batch" in found.help
    best = planned(pins[0], pins[2])
    assert f"without the pin micro_batch = 16 the best plan is {best.plan.described}" in found.help


def test_devices_that_cannot_all_be_used() -> None:
    changes: dict[str, int | str] = {"nodes": 1, "per_node": 7, "batch": 3}
    found = refused(**changes)
    assert (found.code, found.message) == ("MLM0604", "no plan can use all 7 devices")
    assert pointed_at(found, **changes) == "cluster here {"
    assert "a batch of 3 cannot be split over data = 7" in found.help and "tensor = 7 cannot split heads = 8" in found.help
    assert [label.text for label in found.secondary] == ["3 sequences"]


def test_fewer_nodes_that_can_be_used() -> None:
    changes: dict[str, int | str] = {"nodes": 7, "per_node": 1, "batch": 3, "memory": "4 GiB"}
    best = planned(**changes | {"nodes": 6})
    assert f"on 6 devices the best plan is {best.plan.described}" in refused(**changes).help


# ---- saved plans ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned("prefer zero == 3")


def test_a_saved_plan_is_read_as_it_was(plan: Plan) -> None:
    assert load_plan(plan.to_json()) == plan
    before = json.loads(plan.to_json())  # of a version without the variable
    assert before["plan"].pop("order") == "pipeline_data_context_tensor" and load_plan(json.dumps(before)) == plan
    saved = plan.saved()
    assert saved.search.seconds == 0.0 and replace(saved, search=plan.search) == plan
    assert load_plan(saved.to_json()).to_json() == saved.to_json()


def unreadable(text: str) -> tuple[str, str]:
    with pytest.raises(PlanError) as caught:
        load_plan(text, "old.json")
    (found,) = caught.value.diagnostics
    return found.code, found.message


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"plan"', "null", "model m {}"])
def test_what_is_no_json_object(text: str) -> None:
    assert unreadable(text) == ("MLM0620", "old.json is not a saved plan: it is not a JSON object")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version(plan: Plan, version: object) -> None:
    text = json.dumps(json.loads(plan.to_json()) | {"version": version})
    assert unreadable(text) == ("MLM0621", f"old.json is a plan of version {version}")


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("plan", "schedule"), "zero_bubble", "plan.schedule"),
        (("memory",), 3, "memory"),
        (("plan", "stages"), None, "plan.stages"),
        (("surprise",), 1, "surprise"),
        (("plan", "surprise"), 1, "plan.surprise"),
        (("layout", 0, "nodes", 0, "surprise"), 1, "layout.0.nodes.0.surprise"),
    ],
)
def test_a_changed_plan_says_where(plan: Plan, path: tuple[str | int, ...], value: object, where: str) -> None:
    whole = json.loads(plan.to_json())
    inner = whole
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    code, message = unreadable(json.dumps(whole))
    assert code == "MLM0620" and message.startswith(f"old.json is not a saved plan: {where}: ")


def test_a_plan_belongs_to_its_text(plan: Plan) -> None:
    spec, _ = problem("prefer zero == 3")
    verify_spec(plan, spec)
    changed, _ = problem("prefer zero == 1")
    with pytest.raises(PlanError) as caught:
        verify_spec(plan, changed)
    assert caught.value.diagnostics[0].code == "MLM0630"
    with pytest.raises(PlanError, match="MLM0630"):
        compile_spec(text_of("prefer zero == 3") + "\n", path="/specs/x.mlm", plan=plan)
    again = compile_spec(text_of("prefer zero == 3"), path="/specs/x.mlm", plan=plan)
    assert again.plan is plan and again.program is not None
