"""Broken and hostile texts: the front end reports, never raises, points into the text, and what it reports can be shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.diagnostics import Diagnostic, Diagnostics, Span
from mlmdsl.grammar.parser import lex, plain
from mlmdsl.grammar.resolve import resolve
from mlmdsl.graph.build import build
from mlmdsl.planner.check import check
from mlmdsl.rendering import render
from tests.grammar.examples import cases, table
from tests.grammar.mistakes import SOUND

SPECS = Path(__file__).resolve().parents[2] / "specs"
FILES = {str(path): path.read_text(encoding="utf-8") for path in sorted(SPECS.rglob("*.mlm"))}
EXAMPLES = [case.marked.replace("▸", "") for entry in table().values() for case in cases(entry) or () if not case.files]
TEXTS = [*FILES.items(), *(("spec.mlm", text) for text in (SOUND, *EXAMPLES) if len(text) < 5000)]
PIECES = sorted({str(token) for _, text in TEXTS for token in lex(text)})
ODD = [
    "",
    "\0",
    "\r",
    "\t",
    "\n",
    "\ufeff",
    "ä",
    "日本",
    "\u2028",
    "\ud83d\ude00",
    "'",
    '"',
    ";",
    "\\",
    "$",
    "{",
    "}",
    "(",
    "]",
    "1e999",
    "%",
]


def front_end(text: str, path: str = "spec.mlm", overrides: tuple[str, ...] = ()) -> Diagnostics:
    """The diagnostics of every pass before the search, each checked to be presentable."""
    found = Diagnostics()
    resolved = resolve(path, text, found, overrides=overrides)
    graph = build(resolved.model, found, resolved.spec and resolved.spec.train) if resolved.model else None
    if resolved.spec and graph and not found.errors:
        check(resolved.spec, graph, found)
    assert found.errors or (resolved.spec is not None and graph is not None), "a pass failed without a word"
    for item in found.items:
        presentable(item, found.sources)
    shown = render(found.items, found.sources)
    assert bool(shown) == bool(found.items)
    assert len(json.loads(render(found.items, found.sources, format="json"))) == len(found.items)
    assert len(json.loads(render(found.items, found.sources, format="sarif"))["runs"][0]["results"]) == len(found.items)
    return found


def presentable(item: Diagnostic, sources: dict[str, str]) -> None:
    assert item.message and item.span is not None, item
    for span in (item.span, *(label.span for label in item.secondary)):
        assert inside(span, sources[span.file]), (item, span)


def inside(span: Span, text: str) -> bool:
    """From a place in the text to a later one; the end of the text counts, and so does the end of a line."""
    lines = plain(text).split("\n")
    if not 1 <= span.line <= span.end_line <= len(lines):
        return False
    starts, ends = (span.line, span.column), (span.end_line, span.end_column)
    return 1 <= span.column <= len(lines[span.line - 1]) + 1 and starts <= ends and ends[1] <= len(lines[ends[0] - 1]) + 2


def tokens(text: str) -> list[str]:
    """The text as tokens and what stands between them."""
    parts, at = list[str](), 0
    for token in lex(text):
        parts += [plain(text)[at : token.start_pos], str(token)]
        at = token.end_pos or at
    return parts


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, str]:
    """A sound or broken text, with some tokens or characters deleted, doubled, swapped, replaced or inserted."""
    path, text = draw(st.sampled_from(TEXTS))
    parts = tokens(text) if draw(st.booleans()) else list(text)
    for _ in range(draw(st.integers(1, 5))):
        if not parts:
            break
        at, other = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
        match draw(st.sampled_from(["delete", "double", "swap", "replace", "insert", "cut"])):
            case "delete":
                del parts[at]
            case "double":
                parts.insert(at, parts[at])
            case "swap":
                parts[at], parts[other] = parts[other], parts[at]
            case "replace":
                parts[at] = draw(st.sampled_from(PIECES + ODD))
            case "insert":
                parts.insert(at, draw(st.sampled_from(PIECES + ODD)))
            case _:
                del parts[min(at, other) : max(at, other)]
    return path, "".join(parts)


@settings(max_examples=250, deadline=None)
@given(broken())
def test_broken_texts(case: tuple[str, str]) -> None:
    path, text = case
    front_end(text, path)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES + ODD), max_size=40).map(" ".join))
def test_soups_of_tokens(text: str) -> None:
    front_end(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    front_end(text)


# ---- hostile texts --------------------------------------------------------------------------------------------------


def with_param(value: str) -> str:
    return SOUND.replace("param layers = 4", f"param layers = 4\n  param odd = {value}")


def codes(found: Diagnostics) -> set[str]:
    return {d.code for d in found.items}


NOTHING = {
    "an empty file": "",
    "blanks": " \t \n\n  ",
    "comments": "# one\n# two",
    "a comment without an end of line": "# one",
    "a byte-order mark": "\ufeff",
}


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING.keys())
def test_texts_of_nothing(text: str) -> None:
    assert codes(front_end(text)) == {"MLM0105"}


SAME = {
    "CRLF": SOUND.replace("\n", "\r\n"),
    "tabs": SOUND.replace("  ", "\t"),
    "a byte-order mark": "\ufeff" + SOUND,
    "no end of line": SOUND.rstrip("\n"),
    "form feeds": SOUND.replace("\n\n", "\n\f\n"),
    "comments in other scripts": "# 日本語 е́ 🙂\n" + SOUND.replace("nodes = 1", "nodes = 1  # ノード"),
    "strings in other scripts": SOUND.replace("corpus/*.txt", "コーパス/*.txt"),
    "a million repeats": SOUND.replace("layers = 4", "layers = 1_000_000").replace("  expect params < 1_000_000\n", ""),
    "sums of 300 terms": with_param("1" + " + 1" * 300),
    "80 calls in one another": SOUND.replace("gelu(gate)", "gelu(" * 80 + "gate" + ")" * 80),
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME.keys())
def test_unusual_but_sound(text: str) -> None:
    found = front_end(text)
    assert [d for d in found.items if d.code != "MLM0513"] == []


def blocks(count: int, body: str) -> str:
    """SOUND with a chain of blocks, each calling the next, at the start of its layers."""
    chain = "".join(f"block Z{i}(x: [B, S, d]) {{\n{body.replace('NEXT', f'Z{i + 1}')}\n}}\n" for i in range(count))
    return chain + f"block Z{count}(x: [B, S, d]) {{ output x }}\n" + SOUND.replace("x + Attention", "Z0(x) + Attention")


DEEP = {
    "a megabyte of braces": "{" * 1_000_000,
    "a megabyte of brackets": "(" * 1_000_000,
    "brackets in a value": with_param("(" * 200 + "1" + ")" * 200),
    "minus signs": with_param("-" * 5000 + "1"),
    "nots": with_param("not " * 5000 + "true"),
    "a sum": with_param("1" + " + 1" * 5000),
    "powers": with_param("1" + " ** 1" * 5000),
    "attributes": with_param("tok" + ".weight" * 5000),
    "calls of calls": with_param("gelu" + "()" * 5000),
    "else if": "block D(x: [B, S, d]) {\n  if true { }" + " else if true { }" * 400 + "\n  output x\n}\n" + SOUND,
    "blocks in blocks": blocks(1500, "output NEXT(x)"),
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP.keys())
def test_deep_nesting(text: str) -> None:
    assert codes(front_end(text)) == {"MLM0011"}


HOSTILE = {
    "a megabyte of closing braces": ("}" * 20_000, "MLM0008"),
    "NUL": ("\0", "MLM0006"),
    "many NULs": ("\0" * 5000, "MLM0006"),
    "NUL in a name": (SOUND.replace("nodes", "no\0des"), "MLM0006"),
    "letters of other scripts in a name": (SOUND.replace("last", "последний"), "MLM0006"),
    "a line separator": ("\u2028" + SOUND, "MLM0006"),
    "half a character": (SOUND.replace("nodes", "no\ud83ddes"), "MLM0006"),
    "carriage returns alone": (SOUND.replace("\n", "\r"), "MLM0006"),
    "an unclosed string over the rest": (SOUND.replace('*.txt")', "*.txt)"), "MLM0005"),
    "NUL in a path": (SOUND.replace("std/devices", "std/\0devices"), "MLM0101"),
    "a folder as an import": (SOUND.replace("std/devices.mlm", "."), "MLM0101"),
    "a repeat beyond all numbers": (SOUND.replace("layers = 4", "layers = 10 ** 400"), "MLM0208"),
    "a number of 5000 digits": (SOUND.replace("layers = 4", "layers = " + "9" * 5000), "MLM0208"),
    "an infinite number": (SOUND.replace("lr = 2e-3", "lr = 1e999"), "MLM0208"),
    "an infinite quantity": (SOUND.replace("5 us", "1e999 us"), "MLM0208"),
    "a repeat of nothing": (SOUND.replace("layers = 4", "layers = 0"), "MLM0518"),
    "a repeat of less": (SOUND.replace("layers = 4", "layers = -4"), "MLM0518"),
    "a power tower": (with_param("9 ** 9 ** 9 ** 9"), "MLM0208"),
    "products out of reach": (with_param("1e308 * 10 + 0 * layers"), "MLM0208"),
    "a set that is not closed in a call": (SOUND.replace("lr = 2e-3", "lr = {"), "MLM0001"),
    "a mistake in repeats in repeats": (blocks(1, "repeat 1000 { repeat 1000 { x = 4 nowhere } }\n  output x"), "MLM0301"),
    "a set of calls": (SOUND.replace("weight_decay = 0.1", "weight_decay = {adamw(lr = 1), 2}"), "MLM0257"),
    "a set of modules": (SOUND.replace("weight_decay = 0.1", "weight_decay = {(1, devices)}"), "MLM0257"),
    "a block that calls itself": (SOUND.replace("output a +", "output Layer(a, heads = heads, ff = ff) +"), "MLM0107"),
    "blocks that double": (blocks(25, "a = NEXT(x)\n  output NEXT(a)"), "MLM0523"),
    "repeats in repeats": (
        blocks(1, "repeat 1000 { repeat 1000 { repeat 1000 { x = -x } } }\n  output NEXT(x)"), "MLM0523"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "code"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_texts(text: str, code: str) -> None:
    assert code in codes(front_end(text))


def test_a_name_of_a_megabyte() -> None:
    name = "n" * 1_000_000
    assert codes(front_end(re.sub(r"\bwidth\b", name, SOUND))) == set()
    assert codes(front_end(SOUND.replace("const width", f"const {name}"))) == {"MLM0201"}


@pytest.mark.parametrize(
    "text", ["", "=", "a=", "=1", "a=(", "a=\0", "small.layers=" + "(" * 200, "small.layers=-", "a.b.c=1", "\ud83d=1"]
)
def test_broken_overrides(text: str) -> None:
    found = front_end(SOUND, overrides=(text,))
    assert len(found.errors) == 1 and found.errors[0].span is not None
    assert found.errors[0].span.file == f"--set {text}"
