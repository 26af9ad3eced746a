"""What a pass made, as text, for `mlmdsl plan --emit`: stable JSON, spans left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mlmdsl.grammar.spec import Spec
from mlmdsl.grammar.syntax import File
from mlmdsl.graph.graph import Graph, Node


def syntax_json(tree: File) -> str:
    """The syntax tree: one object per node, its class under "node"."""
    return _dump(_plain(tree))


def spec_json(spec: Spec) -> str:
    """The resolved settings; the model, still text at this stage, by its name and the values in force."""
    settings = {name: dataclasses.asdict(getattr(spec, name)) for name in ("cluster", "train", "plan")}
    blocks = sorted({*spec.model.blocks, *spec.model.names})
    model = {"name": spec.model.model.name, "values": _plain(spec.model.values), "blocks": blocks}
    return _dump({"path": spec.path, "sha256": spec.sha256, "overrides": list(spec.overrides), "model": model, **settings})


def graph_json(graph: Graph) -> str:
    """Regions, nodes by path with types and weights, repeats folded."""
    regions = [
        {
            "name": region.name,
            "count": region.count,
            "carried": [dataclasses.asdict(c) for c in region.carried],
            "nodes": [_node(node) for node in region.nodes],
        }
        for region in graph.regions
    ]
    weights = {key: {"shape": list(w.shape), "count": graph.count_of(w)} for key, w in graph.weights.items()}
    whole = {
        "model": graph.model,
        "parameters": graph.parameters,
        "layers": graph.layers,
        "output": graph.output,
        "loss": graph.loss,
    }
    return _dump({**whole, "inputs": list(graph.inputs), "weights": weights, "regions": regions})


def _node(node: Node) -> dict[str, Any]:
    shown = {"path": node.path, "op": node.op, "inputs": list(node.inputs), "type": str(node.type)}
    return {**shown, "attributes": _plain(dict(node.attributes)), "weights": list(node.weights)}


def _plain(value: Any) -> Any:
    """Dataclasses and containers as JSON values; spans and whole source texts are dropped."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return {"node": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
