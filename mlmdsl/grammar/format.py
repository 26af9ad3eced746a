"""The canonical layout of a spec: `mlmdsl fmt`.

Works on the tokens, so that numbers, units and strings stay as they are written, and on the comments between them:

    indentation     two spaces a brace
    statements      one a line; a body that was written on one line stays there where it fits
    blank lines     the author's, one at a time; one around every block, model, cluster, train and plan
    brackets        on one line where they fit in 100 columns; else their contents on a line of their own, or one element a line
    comments        all kept; trailing ones of neighbouring lines stand under one another
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lark import Token

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar import syntax
from mlmdsl.grammar.parser import lex, parse, plain

WIDTH = 100
_INDENT = 2

_COMMENT = re.compile(r"#[^\n]*")
_NUMBER = re.compile(r"[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CLOSING = {"LPAR": "RPAR", "LSQB": "RSQB"}
# Tokens that end a value: a bracket or minus after one of these belongs to it
_VALUES = frozenset({"NAME", "NUMBER", "QUANTITY", "STRING", "SCHEDULE", "TRUE", "FALSE", "NONE", "RPAR", "RSQB", "RBRACE"})
_BEFORE_BODY = _VALUES | {"ELSE", "CLUSTER", "TRAIN", "PLAN", "POOL"}  # a brace after any other token opens a set
_NO_SPACE_AFTER = frozenset({"LPAR", "LSQB", "LBRACE", "DOT"})
_NO_SPACE_BEFORE = frozenset({"COMMA", "COLON", "DOT", "RPAR", "RSQB", "RBRACE"})
_APART = frozenset({"MLM", "BLOCK", "MODEL", "CLUSTER", "TRAIN", "PLAN"})  # items with blank lines around them


def format_file(tree: syntax.File) -> str:
    """The file's text in the canonical layout; the file has been read without a syntax error."""
    text = format_text(tree.source)
    assert parse(text, tree.path, Diagnostics()) == tree, "the layout changed what the text says"
    return text


def format_text(text: str) -> str:
    lines, _ = _Reader(_words(text)).lines()
    return "".join(f"{line}\n" for line in _printed(_body_rows(_separated(lines), 0)))


# ---- the text as words, brackets, bodies and lines ------------------------------------------------------------------


@dataclass(frozen=True)
class _Word:
    """A token as it is printed, whether a space stands before it inside a line; newlines and comments are words too."""

    kind: str
    text: str
    space: bool


@dataclass(frozen=True)
class _Element:
    """What stands between two commas, with the comments above it and behind it."""

    parts: tuple[_Part, ...]
    above: tuple[str, ...] = ()
    behind: str = ""


@dataclass(frozen=True)
class _Group:
    """`(...)` or `[...]`. comma behind the last element: "never" in `(a + b)`, "always" in `(a,)`, else "broken", where the
    elements stand on lines of their own."""

    opening: _Word
    closing: str
    elements: tuple[_Element, ...]
    below: tuple[str, ...]  # comments before the closing bracket
    comma: str

    @property
    def commented(self) -> bool:
        """Comments inside need lines."""
        return bool(self.below) or any(e.above or e.behind or _commented(e.parts) for e in self.elements)


@dataclass(frozen=True)
class _Body:
    """`{ ... }` with statements; `comment` stands behind its brace. inline: written on one line."""

    lines: tuple[_Line, ...]
    comment: str
    inline: bool


@dataclass(frozen=True)
class _Line:
    """A statement or item with its bodies, or a comment on a line of its own (no parts). blank: a blank line above."""

    parts: tuple[_Part, ...]
    comment: str
    blank: bool

    @property
    def kind(self) -> str:
        return self.parts[0].kind if self.parts and isinstance(self.parts[0], _Word) else ""


_Part = _Word | _Group | _Body


def _words(text: str) -> list[_Word]:
    """Tokens, and the comments in the gaps between them."""
    source, end = plain(text), 0
    words: list[_Word] = []
    before, sign = "", False
    for token in lex(text):
        start = token.start_pos or 0
        words += [_Word("COMMENT", found[0].rstrip(), True) for found in _COMMENT.finditer(source[end:start])]
        end = start + len(token)
        words.append(_Word(token.type, _spelt(token), not sign and _spaced(before, token.type)))
        if token.type != "_NL":
            sign = token.type == "MINUS" and before not in _VALUES
            before = token.type
    return words


def _spelt(token: Token) -> str:
    """A quantity with single spaces; any other token as it is."""
    if token.type != "QUANTITY":
        return str(token)
    number = _NUMBER.match(token)
    assert number is not None
    return " ".join([number[0], *token[number.end() :].split()])


def _spaced(before: str, kind: str) -> bool:
    if before in _NO_SPACE_AFTER or kind in _NO_SPACE_BEFORE:
        return False
    return kind not in _CLOSING or before not in _VALUES


class _Reader:
    """Words to lines. The text is known to be sound: every bracket is closed."""

    def __init__(self, words: Sequence[_Word]):
        self._words, self._at = words, 0
        self._before = ""  # the kind of the last word that is neither newline nor comment

    def lines(self) -> tuple[tuple[_Line, ...], bool]:
        """Lines up to the end of the body, or of the file; whether newlines stand between or around them."""
        found: list[_Line] = []
        newlines, broken = 0, False
        while (kind := self._peek()) not in ("RBRACE", ""):
            if kind == "_NL":
                self._next()
                newlines, broken = newlines + 1, True
            else:
                found.append(self._line(blank=bool(found) and newlines > 1))
                newlines = 0
        return tuple(found), broken

    def _line(self, blank: bool) -> _Line:
        parts = tuple(self._parts(("_NL", "COMMENT", "RBRACE", "")))
        return _Line(parts, self._comment(), blank)

    def _comment(self) -> str:
        return self._next().text if self._peek() == "COMMENT" else ""

    def _peek(self) -> str:
        return self._words[self._at].kind if self._at < len(self._words) else ""

    def _next(self) -> _Word:
        word = self._words[self._at]
        self._at += 1
        if word.kind not in ("_NL", "COMMENT"):
            self._before = word.kind
        return word

    def _parts(self, stops: tuple[str, ...]) -> Iterator[_Part]:
        while (kind := self._peek()) not in stops:
            before = self._before
            if kind in _CLOSING:
                yield self._group(before)
            elif kind == "LBRACE" and before in _BEFORE_BODY:
                yield self._body()
            elif kind == "LBRACE":
                yield from self._set()
            else:
                yield self._next()

    def _body(self) -> _Body:
        self._next()
        comment = self._comment()
        lines, broken = self.lines()
        self._next()
        inner = [part for line in lines for part in line.parts if isinstance(part, _Body)]
        inline = not lines or (not broken and all(body.inline for body in inner))
        return _Body(lines, comment, inline=inline and not comment)

    def _set(self) -> Iterator[_Part]:
        """`{a, b}` takes no newlines, so that it is printed like words."""
        yield self._next()
        while self._peek() != "RBRACE":
            yield from self._parts(("COMMA", "RBRACE"))
            if self._peek() == "COMMA":
                comma = self._next()
                if self._peek() != "RBRACE":
                    yield comma
        yield self._next()

    def _group(self, before: str) -> _Group:
        opening = self._next()
        closing = _CLOSING[opening.kind]
        elements: list[_Element] = []
        commas = 0
        while (element := self._element(closing)).parts:
            elements.append(element)
            if self._before == "COMMA":
                commas += 1
        own = opening.kind == "LPAR" and before not in _VALUES  # a tuple, or parentheses around one value
        comma = "broken" if not own or len(elements) > 1 else "always" if commas else "never"
        return _Group(opening, self._next().text, tuple(elements), element.above, comma)

    def _element(self, closing: str) -> _Element:
        """One element and its comma; without parts where the bracket ends. Comments in its midst go above it."""
        above, behind = self._comments(), ""
        parts: list[_Part] = []
        while self._peek() not in ("COMMA", closing):
            above += [behind] if behind else []
            parts += self._parts(("_NL", "COMMENT", "COMMA", closing))
            behind, here = self._comment(), self._at
            lower = self._comments()
            if self._peek() == closing:  # these stand below the last element
                self._at = here
                break
            above += lower
        if self._peek() == "COMMA":
            self._next()
            comment = self._comment()
            above += [behind] if behind and comment else []
            behind = comment or behind
        return _Element(tuple(parts), tuple(above), behind)

    def _comments(self) -> list[str]:
        """Those on the lines up to the next other word."""
        found: list[str] = []
        while self._peek() in ("_NL", "COMMENT"):
            word = self._next()
            found += [word.text] if word.kind == "COMMENT" else []
        return found


def _separated(lines: Sequence[_Line]) -> list[_Line]:
    """A blank line above and below each item of several lines; comments right above one belong to it."""
    found = list(lines)
    for index, (above, line) in enumerate(pairwise(lines), 1):
        if above.kind in _APART:
            found[index] = replace(found[index], blank=True)
        first = index
        while line.kind in _APART and first and not found[first].blank and not found[first - 1].parts:
            first -= 1
        if line.kind in _APART and first:
            found[first] = replace(found[first], blank=True)
    return found


# ---- lines as rows of text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    indent: int
    text: str
    comment: str = ""
    blank: bool = False


def _flat(parts: Iterable[_Part]) -> str:
    """On one line."""
    text = ""
    for part in parts:
        text = _joined(text, part, _flat_part(part))
    return text


def _joined(text: str, part: _Part, more: str) -> str:
    word = part.opening if isinstance(part, _Group) else part
    return f"{text} {more}" if text and (isinstance(word, _Body) or word.space) else text + more


def _flat_part(part: _Part) -> str:
    match part:
        case _Word():
            return part.text
        case _Group():
            return f"{part.opening.text}{_flat_elements(part)}{part.closing}"
        case _Body():
            inner = " ".join(_flat(line.parts) for line in part.lines)
            return f"{{ {inner} }}" if inner else "{}"


def _flat_elements(group: _Group) -> str:
    return ", ".join(_flat(e.parts) for e in group.elements) + ("," if group.comma == "always" else "")


def _commented(parts: Iterable[_Part]) -> bool:
    return any(isinstance(part, _Group) and part.commented for part in parts)


def _body_rows(lines: Iterable[_Line], indent: int) -> list[_Row]:
    rows: list[_Row] = []
    for line in lines:
        first, *rest = _line_rows(line, indent)
        rows += [replace(first, blank=line.blank), *rest]
    return rows


def _line_rows(line: _Line, indent: int) -> list[_Row]:
    """The comment stands behind the last row."""
    bodies = [part for part in line.parts if isinstance(part, _Body)]
    inline = all(body.inline for body in bodies) and not any(_inner_comments(body) for body in bodies)
    inline = inline and not (bodies and (_commented(line.parts) or indent + len(_flat(line.parts)) > WIDTH))
    rows = _rows(line.parts, indent, "", inline)
    return [*rows[:-1], replace(rows[-1], comment=line.comment)]


def _inner_comments(body: _Body) -> bool:
    return any(
        _commented(line.parts) or any(isinstance(p, _Body) and _inner_comments(p) for p in line.parts) for line in body.lines
    )


def _rows(parts: Sequence[_Part], indent: int, suffix: str, inline: bool = True) -> list[_Row]:
    """One row where everything fits; else brackets are broken, the widest first, until the rest of the line fits."""
    broken = {i for i, part in enumerate(parts) if isinstance(part, _Group) and part.commented}
    widths = {i: len(_flat_part(p)) for i, p in enumerate(parts) if isinstance(p, _Group) and p.elements}
    while True:
        rows, width = _broken_rows(parts, indent, suffix, inline, broken)
        whole = widths.keys() - broken
        if width <= WIDTH or not whole:
            return rows
        broken.add(max(whole, key=lambda i: (widths[i], i)))


def _broken_rows(parts: Sequence[_Part], indent: int, suffix: str, inline: bool, broken: set[int]) -> tuple[list[_Row], int]:
    """Rows, and the width of the widest that is not inside a bracket or body."""
    rows: list[_Row] = []
    text, width = "", 0
    for index, part in enumerate(parts):
        opened, inside, comment = "", list[_Row](), ""
        if isinstance(part, _Group) and index in broken:
            opened, inside, closing = part.opening.text, _group_rows(part, indent + _INDENT), part.closing
        elif isinstance(part, _Body) and not inline and (part.lines or part.comment):
            opened, inside, closing = "{", _body_rows(part.lines, indent + _INDENT), "}"
            comment = part.comment
        else:
            text = _joined(text, part, _flat_part(part))
            continue
        text = _joined(text, part, opened)
        width = max(width, indent + len(text))
        rows += [_Row(indent, text, comment), *inside]
        text = closing
    return [*rows, _Row(indent, text + suffix)], max(width, indent + len(text + suffix))


def _group_rows(group: _Group, indent: int) -> list[_Row]:
    """All elements on one row where they fit and have no comments, else each on its own."""
    if not group.commented and indent + len(_flat_elements(group)) <= WIDTH:
        return [_Row(indent, _flat_elements(group))]
    rows: list[_Row] = []
    for element in group.elements:
        last = element is group.elements[-1]
        inner = _rows(element.parts, indent, "" if last and group.comma == "never" else ",")
        rows += [_Row(indent, "", comment) for comment in element.above]
        rows += [*inner[:-1], replace(inner[-1], comment=element.behind)]
    return rows + [_Row(indent, "", comment) for comment in group.below]


def _printed(rows: Sequence[_Row]) -> Iterator[str]:
    """Rows as text; trailing comments of neighbouring rows of one indentation in one column."""
    columns = [len(row.text) for row in rows]
    aligned = [bool(row.text and row.comment) for row in rows]
    for order in (1, -1):
        indices = range(len(rows))[::order]
        for here, there in pairwise(indices):
            later = rows[max(here, there)]
            if aligned[here] and aligned[there] and rows[here].indent == rows[there].indent and not later.blank:
                columns[there] = max(columns[here], columns[there])
    for row, column in zip(rows, columns, strict=True):
        text = f"{row.text:{column}}  {row.comment}" if row.text and row.comment else row.text or row.comment
        yield from ["", " " * row.indent + text] if row.blank else [" " * row.indent + text]
