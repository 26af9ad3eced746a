"""What a user sees: every diagnostic of the table as text, some in JSON and SARIF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from mlmdsl.diagnostics import CODES, Diagnostic, Diagnostics, Label, Span
from mlmdsl.rendering import render
from tests.grammar.examples import cases, table

BAD = {code: found[0] for code, entry in table().items() if (found := cases(entry)) is not None}
MACHINE = ("MLM0002", "MLM0402", "MLM0501", "MLM0513")  # with and without help and second labels; one warning
Golden = Callable[[str, str], None]


@pytest.fixture(scope="module")
def several() -> tuple[list[Diagnostic], dict[str, str]]:
    """The diagnostics of MACHINE, each in a file of its own name."""
    items: list[Diagnostic] = []
    sources: dict[str, str] = {}
    for code in MACHINE:
        found, _, _ = BAD[code].run()
        items += [d for d in found.items if d.code == code]
        sources |= found.sources
    return items, sources


@pytest.mark.parametrize("code", BAD)
def test_text(code: str, golden: Golden) -> None:
    found, _, _ = BAD[code].planned() if code.startswith("MLM06") else BAD[code].checked()
    items = [d for d in found.items if d.code == code]
    text = re.sub(r"[0-9.]+ (us|ms|s) a step", "... a step", render(items, found.sources))  # estimates are tested elsewhere
    golden(f"diagnostics/{code}.txt", text + "\n")


def test_most_codes_are_shown() -> None:
    assert len(BAD) > 90
    assert set(BAD) == {code for code in CODES if code < "MLM0620"}


@pytest.mark.parametrize("format", ["json", "sarif"])
def test_machine_formats(format: str, several: Any, golden: Golden) -> None:
    items, sources = several
    text = render(items, sources, format=format)
    assert json.loads(text)
    golden(f"diagnostics/all.{format}", text + "\n")


def test_sarif_has_what_it_requires(several: Any) -> None:
    """SARIF 2.1.0: version and runs (3.13), a named driver (3.14, 3.19.8), rules with ids (3.49.3), results with a message
    (3.27.11), a rule index that agrees (3.27.6), regions of 1-based positions (3.30)."""
    items, sources = several
    log = json.loads(render(items, sources, format="sarif"))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "mlmdsl" and driver["version"]
    assert run["columnKind"] in ("unicodeCodePoints", "utf16CodeUnits")
    rules = driver["rules"]
    assert [rule["id"] for rule in rules] == sorted({d.code for d in items})
    assert all(rule["shortDescription"]["text"] for rule in rules)
    assert len(run["results"]) == len(items)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        for location in [*result["locations"], *result["relatedLocations"]]:
            place = location["physicalLocation"]
            assert place["artifactLocation"]["uri"]
            region = place["region"]
            assert 1 <= region["startLine"] <= region["endLine"] and region["startColumn"] >= 1


def test_the_rest_is_counted() -> None:
    found = Diagnostics()
    for line in range(30):
        found.report("MLM0001", f"mistake {line}")
    shown = render(found.items, {})
    assert shown.count("mistake") == 20 and shown.endswith("and 10 more")
    assert len(json.loads(render(found.items, {}, format="json"))) == 30


def test_the_order_is_the_source_s() -> None:
    found = Diagnostics()
    for line in (7, 2, 5):
        found.report("MLM0001", f"line {line}", Span("a.mlm", line, 1, line, 2))
    assert [d["span"]["line"] for d in json.loads(render(found.items, {}, format="json"))] == [2, 5, 7]


def test_colour_only_where_asked() -> None:
    found, _, _ = BAD["MLM0002"].run()
    assert "\x1b[" in render(found.items, found.sources, color=True)
    assert "\x1b[" not in render(found.items, found.sources)


@pytest.mark.parametrize(
    ("source", "span", "shown"),
    [
        ("ab = cd", Span("f", 1, 6, 1, 8), ["1 | ab = cd", "  |      ^^"]),
        ("\tab", Span("f", 1, 2, 1, 4), ["1 |     ab", "  |     ^^"]),
        ("a\tb", Span("f", 1, 3, 1, 4), ["1 | a   b", "  |     ^"]),
        ("日本 x", Span("f", 1, 4, 1, 5), ["1 | 日本 x", "  |      ^"]),
        ("e\u0301 x", Span("f", 1, 4, 1, 5), ["1 | e\u0301 x", "  |   ^"]),
        ("a\x07b x", Span("f", 1, 5, 1, 6), ["1 | a?b x", "  |     ^"]),
        ("ab\r\ncd", Span("f", 1, 3, 1, 3), ["1 | ab", "  |   ^"]),
        ("f(a,\n  b)", Span("f", 1, 1, 2, 5), ["1 | f(a,", "  | ^^^^"]),
        ("a", Span("f", 2, 1, 2, 1), []),
        ("a\n", Span("f", 2, 1, 2, 1), ["2 |", "  | ^"]),
    ],
)
def test_the_caret_stands_under_what_it_means(source: str, span: Span, shown: list[str]) -> None:
    text = render([Diagnostic("MLM0001", "m", span)], {"f": source}).split("\n")
    assert text[2:] == shown


def test_a_second_label_of_another_file_has_its_own_header() -> None:
    one, two = Span("a.mlm", 9, 1, 9, 2), Span("b.mlm", 10, 1, 10, 2)
    sources = {"a.mlm": "\n" * 8 + "x", "b.mlm": "\n" * 9 + "y"}
    text = render([Diagnostic("MLM0104", "m", one, "here", (Label(two, "there"),))], sources)
    assert text.split("\n")[1:] == ["  --> a.mlm:9:1", " 9 | x", "   | ^ here", "  --> b.mlm:10:1", "10 | y", "   | - there"]
