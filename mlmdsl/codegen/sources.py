"""The spec beside its program: the entry file as spec.mlm and what it imports, so that the directory compiles again by itself.

An imported file keeps its place relative to the entry file where that lies inside the program's directory; one from elsewhere
goes to imports/, and the import strings that led to it are rewritten in the copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from mlmdsl.codegen.text import literal
from mlmdsl.diagnostics import Diagnostics, Span
from mlmdsl.grammar.library import shipped
from mlmdsl.grammar.parser import parse
from mlmdsl.grammar.spec import Spec
from mlmdsl.grammar.syntax import Import

TAKEN = frozenset({"spec.mlm", "program.py", "plan.json", "metrics.jsonl"})


def spec_files(spec: Spec) -> dict[str, str]:
    """Text of spec.mlm and of every imported file but the standard library, by path inside the program's directory, in the
    order of reading."""
    entry = os.path.abspath(spec.path)
    texts = {os.path.abspath(path): text for path, text in spec.sources.items() if not shipped(path)}
    places = _places(entry, sorted(texts))
    return {places[path]: _rewritten(path, text, places) for path, text in texts.items()}


def _places(entry: str, paths: Iterable[str]) -> Mapping[str, str]:
    places = {entry: "spec.mlm"}
    for path in paths:
        relative = os.path.relpath(path, os.path.dirname(entry)).replace(os.sep, "/")
        inside = not relative.startswith("../") and relative not in TAKEN
        places.setdefault(path, relative if inside else _free(f"imports/{os.path.basename(path)}", places.values()))
    return places


def _free(name: str, taken: Iterable[str]) -> str:
    used = set(taken)
    stem, dot = os.path.splitext(name)
    return next(n for n in (name, *(f"{stem}_{i}{dot}" for i in range(2, len(used) + 3))) if n not in used)


def _rewritten(path: str, text: str, places: Mapping[str, str]) -> str:
    """The text with the import strings changed that would lead elsewhere now."""
    here, lines = os.path.dirname(places[path]), text.splitlines(keepends=True)
    imports = [item for item in parse(text, path, Diagnostics()).items if isinstance(item, Import)]
    for item in reversed(imports):
        target = os.path.normpath(os.path.join(os.path.dirname(path), item.path))
        if target in places and os.path.normpath(os.path.join(here, item.path)).replace(os.sep, "/") != places[target]:
            moved = os.path.relpath(places[target], here or ".").replace(os.sep, "/")
            _replace(lines, item.path_span, literal(moved))
    return "".join(lines)


def _replace(lines: list[str], span: Span, text: str) -> None:
    line = lines[span.line - 1]
    lines[span.line - 1] = line[: span.column - 1] + text + line[span.end_column - 1 :]
