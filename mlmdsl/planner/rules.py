"""Rules of the plan (`require`, `prefer`, `avoid`, `forbid`) compiled once to predicates over plain numbers.

What a rule may say is checked when the spec is resolved (grammar/constraints.py: types and units); what does not depend on the
plan (`0.9 * device.memory`) is evaluated here once with the grammar's own evaluator, the rest becomes closures, since a search
asks tens of thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.frozen import frozen
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.constraints import WORDS, RuleEvaluator
from mlmdsl.grammar.evaluate import ARITHMETIC, COMPARE, number_of
from mlmdsl.grammar.spec import Device, Rule
from mlmdsl.units import Quantity

Facts = Mapping[
    str, Any
]  # plan variables, `memory` (bytes), `step_time` (seconds), `bubble`, `mfu`, `cost`, "tensor.crosses_nodes"
Term = Callable[[Facts], Any]

_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    **ARITHMETIC,
    **COMPARE,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "in": lambda a, b: a in b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
}


@frozen
class CompiledRule:
    """`kept(facts)`: whether the plan is as the rule wants it, whatever its form. `names`: the facts it reads."""

    rule: Rule
    kept: Callable[[Facts], bool]
    names: frozenset[str]

    @property
    def hard(self) -> bool:
        return self.rule.form in ("require", "forbid")


def compile_rule(rule: Rule, device: Device, capacity_bytes: float) -> CompiledRule:
    """capacity_bytes: what `device.memory` says."""
    constants = {"device": {"memory": Quantity(capacity_bytes, "bytes"), "name": device.name}}
    condition = _term(rule.condition, RuleEvaluator(constants, Diagnostics()))
    wanted = rule.form in ("require", "prefer")

    def kept(facts: Facts) -> bool:
        try:
            return bool(condition(facts)) == wanted
        except (ZeroDivisionError, OverflowError):  # of a plan for which the condition means nothing
            return not wanted

    return CompiledRule(rule, kept, frozenset(names_in(rule.condition)))


def names_in(expr: s.Expr) -> set[str]:
    """Names of facts, `tensor.crosses_nodes` as one; of `device.memory` and words (`full`) as well."""
    match expr:
        case s.Name():
            return {expr.name}
        case s.Attribute():
            return {f"{expr.value.name}.{expr.name}"} if isinstance(expr.value, s.Name) else names_in(expr.value)
        case s.Unary():
            return names_in(expr.operand)
        case s.Binary():
            return names_in(expr.left) | names_in(expr.right)
        case s.Sequence():
            return {name for item in expr.items for name in names_in(item)}
        case s.Call():
            return {name for argument in expr.arguments for name in names_in(argument.value)}
        case _:
            return set()


def _term(expr: s.Expr, evaluator: RuleEvaluator) -> Term:
    """A closure; constant parts are evaluated now."""
    varying = {name for name in names_in(expr) if not name.startswith("device.") and name not in WORDS}
    if not varying:
        value = _plain(evaluator.value(expr))
        return lambda facts: value
    match expr:
        case s.Name():
            name = expr.name
            return lambda facts: facts[name]
        case s.Attribute():
            path = next(iter(varying))
            return lambda facts: facts[path]
        case s.Unary():
            operand = _term(expr.operand, evaluator)
            return (lambda facts: not operand(facts)) if expr.operator == "not" else (lambda facts: -operand(facts))
        case s.Binary():
            left, right, operate = _term(expr.left, evaluator), _term(expr.right, evaluator), _OPERATORS[expr.operator]
            return lambda facts: operate(left(facts), right(facts))
        case s.Sequence():
            items = tuple(_term(item, evaluator) for item in expr.items)
            return lambda facts: tuple(item(facts) for item in items)
        case _:
            raise AssertionError(f"a rule with {type(expr).__name__}")


def _plain(value: Any) -> Any:
    """Quantities as their numbers, in lists too; `none` as recompute's word."""
    if isinstance(value, tuple | frozenset):
        return tuple(_plain(item) for item in cast(Iterable[Any], value))
    return "none" if value is None else number_of(value)
