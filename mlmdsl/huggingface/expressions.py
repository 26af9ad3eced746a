"""The expressions in family files: mlm's own, over config.json's fields or a model's params."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.evaluate import Evaluator
from mlmdsl.grammar.parser import parse_expression

_BRACES = re.compile(r"\{([^{}]+)\}")


class Unknown(Exception):
    """An expression that cannot be evaluated, with what is missing in it."""


def evaluate(text: str, scope: Mapping[str, Any]) -> Any:
    """Raises Unknown."""
    found = Diagnostics()
    value = Evaluator(scope, found).value(_parsed(text))
    if found.errors:
        raise Unknown(found.errors[0].message)
    return value


def value_of(entry: Any, scope: Mapping[str, Any]) -> Any:
    """An entry of a family file: a string is an expression, tables and lists hold entries, everything else is itself. A table
    with nothing but `integer` rounds what it holds."""
    if isinstance(entry, str):
        return evaluate(entry, scope)
    if isinstance(entry, dict) and list(entry) == ["integer"]:  # pyright: ignore[reportUnknownArgumentType]
        return round(value_of(entry["integer"], scope))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(entry, dict):
        return {key: value_of(part, scope) for key, part in entry.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(entry, list):
        return [value_of(part, scope) for part in entry]  # pyright: ignore[reportUnknownVariableType]
    return entry


def filled(name: str, scope: Mapping[str, Any]) -> str:
    """`model.layers.{i + 1}.norm` with its expressions in place."""
    return _BRACES.sub(lambda found: str(evaluate(found[1], scope)), name)


def literal(value: object) -> str:
    """A value as mlm writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


@cache
def _parsed(text: str) -> s.Expr:
    found = Diagnostics()
    expr = parse_expression(text, "a family file", found)
    assert expr is not None and not found.errors, text
    return expr
