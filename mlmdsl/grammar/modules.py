"""Files and their imports: each file read and parsed once, cycles and missing files reported where they are imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mlmdsl.diagnostics import Diagnostics, Label, Span
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.evaluate import did_you_mean, one_of
from mlmdsl.grammar.library import SHIPPED, STD, definitions
from mlmdsl.grammar.parser import parse

Reader = Callable[[str], str]


def read_file(path: str) -> str:
    """The text of a spec; `std/...` is the shipped library. OSError or UnicodeDecodeError where it cannot be read."""
    real = STD / path.removeprefix("std/") if path.startswith("std/") else Path(path)
    return real.read_text(encoding="utf-8")


@dataclass
class Module:
    """One parsed file: its items, and the modules that it imports by the name they have there. Of a shipped one the items are
    read when they are looked up in `blocks` and `constants`, and `file` has none."""

    path: str
    file: s.File
    imports: dict[str, Module] = field(default_factory=dict[str, "Module"])
    broken: set[str] = field(default_factory=set[str])  # imports that are already reported

    @cached_property
    def blocks(self) -> Mapping[str, s.Block]:
        if self.path in SHIPPED:
            return definitions(self.file.source, self.path, s.Block)
        return {item.name: item for item in self.file.items if isinstance(item, s.Block)}

    @cached_property
    def constants(self) -> Mapping[str, s.Const | s.Param]:
        if self.path in SHIPPED:
            return definitions(self.file.source, self.path, s.Const)
        return {item.name: item for item in self.file.items if isinstance(item, s.Const | s.Param)}


@dataclass
class Loader:
    read: Reader
    diagnostics: Diagnostics
    modules: dict[str, Module] = field(default_factory=dict[str, Module])

    def load(self, path: str, text: str | None = None, chain: tuple[tuple[str, Span], ...] = ()) -> Module:
        """The module at `path`, its imports loaded; `chain` are the imports that lead here, to find cycles."""
        if path in self.modules:
            return self.modules[path]
        source = self.read(path) if text is None else text
        module = Module(path, self._parsed(source, path))
        self.modules[path] = module
        self._duplicates(module)
        for item in module.file.items:
            if isinstance(item, s.Import):
                self._import(module, item, (*chain, (path, item.path_span)))
        return module

    def _parsed(self, source: str, path: str) -> s.File:
        if path not in SHIPPED:
            return parse(source, path, self.diagnostics)
        self.diagnostics.sources[path] = source
        return s.File(path, source, (), span=Span(path, 1, 1, 1, 1))

    def _import(self, module: Module, item: s.Import, chain: tuple[tuple[str, Span], ...]) -> None:
        name = item.name or Path(item.path).stem
        loaded = self._imported(module, item, chain)
        if loaded is None:
            module.broken.add(name)
        else:
            module.imports[name] = loaded

    def _imported(self, module: Module, item: s.Import, chain: tuple[tuple[str, Span], ...]) -> Module | None:
        path = (
            item.path
            if item.path.startswith("std/")
            else os.path.normpath(os.path.join(os.path.dirname(module.path), item.path))
        )
        report = self.diagnostics.report
        if path in {step for step, _ in chain}:
            first = next(span for step, span in chain if step == path)
            shown = " -> ".join([*(step for step, _ in chain), path])
            report(
                "MLM0102",
                f"the imports run in a circle: {shown}",
                item.path_span,
                secondary=(Label(first, "the circle begins here"),) if first != item.path_span else (),
                help="move what both need into a third file",
            )
            return None
        try:
            return self.load(path, None, chain)
        except UnicodeDecodeError:
            report("MLM0103", f"{item.path} is not UTF-8 text", item.path_span)
        except (OSError, ValueError):  # a path with a NUL is a ValueError
            report("MLM0101", f"there is no file {item.path}", item.path_span, help=self._near(module, item.path))
        return None

    def _near(self, module: Module, path: str) -> str:
        folder = STD if path.startswith("std/") else Path(os.path.dirname(module.path) or ".", os.path.dirname(path))
        names = [p.name for p in folder.glob("*.mlm")] if folder.is_dir() else []
        near = did_you_mean(os.path.basename(path), names) or (one_of(names) if names else "")
        return near or "paths are relative to the file that imports"

    def _duplicates(self, module: Module) -> None:
        """Two items of one name."""
        seen: dict[str, Span] = {}
        for item in module.file.items:
            name = _item_name(item)
            if name is None:
                continue
            span = getattr(item, "name_span", None) or item.span
            if name in seen:
                self.diagnostics.report(
                    "MLM0104",
                    f"`{name}` is defined twice",
                    span,
                    secondary=(Label(seen[name], "defined here first"),),
                    help="rename one of the two",
                )
            seen.setdefault(name, span)


def _item_name(item: s.Item) -> str | None:
    if isinstance(item, s.Import):
        return item.name or Path(item.path).stem
    return item.name if not isinstance(item, s.PlanBlock) else None
