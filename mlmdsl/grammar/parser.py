"""Text to syntax tree, with every syntax error of a file in one run.

Tokens are fed one by one to lark's LALR parser. On an error the parser goes back to its state at the start of the statement,
the rest of that statement is skipped (braces that it opened included), what it defines gets a broken value (`recovery.py`), and
parsing goes on: a broken statement costs one diagnostic and never makes another. `wording.py` says what is wrong.
"""

# lark's types are not complete
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput, UnexpectedToken
from lark.parsers.lalr_interactive_parser import InteractiveParser
from lark.tree import Meta

from mlmdsl.diagnostics import Diagnostics, Label, Span
from mlmdsl.grammar import syntax
from mlmdsl.grammar.recovery import placeholders
from mlmdsl.grammar.tokens import Tokens, token_span
from mlmdsl.grammar.tree import ToSyntax
from mlmdsl.grammar.wording import ITEM_KEYWORDS, misspelt, report, unclosed

_GRAMMAR = Path(__file__).with_name("mlm.lark")
EDITION = "1"
MAX_NESTING = 100  # brackets within brackets; the passes after this one recurse
MAX_DEPTH = 320  # of the tree that lark makes: a level for an operator, three for a call with named arguments


@cache
def _lark() -> Lark:
    """The parser, from lark's cache file where there is one (grammar, options and lark's version make its key)."""
    text = _GRAMMAR.read_text(encoding="utf-8")
    options: dict[str, Any] = {"start": ["start", "expression"], "parser": "lalr", "lexer": "basic", "postlex": Tokens()}
    try:
        return Lark(text, cache=True, propagate_positions=True, maybe_placeholders=True, **options)
    except OSError:  # no folder to write the cache to
        return Lark(text, propagate_positions=True, maybe_placeholders=True, **options)


def parse(text: str, path: str, diagnostics: Diagnostics) -> syntax.File:
    """The file's items; statements that cannot be parsed are reported and left out."""
    text = text.removeprefix("\ufeff")  # which takes no column
    diagnostics.sources[path] = text
    tree: Tree[Token] = _tree(text, path, "start", diagnostics) or Tree("start", [])
    for edition in tree.find_data("edition"):
        number = cast(Token, edition.children[0])
        if number != EDITION:
            help = f"write mlm {EDITION}, or take a newer mlmdsl"
            diagnostics.report("MLM0012", f"there is no edition {number} of the language", token_span(number, path), help=help)
    return ToSyntax(path, text).transform(tree)


def parse_expression(text: str, path: str, diagnostics: Diagnostics) -> syntax.Expr | None:
    """One expression, as in `--set` and `--pin`; None where it is broken (reported)."""
    diagnostics.sources[path] = text
    before = len(diagnostics.items)
    tree = _tree(text, path, "expression", diagnostics)
    if tree is None or len(diagnostics.items) > before:
        return None
    return ToSyntax(path, text).transform(tree).children[0]


def plain(text: str) -> str:
    """With newlines of one character, the last line ended, and no byte-order mark: what the positions of tokens count in."""
    return text.replace("\r\n", "\n").removeprefix("\ufeff") + "\n"


def lex(text: str) -> list[Token]:
    """The tokens of `plain(text)`, newlines among them; comments lie between."""
    return list(_lark().lex(plain(text)))


def _tree(text: str, path: str, start: str, diagnostics: Diagnostics) -> Tree[Token] | None:
    tokens = _shallow(_lark().lex(plain(text)), path, diagnostics)
    if tokens is None:
        return None
    feeder = _Feeder(_lark().parse_interactive("", start=start), path, diagnostics)
    tree = feeder.run(tokens)
    deep = tree and _too_deep(tree)
    if deep:
        message = f"operators, calls or statements are nested more than {MAX_DEPTH} deep"
        where = Span(path, deep.line, deep.column, deep.end_line, deep.end_column)
        diagnostics.report("MLM0011", message, where, help="name the inner parts")
        return None
    return tree


def _shallow(tokens: Iterable[Token], path: str, diagnostics: Diagnostics) -> list[Token] | None:
    """The tokens; None where their brackets are nested too deep (reported)."""
    depth, found = 0, list[Token]()
    for token in tokens:
        found.append(token)
        depth = max(0, depth + (token.type in _OPEN) - (token.type in _CLOSE))
        if depth > MAX_NESTING:
            message = f"brackets are nested more than {MAX_NESTING} deep"
            diagnostics.report("MLM0011", message, token_span(token, path), help="name the inner parts")
            return None
    return found


def _too_deep(tree: Tree[Token]) -> Meta | None:
    """Where a tree stands that is below MAX_DEPTH others."""
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in node.children if isinstance(child, Tree)]
    return next((node.meta for node in level if not node.meta.empty), None)


# Tokens that a body's brace can follow: the end of a value, or a word
BEFORE_BODY = frozenset(
    "NAME NUMBER QUANTITY STRING SCHEDULE TRUE FALSE NONE BROKEN RPAR RSQB RBRACE ELSE CLUSTER TRAIN PLAN POOL".split()  # noqa: SIM905
)
_OPEN = {"LPAR": "(", "LSQB": "[", "LBRACE": "{"}
_CLOSE = {"RPAR": ")", "RSQB": "]", "RBRACE": "}"}


def _copy(parser: InteractiveParser) -> InteractiveParser:
    """A parser in the same state. lark appends to the lists of open repetitions in place, so these are copied."""
    copied = parser.copy(deepcopy_values=False)
    stack: list[Any] = copied.parser_state.value_stack
    copied.parser_state.value_stack = [Tree(v.data, list(v.children), v.meta) if isinstance(v, Tree) else v for v in stack]
    return copied


@dataclass
class _Feeder:
    """The parser's state at the start of each open block's current statement, so that it can go back there."""

    parser: InteractiveParser
    path: str
    diagnostics: Diagnostics
    marks: list[InteractiveParser] = field(default_factory=list)
    opened: list[Token] = field(default_factory=list)  # brackets not closed yet
    statement: list[Token] = field(default_factory=list)  # tokens since the last mark

    def run(self, tokens: list[Token]) -> Tree[Token] | None:
        self.marks.append(_copy(self.parser))
        position = 0
        while position < len(tokens):
            position = self._step(tokens, position)
        return self._finish(tokens)

    def _step(self, tokens: list[Token], position: int) -> int:
        """Feeds one token; the position to go on from. Newlines inside () and [] do not count."""
        token = tokens[position]
        if token.type == "_NL" and self.opened and self.opened[-1].type in ("LPAR", "LSQB"):
            return position + 1
        try:
            self.parser.feed_token(token)
        except UnexpectedToken as problem:
            if token.type in ITEM_KEYWORDS and not self.statement and len(self.marks) > 1:
                before = Label(token_span(token, self.path), "a new item begins here")
                unclosed(self.opened[-1], self.path, self.diagnostics, before)
                self._close_blocks(token)
                return position
            if (mended := self._mended(tokens, position)) is not None:
                return mended
            if token.type == "BAD" and self._idle(tokens, position):
                report(problem, self.statement, None, self.opened, self.path, self.diagnostics)
                return position + 1
            after = tokens[position + 1] if position + 1 < len(tokens) else None
            ended = report(problem, self.statement, after, self.opened, self.path, self.diagnostics)
            return self._skip(tokens, position, ended=ended)
        before = self.statement[-1].type if self.statement else ""
        self.statement.append(token)
        self._mark(token, before)
        return position + 1

    def _mended(self, tokens: list[Token], position: int) -> int | None:
        """A misspelt keyword at the start of a statement is reported and put right, so that what follows is read: the
        position to go on from, or None where that is not the mistake."""
        first = position - len(self.statement)
        if len(self.statement) > 1 or tokens[position].type in ("EQUAL", "DOT", "_NL"):
            return None
        keyword = misspelt(tokens[first], self.path, self.diagnostics)
        if keyword is None:
            return None
        tokens[first] = Token.new_borrow_pos(keyword.upper(), keyword, tokens[first])
        self.parser = _copy(self.marks[-1])
        self.statement = []
        return first

    def _idle(self, tokens: list[Token], position: int) -> bool:
        """A bad character that stands alone before a statement or after it: the statement can do without it."""
        line = [t for t in tokens[max(0, position - 1) : position + 2] if t.type == "BAD"]
        last = position + 1 < len(tokens) and tokens[position + 1].type == "_NL"
        return len(line) == 1 and str(tokens[position]) != '"' and (not self.statement or last)

    def _close_blocks(self, token: Token) -> None:
        """Closes all blocks that are open."""
        while len(self.marks) > 1:
            self.marks.pop()
            closing = Token.new_borrow_pos("RBRACE", "}", token)
            self.parser.feed_token(closing)
            self.parser.feed_token(Token.new_borrow_pos("_NL", "\n", token))
        self.opened.clear()
        self.marks[-1] = _copy(self.parser)

    def _mark(self, token: Token, before: str) -> None:
        """Keeps the brackets, and the state where a statement starts. A brace that opens no body opens a set."""
        body = before in BEFORE_BODY and not (self.opened and self.opened[-1].type != "LBRACE")
        closed = ""
        if token.type in _OPEN:
            self.opened.append(Token.new_borrow_pos("SET", "{", token) if token.type == "LBRACE" and not body else token)
        elif token.type in _CLOSE and self.opened:
            closed = self.opened.pop().type
        if token.type == "LBRACE" and body:
            self.marks.append(_copy(self.parser))
            self.statement = []
        elif closed == "LBRACE" and len(self.marks) > 1:
            self.marks.pop()
        elif token.type == "_NL":
            self.marks[-1] = _copy(self.parser)
            self.statement = []

    def _skip(self, tokens: list[Token], position: int, *, ended: bool = False) -> int:
        """Back to the statement's start, on to the first token after it (where it has `ended`, the one at `position`); names
        that it defines get a value that is broken."""
        first = min(position, len(tokens) - 1)
        started = self.statement[0] if self.statement else tokens[first]
        while tokens[first] is not started:  # newlines inside brackets lie between
            first -= 1
        self.opened = [t for t in self.opened if (t.start_pos or 0) < (started.start_pos or 0)]
        self.parser = _copy(self.marks[-1])
        depth = sum((t.type == "LBRACE") - (t.type == "RBRACE") for t in self.statement)
        sets, depth = max(0, depth), min(0, depth)  # a set ends with its line
        self.statement = []
        while position < len(tokens) and not ended:
            token = tokens[position]
            if token.type == "_NL" and depth <= 0:
                position += 1
                break
            if token.type == "RBRACE" and sets and depth <= 0:
                sets, depth = sets - 1, depth + 1
            elif token.type == "RBRACE" and depth <= 0 and len(self.marks) > 1:
                break
            depth += (token.type == "LBRACE") - (token.type == "RBRACE")
            position += 1
        for replacement in placeholders(tokens[first:position]):
            self._feed_all(replacement)
        return position

    def _feed_all(self, tokens: Sequence[Token]) -> None:
        """Feeds a whole statement where it fits, or nothing."""
        ahead = _copy(self.marks[-1])
        try:
            for token in tokens:
                ahead.feed_token(token)
        except UnexpectedToken:
            return
        self.parser = ahead
        self.marks[-1] = _copy(ahead)

    def _finish(self, tokens: list[Token]) -> Tree[Token] | None:
        last = tokens[-1]
        if self.opened:
            unclosed(self.opened[-1], self.path, self.diagnostics)
            self._skip(tokens, len(tokens))
            self._close_blocks(last)
        try:
            return self.parser.feed_eof(last)
        except UnexpectedInput:
            if not self.diagnostics.errors:
                where = token_span(last, self.path)
                self.diagnostics.report("MLM0001", "the text ends in the middle of a statement", where)
            return None
