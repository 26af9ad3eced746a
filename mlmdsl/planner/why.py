"""`mlmdsl plan --why tensor=4`: the best plan with that choice forced, beside the one that was chosen.

A forced value takes the place of a pin on the same variable; every other constraint of the text still holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mlmdsl.diagnostics import Diagnostics, Span
from mlmdsl.frozen import frozen
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.constraints import read_pins
from mlmdsl.grammar.overrides import Overrides
from mlmdsl.grammar.spec import Pin, PlanConstraints, PlanValue, Rule
from mlmdsl.planner import explain
from mlmdsl.planner.assemble import variables
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.check import check
from mlmdsl.planner.compare import Costed, Part, costed, costed_plan, difference, parts_of, verdict
from mlmdsl.planner.outcome import Found, Outcome
from mlmdsl.planner.plan import Plan, PlanVariables, Predicted, StageMemory
from mlmdsl.planner.search import explore

Verdict = Literal["slower", "as_fast", "faster", "memory", "rule", "illegal"]


@frozen
class Answer:
    """asked: as it was asked; chosen: it is the plan's own choice, so that the rest is about the best plan without it;
    verdict: `memory`, `rule`, `illegal` where no plan with it can be taken, then `plan` is the closest one, if there is any;
    parts: seconds of the plan's step and of this one's; memory: the ledger of its fullest rank."""

    asked: str
    chosen: bool
    verdict: Verdict
    sentence: str
    plan: PlanVariables | None = None
    predicted: Predicted | None = None
    parts: tuple[Part, ...] = ()
    memory: StageMemory | None = None


Question = tuple[Pin, ...]


def questions(texts: Sequence[str]) -> list[Question]:
    """Each text is one question: `tensor=4`, or `tensor=4,pipeline=2` for both at once. Raises SpecError."""
    found = Diagnostics()
    asked: list[Question] = []
    for text in texts:
        written = re.split(r",(?![^\[]*\])", text)  # not inside the list of `stages=[6, 6]`
        asked.append(read_pins(Overrides((), found).pins(written, "--why"), lambda span: span.file, found))
    found.raise_if_errors()
    return asked


def answer(setting: Setting, chosen: Plan, asked: Question) -> Answer:
    text = " and ".join(explain.pinned(pin) for pin in asked)
    if all(getattr(chosen.plan, pin.variable) == pin.value for pin in asked):
        return _of_the_choice(setting, chosen, asked, text)
    limits = _forced(setting.spec.plan, asked)
    found = Diagnostics()
    check(replace(setting.spec, plan=limits), setting.graph, found)
    if found.errors:
        first = next(item for item in found.items if item.severity == "error")
        return Answer(asked=text, chosen=False, verdict="illegal", sentence=_sentence(first.message, first.help))
    outcome = explore(setting, limits)
    if not outcome.found:
        return _not_possible(setting, chosen, outcome, text)
    return _possible(setting, chosen, outcome.found[0], outcome, text)


def _forced(limits: PlanConstraints, asked: Question) -> PlanConstraints:
    names = {pin.variable for pin in asked}
    return replace(limits, pins=(*(pin for pin in limits.pins if pin.variable not in names), *asked))


def _possible(setting: Setting, chosen: Plan, best: Found, outcome: Outcome, text: str) -> Answer:
    plan, other = costed_plan(chosen), costed(best.place, best.candidate)
    kind = verdict(plan, other)
    sentence = difference(plan, other)
    if kind == "faster":
        sentence = _sentence(sentence, _excluded(setting, chosen, best, outcome))
    return _answer(text, False, kind, sentence, plan, other)


def _excluded(setting: Setting, chosen: Plan, best: Found, outcome: Outcome) -> str:
    """Why a faster plan is not the choice."""
    values = best.place.bench.setting.spec.plan.pins
    pins = [explain.pinned(pin) for pin in values if pin.value != getattr(variables(best.candidate), pin.variable)]
    kept = {rule.text for rule in chosen.soft if rule.kept}
    wishes = [" ".join(wish.rule.text.split()) for bit, wish in enumerate(outcome.wishes) if best.broken >> bit & 1]
    broken = [text for text in wishes if text in kept]
    if pins:
        return f"it is pinned away: {' and '.join(pins)}"
    if broken:
        return f"it does not keep the wish {' and '.join(f'`{text}`' for text in broken)}"
    return "the plan is to take the least memory" if setting.spec.plan.minimize == "memory" else ""


def _answer(text: str, is_choice: bool, kind: Verdict, sentence: str, plan: Costed, other: Costed) -> Answer:
    return Answer(text, is_choice, kind, sentence, other.plan, other.predicted, parts_of(plan, other), other.fullest)


# ---- asked of the choice itself -------------------------------------------------------------------------------------


def _of_the_choice(setting: Setting, chosen: Plan, asked: Question, text: str) -> Answer:
    """The best plan that is not so."""
    names = {pin.variable for pin in asked}
    limits = setting.spec.plan
    free = tuple(pin for pin in limits.pins if pin.variable not in names)
    outcome = explore(setting, replace(limits, pins=free, rules=(*limits.rules, _forbidden(asked))))
    if not outcome.found:
        sentence = f"it is the choice, and no plan that fits has another {' and '.join(sorted(names))}"
        return Answer(asked=text, chosen=True, verdict="slower", sentence=sentence)
    best = outcome.found[0]
    plan, other = costed_plan(chosen), costed(best.place, best.candidate)
    kind, others = verdict(plan, other), _others(other.plan, names)
    sentence = f"it is the choice; the next best, {others}, is {difference(plan, other)}"
    if kind == "as_fast":
        sentence = f"it is the choice; the next best, {others}, {difference(plan, other)}"
    if kind == "faster":
        pins = [explain.pinned(pin) for pin in limits.pins if pin.variable in names]
        sentence = _sentence(
            sentence, f"it is pinned: {' and '.join(pins)}" if pins else _excluded(setting, chosen, best, outcome)
        )
    return _answer(text, True, kind, sentence, plan, other)


def _others(plan: PlanVariables, names: set[str]) -> str:
    return " and ".join(explain.assigned(name, getattr(plan, name)) for name in sorted(names))


def _forbidden(asked: Question) -> Rule:
    """`forbid tensor == 4 and pipeline == 2`."""
    here = Span("--why", 1, 1, 1, 1)
    terms = [s.Binary("==", s.Name(pin.variable, span=here), _literal(pin.value, here), span=here) for pin in asked]
    condition = terms[0]
    for term in terms[1:]:
        condition = s.Binary("and", condition, term, span=here)
    return Rule(form="forbid", condition=condition, text="forbid the choice", span=here)


def _literal(value: PlanValue, here: Span) -> s.Expr:
    if isinstance(value, bool):
        return s.Bool(value, span=here)
    if isinstance(value, int):
        return s.Number(value, span=here)
    if isinstance(value, str):
        return s.String(value, span=here)
    return s.Sequence("list", tuple(_literal(item, here) for item in value), span=here)


# ---- what cannot be -------------------------------------------------------------------------------------------------


def _not_possible(setting: Setting, chosen: Plan, outcome: Outcome, text: str) -> Answer:
    """The reason that the candidates got furthest to: rules of the plan, then memory, then what is legal."""
    rules = [key for key in outcome.rejected if key[1]]
    key = max(rules, key=lambda key: outcome.rejected[key].count) if rules else ("memory", "")
    tally = outcome.rejected.get(key)
    if tally is None:
        reasons = "; ".join(t.words for t in outcome.rejected.values() if t.words) or "no plan can have it with the other pins"
        return Answer(asked=text, chosen=False, verdict="illegal", sentence=f"not legal: {reasons}")
    closest = explain.closest(outcome, key, tally)
    kind: Verdict = "rule" if rules else "memory"
    if rules:
        sentence = f"breaks `{' '.join(key[1].split())}`; the closest: {closest}"
    else:
        sentence = f"does not fit: of {tally.count:,} plans the closest, {closest}"
    if tally.closest is None or tally.place is None:
        return Answer(asked=text, chosen=False, verdict=kind, sentence=sentence)
    return _answer(text, False, kind, sentence, costed_plan(chosen), costed(tally.place, tally.closest))


def _sentence(first: str, second: str) -> str:
    return f"{first}; {second}" if second else first
