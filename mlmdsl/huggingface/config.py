"""config.json: the family it names, the params it stands for, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from mlmdsl.diagnostics import Diagnostic, RunError, SpecError
from mlmdsl.grammar.evaluate import did_you_mean
from mlmdsl.graph.graph import Graph
from mlmdsl.huggingface.expressions import Unknown, evaluate, value_of
from mlmdsl.huggingface.families import Family, common, families, family_of
from mlmdsl.huggingface.match import Difference, Match, match

CONFIG = "config.json"
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Config:
    """`raw` as in the file; `fields` with the family's other names and defaults."""

    family: Family
    raw: Mapping[str, Any]
    fields: Mapping[str, Any]
    params: Mapping[str, Any]  # of the family's .mlm file
    warnings: tuple[Diagnostic, ...]

    @property
    def sequence(self) -> int:
        return int(self.fields[self.family.sequence])

    @property
    def dtype(self) -> str:
        return str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32")

    def graph(self) -> Graph:
        """The model that the file describes. Raises RunError MLM0802."""
        try:
            return self.family.graph(self.params)
        except SpecError as problem:
            fail("MLM0802", f"the sizes in {CONFIG} make no model: {problem.diagnostics[0].message}")


def read_config(folder: Path) -> Config:
    """Raises RunError: MLM0800 to MLM0804."""
    raw = _raw(folder)
    family = _family(raw)
    fields = _fields(family, raw)
    _check_allowed(family, fields)
    return Config(family, raw, fields, _params(family, fields), tuple(_unknown_fields(family, raw)))


def _raw(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    help = "name a folder that transformers' save_pretrained has written, or that was downloaded from its hub"
    if not path.is_file():
        fail("MLM0800", f"{folder} is no checkpoint of transformers: it has no {CONFIG}", help)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail("MLM0802", f"{path} cannot be read: {error}")
    if not isinstance(raw, dict):
        fail("MLM0802", f"{path} is no table of fields")
    return cast(dict[str, Any], raw)


def _family(raw: Mapping[str, Any]) -> Family:
    name = str(raw.get("model_type"))
    if (family := family_of(name)) is not None:
        return family
    known = sorted(kind for family in families().values() for kind in family.model_types)
    near = did_you_mean(name, known)
    fail("MLM0803", f"there is no family for model_type {name!r}", near or f"known are {', '.join(known)}")


def _fields(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file's own, those that the family has under several names, and defaults for what is left out or null."""
    fields = {name: value for name, value in raw.items() if value is not None}
    for name, paths in family.fields.items():
        values = (value for path in paths if (value := _at(raw, path)) is not None)
        if (value := next(values, None)) is not None:
            fields[name] = value
    for name, entry in family.defaults.items():
        if name not in fields:
            fields[name] = _field(name, entry, fields)
    return fields


def _at(raw: Mapping[str, Any], path: str) -> Any:
    value: Any = raw
    for part in path.split("."):
        if not isinstance(value, dict):
            return None
        value = cast(dict[str, Any], value).get(part)
    return value


def _field(name: str, entry: Any, fields: Mapping[str, Any]) -> Any:
    try:
        return value_of(entry, fields)
    except Unknown as problem:
        fail("MLM0802", f"{CONFIG} has neither {name} nor what it follows from: {problem}")


def _params(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    tables = [family.params, *(t for t in family.params_where if _param("condition", t["condition"], fields))]
    return {name: _param(name, text, fields) for table in tables for name, text in table.items() if name != "condition"}


def _param(name: str, text: str, fields: Mapping[str, Any]) -> Any:
    try:
        return evaluate(text, fields)
    except Unknown as problem:
        fail("MLM0802", f"{CONFIG} does not say what `{name} = {text}` asks for: {problem}")


def _check_allowed(family: Family, fields: Mapping[str, Any]) -> None:
    if fields.get("quantization_config"):
        fail("MLM0809", "the checkpoint is quantized", "save it again in float32 or bfloat16")
    wrong = [
        Diagnostic(
            "MLM0804",
            f"{CONFIG} has {name} = {json.dumps(fields[name])}, which {family.name}'s model does not cover",
            help=f"it covers {' and '.join(json.dumps(value) for value in allowed)}",
        )
        for name, allowed in family.allowed.items()
        if fields.get(name) not in allowed
    ]
    wrong += [
        Diagnostic("MLM0804", f"{CONFIG} has {name} = {json.dumps(fields[name])}, which {family.name}'s model does not cover")
        for name in family.without
        if fields.get(name)
    ]
    wrong += [
        Diagnostic("MLM0804", f"{CONFIG} has {name} that are not {' and '.join(pattern)} in turn")
        for name, pattern in family.pattern.items()
        if any(kind != pattern[i % len(pattern)] for i, kind in enumerate(fields.get(name) or ()))
    ]
    if wrong:
        raise RunError(wrong)


def _unknown_fields(family: Family, raw: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """What nobody has thought of may matter: it is said."""
    aliases = {path.partition(".")[0] for paths in family.fields.values() for path in paths}
    known = {
        *common().harmless,
        *family.harmless,
        *family.defaults,
        *family.allowed,
        *family.without,
        *family.pattern,
        *family.config,
        family.sequence,
        *aliases,
    }
    known |= {name for name in raw if any(name in text for text in family.params.values())}
    unknown = sorted(name for name, value in raw.items() if name not in known and value is not None)
    if unknown:
        more = f" and {len(unknown) - _MOST_SHOWN} more" if len(unknown) > _MOST_SHOWN else ""
        shown = ", ".join(unknown[:_MOST_SHOWN]) + more
        yield Diagnostic("MLM0813", f"fields of {CONFIG} that are not looked at: {shown}", severity="warning")


# ---- from a model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recognised:
    """A model as one of a family: its params, the family's own graph with them, and what corresponds to what."""

    family: Family
    params: Mapping[str, Any]
    graph: Graph
    match: Match


def recognise(graph: Graph, only: str | None = None, model_type: str | None = None) -> Recognised:
    """The family whose model computes what `graph` does: of several that of `model_type`, else the first by name. Raises
    RunError MLM0811 with what the nearest one differs in."""
    if only is not None and only not in families():
        near = did_you_mean(only, families())
        fail("MLM0811", f"there is no family {only!r}", near or f"known are {', '.join(families())}")
    nearest: tuple[int, Family, Difference] | None = None
    ordered = sorted(families().values(), key=lambda family: model_type not in family.model_types)
    for family in (families()[only],) if only else ordered:
        found = recognised_as(family, graph)
        if isinstance(found, Recognised):
            return found
        if nearest is None or found.distance > nearest[0]:
            nearest = (found.distance, family, found)
    assert nearest is not None
    _, family, difference = nearest
    raise RunError([_not_of(family, difference)])


def recognised_as(family: Family, graph: Graph) -> Recognised | Difference:
    first: Difference | None = None
    for variant in family.variants:
        try:
            loose = match(family.graph(variant), graph, loosely=True)
            params = {**variant, **params_of(family, variant, loose, graph)}
            reference = family.graph(params)
            return Recognised(family, params, reference, _exactly(reference, graph))
        except Difference as difference:
            first = difference if first is None or difference.distance > first.distance else first
        except SpecError as problem:
            first = first or Difference(f"sizes that {family.name} cannot have: {problem.diagnostics[0].message}", None)
    assert first is not None
    return first


def _exactly(reference: Graph, graph: Graph) -> Match:
    """Of two whose operations agree: a difference in settings is a small one."""
    try:
        return match(reference, graph)
    except Difference as difference:
        difference.distance += len(graph.nodes)
        raise


def _not_of(family: Family, difference: Difference) -> Diagnostic:
    return Diagnostic(
        "MLM0811",
        f"the model is of no family that transformers can load; the nearest is {family.name}",
        span=difference.node.span if difference.node else None,
        label=difference.message,
        help="the name maps are data: mlmdsl/huggingface/families has one pair of files for each family",
    )


def params_of(family: Family, known: Mapping[str, Any], loose: Match, graph: Graph) -> dict[str, Any]:
    """Those that are not known, as the model has them; `per` divides by another one."""
    open_ = {name: place for name, place in family.model.items() if name not in known}
    found = {name: _found(place, loose, graph) for name, place in open_.items()}
    return found | {name: found[name] // found[place["per"]] for name, place in open_.items() if "per" in place}


def _found(place: Mapping[str, Any], loose: Match, graph: Graph) -> Any:
    """A param's value in a model."""
    if "repeat" in place:
        name = loose.regions[place["repeat"]]
        count = next(region.count for region in graph.regions if region.name == name and region.repeated)
        return count * int(place.get("times", 1))
    if "weight" in place:
        return graph.weights[loose.weights[place["weight"]]].shape[int(place["dim"])]
    node = graph.nodes[loose.nodes[place["node"]]]
    return node.type.shape[int(place["dim"])] if "dim" in place else node.attrs[place["attribute"]]


def config_of(found: Recognised, sequence: int, dtype: str, carried: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model. `carried`: that of the checkpoint it came from, for fields that say nothing about the model."""
    family, scope = found.family, {**found.params, "sequence": sequence}
    computed: dict[str, Any] = value_of(dict(family.config), scope)
    for table in family.config_where:
        if evaluate(table["condition"], scope):
            computed |= value_of({name: entry for name, entry in table.items() if name != "condition"}, scope)
    kept = {name: carried[name] for name in common().carried if name in carried}
    head = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    return {**head, **computed, **kept, "torch_dtype": dtype}


def fail(code: str, message: str, help: str = "") -> NoReturn:
    raise RunError([Diagnostic(code, message, help=help)])
