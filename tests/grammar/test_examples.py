"""Every example of docs/diagnostics.toml: the bad one gives its code where it is marked and nothing else, the good none."""

from __future__ import annotations

import pytest

from mlmdsl.diagnostics import CODES
from tests.grammar.examples import Case, cases, table

EXAMPLES = {code: found for code, entry in table().items() if (found := cases(entry)) is not None}


@pytest.mark.parametrize("code", EXAMPLES)
def test_bad_example(code: str) -> None:
    bad, _ = EXAMPLES[code]
    found, _, graph = bad.planned() if code.startswith("MLM06") else bad.checked()
    assert [d.code for d in found.items if d.code != "MLM0513"] == [code] * (code != "MLM0513"), found.items
    first = next(d for d in found.items if d.code == code)
    assert first.span is not None
    assert (first.span.file, first.span.line, first.span.column) == bad.expected()
    assert (graph is None) or first.severity == "warning" or not "MLM0500" < code < "MLM0600"


@pytest.mark.parametrize("code", EXAMPLES)
def test_good_example(code: str) -> None:
    _, good = EXAMPLES[code]
    found, resolved, graph = good.planned() if code.startswith("MLM06") else good.checked()
    assert not found.errors
    assert resolved.spec is not None and graph is not None
    assert all(d.code == "MLM0513" for d in found.items)


def test_every_code_of_the_text_has_an_example() -> None:
    front = {code for code in CODES if code[:5] in ("MLM00", "MLM01", "MLM02", "MLM03", "MLM04", "MLM05")}
    assert front <= set(EXAMPLES), sorted(front - set(EXAMPLES))
    assert set(EXAMPLES) <= set(CODES)


def test_a_mark_is_where_it_is_seen() -> None:
    assert Case("a\n  ▸b", {}).expected() == ("spec.mlm", 2, 3)
