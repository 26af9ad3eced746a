"""Syntax to Spec: imports, inheritance, overrides, settings.

Each part resolves on its own, so that a mistake in one does not hide those in the others: `Resolved` has what could be
resolved, and `Resolved.spec` the whole when all could.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

from mlmdsl.diagnostics import Diagnostics, Label, Span
from mlmdsl.frozen import frozen
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.cluster import POOL, read_cluster
from mlmdsl.grammar.constraints import read_objective, read_pins, read_rules
from mlmdsl.grammar.evaluate import POISON, Evaluator, did_you_mean, one_of
from mlmdsl.grammar.library import DEVICES, SHIPPED, Lazy, shipped, std_blocks
from mlmdsl.grammar.modules import Loader, Module, read_file
from mlmdsl.grammar.overrides import Overrides
from mlmdsl.grammar.settings import Settings
from mlmdsl.grammar.spec import BlockSource, Cluster, ModelSource, PlanConstraints, Spec, Train, fingerprint
from mlmdsl.grammar.train import read_train

_WORDS = frozenset({"precision", "kind", "documents"})  # settings whose values are bare words
_Statement = TypeVar("_Statement", bound=s.Node)
_Item = TypeVar("_Item", bound=s.Item)


@frozen
class Resolved:
    path: str
    folder: str
    sources: Mapping[str, str]
    sha256: str
    overrides: tuple[str, ...]
    model: ModelSource | None
    cluster: Cluster | None
    train: Train | None
    plan: PlanConstraints | None

    @property
    def spec(self) -> Spec | None:
        if self.model is None or self.cluster is None or self.train is None or self.plan is None:
            return None
        return Spec(
            path=self.path,
            folder=self.folder,
            sources=dict(self.sources),
            sha256=self.sha256,
            overrides=self.overrides,
            model=self.model,
            cluster=self.cluster,
            train=self.train,
            plan=self.plan,
        )


def resolve(
    path: str,
    text: str,
    diagnostics: Diagnostics,
    *,
    overrides: Sequence[str] = (),
    pins: Sequence[str] = (),
    folder: str | None = None,
    read: Callable[[str], str] = read_file,
) -> Resolved:
    """Everything of `text` but the model's shapes. overrides: "gpt2.d=1024"; pins: "tensor=4", stronger than the text's.
    folder: what relative paths of data are relative to, where that is not the text's own."""
    start = folder or os.path.dirname(os.path.abspath(path))
    loader = Loader(read, diagnostics)
    entry = loader.load(path, text)
    changes = Overrides(overrides, diagnostics)
    resolver = _Resolver(loader, entry, changes)
    model = resolver.model()
    cluster = resolver.cluster()
    train = resolver.train(start)
    plan = resolver.plan(pins)
    changes.report_unused()
    files = {p: m.file.source for p, m in loader.modules.items() if not shipped(p)}
    digest = fingerprint(files.values(), overrides)
    return Resolved(path, start, files, digest, tuple(overrides), model, cluster, train, plan)


class _Names(Evaluator):
    """A module's scope; names of the device library are looked up when nothing else has them."""

    def __init__(self, scope: Mapping[str, Any], diagnostics: Diagnostics, library: Callable[[], Mapping[str, Any]]):
        super().__init__(scope, diagnostics)
        self._library = library

    def name(self, expr: s.Name) -> Any:
        if expr.name in self.scope:
            return self.scope[expr.name]
        devices = self._library()
        if expr.name in devices:
            return devices[expr.name]
        help = did_you_mean(expr.name, [*self.scope, *devices])
        return self.poison("MLM0201", f"there is no `{expr.name}` here", expr.span, help=help)


@dataclass
class _Resolver:
    loader: Loader
    entry: Module
    changes: Overrides

    @property
    def _report(self) -> Callable[..., None]:
        return self.loader.diagnostics.report

    # ---- names ------------------------------------------------------------------------------------------------------

    def _library(self) -> Mapping[str, Any]:
        module = self.loader.load(DEVICES, read_file(DEVICES))
        return self._values(module)

    def _values(self, module: Module) -> Mapping[str, Any]:
        """Consts and params of a file, imported files under their names."""
        if module.path in SHIPPED and not hasattr(module, "values"):
            evaluate = self._evaluator
            defined: Callable[[str], Any] = lambda name: evaluate(module).defined(module.constants[name])  # noqa: E731
            module.values = Lazy(module.constants, defined)  # type: ignore[attr-defined]
        if not hasattr(module, "values"):
            values: dict[str, Any] = {name: self._values(other) for name, other in module.imports.items()}
            values |= dict.fromkeys(module.broken, POISON)
            module.values = values  # type: ignore[attr-defined]
            for item in module.file.items:
                if isinstance(item, s.Const | s.Param):
                    changed = self._changed("", item) if module is self.entry else item
                    values[item.name] = self._evaluator(module).defined(changed)
        return module.values  # type: ignore[attr-defined, no-any-return]

    def _evaluator(self, module: Module, extra: Mapping[str, Any] | None = None) -> Evaluator:
        library = dict if module.path == DEVICES else self._library
        values = self._values(module)
        return _Names({**values, **extra} if extra else values, self.loader.diagnostics, library)

    def _one(self, kind: type[_Item], what: str, matches: Callable[[_Item], bool], example: str) -> _Item | None:
        """The entry file's item of a kind; the last one counts, several are reported."""
        found = [item for item in self.entry.file.items if isinstance(item, kind) and matches(item)]
        if not found:
            where = Span(self.entry.path, 1, 1, 1, 1)
            if not self.loader.diagnostics.errors:
                self._report("MLM0105", f"the spec has no `{what}`", where, help=f"write {example}")
            return None
        for extra in found[1:]:
            self._report(
                "MLM0106",
                f"the spec has two `{what}` items",
                extra.span,
                secondary=(Label(found[0].span, "the first"),),
                help="keep one; a file has one of each",
            )
        return found[0]

    def _base(self, module: Module, name: str, kind: type[_Item], span: Span) -> tuple[Module, _Item] | None:
        """What `from name` refers to."""
        head, _, tail = name.rpartition(".")
        home = module if not head else module.imports.get(head)
        if head in module.broken:
            return None
        if home is None:
            help = did_you_mean(head, module.imports) or "import its file first"
            self._report("MLM0108", f"there is no import `{head}`", span, help=help)
            return None
        items = {getattr(i, "name", None) or _kind_word(i): i for i in home.file.items if isinstance(i, kind)}
        if tail not in items:
            self._report(
                "MLM0108", f"there is no `{tail}` to inherit from", span, help=did_you_mean(tail, items) or one_of(items)
            )
            return None
        return home, items[tail]

    # ---- the model --------------------------------------------------------------------------------------------------

    def model(self) -> ModelSource | None:
        found = self._one(s.Model, "model", lambda item: True, "model name { input tokens: int[B, S] ... output ... }")
        if found is None:
            return None
        chain = self._chain(self.entry, found, s.Model)
        if chain is None:
            return None
        home, base = chain[-1]
        model = replace(base, name=found.name, name_span=found.name_span)
        for _, derived in reversed(chain[:-1]):
            model = self._derived_model(model, derived)
        model = replace(model, body=tuple(self._changed(model.name, item) for item in model.body))
        blocks = self._blocks()
        return ModelSource(model=model, values=dict(self._values(home)), blocks=blocks, names=self._callable(home))

    def _changed(self, model: str, item: _Statement) -> _Statement:
        return replace(item, value=self.changes.param(model, item)) if isinstance(item, s.Param) else item

    def _derived_model(self, model: s.Model, derived: s.Model) -> s.Model:
        """`model big from small { param d = 1024 }`: params and consts of other values."""
        values = {i.name: i for i in derived.body if isinstance(i, s.Const | s.Param)}
        for item in derived.body:
            if not isinstance(item, s.Const | s.Param):
                self._report(
                    "MLM0109",
                    "a model that inherits changes params and consts only",
                    item.span,
                    help="write the model out instead",
                )
        known = {i.name for i in model.body if isinstance(i, s.Const | s.Param)}
        for name, item in values.items():
            if name not in known:
                self._report(
                    "MLM0214",
                    f"`{model.name}` has no param `{name}`",
                    item.name_span,
                    help=did_you_mean(name, known) or one_of(known),
                )
        body = tuple(
            replace(i, value=values[i.name].value) if isinstance(i, s.Const | s.Param) and i.name in values else i
            for i in model.body
        )
        return replace(model, body=body)

    def _chain(self, module: Module, item: _Item, kind: type[_Item]) -> list[tuple[Module, _Item]] | None:
        """An item and those it inherits from, the root last."""
        chain: list[tuple[Module, _Item]] = [(module, item)]
        while (base := getattr(chain[-1][1], "base", None)) is not None:
            found = self._base(chain[-1][0], base, kind, chain[-1][1].span)
            if found is None:
                return None
            if any(found[1] is earlier for _, earlier in chain):
                self._report("MLM0110", "the items inherit in a circle", item.span)
                return None
            chain.append(found)
        return chain

    def _blocks(self) -> Mapping[str, BlockSource]:
        """All blocks by their qualified names."""
        for path in std_blocks():
            self.loader.load(path, read_file(path))
        keys = [f"{module.path}:{name}" for module in self.loader.modules.values() for name in module.blocks]
        sources = Lazy(keys, self._source)
        self._recursion(sources)
        return sources

    def _source(self, key: str) -> BlockSource:
        path, _, name = key.rpartition(":")
        module = self.loader.modules[path]
        values, names = dict(self._values(module)), self._callable(module)
        return BlockSource(block=module.blocks[name], values=values, blocks=names, qualified=key)

    def _callable(self, module: Module) -> dict[str, str]:
        """Names by which blocks are called in `module` -> qualified names: std, imports, its own, the later ones stronger."""
        names = {n: f"{p}:{n}" for p in std_blocks() if p in self.loader.modules for n in self.loader.modules[p].blocks}
        for alias, other in module.imports.items():
            names |= {f"{alias}.{n}": f"{other.path}:{n}" for n in other.blocks}
        return names | {n: f"{module.path}:{n}" for n in module.blocks}

    def _recursion(self, sources: Mapping[str, BlockSource]) -> None:
        """Reports blocks that call themselves (none of the library does); depth first, with a stack of its own."""
        done = set(filter(shipped, sources))

        def called(key: str) -> Iterator[str]:
            names = dict.fromkeys(_called(sources[key].block.body))
            return iter([target for n in names if (target := sources[key].blocks.get(n)) in sources and target])

        for start in sources:
            chain = {} if start in done else {start: called(start)}
            while chain:
                key, ahead = next(reversed(chain.items()))
                inner = next(ahead, None)
                if inner is None:
                    done.add(key)
                    del chain[key]
                elif inner in chain:
                    self._circle(sources, [*chain], inner)
                elif inner not in done:
                    chain[inner] = called(inner)

    def _circle(self, sources: Mapping[str, BlockSource], chain: list[str], key: str) -> None:
        shown = " -> ".join(sources[k].block.name for k in (*chain[chain.index(key) :], key))
        where = sources[key].block.name_span
        self._report("MLM0107", f"a block contains itself: {shown}", where, help="use `repeat` for depth")

    # ---- cluster and train ------------------------------------------------------------------------------------------

    def cluster(self) -> Cluster | None:
        is_cluster: Callable[[s.Config], bool] = lambda item: item.kind == "cluster"  # noqa: E731
        found = self._one(s.Config, "cluster", is_cluster, "cluster name { nodes = 1  devices_per_node = 8  device = ... }")
        settings = found and self._settings(found, "cluster")
        if found is None or settings is None:
            return None
        subs = [x for x in settings[2] if isinstance(x, s.SubConfig)]
        changed = _of_nodes(settings[2]) if subs else ()
        keys = {setting.key for setting in changed}
        others = replace(settings[0], values={key: value for key, value in settings[0].values.items() if key not in keys})
        pools = tuple(
            (sub.name or f"pool{i}", self._pool(settings[1], sub, changed))
            for i, sub in enumerate(subs[:1] if changed else subs)
        )
        return read_cluster(found.name or "cluster", others, pools)

    def _pool(self, module: Module, sub: s.SubConfig, changed: Iterable[s.Setting] = ()) -> Settings:
        statements = [(module, x) for x in (*sub.settings, *changed)]
        return self._evaluated(f"pool {sub.name or ''}".strip(), module, statements, sub.span)

    def train(self, folder: str) -> Train | None:
        is_train: Callable[[s.Config], bool] = lambda item: item.kind == "train"  # noqa: E731
        found = self._one(s.Config, "train", is_train, "train { data = ...  seq_len = 1024 tok  batch = 512 seq  ... }")
        settings = found and self._settings(found, "train")
        if settings is None:
            return None
        return read_train(settings[0], folder)

    def _settings(self, item: s.Config, what: str) -> tuple[Settings, Module, tuple[s.ConfigStatement, ...]] | None:
        """The settings of an item, those that it inherits and those of --set joined."""
        chain = self._chain(self.entry, item, s.Config)
        if chain is None:
            return None
        statements = [(module, statement) for module, config in reversed(chain) for statement in config.settings]
        names = {what, item.name or what}
        statements += [(self.entry, setting) for setting in self.changes.settings(names)]
        subs = tuple(x for _, x in statements)
        return self._evaluated(what, self.entry, statements, item.span), self.entry, subs

    def _evaluated(
        self, what: str, module: Module, statements: Iterable[tuple[Module, s.ConfigStatement]], whole: Span
    ) -> Settings:
        """Values of settings in order, later ones of an inheriting item or --set stronger."""
        values: dict[str, Any] = {}
        spans: dict[str, Span] = {}
        keys: dict[str, Span] = {}
        local: dict[str, Any] = {}
        seen: dict[tuple[str, str, str], Span] = {}
        for home, statement in statements:
            if isinstance(statement, s.Const | s.Param):
                local[statement.name] = self._evaluator(home, local).defined(statement)
            elif isinstance(statement, s.Setting):
                where = (statement.span.file, str(id(home)), statement.key)
                values[statement.key] = self._setting(home, local, statement)
                if where in seen and _same_item(whole, statement.span, seen[where]):
                    first = (Label(seen[where], "set here first"),)
                    self._report("MLM0315", f"`{statement.key}` is set twice", statement.key_span, secondary=first)
                    values[statement.key] = POISON
                seen[where] = statement.key_span
                spans[statement.key], keys[statement.key] = statement.value.span, statement.key_span
        return Settings(what, values, spans, whole, self.loader.diagnostics, keys)

    def _setting(self, module: Module, local: Mapping[str, Any], statement: s.Setting) -> Any:
        if statement.key in _WORDS and isinstance(statement.value, s.Name):
            return statement.value.name
        return self._evaluator(module, local).value(statement.value)

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def plan(self, pins: Sequence[str]) -> PlanConstraints | None:
        diagnostics = self.loader.diagnostics
        before = len(diagnostics.errors)
        blocks = [item for item in self.entry.file.items if isinstance(item, s.PlanBlock)]
        statements = [
            x for block in blocks for _, b in reversed(self._chain(self.entry, block, s.PlanBlock) or []) for x in b.statements
        ]
        given = self.changes.pins(pins)
        strong = {pin.variable for pin in given}
        written = [x for x in statements if isinstance(x, s.Pin) and x.variable not in strong]
        texts = partial(_text, diagnostics.sources)
        found = PlanConstraints(
            minimize=read_objective([x for x in statements if isinstance(x, s.Minimize)], diagnostics),
            pins=read_pins([*written, *given], texts, diagnostics),
            rules=read_rules([x for x in statements if isinstance(x, s.Rule)], texts, diagnostics),
        )
        return found if len(diagnostics.errors) == before else None


def _kind_word(item: object) -> str:
    return item.kind if isinstance(item, s.Config) else "plan"


def _same_item(whole: Span, one: Span, other: Span) -> bool:
    """Both lie in the item `whole`."""
    return all(span.file == whole.file and whole.line <= span.line <= whole.end_line for span in (one, other))


def _text(sources: Mapping[str, str], span: Span) -> str:
    """The source text of a span, on one line."""
    lines = sources[span.file].split("\n")[span.line - 1 : span.end_line]
    if not lines:
        return ""
    if len(lines) == 1:
        return lines[0][span.column - 1 : span.end_column - 1]
    return " ".join(
        [lines[0][span.column - 1 :].strip(), *(x.strip() for x in lines[1:-1]), lines[-1][: span.end_column - 1].strip()]
    )


def _called(body: Iterable[object]) -> Iterable[str]:
    """Names of everything that statements call, dotted where they are."""
    for node in body:
        yield from _calls_of(node)


def _calls_of(node: object) -> Iterable[str]:
    if isinstance(node, s.Call):
        function = node.function
        if isinstance(function, s.Name):
            yield function.name
        elif isinstance(function, s.Attribute) and isinstance(function.value, s.Name):
            yield f"{function.value.name}.{function.name}"
    if isinstance(node, s.Node):
        for value in vars(node).values():
            yield from _called(cast(tuple[object, ...], value)) if isinstance(value, tuple) else _calls_of(value)


__all__ = ["POISON", "Resolved", "resolve"]


def _of_nodes(statements: Iterable[s.ConfigStatement]) -> tuple[s.Setting, ...]:
    """What --set says of the nodes of a cluster that has pools: then the first pool, changed, takes the place of all."""
    given = (x for x in statements if isinstance(x, s.Setting) and x.key in POOL)
    return tuple(x for x in given if x.key_span.file.startswith("--set"))
