"""`--set path=value` and `--pin name=value`: parsed by the grammar, applied where their path points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlmdsl.diagnostics import Diagnostics, Span
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.evaluate import did_you_mean
from mlmdsl.grammar.parser import parse_expression


class Overrides:
    """The `--set`s of one command; each has to find its place (`report_unused`)."""

    def __init__(self, texts: Sequence[str], diagnostics: Diagnostics):
        self._diagnostics = diagnostics
        self._values: dict[str, tuple[s.Expr, Span]] = {}
        self._used: set[str] = set()
        self._known: set[str] = set()
        for text in texts:
            split = self._split(text, "--set")
            if split is not None:
                path, value, where = split
                self._values[path] = (value, where)

    def _split(self, text: str, option: str) -> tuple[str, s.Expr, Span] | None:
        """`path=value`; the span covers the value in the text, which is its own source file."""
        file = f"{option} {text}"
        path, equals, value = text.partition("=")
        whole = Span(file, 1, 1, 1, len(text) + 1)
        if not equals or not path.strip() or not value.strip():
            self._diagnostics.sources[file] = text
            example = "gpt2.d=1024" if option == "--set" else "tensor=4"
            self._diagnostics.report("MLM0111", f"{option} wants name=value", whole, help=f"write {option} {example}")
            return None
        # columns of the value stay those of the whole text
        expr = parse_expression(" " * (len(path) + 1) + value, file, self._diagnostics)
        self._diagnostics.sources[file] = text
        return None if expr is None else (path.strip(), expr, Span(file, 1, 1, 1, len(path) + 1))

    def param(self, model: str, item: s.Param) -> s.Expr:
        """The value of a param: the override's, where there is one."""
        path = f"{model}.{item.name}" if model else item.name
        self._known.add(path)
        if path not in self._values:
            return item.value
        self._used.add(path)
        return self._values[path][0]

    def settings(self, owners: Iterable[str]) -> list[s.Setting]:
        """Overrides of a cluster's or train's settings, as settings."""
        found: list[s.Setting] = []
        for owner in owners:
            self._known.add(f"{owner}.")
            for path, (value, where) in self._values.items():
                if path.startswith(f"{owner}."):
                    self._used.add(path)
                    found.append(s.Setting(path[len(owner) + 1 :], value, key_span=where, span=value.span))
        return found

    def pins(self, texts: Sequence[str], option: str = "--pin") -> list[s.Pin]:
        """`--pin`s as pins; of two for one variable the last holds."""
        pins: dict[str, s.Pin] = {}
        for text in texts:
            split = self._split(text, option)
            if split is not None:
                name, value, where = split
                pins[name] = s.Pin(name, value, variable_span=where, span=Span(where.file, 1, 1, 1, len(text) + 1))
        return list(pins.values())

    def report_unused(self) -> None:
        for path, (_, where) in self._values.items():
            if path not in self._used:
                help = (
                    did_you_mean(path, self._known)
                    or "paths are model.param, a top-level param, cluster.setting or train.setting"
                )
                self._diagnostics.report("MLM0112", f"there is no `{path}` to set", where, help=help)
