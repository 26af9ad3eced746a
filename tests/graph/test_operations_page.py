"""docs/operations.md lists every operation as the catalogue has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmdsl.graph.calls import REQUIRED, SIGNATURES, Signature
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.tensor import TensorType

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
MARK = "## The catalogue\n"

# Types to ask each operation for its strategies with, on an axis of two
_X = TensorType("float", ("B", "S", 8))
_HEADS = TensorType("float", ("B", "S", 4, 8))
_TOKENS = TensorType("int", ("B", "S"))
_ROWS = TensorType("float", ("2*B*S", 8))
_ROUTING = TensorType("int", (3, "2*B*S+8"))
_ASKED = {
    "embedding": ((_TOKENS,), {"vocab": 8, "dim": 8, "std": 0.02}),
    "position": ((_TOKENS,), {"max": 8, "dim": 8, "std": 0.02}),
    "linear": ((_X,), {"out": 8, "std": 0.02}),
    "layer_norm": ((_X,), {"eps": 1e-5, "bias": True, "affine": True}),
    "rms_norm": ((_X,), {"eps": 1e-5, "offset": 0.0, "affine": True}),
    "add": ((_X, _X), {}),
    "subtract": ((_X, _X), {}),
    "multiply": ((_X, _X), {}),
    "divide": ((_X, _X), {}),
    "split_heads": ((_X,), {"heads": 4}),
    "merge_heads": ((_HEADS,), {}),
    "rotary": ((_HEADS,), {"dim": None, "interleaved": False}),
    "attend": (
        (*(_HEADS,) * 3, TensorType("float", (4, "S", "S"))),
        {"causal": True, "scale": None, "window": None, "softcap": None},
    ),
    "relative_position": (
        (_X,),
        {"heads": 4, "buckets": 32, "max_distance": 128, "bidirectional": True, "std": 0.02},
    ),
    "alibi": ((_X,), {"heads": 4, "bidirectional": False}),
    "cross_entropy": ((_X, _TOKENS), {}),
    "top_k": ((_X,), {"k": 2, "groups": 1, "group_limit": None}),
    "balanced_top_k": ((_X,), {"k": 2, "rate": 1e-3, "groups": 1, "group_limit": None}),
    "add_loss": ((_X, _X), {}),
    "load": ((_X,), {}),
    "limit": ((_X,), {"top_k": 2, "factor": 1.25}),
    "first": ((_X,), {"size": 4}),
    "last": ((_X,), {"size": 4}),
    "concat": ((_HEADS, TensorType("float", ("B", "S", 1, 4))), {}),
    "sum": ((_X,), {"keep": False}),
    "route": ((_X,), {"top_k": 2}),
    "dispatch": ((_X, _ROUTING), {}),
    "grouped_linear": ((_ROWS, _ROUTING), {"out": 8, "std": 0.02}),
    "combine": ((_ROWS, _X, _ROUTING), {}),
}


def called(name: str, signature: Signature) -> str:
    """`Linear(x, out = none, bias = none, ...)`."""
    arguments = [f"{a.name}" if a.default is REQUIRED else f"{a.name} = {shown(a.default)}" for a in signature.arguments]
    optional = [f"{tensor} = none" for tensor in signature.optional]
    return f"{name}({', '.join([*signature.tensors, *optional, *arguments])})"


def shown(value: object) -> str:
    return (
        "none"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def catalogue() -> str:
    lines: list[str] = []
    for name, op in CATALOGUE.items():
        types, attrs = _ASKED.get(name, ((_X,), {}))
        weights = op.weights(types, attrs)
        offered = op.strategies(types, op.infer(types, attrs), tuple(w.shape for w in weights), attrs, 2)
        lines += [f"### {name}", "", op.doc, ""]
        lines += [f"    {called(spelled, s)}" for spelled, s in SIGNATURES.items() if s.op == name]
        lines += [""] if any(s.op == name for s in SIGNATURES.values()) else []
        if weights:
            lines += [f"Weights: {', '.join(f'`{w.leaf}`' for w in weights)}.", ""]
        lines += ["| strategy | inputs | weights | output |", "| --- | --- | --- | --- |"]
        for s in offered:
            inputs, held = ", ".join(map(str, s.inputs)) or "-", ", ".join(map(str, s.weights)) or "-"
            lines.append(f"| {s.name} | {inputs} | {held} | {s.output} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def test_the_page_is_what_the_catalogue_says(request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text(encoding="utf-8")
    written = text[: text.index(MARK)] + MARK + "\n" + catalogue()
    if request.config.getoption("--update-golden"):
        PAGE.write_text(written, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == written
