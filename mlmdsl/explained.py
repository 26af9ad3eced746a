"""What `mlmdsl plan` tells beside the plan itself: made once, as text or as keys of the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlmdsl.compile import Compilation
from mlmdsl.frozen import frozen
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.accuracy import Accuracy, accuracy
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.operation import Goodput, goodput
from mlmdsl.planner.plan import Plan

if TYPE_CHECKING:  # imported when it is asked for
    from mlmdsl.planner.whatif import WhatIf
    from mlmdsl.planner.why import Answer
    from mlmdsl.planner.within import Within


@frozen
class Explained:
    accuracy: Accuracy
    goodput: Goodput
    why: tuple[Answer, ...] = ()
    what_if: tuple[WhatIf, ...] = ()
    within: Within | None = None

    def to_json(self, plan: Plan) -> str:
        """The plan's keys, and one for each thing that is told."""
        from mlmdsl.serialization import to_plain

        told = {
            "accuracy": to_plain(self.accuracy),
            "goodput": to_plain(self.goodput),
            "why": [to_plain(each) for each in self.why],
            "what_if": [to_plain(each) for each in self.what_if],
            "within": to_plain(self.within) if self.within else None,
        }
        return json.dumps(json.loads(plan.to_json()) | {key: value for key, value in told.items() if value}, indent=1) + "\n"

    def render(self, plan: Plan, *, color: bool, width: int) -> Iterator[str]:
        from mlmdsl.report.explained import render_answers, render_trust, render_what_if, render_within

        look: Any = {"color": color, "width": width}
        yield render_trust(self.accuracy, self.goodput, **look)
        if self.what_if:
            yield render_what_if(plan, self.what_if, **look)
        if self.within:
            yield render_within(self.within, **look)
        if self.why:
            yield render_answers(plan, self.why, **look)


def explain(done: Compilation, why: Sequence[str] = (), asked_what_if: bool = False, time: str | None = None) -> Explained:
    """Of a compilation that got to the plan. Raises SpecError and UsageError for what was asked wrongly."""
    spec, graph, plan = done.spec, done.graph, done.plan
    assert spec is not None and graph is not None and plan is not None
    answers = _answers(spec, graph, plan, why) if why else ()
    changes, sized = _what_if(spec, graph) if asked_what_if else (), None if time is None else _within(spec, graph, time)
    return Explained(accuracy(spec, plan), goodput(spec, plan), answers, changes, sized)


def _answers(spec: Spec, graph: Graph, plan: Plan, why: Sequence[str]) -> tuple[Answer, ...]:
    from mlmdsl.planner.why import answer, questions

    setting = Setting(spec, graph)
    return tuple(answer(setting, plan, asked) for asked in questions(why))


def _what_if(spec: Spec, graph: Graph) -> tuple[WhatIf, ...]:
    from mlmdsl.planner.whatif import what_if

    return what_if(spec, graph)


def _within(spec: Spec, graph: Graph, time: str) -> Within:
    from mlmdsl.planner.within import days_of, within

    return within(spec, graph, days_of(time))
