"""Makes docs/diagnostics.md out of the codes and docs/diagnostics.toml: `python docs/diagnostics.py`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from mlmdsl.diagnostics import CODES

HERE = Path(__file__).resolve().parent
RANGES = {
    "MLM00": "Characters and syntax",
    "MLM01": "Files, imports, items",
    "MLM02": "Names, types, arguments",
    "MLM03": "Quantities and settings",
    "MLM04": "Sizes and constraints that contradict each other",
    "MLM05": "Shapes and the graph",
    "MLM06": "Planning and saved plans",
    "MLM07": "The run and the command line",
    "MLM08": "Checkpoints of transformers",
}
INTRODUCTION = """# Diagnostics

Made by docs/diagnostics.py from docs/diagnostics.toml; every example that is set in a spec is compiled by the tests.

Each problem has a stable code. The first line names what is wrong, the excerpt where, a second label the other half of a
contradiction, and the help line what to write instead. All problems of a spec come in one run, twenty at most. The same records
are printed by `--format json` and `--format sarif`.

Exit status: 0 ok, 1 the spec is wrong (MLM00 to MLM05, MLM0810), 2 usage (MLM0731, MLM0750 to MLM0753), 3 no plan fits (MLM06),
4 the run, the import or the export failed (the rest of MLM07 and MLM08).
"""


def page(table: dict[str, dict[str, Any]]) -> str:
    """The whole page, a section per code."""
    parts = [INTRODUCTION]
    for prefix, title in RANGES.items():
        codes = [code for code in sorted(CODES) if code.startswith(prefix)]
        if codes:
            parts += [f"## {title}\n", *(_section(code, table[code]) for code in codes)]
    return "\n".join(parts)


def _section(code: str, entry: dict[str, Any]) -> str:
    lines = [f"### {code}: {CODES[code]}\n", entry["text"] + "\n"]
    if "in" in entry:
        lines.append(f"In {_place(entry['in'])}:\n")
    for kind, title in (("bad", ""), ("good", "Instead:\n")):
        example = _example(entry, kind)
        if example:
            lines += [title] * bool(title) + [f"```\n{example}\n```\n"]
    return "\n".join(lines)


def _place(kind: str) -> str:
    return {"file": "the spec", "alone": "the spec", "plan": "`plan { ... }`"}.get(kind, f"`{kind} {{ ... }}`")


def _example(entry: dict[str, Any], kind: str) -> str:
    """The fragment with its files and options as one would show them."""
    texts = [entry.get(kind, "").strip("\n")]
    texts += [f"--set {text}" for text in entry.get(f"{kind}_set", ())]
    texts += [f"--pin {text}" for text in entry.get(f"{kind}_pin", ())]
    for name, text in {**entry.get("files", {}), **(entry.get("bad_files", {}) if kind == "bad" else {})}.items():
        shown = text.strip("\n") if text.isprintable() or "\n" in text else "(not text)"
        texts.append(f"# {name}\n{shown}")
    return "\n\n".join(text for text in texts if text).replace("▸", "")


def load() -> dict[str, dict[str, Any]]:
    return tomllib.loads((HERE / "diagnostics.toml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    (HERE / "diagnostics.md").write_text(page(load()), encoding="utf-8")
