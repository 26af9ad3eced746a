"""Values of expressions that hold no tensors: numbers, strings, quantities, lists, settings calls.

A mistake is reported once and becomes POISON, which no later operation complains about. The graph's builder extends `Evaluator`
with tensors; the planner evaluates `require` conditions with it.

    value of                 Python type
    number                   int, float
    text, true, none         str, bool, None
    80 GiB                   Quantity
    (a, b), [a, b], {a, b}   tuple, tuple, frozenset
    adamw(lr = 3e-4)         CallValue
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from difflib import get_close_matches
from typing import Any, Final, cast

from mlmdsl.diagnostics import Diagnostics, Label, Span
from mlmdsl.frozen import frozen
from mlmdsl.grammar import syntax as s
from mlmdsl.units import WORDS, Quantity, nearest_unit, quantity


class Poison:
    """The value of what is already reported."""

    def __repr__(self) -> str:
        return "POISON"


POISON: Final = Poison()
_OUT_OF_REACH = "this number is out of reach"
_LIMIT = 1e300  # of what arithmetic may give; a power beyond it is refused before it is computed


@frozen
class CallValue:
    """A settings call, evaluated: `text("a.txt", "b.txt")`, `adamw(lr = 3e-4)`; spans for messages."""

    name: str
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    span: Span = field(compare=False)
    spans: Mapping[str | int, Span] = field(compare=False)  # of the values
    names: Mapping[str, Span] = field(compare=False)  # of the arguments' names


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean `x`?`, or an empty string."""
    found = nearest(word, names)
    return f"did you mean `{found}`?" if found else ""


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` is probably meant to be."""
    by_lower = {name.lower(): name for name in sorted(set(names))}
    found = get_close_matches(word.lower(), by_lower, 1, 0.6)
    found = found or [name for name in by_lower if len(word) >= 3 and name.startswith(word.lower())]  # H100, for one
    return by_lower[found[0]] if found else None


def one_of(names: Iterable[str], most: int = 12) -> str:
    """`one of a, b, c`."""
    listed = sorted(set(names))
    return "one of " + ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def kind_of(value: object) -> str:
    """A value's type in words."""
    if isinstance(value, Quantity):
        return WORDS[value.dimension]
    names: dict[type, str] = {
        bool: "a truth value",
        int: "an integer",
        float: "a number",
        str: "a string",
        tuple: "a list",
        frozenset: "a set",
    }
    if isinstance(value, CallValue):
        return f"`{value.name}(...)`"
    if isinstance(value, Mapping):
        return "an imported file"
    return "none" if value is None else names.get(type(value), type(value).__name__)


def argument_names(expr: s.Call) -> dict[str, Span]:
    """Where the names of a call's arguments stand."""
    return {a.name: a.name_span for a in expr.arguments if a.name is not None and a.name_span is not None}


_PARAM_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "string": str,
    "quantity": Quantity,
}


class Evaluator:
    """Evaluates expressions in `scope`. Subclasses override `call`, `attribute`, `name` and `operate`."""

    def __init__(self, scope: Mapping[str, Any], diagnostics: Diagnostics):
        self.scope, self.diagnostics = scope, diagnostics

    def value(self, expr: s.Expr) -> Any:
        """The value, or POISON."""
        match expr:
            case s.String() | s.Bool():
                return expr.value
            case s.Number():
                return expr.value if math.isfinite(expr.value) else self.poison("MLM0208", _OUT_OF_REACH, expr.span)
            case s.NoneLiteral():
                return None
            case s.Broken():
                return POISON
            case s.QuantityLiteral():
                return self.quantity(expr)
            case s.Name():
                return self.name(expr)
            case s.Attribute():
                return self.attribute(expr)
            case s.Call():
                return self.call(expr)
            case s.Unary():
                return self.unary(expr)
            case s.Binary():
                return self.binary(expr)
            case s.Sequence():
                return self.sequence(expr)

    def defined(self, item: s.Const | s.Param) -> Any:
        """The value of a const or param; of a param's type where it names one."""
        value = self.value(item.value)
        if isinstance(item, s.Const) or item.type is None or value is POISON:
            return value
        kind = item.type.base or ""
        if kind not in _PARAM_TYPES:
            help = did_you_mean(kind, _PARAM_TYPES) or one_of(tuple(_PARAM_TYPES))
            return self.poison("MLM0258", f"there is no type `{kind}` of params", item.type.span, help=help)
        if not isinstance(value, _PARAM_TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
            where = Label(item.type.span, "declared here")
            message = f"`{item.name}` is of type {kind}, not {kind_of(value)}"
            return self.poison("MLM0257", message, item.value.span, secondary=(where,))
        return float(value) if kind == "float" else value

    def poison(self, code: str, message: str, span: Span, **more: Any) -> Poison:
        self.diagnostics.report(code, message, span, **more)
        return POISON

    # ---- leaves

    def quantity(self, expr: s.QuantityLiteral) -> Any:
        if expr.unit == "%":
            return self.poison("MLM0302", "there are no percentages", expr.span, help=f"write the share: {expr.number / 100:g}")
        if expr.per not in (None, "gpu", "node"):
            return self.poison(
                "MLM0303", f"`per {expr.per}` is no share of a link", expr.span, help="write `per gpu` or `per node`"
            )
        found = quantity(float(expr.number), expr.unit, expr.per)
        if found is not None:
            return found if math.isfinite(found.value) else self.poison("MLM0208", _OUT_OF_REACH, expr.span)
        if expr.unit in ("K", "M", "B", "T", "k", "G"):
            return self.poison("MLM0304", f"`{expr.unit}` alone is no unit", expr.span, help=_spelled_out(expr))
        near = nearest_unit(expr.unit)
        return self.poison(
            "MLM0301",
            f"there is no unit `{expr.unit}`",
            expr.span,
            help=f"did you mean `{near}`?" if near else "units: GiB, GB/s, TFLOPS, us, s, tok, seq, steps, W, USD/gpu/hour",
        )

    def name(self, expr: s.Name) -> Any:
        if expr.name in self.scope:
            return self.scope[expr.name]
        return self.poison("MLM0201", f"there is no `{expr.name}` here", expr.span, help=did_you_mean(expr.name, self.scope))

    def attribute(self, expr: s.Attribute) -> Any:
        value = self.value(expr.value)
        if value is POISON:
            return POISON
        if isinstance(value, Mapping):
            return self.member(cast(Mapping[str, Any], value), expr)
        return self.poison("MLM0202", f"{kind_of(value)} has no parts", expr.name_span)

    def member(self, value: Mapping[str, Any], expr: s.Attribute) -> Any:
        if expr.name in value:
            return value[expr.name]
        help = did_you_mean(expr.name, value) or one_of(value)
        return self.poison("MLM0201", f"there is no `{expr.name}` in it", expr.name_span, help=help)

    # ---- calls: settings

    def call(self, expr: s.Call) -> Any:
        if not isinstance(expr.function, s.Name):
            return self.poison("MLM0203", "this cannot be called", expr.function.span)
        positional, keywords, spans = self.arguments(expr)
        return CallValue(expr.function.name, positional, keywords, expr.span, spans, argument_names(expr))

    def arguments(self, expr: s.Call) -> tuple[tuple[Any, ...], dict[str, Any], dict[str | int, Span]]:
        """Evaluated arguments and where they stand; repeated and misplaced ones are reported."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        spans: dict[str | int, Span] = {}
        for argument in expr.arguments:
            value = self.value(argument.value)
            if argument.name is None:
                if keywords:
                    self.poison(
                        "MLM0204",
                        "a positional argument stands after a named one",
                        argument.span,
                        help="name it, or move it forward",
                    )
                spans[len(positional)] = argument.value.span
                positional.append(value)
            elif argument.name in keywords:
                self.poison("MLM0205", f"`{argument.name}` is given twice", argument.span, help="keep one of the two")
            else:
                keywords[argument.name], spans[argument.name] = value, argument.value.span
        return tuple(positional), keywords, spans

    # ---- operators

    def unary(self, expr: s.Unary) -> Any:
        value = self.value(expr.operand)
        return POISON if value is POISON else self.applied(expr, value)

    def applied(self, expr: s.Unary, value: Any) -> Any:
        """The operator of one sound value."""
        if expr.operator == "not" and isinstance(value, bool):
            return not value
        if expr.operator == "-" and _is_number(value):
            return -value
        if expr.operator == "-" and isinstance(value, Quantity):
            return value.scaled(-1)
        return self.poison("MLM0206", f"`{expr.operator}` does not apply to {kind_of(value)}", expr.span)

    def binary(self, expr: s.Binary) -> Any:
        left = self.value(expr.left)
        if expr.operator in ("and", "or"):
            return self.logic(expr, left)
        right = self.value(expr.right)
        if left is POISON or right is POISON:
            return POISON
        return self.operate(expr, left, right)

    def logic(self, expr: s.Binary, left: Any) -> Any:
        right = self.value(expr.right)
        if left is POISON or right is POISON:
            return POISON
        for value, side in ((left, expr.left), (right, expr.right)):
            if not isinstance(value, bool):
                return self.poison("MLM0206", f"`{expr.operator}` does not apply to {kind_of(value)}", side.span)
        return (left and right) if expr.operator == "and" else (left or right)

    def operate(self, expr: s.Binary, left: Any, right: Any) -> Any:
        """Arithmetic and comparison of two sound values."""
        operator = expr.operator
        if operator == "in":
            if isinstance(right, frozenset | tuple):
                return any(left == item for item in cast(Iterable[object], right))
        elif operator in ("==", "!="):
            return self._equal(expr, left, right)
        elif operator in COMPARE:
            if comparable(left, right):
                return COMPARE[operator](number_of(left), number_of(right))
        elif _is_number(left) and _is_number(right):
            return self._arithmetic(expr, left, right)
        elif isinstance(left, Quantity) or isinstance(right, Quantity):
            found = _with_units(operator, left, right)
            if found is not None and not abs(number_of(found)) <= _LIMIT:
                return self.poison("MLM0208", _OUT_OF_REACH, expr.span)
            if found is not None:
                return found
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            return left + right
        return self._unlike(expr, left, right)

    def _unlike(self, expr: s.Binary, left: Any, right: Any) -> Any:
        """Two values that the operator does not take; `70 B` beside a number is a count that reads as bytes."""
        for side, value, other in ((expr.left, left, right), (expr.right, right, left)):
            if isinstance(side, s.QuantityLiteral) and side.unit == "B" and _is_number(other):
                return self.poison("MLM0304", f"`{value}` is {side.number:g} bytes", side.span, help=_spelled_out(side))
        message = f"`{expr.operator}` does not apply to {kind_of(left)} and {kind_of(right)}"
        return self.poison("MLM0206", message, expr.span)

    def _equal(self, expr: s.Binary, left: Any, right: Any) -> Any:
        alike = type(left) is type(right) and not isinstance(left, Quantity)
        if not comparable(left, right) and not alike and left is not None and right is not None:
            return self._unlike(expr, left, right)
        same = number_of(left) == number_of(right) if comparable(left, right) else left == right
        return same if expr.operator == "==" else not same

    def _arithmetic(self, expr: s.Binary, left: float, right: float) -> Any:
        operator = expr.operator
        if operator in ("/", "//", "%") and right == 0:
            return self.poison("MLM0207", "division by zero", expr.right.span, label="this is 0")
        if operator == "**" and _too_large(left, right):
            return self.poison("MLM0208", "this power is out of reach", expr.span)
        try:
            value = ARITHMETIC[operator](left, right)
        except (OverflowError, ValueError, ZeroDivisionError):
            return self.poison("MLM0208", _OUT_OF_REACH, expr.span)
        if isinstance(value, complex) or not abs(value) <= _LIMIT:
            return self.poison("MLM0208", _OUT_OF_REACH, expr.span)
        if operator == "/" and isinstance(left, int) and isinstance(right, int) and left % right == 0:
            return left // right
        return value

    def sequence(self, expr: s.Sequence) -> Any:
        items = tuple(self.value(item) for item in expr.items)
        if any(item is POISON for item in items):
            return POISON
        if expr.kind != "set":
            return items
        for value, item in zip(items, expr.items, strict=True):
            if not _plain(value):
                return self.poison("MLM0257", f"a set cannot hold {kind_of(value)}", item.span)
        return frozenset(items)


COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": lambda a, b: a**b,
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: object) -> bool:
    """Can be an element of a set."""
    if isinstance(value, tuple | frozenset):
        return all(_plain(item) for item in cast(Iterable[object], value))
    return value is None or isinstance(value, int | float | str | Quantity)


def number_of(value: Any) -> Any:
    return value.value if isinstance(value, Quantity) else value


def comparable(left: object, right: object) -> bool:
    """Both numbers, or quantities of one dimension, or both strings."""
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        return left.dimension == right.dimension
    return (_is_number(left) and _is_number(right)) or (isinstance(left, str) and isinstance(right, str))


def _with_units(operator: str, left: Any, right: Any) -> Any:
    """Sums of one dimension, multiples, ratios; None where it makes no sense."""
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        if left.dimension != right.dimension:
            return None
        if operator in ("+", "-"):
            return Quantity(ARITHMETIC[operator](left.value, right.value), left.dimension, left.per)
        return left.value / right.value if operator == "/" and right.value else None
    if isinstance(left, Quantity) and _is_number(right):
        if operator == "*":
            return left.scaled(right)
        return left.scaled(1 / right) if operator == "/" and right else None
    return right.scaled(left) if operator == "*" and _is_number(left) else None


def _too_large(base: float, exponent: float) -> bool:
    return abs(base) > 1 and exponent > 0 and exponent * math.log(abs(base)) > math.log(_LIMIT)


def _spelled_out(expr: s.QuantityLiteral) -> str:
    factor = {"K": 10**3, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}[expr.unit]
    value = expr.number * factor
    plain = f"{int(value):_}" if value == int(value) else f"{value:g}"
    return f"a count is {plain}; a size is {expr.number:g} GiB, a number of tokens {expr.number:g} {expr.unit} tok"
