"""Why not another choice: the best plan with it, its parts beside the chosen one's, and the words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlmdsl.cli import main
from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import SpecError
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.plan import Plan
from mlmdsl.planner.search import explore
from mlmdsl.planner.why import Answer, answer, questions

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "specs" / "models" / "llama3_8b.mlm"


def planned(*, pins: tuple[str, ...] = (), overrides: tuple[str, ...] = ()) -> tuple[Setting, Plan]:
    done = compile_spec(LLAMA.read_text(), path=str(LLAMA), pins=pins, overrides=overrides, until="plan")
    assert done.spec and done.graph and done.plan
    return Setting(done.spec, done.graph), done.plan


def asked(setting: Setting, plan: Plan, text: str) -> Answer:
    return answer(setting, plan, questions([text])[0])


@pytest.fixture(scope="module")
def llama() -> tuple[Setting, Plan]:
    return planned(overrides=("cluster.nodes=4",))


@pytest.mark.parametrize("text", ["tensor=8", "pipeline=4", "micro_batch=4", "zero=0", "recompute=full", "data=4"])
def test_a_forced_choice_is_what_a_search_with_that_pin_finds(llama: tuple[Setting, Plan], text: str) -> None:
    setting, plan = llama
    found = asked(setting, plan, text)
    pins = questions([text])[0]
    best = explore(setting, replace(setting.spec.plan, pins=pins)).found
    if found.chosen or not best:
        assert found.chosen or found.verdict in ("memory", "rule", "illegal")
        return
    assert found.predicted is not None and found.predicted.step_time_s == best[0].times.total
    assert found.verdict in ("slower", "as_fast") and getattr(found.plan, pins[0].variable) == pins[0].value


def test_the_parts_add_up_to_both_steps(llama: tuple[Setting, Plan]) -> None:
    setting, plan = llama
    found = asked(setting, plan, "tensor=8")
    assert found.predicted is not None
    assert sum(part.chosen_s for part in found.parts) == pytest.approx(plan.predicted.step_time_s, rel=1e-3)
    assert sum(part.other_s for part in found.parts) == pytest.approx(found.predicted.step_time_s, rel=1e-3)
    assert "slower: " in found.sentence and "take" in found.sentence


def test_asked_of_the_choice_the_next_best_is_told(llama: tuple[Setting, Plan]) -> None:
    setting, plan = llama
    found = asked(setting, plan, f"tensor={plan.plan.tensor}")
    assert found.chosen and found.plan is not None and found.plan.tensor != plan.plan.tensor
    assert found.sentence.startswith("it is the choice; the next best, tensor = ")


def test_what_is_not_legal_says_the_rule(llama: tuple[Setting, Plan]) -> None:
    found = asked(*llama, "tensor=16")
    assert found.verdict == "illegal" and "tensor = 16 cannot split kv_heads = 8" in found.sentence
    assert found.plan is None


def test_what_does_not_fit_shows_the_closest_ledger(llama: tuple[Setting, Plan]) -> None:
    setting, plan = llama
    found = asked(setting, plan, "tensor=1,pipeline=1,zero=0,recompute=none,micro_batch=8")
    assert found.verdict == "memory" and found.memory is not None
    assert found.memory.total_bytes > setting.capacity_bytes and "more than the" in found.sentence


def test_a_pin_that_costs_is_named() -> None:
    setting, plan = planned(pins=("tensor=8",), overrides=("cluster.nodes=4",))
    found = asked(setting, plan, "tensor=1")
    assert found.verdict == "faster" and found.sentence.endswith("it is pinned away: tensor = 8")
    found = asked(setting, plan, "tensor=8")
    assert found.chosen and found.verdict == "faster" and found.sentence.endswith("it is pinned: tensor = 8")


def test_a_rule_that_leaves_nothing_is_named() -> None:
    text = LLAMA.read_text()
    assert "plan {" in text
    text = text.replace("plan {", "plan {\n  require tensor <= 2")
    done = compile_spec(text, path=str(LLAMA), until="plan")
    assert done.spec and done.graph and done.plan
    found = answer(Setting(done.spec, done.graph), done.plan, questions(["tensor=8"])[0])
    assert found.verdict in ("rule", "illegal") and "require tensor <= 2" in found.sentence


@pytest.mark.parametrize("text", ["tensors=4", "tensor", "zero=7", "schedule=fast"])
def test_a_question_that_cannot_be_read_is_a_diagnostic(text: str) -> None:
    with pytest.raises(SpecError):
        questions([text])


def test_lists_keep_their_commas() -> None:
    pins = questions(["stages=[16, 16],pipeline=2"])[0]
    assert [(pin.variable, pin.value) for pin in pins] == [("stages", (16, 16)), ("pipeline", 2)]


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(LLAMA), "--why", "tensor=8", "--why", "data=2"]) == 0
    printed = capsys.readouterr().out
    assert "why not tensor = 8?" in printed and max(map(len, printed.splitlines())) <= 80
    assert main(["plan", str(LLAMA), "--why", "tensor=8", "--json"]) == 0
    why = json.loads(capsys.readouterr().out)["why"]
    assert len(why) == 1 and why[0]["asked"] == "tensor = 8"
    assert set(why[0]) == {"asked", "chosen", "verdict", "sentence", "plan", "predicted", "parts", "memory"}
