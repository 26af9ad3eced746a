"""Text of emitted programs: literals, comments, and the layout of calls too long for a line.

Whatever a user can choose goes through `literal` where it is a value and through `plain` where it is prose, so that it is never
read as code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

WIDTH = 128
_LONG = 16  # items of a tuple that are written one by one
INDENT = "    "


def literal(value: str | float | bool | tuple[str | float | bool, ...] | None) -> str:
    """A Python literal that evaluates to `value`; strings in double quotes where they need no escape."""
    if isinstance(value, str):
        text = repr(value)
        return f'"{text[1:-1]}"' if "'" not in text[1:-1] and '"' not in value else text
    if isinstance(value, tuple):
        items = _runs(value) if len(value) > _LONG else [literal(item) for item in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    return repr(value)


def packed(values: tuple[str, ...]) -> Call:
    """A tuple of different words, equal neighbours together, that may be laid out in lines."""
    return Call("", tuple(("", run) for run in _runs(values)))


def _runs(values: tuple[str | float | bool, ...]) -> list[str]:
    """Equal neighbours together: (1, 2, 2, 2) as 1, *(2,) * 3."""
    runs = [(value, sum(1 for _ in group)) for value, group in groupby(values)]
    return [literal(value) if count == 1 else f"*({literal(value)},) * {count}" for value, count in runs]


def plain(text: str) -> str:
    """Prose that cannot end a comment or a docstring: no line break of any kind, no backslash, no double quote."""
    safe = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(safe.replace("\\", "/").replace('"', "'").split())


@dataclass(frozen=True)
class Call:
    """`head(argument, keyword=argument)`; a keyword is "" for a positional argument."""

    head: str
    arguments: tuple[tuple[str, Call | str], ...]

    def flat(self) -> str:
        return f"{self.head}({', '.join(_keyword(k) + _flat(a) for k, a in self.arguments)})"


def lay_out(prefix: str, tree: Call | str, indent: int, suffix: str = "") -> list[str]:
    """The lines of `prefix + tree + suffix`: one where it fits, else one argument a line with a trailing comma, as formatters
    do. `indent` counts levels."""
    flat = f"{INDENT * indent}{prefix}{_flat(tree)}{suffix}"
    if isinstance(tree, str) or len(flat) <= WIDTH:
        return [flat]
    lines = [f"{INDENT * indent}{prefix}{tree.head}("]
    for keyword, argument in tree.arguments:
        lines += lay_out(_keyword(keyword), argument, indent + 1, ",")
    return [*lines, f"{INDENT * indent}){suffix}"]


def commented(code: str, comments: tuple[str, str], indent: int) -> list[str]:
    """A line with its comments behind it: both, or the second, or above it where the line would grow too long."""
    line = INDENT * indent + code
    both = ", ".join(filter(None, comments))
    for comment in (both, comments[1]):
        if comment and len(f"{line}  # {comment}") <= WIDTH:
            return [f"{line}  # {comment}"]
    return [*remark(comments[1], indent), line] if comments[1] else [line]


def remark(comment: str, indent: int) -> list[str]:
    """Comment lines of their own."""
    return [f"{INDENT * indent}# {line}" for line in wrap(comment, WIDTH - 4 * indent - 2)]


def wrap(text: str, width: int = WIDTH) -> list[str]:
    """Words in lines of at most `width` characters; a longer word is cut."""
    lines = [""]
    for word in _words(text, width):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def _words(text: str, width: int) -> Iterable[str]:
    for word in text.split():
        yield from (word[i : i + width] for i in range(0, len(word), width))


def _keyword(keyword: str) -> str:
    return f"{keyword}=" if keyword else ""


def _flat(tree: Call | str) -> str:
    return tree if isinstance(tree, str) else tree.flat()


def number(value: float) -> str:
    """The shortest literal of a number: `0.02`, `3e-4`, `9.89e14`."""
    if isinstance(value, int):
        return str(value)
    text = repr(value)
    for digits in range(17):
        mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
        if float(short := f"{mantissa}e{int(exponent)}") == value:
            return short if len(short) < len(text) else text
    return text
