"""Diagnostics as terminal text, JSON and SARIF 2.1.0."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlmdsl import __version__
from mlmdsl.diagnostics import CODES, MAX_DIAGNOSTICS, Diagnostic, Span

_RED, _YELLOW, _BLUE, _GREEN, _BOLD, _OFF = "\x1b[31m", "\x1b[33m", "\x1b[34m", "\x1b[32m", "\x1b[1m", "\x1b[0m"
_TAB = 4


def render(diagnostics: Iterable[Diagnostic], sources: Mapping[str, str], *, format: str = "text", color: bool = False) -> str:
    """All problems in the order of the source, the first MAX_DIAGNOSTICS of them in text; formats: text, json, sarif."""
    ordered = sorted(diagnostics, key=_order)
    if format == "json":
        return _json([_record(d) for d in ordered])
    if format == "sarif":
        return _json(_sarif(ordered))
    shown = [_text(d, sources, color) for d in ordered[:MAX_DIAGNOSTICS]]
    rest = len(ordered) - len(shown)
    return "\n\n".join([*shown, *([f"and {rest} more"] if rest else [])])


def _json(value: Any) -> str:
    """As UTF-8 can hold it: half a surrogate pair, which a command line can bring, becomes `?`."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


def _order(diagnostic: Diagnostic) -> tuple[str, int, int]:
    span = diagnostic.span
    return (span.file, span.line, span.column) if span else ("", 0, 0)


# ---- text -----------------------------------------------------------------------------------------------------------


def _text(diagnostic: Diagnostic, sources: Mapping[str, str], color: bool) -> str:
    def paint(code: str, text: str) -> str:
        return f"{code}{text}{_OFF}" if color else text

    tone = _RED if diagnostic.severity == "error" else _YELLOW
    head = paint(tone + _BOLD, f"{diagnostic.severity}[{diagnostic.code}]") + paint(_BOLD, f": {_safe(diagnostic.message)}")
    lines = [head]
    if diagnostic.span is not None:
        labels = [(diagnostic.span, "^", diagnostic.label, tone)]
        labels += [(label.span, "-", label.text, _BLUE) for label in diagnostic.secondary]
        lines += _excerpts(labels, sources, paint)
    if diagnostic.help:
        lines.append(paint(_GREEN, "help") + f": {_safe(diagnostic.help)}")
    return "\n".join(lines)


def _excerpts(labels: Sequence[tuple[Span, str, str, str]], sources: Mapping[str, str], paint: Any) -> list[str]:
    """The lines of all labels, each under a header with its file where the file changes."""
    width = max(len(str(span.line)) for span, *_ in labels)
    lines: list[str] = []
    file = ""
    for span, mark, text, tone in labels:
        if span.file != file:
            lines.append(" " * width + paint(_BLUE, "--> ") + f"{span.file}:{span.line}:{span.column}")
            file = span.file
        source = _line(sources.get(span.file, ""), span.line)
        if source is None:
            continue
        before, marked = source[: span.column - 1], source[span.column - 1 : _end(span, source)]
        lines.append(paint(_BLUE, f"{span.line:>{width}} |") + f" {_expanded(source)}".rstrip())
        pointer = " " * _columns(before) + paint(
            tone, mark * max(1, _columns(before + marked) - _columns(before)) + (f" {text}" if text else "")
        )
        lines.append(paint(_BLUE, " " * width + " |") + f" {pointer}")
    return lines


def _line(source: str, number: int) -> str | None:
    """One line of the text; the end of the file counts as an empty one."""
    lines = source.split("\n")
    return lines[number - 1].rstrip("\r") if 0 < number <= len(lines) else None


def _end(span: Span, source: str) -> int:
    return span.end_column - 1 if span.end_line == span.line else len(source.rstrip())


def _expanded(text: str) -> str:
    """Tabs as spaces, control characters as `?`, so that carets stand under what they mean."""
    shown = ""
    for character in text:
        shown += " " * (_TAB - _columns(shown) % _TAB) if character == "\t" else _safe(character)
    return shown


def _safe(text: str) -> str:
    """Without characters that a terminal acts on instead of showing them."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n" else c for c in text)


def _columns(text: str) -> int:
    """Terminal columns of a text: wide characters take two, combining ones none."""
    total = 0
    for character in text:
        if character == "\t":
            total += _TAB - total % _TAB
        elif not unicodedata.combining(character):
            total += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return total


# ---- JSON and SARIF -------------------------------------------------------------------------------------------------


def _place(span: Span) -> dict[str, Any]:
    return {
        "file": span.file,
        "line": span.line,
        "column": span.column,
        "end_line": span.end_line,
        "end_column": span.end_column,
    }


def _record(diagnostic: Diagnostic) -> dict[str, Any]:
    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "span": _place(diagnostic.span) if diagnostic.span else None,
        "label": diagnostic.label,
        "secondary": [{"span": _place(label.span), "text": label.text} for label in diagnostic.secondary],
        "help": diagnostic.help,
    }


def _location(span: Span, text: str = "") -> dict[str, Any]:
    region = {"startLine": span.line, "startColumn": span.column, "endLine": span.end_line, "endColumn": span.end_column}
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": span.file}, "region": region}}
    return location | ({"message": {"text": text}} if text else {})


def _sarif(diagnostics: Sequence[Diagnostic]) -> dict[str, Any]:
    """One run; rules are the codes that occur, results point at them."""
    codes = sorted({d.code for d in diagnostics})
    rules = [{"id": code, "shortDescription": {"text": CODES[code]}} for code in codes]
    results = [
        {
            "ruleId": d.code,
            "ruleIndex": codes.index(d.code),
            "level": d.severity,
            "message": {"text": d.message + (f" (help: {d.help})" if d.help else "")},
            "locations": [_location(d.span)] if d.span else [],
            "relatedLocations": [_location(label.span, label.text) for label in d.secondary],
        }
        for d in diagnostics
    ]
    driver = {"name": "mlmdsl", "version": __version__, "rules": rules}
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}],
    }
