"""Expressions without tensors: arithmetic on numbers and quantities, comparison, lists, calls; every mistake reported once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar.evaluate import POISON, CallValue, Evaluator, did_you_mean, kind_of, one_of
from mlmdsl.grammar.parser import parse_expression
from mlmdsl.units import Quantity

SCOPE = {"d": 768, "heads": 12, "name": "gpt2", "big": True, "half": 0.5, "module": {"x": 3, "inner": {"y": 4}}, "bad": POISON}


def evaluated(text: str, scope: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    """The value, and what was reported as `CODE column`."""
    found = Diagnostics()
    expr = parse_expression(text, "e", found)
    assert expr is not None and not found.items, found.items
    value = Evaluator(SCOPE if scope is None else scope, found).value(expr)
    return value, [f"{d.code} {d.span.column}" for d in found.items if d.span]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50_257", 50257),
        ("3e-4", 3e-4),
        ("1.0", 1.0),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("10 - 2 - 3", 5),
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("7 / 2", 3.5),
        ("8 / 2", 4),
        ("7 // 2", 3),
        ("-7 // 2", -4),
        ("7 % 4", 3),
        ("d / heads", 64),
        ("d * half", 384.0),
        ("1 / 3", 1 / 3),
        ('"a" + "b"', "ab"),
        ("name", "gpt2"),
        ("none", None),
        ("true", True),
        ("not big", False),
        ("big and 1 < 2", True),
        ("false or big", True),
        ("not 1 == 2 and big", True),
        ("3 <= 3", True),
        ("3 < 3", False),
        ('"a" < "b"', True),
        ("1 != 1.0", False),
        ("none == none", True),
        ("d in [1, 768]", True),
        ("3 in {1, 2}", False),
        ('name in {"gpt2", "llama"}', True),
        ("(1, 2)", (1, 2)),
        ("[1, (2, 3)]", (1, (2, 3))),
        ("{1, 1, 2}", frozenset({1, 2})),
        ("[]", ()),
        ("module.x", 3),
        ("module.inner.y", 4),
        ('"a\\"b\\n\\\\"', 'a"b\n\\'),
    ],
)
def test_values(text: str, value: object) -> None:
    found, reported = evaluated(text)
    assert (found, type(found), reported) == (value, type(value), [])


@pytest.mark.parametrize(
    ("text", "value", "dimension", "per"),
    [
        ("80 GiB", 80 * 2.0**30, "bytes", None),
        ("0.9 * 80 GB", 72e9, "bytes", None),
        ("80 GB * 2", 160e9, "bytes", None),
        ("80 GB / 4", 20e9, "bytes", None),
        ("1 GB + 24 MB", 1.024e9, "bytes", None),
        ("1 hour - 1 min", 3540.0, "seconds", None),
        ("-(5 us)", -5e-6, "seconds", None),
        ("2 * (3 * 4 tok)", 24.0, "tokens", None),
        ("400 Gb/s per gpu", 50e9, "bytes_per_second", "gpu"),
        ("2 * 300 GB/s per node", 600e9, "bytes_per_second", "node"),
    ],
)
def test_quantities(text: str, value: float, dimension: str, per: str | None) -> None:
    found, reported = evaluated(text)
    assert isinstance(found, Quantity) and reported == []
    assert found.value == pytest.approx(value) and (found.dimension, found.per) == (dimension, per)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80 GB / 20 GB", 4.0),
        ("1 min / 1 s", 60.0),
        ("1 GiB > 1 GB", True),
        ("60 s == 1 min", True),
        ("1 min in [60 s]", False),
        ("8 Gb/s per gpu <= 1 GB/s per gpu", True),
    ],
)
def test_quantities_of_one_dimension_compare(text: str, value: object) -> None:
    found, reported = evaluated(text)
    assert reported == []
    assert found is value if isinstance(value, bool) else found == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        # names and parts
        ("wdith", "MLM0201 1"),
        ("1 + wdith * 2", "MLM0201 5"),
        ("module.z", "MLM0201 8"),
        ("module.inner.z", "MLM0201 14"),
        ("d.x", "MLM0202 3"),
        ("name.x", "MLM0202 6"),
        ("d.x()", "MLM0203 1"),
        # operators
        ("1 + true", "MLM0206 1"),
        ('2 * "a"', "MLM0206 1"),
        ('"a" < 1', "MLM0206 1"),
        ("(1, 2) + (3, 4)", "MLM0206 1"),
        ("1 in 2", "MLM0206 1"),
        ("not 1", "MLM0206 1"),
        ("-true", "MLM0206 1"),
        ("1 and true", "MLM0206 1"),
        ("true or 1", "MLM0206 9"),
        ("-name", "MLM0206 1"),
        # quantities
        ("1 GB + 1", "MLM0206 1"),
        ("1 GB + 1 s", "MLM0206 1"),
        ("1 GB * 1 GB", "MLM0206 1"),
        ("1 / 2 s", "MLM0206 1"),
        ("1 GB < 1 s", "MLM0206 1"),
        ("1 GB < 1", "MLM0206 1"),
        ("1 GB ** 2", "MLM0206 1"),
        ("80 GiBB", "MLM0301 1"),
        ("10 %", "MLM0302 1"),
        ("400 Gb/s per rack", "MLM0303 1"),
        ("1 GB == 1 s", "MLM0206 1"),
        ("70K", "MLM0304 1"),
        ("7 == 7B", "MLM0304 6"),
        ("7B < d", "MLM0304 1"),
        # numbers out of reach
        ("1 / 0", "MLM0207 5"),
        ("1 // (2 - 2)", "MLM0207 7"),
        ("1 % 0", "MLM0207 5"),
        ("10 ** 400", "MLM0208 1"),
        ("2 ** 3 ** 30", "MLM0208 1"),
        ("(-8) ** half", "MLM0208 1"),
        ("1e400", "MLM0208 1"),
        ("1e300 * 1e300", "MLM0208 1"),
        ("10 ** 200 * 10 ** 200", "MLM0208 1"),
        ("1e300 GB / 1e-9", "MLM0208 1"),
        ("1e400 GB", "MLM0208 1"),
        ("0 ** -1", "MLM0208 1"),
        # calls and sets
        ("adamw(lr = 1, 2)", "MLM0204 15"),
        ("adamw(lr = 1, lr = 2)", "MLM0205 15"),
        ("{1, adamw()}", "MLM0257 5"),
        ("{(1, module)}", "MLM0257 2"),
    ],
)
def test_mistakes(text: str, reported: str) -> None:
    found, problems = evaluated(text)
    assert problems == [reported]
    assert found is POISON or isinstance(found, CallValue)


@pytest.mark.parametrize(
    "text",
    ["bad", "-bad", "not bad", "bad + 1", "1 < bad", "bad and true", "bad.x", "[1, bad]", "{bad}", "bad == bad", "bad in [1]"],
)
def test_what_is_already_reported_is_not_again(text: str) -> None:
    assert evaluated(text) == (POISON, [])


def test_both_sides_are_read() -> None:
    assert evaluated("wdith + dpeth")[1] == ["MLM0201 1", "MLM0201 9"]
    assert evaluated("false and wdith")[1] == ["MLM0201 11"]


def test_a_call_keeps_what_it_was_given() -> None:
    found, reported = evaluated('text("a", "b", lr = 2 * 3, ok = bad)')
    assert reported == [] and isinstance(found, CallValue)
    assert (found.name, found.positional, found.keywords) == ("text", ("a", "b"), {"lr": 6, "ok": POISON})
    assert {key: span.column for key, span in found.spans.items()} == {0: 6, 1: 11, "lr": 21, "ok": 33}
    assert {key: span.column for key, span in found.names.items()} == {"lr": 16, "ok": 28}


@given(st.integers(-1000, 1000), st.integers(-1000, 1000), st.sampled_from(["+", "-", "*", "//", "%", "/"]))
def test_integers_are_those_of_python(a: int, b: int, operator: str) -> None:
    found, reported = evaluated(f"({a}) {operator} ({b})")
    if b == 0 and operator in ("//", "%", "/"):
        assert found is POISON and len(reported) == 1
        return
    expected = {"+": a + b, "-": a - b, "*": a * b}.get(operator)
    if expected is None:
        expected = {"//": a // b, "%": a % b, "/": a / b}[operator]
    assert found == expected and reported == []
    assert isinstance(found, int) or a % b != 0


@given(st.integers(2, 10**6), st.integers(0, 10**6))
def test_powers_are_right_or_refused(base: int, exponent: int) -> None:
    found, reported = evaluated(f"{base} ** {exponent}")
    if exponent * math.log(base) > math.log(1e300) * 1.001:
        assert found is POISON and reported == ["MLM0208 1"]
    elif exponent * math.log(base) < math.log(1e300) * 0.999:
        assert found == base**exponent and reported == []


def test_words_for_kinds_and_names() -> None:
    kinds = {1: "an integer", 1.5: "a number", "x": "a string", None: "none", (1,): "a list", frozenset({2}): "a set"}
    assert {value: kind_of(value) for value in kinds} == kinds
    assert kind_of(True) == "a truth value" and kind_of(Quantity(1.0, "seconds")).startswith("time")
    assert did_you_mean("Widht", ["width", "depth"]) == "did you mean `width`?"
    assert did_you_mean("zzz", ["width"]) == ""
    assert one_of(["b", "a", "a"]) == "one of a, b" and one_of(map(str, range(30)), 2).endswith(", ...")
