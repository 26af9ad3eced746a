"""The examples of docs/diagnostics.toml as whole specs: a fragment is set into a small model, cluster and training."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmdsl.diagnostics import Diagnostics, PlanError
from mlmdsl.grammar.modules import read_file
from mlmdsl.grammar.resolve import Resolved, resolve
from mlmdsl.graph.build import build
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.check import check
from mlmdsl.planner.search import search

TABLE = Path(__file__).resolve().parents[2] / "docs" / "diagnostics.toml"
MARK = "▸"
ENTRY = "spec.mlm"

_MODEL = """model tiny {{
  param d = 64
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 256, dim = d)
  h = tok
{lines}
  output Linear(RMSNorm(h), weight = tok.weight)
}}
"""
_ATTENTION = "  repeat 4 as blocks { h = h + Attention(h, heads = 4, kv_heads = 2, causal = true) }"  # what a plan can split
_SETTINGS = {
    "cluster": {"nodes": "1", "devices_per_node": "8", "device": "cpu(memory = 2 GiB, fp32 = 40 GFLOPS)"},
    "train": {
        "data": 'text("corpus.txt")',
        "seq_len": "64 tok",
        "batch": "8 seq",
        "stop": "10 steps",
        "optimizer": "adamw(lr = 1e-3)",
        "precision": "fp32",
    },
}


@dataclass(frozen=True)
class Case:
    """One spec with what is given on the command line; `marked` still has MARK where the diagnostic should point."""

    marked: str
    files: dict[str, str]
    overrides: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()

    def expected(self) -> tuple[str, int, int] | None:
        """File, line and column of the mark."""
        texts = {ENTRY: self.marked, **self.files}
        texts |= {f"--set {_plain(o)}": o for o in self.overrides} | {f"--pin {_plain(p)}": p for p in self.pins}
        for name, text in texts.items():
            if MARK in text:
                before = text[: text.index(MARK)]
                return name, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        return None

    def run(self) -> tuple[Diagnostics, Resolved, Graph | None]:
        """Through the front half of the compiler."""
        found = Diagnostics()

        def read(path: str) -> str:
            if path in self.files:
                text = _plain(self.files[path])
                return text.encode("latin-1").decode("utf-8") if "\0" not in text else b"\xff".decode("utf-8")
            return read_file(path)

        overrides, pins = [_plain(o) for o in self.overrides], [_plain(p) for p in self.pins]
        resolved = resolve(ENTRY, _plain(self.marked), found, overrides=overrides, pins=pins, read=read)
        graph = build(resolved.model, found, resolved.spec and resolved.spec.train) if resolved.model else None
        return found, resolved, graph

    def checked(self) -> tuple[Diagnostics, Resolved, Graph | None]:
        """Through the check of the constraints as well."""
        found, resolved, graph = self.run()
        if resolved.spec and graph and not found.errors:
            check(resolved.spec, graph, found)
        return found, resolved, graph

    def planned(self) -> tuple[Diagnostics, Resolved, Graph | None]:
        """Through the search, whose diagnostic is added."""
        found, resolved, graph = self.checked()
        if resolved.spec and graph and not found.errors:
            try:
                search(resolved.spec, graph)
            except PlanError as problem:
                found.items += problem.diagnostics
        return found, resolved, graph


def _plain(text: str) -> str:
    return text.replace(MARK, "")


def table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def cases(entry: dict[str, Any]) -> tuple[Case, Case] | None:
    """The bad and the good spec of an entry; None for one that only the planner or a run can show."""
    if "in" not in entry:
        return None
    files: dict[str, str] = entry.get("files", {})

    def case(kind: str, own: dict[str, str]) -> Case:
        text = wrapped(entry["in"], entry.get(kind, ""))
        return Case(text, own, tuple(entry.get(f"{kind}_set", ())), tuple(entry.get(f"{kind}_pin", ())))

    return case("bad", files | entry.get("bad_files", {})), case("good", files)


def wrapped(kind: str, fragment: str) -> str:
    """The whole spec around a fragment."""
    fragment = fragment.strip("\n")
    if kind == "alone":
        return fragment + "\n"
    items = fragment + "\n" if kind == "file" else ""
    if kind == "plan":
        items = "plan {\n" + _indented(fragment) + "\n}\n"
    if not re.search(r"^▸?model\b", items, re.M):
        items += _MODEL.format(lines=_indented(fragment)) if kind == "model" else _MODEL.format(lines=_ATTENTION)
    for item, settings in _SETTINGS.items():
        if not re.search(rf"^▸?{item}\b", items, re.M):
            items += _config(item, settings, fragment if kind == item else "")
    return items


def _config(item: str, settings: dict[str, str], fragment: str) -> str:
    """The item with `fragment`, whose settings replace those of the same name."""
    given = set(re.findall(r"^▸?(\w+)", fragment, re.M))
    rest = "".join(f"  {key} = {value}\n" for key, value in settings.items() if key not in given)
    return f"{item} {'here ' if item == 'cluster' else ''}{{\n{rest}{_indented(fragment)}\n}}\n"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
