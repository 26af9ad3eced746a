"""The `plan` item and `--pin`: constraints on the plan's variables, with their types checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

from mlmdsl.diagnostics import Diagnostics, Label, Span
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.evaluate import POISON, Evaluator, did_you_mean, kind_of, one_of
from mlmdsl.grammar.spec import Pin, PlanValue, Rule
from mlmdsl.units import Quantity

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_v", "dualpipe_v")
RECOMPUTE = ("none", "selective", "full")
Order = Literal["pipeline_data_context_tensor", "data_pipeline_context_tensor"]  # axes of the grid, the outermost first
ORDERS: tuple[Order, ...] = get_args(Order)
USUAL: Order = ORDERS[0]
WORDS = (*SCHEDULES, *RECOMPUTE, *ORDERS)  # stand for themselves
ZEROS = (0, 1, 2, 3)
_DEGREES = ("tensor", "context", "pipeline", "interleave", "data", "replicate", "expert", "micro_batch")
_CHOICES = {"schedule": SCHEDULES, "recompute": RECOMPUTE, "order": ORDERS}
VARIABLES = (*_DEGREES, "sequence_parallel", "schedule", "zero", "recompute", "stages", "order")
AXES = ("tensor", "context", "pipeline", "data", "replicate", "expert")

# What a rule may speak of, with a value of its type to check the rule by
FACTS: dict[str, Any] = {
    **dict.fromkeys(_DEGREES, 1),
    "zero": 0,
    "sequence_parallel": True,
    "schedule": "1f1b",
    "recompute": "none",
    "stages": (1,),
    "order": USUAL,
    "memory": Quantity(1.0, "bytes"),
    "step_time": Quantity(1.0, "seconds"),
    "bubble": 0.5,
    "mfu": 0.5,
    "cost": 1.0,
    "device": {"memory": Quantity(1.0, "bytes")},
}


class RuleEvaluator(Evaluator):
    """Evaluates rules over plan variables and facts; `tensor.crosses_nodes` reads `crosses` of the scope. Words of
    schedules, recomputation and orders (`full`, `gpipe`) are names for themselves."""

    def name(self, expr: s.Name) -> Any:
        if expr.name not in self.scope and expr.name in WORDS:
            return expr.name
        return super().name(expr)

    def attribute(self, expr: s.Attribute) -> Any:
        if isinstance(expr.value, s.Name) and expr.value.name in AXES:
            crosses = self.scope.get("crosses", dict.fromkeys(AXES, False))
            if expr.name == "crosses_nodes":
                return crosses[expr.value.name]
            help = did_you_mean(expr.name, ("crosses_nodes",)) or f"an axis has {expr.value.name}.crosses_nodes"
            return self.poison("MLM0201", f"an axis has no `{expr.name}`", expr.name_span, help=help)
        return super().attribute(expr)


def read_pins(statements: Sequence[s.Pin], texts: Callable[[Span], str], diagnostics: Diagnostics) -> tuple[Pin, ...]:
    """Checked pins; two that contradict each other are reported."""
    pins: dict[str, Pin] = {}
    for statement in statements:
        value = pin_value(statement, diagnostics)
        if value is POISON:
            continue
        pin = Pin(variable=statement.variable, value=value, text=texts(statement.span), span=statement.value.span)
        other = pins.setdefault(statement.variable, pin)
        if other.value != pin.value:
            diagnostics.report(
                "MLM0402",
                f"`{pin.variable}` is pinned to {_shown(pin.value)} and to {_shown(other.value)}",
                pin.span,
                label="pinned again here",
                secondary=(Label(other.span, "pinned here"),),
                help="keep one of the two",
            )
    return tuple(pins.values())


def _shown(value: PlanValue) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def pin_value(pin: s.Pin, diagnostics: Diagnostics) -> Any:
    """The value, of the variable's type; POISON where it is wrong (reported)."""

    def wrong(message: str, help: str) -> Any:
        diagnostics.report("MLM0320", message, pin.value.span, help=help)
        return POISON

    name = pin.variable
    if name not in VARIABLES:
        help = did_you_mean(name, VARIABLES) or one_of(VARIABLES, 20)
        diagnostics.report("MLM0212", f"the plan has no variable `{name}`", pin.variable_span, help=help)
        return POISON
    value = RuleEvaluator({}, diagnostics).value(pin.value)
    if value is POISON:
        return POISON
    if name in _DEGREES:
        sound = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return value if sound else wrong(f"`{name}` is an integer of 1 or more", f"write pin {name} = 4")
    if name == "zero":
        sound = not isinstance(value, bool) and value in ZEROS
        return value if sound else wrong("`zero` is 0, 1, 2 or 3", "write pin zero = 1")
    if name == "sequence_parallel":
        sound = isinstance(value, bool)
        return value if sound else wrong(f"`{name}` is true or false, not {kind_of(value)}", f"write pin {name} = true")
    if name == "stages":
        items = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (0,)
        sound = all(isinstance(v, int) and v >= 1 for v in items)
        return items if sound else wrong("`stages` is a list of layers per stage", "write pin stages = [6, 6]")
    words = _CHOICES[name]
    value = "none" if value is None else value
    if isinstance(value, str) and value in words:
        return value
    if name == "recompute" and isinstance(value, tuple) and value:
        items = tuple("none" if item is None else item for item in cast(tuple[Any, ...], value))
        if all(isinstance(item, str) and item in RECOMPUTE for item in items):
            return items
        return wrong("a list for `recompute` has one of its words for each layer", "write pin recompute = [full, none]")
    help = (did_you_mean(value, words) if isinstance(value, str) else "") or one_of(words)
    return wrong(f"`{name}` is {', '.join(words[:-1])} or {words[-1]}", help)


def read_rules(statements: Sequence[s.Rule], texts: Callable[[Span], str], diagnostics: Diagnostics) -> tuple[Rule, ...]:
    """Rules whose conditions are boolean over FACTS."""
    rules: list[Rule] = []
    for statement in statements:
        value = RuleEvaluator(FACTS, diagnostics).value(statement.condition)
        if value is not POISON and not isinstance(value, bool):
            diagnostics.report(
                "MLM0321",
                f"`{statement.form}` wants a condition, not {kind_of(value)}",
                statement.condition.span,
                help="compare it: pipeline <= 4",
            )
        elif value is not POISON:
            text = texts(statement.span)
            rules.append(Rule(form=statement.form, condition=statement.condition, text=text, span=statement.condition.span))
    return tuple(rules)


def read_objective(statements: Sequence[s.Minimize], diagnostics: Diagnostics) -> Any:
    words = ("time", "cost", "memory")
    chosen = "time"
    for statement in statements:
        if statement.objective in words:
            chosen = statement.objective
        else:
            help = did_you_mean(statement.objective, words) or one_of(words)
            diagnostics.report(
                "MLM0213", f"there is no minimizing `{statement.objective}`", statement.objective_span, help=help
            )
    return chosen
