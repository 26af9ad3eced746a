"""What is wrong with a statement that the parser refused, in words, with the way out."""

# lark's types are not complete
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from lark import Token
from lark.exceptions import UnexpectedToken

from mlmdsl.diagnostics import Diagnostics, Label
from mlmdsl.grammar.tokens import KEYWORDS, token_span

ITEM_KEYWORDS = frozenset({"IMPORT", "BLOCK", "MODEL", "CLUSTER", "TRAIN", "PLAN"})
STARTS = frozenset(
    "import const param block model cluster train plan input output repeat if expect pool "  # noqa: SIM905
    "minimize pin require prefer avoid forbid".split()
)
_STATEMENTS = {
    "INPUT": "in a model",
    "OUTPUT": "in a model or block",
    "REPEAT": "in a model or block",
    "EXPECT": "in a model",
    "IF": "in a model or block",
    "POOL": "in a cluster",
    "MINIMIZE": "in a plan",
    "PIN": "in a plan",
    "REQUIRE": "in a plan",
    "PREFER": "in a plan",
    "AVOID": "in a plan",
    "FORBID": "in a plan",
}
_CLOSING = {"LPAR": ")", "LSQB": "]", "LBRACE": "}", "SET": "}"}
_SHOWN = {
    "_NL": "the end of the line", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "LBRACE": "`{`", "RBRACE": "`}`",
    "COMMA": "`,`", "EQUAL": "`=`", "COLON": "`:`", "DOT": "`.`", "NAME": "a name", "NUMBER": "a number", "STRING": "a string",
    "QUANTITY": "a quantity",
}  # fmt: skip
_VALUE_STARTS = {"NUMBER", "QUANTITY", "STRING", "NAME", "LPAR", "LSQB"}


def unclosed(opened: Token, path: str, diagnostics: Diagnostics, *secondary: Label) -> None:
    diagnostics.report(
        "MLM0004",
        f"this `{opened}` is never closed",
        token_span(opened, path),
        label="opened here",
        secondary=secondary,
        help=f"write `{_CLOSING[opened.type]}` where it ends",
    )


def misspelt(token: Token, path: str, diagnostics: Diagnostics) -> str | None:
    """Reports a name at the start of a statement that is nearly a keyword; the keyword."""
    near = get_close_matches(str(token), sorted(STARTS), 1, 0.7) if token.type == "NAME" else []
    if not near:
        return None
    where = token_span(token, path)
    diagnostics.report("MLM0003", f"`{token}` starts no statement", where, help=f"did you mean `{near[0]}`?")
    return near[0]


def report(
    problem: UnexpectedToken,
    statement: Sequence[Token],
    after: Token | None,
    opened: Sequence[Token],
    path: str,
    diagnostics: Diagnostics,
) -> bool:
    """One diagnostic for one refused token; the first rule that knows the mistake words it. Whether the token is the first of
    another statement."""
    token = problem.token
    where = token_span(token, path)
    text, last = str(token), statement[-1] if statement else None
    bracket = next((t for t in reversed(opened) if t.type != "LBRACE"), None)
    expected = problem.accepts or problem.expected

    def say(code: str, message: str, label: str = "", help: str = "") -> bool:
        diagnostics.report(code, message, where, label=label, help=help)
        return False

    if token.type == "BAD":
        if text == '"':
            return say("MLM0005", "this string is never closed", "starts here", 'write `"` where it ends, on the same line')
        if text == "'":
            return say("MLM0006", "strings stand in double quotes", help='write "..."')
        if text == ";":
            return say(
                "MLM0006", "a statement ends with its line, not with `;`", help="take the `;` away; one statement a line"
            )
        return say("MLM0006", f"the character {text!r} means nothing here", help="take it away")
    if bracket is not None and (
        (token.type == "RBRACE" and bracket.type != "SET")
        or token.type in ITEM_KEYWORDS
        or (last is not None and _on_new_statement(token, last, after))
    ):
        unclosed(bracket, path, diagnostics, Label(where, "this does not belong inside"))
        return token.type not in ITEM_KEYWORDS
    if token.type in _STATEMENTS and not statement:
        return say("MLM0007", f"`{text}` does not belong here", help=f"it stands {_STATEMENTS[token.type]}")
    if token.type in ITEM_KEYWORDS and not statement:
        return say("MLM0007", f"`{text}` cannot stand inside another item", help="close the one before with `}` first")
    if token.type in ("RPAR", "RSQB", "RBRACE") and not any(_CLOSING[t.type] == text for t in opened):
        return say("MLM0008", f"this `{text}` closes nothing", help="take it away, or open it earlier")
    if "COMMA" in expected and token.type in _VALUE_STARTS and bracket is not None:
        return say("MLM0002", "a comma is missing", f"before `{text}`", f"write `, {text}`")
    if "EQUAL" in expected and token.type in _VALUE_STARTS and len(statement) <= 2:
        return say("MLM0009", f"`=` is missing after `{last}`", help=f"write `{last} = {text}`")
    if text in KEYWORDS and "NAME" in expected:
        return say("MLM0010", f"`{text}` is a word of the language and cannot be a name", help=f"call it `{text}_`, say")
    if token.type == "_NL":
        return say("MLM0001", "the statement ends too early", f"expected {_expected(expected)}")
    return say("MLM0001", f"`{text}` does not fit here", f"expected {_expected(expected)}")


def _on_new_statement(token: Token, last: Token, after: Token | None) -> bool:
    """On a later line, and `name =` or a keyword: the line before was meant to end."""
    later = (token.line or 0) > (last.end_line or 0)
    return later and (
        str(token) in KEYWORDS or (token.type == "NAME" and after is not None and after.type in ("EQUAL", "LBRACE"))
    )


def _expected(names: set[str]) -> str:
    shown = sorted({_SHOWN.get(name, f"`{name.lower()}`") for name in names if name in _SHOWN})
    return " or ".join(shown[:4]) if shown else "something else"
