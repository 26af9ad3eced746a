"""What stands under a drawn plan: how far to trust it, and where it is asked for why not another choice, what if one thing were
different, and what cluster ends in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mlmdsl import words
from mlmdsl.planner.accuracy import Accuracy
from mlmdsl.planner.operation import Bill, Goodput
from mlmdsl.planner.plan import Plan
from mlmdsl.report.terminal import Ink, wrapped

if TYPE_CHECKING:
    from mlmdsl.planner.whatif import WhatIf
    from mlmdsl.planner.why import Answer
    from mlmdsl.planner.within import Sized, Within

_LEFT = 8


def render_answers(plan: Plan, answers: Sequence[Answer], *, color: bool = False, width: int = 80) -> str:
    ink = Ink(color)
    return "\n\n".join("\n".join(_answer(plan, each, ink, max(width, 80))) for each in answers)


def _answer(plan: Plan, answer: Answer, ink: Ink, width: int) -> Iterator[str]:
    head = f"why not {answer.asked}?" if not answer.chosen else f"why {answer.asked}?"
    yield ink.bold(head)
    yield from wrapped(answer.sentence, width, " " * _LEFT)
    if answer.plan is None or answer.predicted is None:
        return
    yield from wrapped(answer.plan.described, width, f"{ink.bold('plan')}    ", " " * _LEFT)
    yield f"        {'':<13}{'chosen':>10}{'this one':>11}"
    yield _row("step", plan.predicted.step_time_s, answer.predicted.step_time_s)
    for part in answer.parts:
        yield _row(f"  {part.name}", part.chosen_s, part.other_s)
    chosen, other = max(plan.predicted.peak_memory_bytes), max(answer.predicted.peak_memory_bytes)
    more = words.gib(abs(other - chosen))
    yield f"        {'memory':<13}{words.gib(chosen):>10}{words.gib(other):>11}{_signed(other - chosen, more):>11}"


def _row(name: str, chosen: float, other: float) -> str:
    change = (
        _signed(other - chosen, words.seconds(abs(other - chosen))) if abs(other - chosen) > 1e-6 * max(chosen, other) else "="
    )
    return f"        {name:<13}{words.seconds(chosen):>10}{words.seconds(other):>11}{change:>11}"


def _signed(more: float, text: str) -> str:
    return f"{'+' if more >= 0 else '-'}{text}"


def render_trust(trust: Accuracy, run: Goodput, *, color: bool = False, width: int = 80) -> str:
    """Two short sections that stand under every plan."""
    ink, width = Ink(color), max(width, 80)
    kernels = "kernels measured on this device" if trust.measured else "kernels by the curves of its kind, not measured"
    band = f"{words.seconds(trust.low_s)} to {words.seconds(trust.high_s)} a step"
    near = f"so near were 8 of 10 of {trust.runs} published runs"
    lines = [*wrapped(f"{band}: {near}; {kernels}", width, f"{ink.bold('error')}   ", " " * _LEFT)]
    saved = f"a checkpoint of {words.size(run.checkpoint_bytes)} ({words.seconds(run.checkpoint_s)})"
    every = f"{saved} every {run.interval_steps:,} steps"
    failing = f"a failure every {words.days(run.failure_every_s / 86_400)}"
    text = f"{words.percent(run.share)}, {words.days(run.train_days)} in all: {failing}, {every}"
    lines += wrapped(text, width, f"{ink.bold('goodput')} ", " " * _LEFT)
    return "\n".join(lines)


def render_what_if(plan: Plan, others: Sequence[WhatIf], *, color: bool = False, width: int = 80) -> str:
    ink = Ink(color)
    lines = [f"{ink.bold('what if')} the best plan's step then"]
    for other in others:
        lines += wrapped(_what_if(plan, other), max(width, 80), " " * _LEFT, " " * 27)
    return "\n".join(lines)


def _what_if(plan: Plan, other: WhatIf) -> str:
    from mlmdsl.planner.whatif import change_of

    change = change_of(plan, other)
    if change is None or other.plan is None or other.step_time_s is None:
        return f"{'':>18} {other.change}: no plan fits"
    same = ", the same plan" if other.plan == plan.plan else f": {other.plan.described}"
    moved = f"{100 * change:+.1f} %" if abs(change) > 5e-4 else "="
    return f"{words.seconds(other.step_time_s):>8} {moved:>9} {other.change}{same}"


def render_within(found: Within, *, color: bool = False, width: int = 80) -> str:
    ink, width = Ink(color), max(width, 80)
    lines = [ink.bold(f"within {words.days(found.asked_days)}")]
    best = found.cheapest
    if best is None:
        lines += wrapped(found.reason, width, " " * _LEFT)
    else:
        nodes = f"{best.nodes:,} node{'s' * (best.nodes != 1)} ({best.devices:,} devices)"
        lines += wrapped(f"{nodes}: {words.days(best.bill.days)}, {_billed(best.bill)}", width, " " * _LEFT)
        lines += wrapped(f"{best.plan.described}, {words.seconds(best.step_time_s)} a step", width, " " * _LEFT)
        if best.bill.default_price:
            lines.append(f"        at {best.bill.price_usd:.2f} USD/gpu/hour, the usual price: the cluster names none")
    if found.sizes:
        lines.append(f"        {'nodes':>7}{'devices':>9}{'days':>10}{'goodput':>9}{'USD':>14}{'kWh':>13}{'t CO2':>9}")
        lines += (_sized(size) for size in found.sizes)
    return "\n".join(lines)


def _billed(costs: Bill) -> str:
    price = "" if costs.usd is None else f"{words.amount(costs.usd)} USD, "
    return f"{price}{words.amount(costs.energy_kwh)} kWh, {words.amount(costs.co2_kg / 1000)} t CO2"


def _sized(size: Sized) -> str:
    costs = size.bill
    usd = "-" if costs.usd is None else words.amount(costs.usd)
    left = f"        {size.nodes:>7,}{size.devices:>9,}{costs.days:>10,.1f}{words.percent(size.goodput.share):>9}"
    return f"{left}{usd:>14}{words.amount(costs.energy_kwh):>13}{words.amount(costs.co2_kg / 1000):>9}"
