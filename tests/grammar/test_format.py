"""`mlmdsl fmt`: one layout, nothing lost, nothing said otherwise."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.cli import main
from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar import syntax
from mlmdsl.grammar.format import WIDTH, format_file, format_text
from mlmdsl.grammar.library import STD
from mlmdsl.grammar.parser import lex, parse

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted([*(ROOT / "specs").rglob("*.mlm"), *STD.glob("*.mlm")])

UNTIDY = r"""mlm 1
# top
import   "x.mlm" as y
const a=3
const b = -a+2**-1   # neg
param n : int=4
# the block
block A( x:[B,S,d], # input
   heads:int=(1,) , # one head
   # on its own
   z = ( a
     # why
     + b # end
   ) # after
   # last
){
  if n==3{output x}else if n in {none,1,}{ output y
  }else{
     }


  # tail


}
cluster c{nodes=4

  pool fast { device=cpu(memory=80GiB,compute=1GFLOPS) } # first
  pool { inter = ethernet(3e3  MB/s   per   gpu) } # second
}
cluster  d from c{ # nothing else
}
train{ data = text( "a#b.txt", "\"#\"" ) # real "comment"
 f = f( # inside
 )
 g = f(a # one
 , b # two
 )
 stop = a . b( 15T  tok )
}
plan { pin schedule=1f1b }
"""

TIDY = r"""mlm 1

# top
import "x.mlm" as y
const a = 3
const b = -a + 2 ** -1  # neg
param n: int = 4

# the block
block A(
  x: [B, S, d],       # input
  heads: int = (1,),  # one head
  # on its own
  z = (
    # why
    a + b  # end
  ),  # after
  # last
) {
  if n == 3 {
    output x
  } else if n in {none, 1} {
    output y
  } else {}

  # tail
}

cluster c {
  nodes = 4

  pool fast { device = cpu(memory = 80 GiB, compute = 1 GFLOPS) }  # first
  pool { inter = ethernet(3e3 MB/s per gpu) }                      # second
}

cluster d from c {  # nothing else
}

train {
  data = text("a#b.txt", "\"#\"")  # real "comment"
  f = f(
    # inside
  )
  g = f(
    a,  # one
    b,  # two
  )
  stop = a.b(15 T tok)
}

plan { pin schedule = 1f1b }
"""

TEXTS = [UNTIDY, *(path.read_text(encoding="utf-8") for path in SHIPPED)]


def read(text: str) -> syntax.File:
    found = Diagnostics()
    tree = parse(text, "spec.mlm", found)
    assert not found.items, [d.message for d in found.items]
    return tree


def comments(text: str) -> list[str]:
    """Found by scanning lines for the first `#` outside a string, without the formatter's own tokens."""
    outside = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^"#])*(#.*)')
    return sorted(m[1].rstrip() for line in text.splitlines() if (m := outside.match(line)))


# ---- examples -------------------------------------------------------------------------------------------------------


def test_an_untidy_file_becomes_tidy() -> None:
    assert format_file(read(UNTIDY)) == TIDY


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_files_are_in_the_layout(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert format_file(read(text)) == text, f"run mlmdsl fmt {path}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("# alone", "# alone\n"),
        ("\n\n\nconst a = 1\n\n\n\nconst b = 2\n\n\n", "const a = 1\n\nconst b = 2\n"),
        ("\ufeffconst a = 1\r\n# c\r\n", "const a = 1\n# c\n"),
        ("const a = 1\nplan {}\n# of b\nconst b = 2\n", "const a = 1\n\nplan {}\n\n# of b\nconst b = 2\n"),
        ("const a = 1\n# of the plan\nplan {}\n", "const a = 1\n\n# of the plan\nplan {}\n"),
        ("const a = f((1), (1,), (), [1, 2,],)\n", "const a = f((1), (1,), (), [1, 2])\n"),
        ("const a = 1 - -2 ** - b\n", "const a = 1 - -2 ** -b\n"),
        ("const a = not (b or c) and d in {1,f(\n2)}\n", "const a = not (b or c) and d in {1, f(2)}\n"),
        ("model m {output=3}\n", "model m { output = 3 }\n"),
        ("const a = 50_257 + 0.6e-4 + 80GiB\n", "const a = 50_257 + 0.6e-4 + 80 GiB\n"),
    ],
)
def test_small_layouts(before: str, after: str) -> None:
    if "()" not in before:  # only the layout of `()` is asked, it is no value
        assert format_file(read(before)) == after
    assert format_text(before) == after == format_text(after)


def test_long_calls_are_broken_at_the_width() -> None:
    name, wide, wider = "n" * 20, "a" * 40, "b" * 40
    assert format_text(f"const {name} = f(x = {wide}, y = {wider})\n") == (f"const {name} = f(\n  x = {wide}, y = {wider}\n)\n")
    assert format_text(f"const {name} = f(x = {wide}, y = {wider}, z = {wide})\n") == (
        f"const {name} = f(\n  x = {wide},\n  y = {wider},\n  z = {wide},\n)\n"
    )
    exact = f"const a = f({'x' * (WIDTH - 13)})\n"
    assert len(exact) == WIDTH + 1 and format_text(exact) == exact
    assert format_text(exact.replace("x)", "xx)")).count("\n") == 3


def test_the_widest_bracket_is_broken_first_and_only_as_needed() -> None:
    small, large = "small(1, 2)", f"large({', '.join(['value'] * 14)})"
    assert format_text(f"const a = {small} + {large}\n") == (
        f"const a = small(1, 2) + large(\n  {', '.join(['value'] * 14)}\n)\n"
    )


def test_parentheses_around_one_value_never_become_a_tuple() -> None:
    text = "const a = (\n  b  # half\n)\n"
    assert format_text(text) == text
    assert read(text) == read("const a = b\n")


def test_a_one_line_body_that_does_not_fit_is_opened() -> None:
    statement = f"h = f({', '.join(['value'] * 13)})"
    assert format_text(f"model m {{ {statement} }}\n") == f"model m {{\n  {statement}\n}}\n"


# ---- what always holds ----------------------------------------------------------------------------------------------


def sound(text: str) -> str:
    """The layout of `text`, after asking it all that should hold."""
    done = format_text(text)
    assert read(done) == read(text)
    assert format_text(done) == done
    assert comments(done) == comments(text)
    assert done == "" or (done.endswith("\n") and not done.endswith("\n\n") and not done.startswith("\n"))
    assert not re.search(r"[ \t]$", done, re.M) and "\n\n\n" not in done
    return done


@pytest.mark.parametrize("text", TEXTS)
def test_the_layout_is_sound(text: str) -> None:
    sound(text)


def test_the_comparison_of_trees_sees_a_change() -> None:
    assert read(UNTIDY) != read(UNTIDY.replace("const a=3", "const a=4"))
    assert read(UNTIDY) != read(UNTIDY.replace("(1,)", "(1)"))
    assert comments(UNTIDY) != comments(UNTIDY.replace("# neg", ""))


_LOOSE = frozenset("()[]{},:")
_OPEN, _CLOSE = {"LPAR", "LSQB", "LBRACE"}, {"RPAR", "RSQB", "RBRACE"}


def perturbed(text: str, chance: random.Random, lines: bool) -> str:
    """The same tokens with other blanks and with newlines inside brackets; `lines`: with comments and blank lines too."""
    out, opened, numbers = "", list[str](), 0
    tokens = [t for t in lex(text)]
    for token in tokens:
        inside = bool(opened) and opened[-1] != "LBRACE"
        numbers += 1
        if token.type == "_NL":
            out += (
                "" if inside else chance.choice(["\n", "\n\n \n", f" # {numbers}\n", f"\n\t# {numbers}\n"] if lines else ["\n"])
            )
            continue
        gaps = [" ", "\t  "] + ["\n", f"# {numbers}\n"][: 1 + lines] * inside
        gaps += [""] if out[-1:] in _LOOSE or token in _LOOSE else []
        out += chance.choice(gaps) + token
        if token.type in _OPEN:
            opened.append(token.type)
        elif token.type in _CLOSE:
            opened.pop()
    return out


def without_comments(text: str) -> str:
    """The tokens of each line, so that only what `perturbed` keeps is compared."""
    return perturbed(text, random.Random(0), lines=False)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TEXTS), st.randoms(use_true_random=False))
def test_any_way_of_writing_a_file_is_formatted_soundly(text: str, chance: random.Random) -> None:
    other = perturbed(text, chance, lines=True)
    assert read(sound(other)) == read(text)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TEXTS), st.randoms(use_true_random=False))
def test_blanks_and_newlines_in_brackets_make_no_difference(text: str, chance: random.Random) -> None:
    assert sound(perturbed(text, chance, lines=False)) == format_text(without_comments(text))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_rewrites_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untidy, tidy = tmp_path / "untidy.mlm", tmp_path / "tidy.mlm"
    untidy.write_text(UNTIDY, encoding="utf-8")
    tidy.write_text(TIDY, encoding="utf-8")

    assert main(["fmt", "--check", str(tidy), str(untidy)]) == 1
    assert capsys.readouterr().out == f"{untidy}: would be reformatted\n"
    assert untidy.read_text(encoding="utf-8") == UNTIDY

    assert main(["fmt", str(tidy), str(untidy)]) == 0
    assert capsys.readouterr().out == f"{untidy}: reformatted\n"
    assert untidy.read_text(encoding="utf-8") == TIDY

    assert main(["fmt", "--check", str(tidy), str(untidy)]) == 0
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.mlm"
    path.write_text("const a = (1\nplan {   }\n", encoding="utf-8")
    assert main(["fmt", str(path)]) == 1
    assert "error[MLM00" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "const a = (1\nplan {   }\n"
    assert main(["fmt", str(tmp_path / "none.mlm")]) == 2
