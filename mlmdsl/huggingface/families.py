"""The family files, read: NAME.toml beside NAME.mlm."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlmdsl.compile import compile_spec
from mlmdsl.graph.graph import Graph
from mlmdsl.huggingface.expressions import literal

FOLDER = Path(__file__).resolve().parent / "families"
_PARAM = re.compile(r"^param (\w+)(: \w+)? = (.+)$", re.M)

Found = Mapping[str, Any]  # where a param is found in a model: {repeat, times}, {weight, dim} or {node, attribute | dim}


@dataclass(frozen=True)
class Layout:
    """How weights of ours lie in one of theirs.

    `theirs` is a name, or several that differ in an axis of their own: `experts.{e}.w1.weight`. `axes` is "THEIRS -> OURS", the
    dims of both as products of named axes: "in (part out) -> (part out) in". The axis `part` counts the weights of `ours`,
    `parts` says how long each is on it (1). `sizes` gives axes that the shapes do not settle."""

    ours: tuple[str, ...]
    theirs: str
    axes: str
    parts: tuple[Any, ...]
    sizes: Mapping[str, Any]
    over: Mapping[str, Any]  # axes that theirs' names count, and how far
    where: str  # a condition on the params


@dataclass(frozen=True)
class Family:
    """One pair of files; docs/huggingface.md explains the tables. Strings are expressions of mlm (expressions.py)."""

    name: str
    model_types: tuple[str, ...]
    architecture: str
    base: str  # what names have in front where the checkpoint is of the whole model, and lack where it is of its base
    sequence: str  # config.json's longest sequence
    variants: tuple[Mapping[str, Any], ...]  # params that change which operations there are
    fields: Mapping[str, Sequence[str]]
    defaults: Mapping[str, Any]
    allowed: Mapping[str, Sequence[Any]]
    without: tuple[str, ...]  # fields that must not be set
    pattern: Mapping[str, Sequence[str]]  # lists with an entry for each layer, as often as there are layers
    params: Mapping[str, str]
    params_where: tuple[Mapping[str, str], ...]
    model: Mapping[str, Found]
    config: Mapping[str, Any]
    config_where: tuple[Mapping[str, Any], ...]
    layouts: tuple[Layout, ...]
    ignored: tuple[str, ...]
    harmless: frozenset[str]
    text: str  # the .mlm file, with a cluster and a train item

    @property
    def path(self) -> str:
        return str(FOLDER / f"{self.name}.mlm")

    def with_params(self, params: Mapping[str, Any]) -> str:
        """The text with other values of its params."""

        def replaced(found: re.Match[str]) -> str:
            name, kind, value = found[1], found[2] or "", found[3]
            return f"param {name}{kind} = {_fitting(params[name], kind)}" if name in params else f"param {name}{kind} = {value}"

        return _PARAM.sub(replaced, self.text)

    def graph(self, params: Mapping[str, Any]) -> Graph:
        """The family's model with these params. Raises SpecError where their sizes make none."""
        done = compile_spec(self.with_params(params), path=self.path, until="graph")
        assert done.graph is not None
        return done.graph


def _fitting(value: Any, kind: str) -> str:
    whole = isinstance(value, float) and kind != ": float" and value.is_integer()
    return literal(int(value) if whole else value)


@dataclass(frozen=True)
class Common:
    """What all families share: fields of config.json, and files that are copied along."""

    harmless: frozenset[str]
    carried: tuple[str, ...]
    files: tuple[str, ...]


@cache
def common() -> Common:
    raw = tomllib.loads((FOLDER / "common.toml").read_text(encoding="utf-8"))
    return Common(frozenset(raw["harmless"]), tuple(raw["carried"]), tuple(raw["files"]))


@cache
def families() -> Mapping[str, Family]:
    """All, by name."""
    found = [_family(path) for path in sorted(FOLDER.glob("*.toml")) if path.stem != "common"]
    return {family.name: family for family in found}


def family_of(model_type: str) -> Family | None:
    return next((family for family in families().values() if model_type in family.model_types), None)


def _family(path: Path) -> Family:
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    simple = [Layout((ours,), theirs, "", (), {}, {}, "true") for ours, theirs in raw["weights"].items()]
    text = path.with_suffix(".mlm").read_text(encoding="utf-8")
    tail = (FOLDER / "tail.mlm").read_text(encoding="utf-8").replace("next_token()", raw.get("objective", "next_token()"))
    ignored: Mapping[str, Any] = raw.get("ignored", {})
    return Family(
        name=path.stem,
        model_types=tuple(raw["model_types"]),
        architecture=raw["architecture"],
        base=raw["base"],
        sequence=raw["sequence"],
        variants=tuple(raw.get("variants", [{}])),
        fields=raw.get("fields", {}),
        defaults=raw.get("defaults", {}),
        allowed=raw.get("allowed", {}),
        without=tuple(raw.get("without", ())),
        pattern=raw.get("pattern", {}),
        params=raw["params"],
        params_where=tuple(raw.get("params_where", ())),
        model=raw["model"],
        config=raw["config"],
        config_where=tuple(raw.get("config_where", ())),
        layouts=(*simple, *(_layout(entry, raw.get("sizes", {})) for entry in raw.get("layouts", ()))),
        ignored=tuple(ignored.get("names", ())),
        harmless=frozenset(ignored.get("fields", ())),
        text=f"{text}\n{tail}",
    )


def _layout(entry: Mapping[str, Any], sizes: Mapping[str, Any]) -> Layout:
    parts = tuple(entry.get("parts", (1,) * len(entry["ours"])))
    return Layout(
        ours=tuple(entry["ours"]),
        theirs=entry["theirs"],
        axes=entry.get("axes", ""),
        parts=parts,
        sizes=sizes,
        over=entry.get("over", {}),
        where=entry.get("where", "true"),
    )
