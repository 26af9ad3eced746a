"""docs/language.md says what the code does: its examples compile, its tables are those of the code.

A fenced block is marked by what follows `mlm`: nothing (whole items; the rest of a spec is added), `model`, `train` or `plan`
(statements of one), or a file name (a file that the examples after it import).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from mlmdsl.cli import main
from mlmdsl.diagnostics import Diagnostic, Diagnostics
from mlmdsl.grammar import syntax
from mlmdsl.grammar.constraints import AXES, FACTS, ORDERS, RECOMPUTE, SCHEDULES, VARIABLES
from mlmdsl.grammar.evaluate import Evaluator
from mlmdsl.grammar.format import format_text
from mlmdsl.grammar.library import DEVICES, std_blocks
from mlmdsl.grammar.modules import read_file
from mlmdsl.grammar.parser import parse, parse_expression
from mlmdsl.grammar.settings import EXAMPLES
from mlmdsl.grammar.spec import Spec
from mlmdsl.planner.check import check
from mlmdsl.units import UNITS, Quantity
from tests.grammar.examples import Case, wrapped

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "language.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Fence:
    kind: str  # "mlm", "mlm plan", "weights", "sh"
    text: str
    line: int


@cache
def fences(*languages: str) -> tuple[Fence, ...]:
    found = re.finditer(r"^```(.+)\n((?:.*\n)*?)```$", PAGE, re.M)
    every = [Fence(m[1], m[2], PAGE.count("\n", 0, m.start()) + 1) for m in found]
    return tuple(f for f in every if f.kind.split()[0] in languages)


def files() -> dict[str, str]:
    return {name: f.text for f in fences("mlm") if (name := f.kind.partition(" ")[2]).endswith(".mlm")}


def examples() -> list[Fence]:
    return [f for f in fences("mlm") if not f.kind.endswith(".mlm")]


def case(fence: Fence, overrides: tuple[str, ...] = (), pins: tuple[str, ...] = ()) -> Case:
    return Case(wrapped(fence.kind.partition(" ")[2] or "file", fence.text), files(), overrides, pins)


def told(items: list[Diagnostic]) -> list[str]:
    return [f"{d.code} {d.message} ({d.help})" for d in items]


def compiled(given: Case) -> Spec:
    """The spec, of which the compiler has nothing to say."""
    found, resolved, graph = given.run()
    assert told(found.items) == []
    assert resolved.spec is not None and graph is not None
    if graph.layers:
        check(resolved.spec, graph, found)
    assert told(found.items) == []
    return resolved.spec


# ---- examples -------------------------------------------------------------------------------------------------------


def test_the_page_has_examples() -> None:
    assert len(examples()) >= 10 and set(files()) == {"shared.mlm", "base.mlm"}


@pytest.mark.parametrize("fence", examples(), ids=lambda f: f"line{f.line}")
def test_an_example_compiles_without_a_word(fence: Fence) -> None:
    compiled(case(fence))


@pytest.mark.parametrize("fence", fences("mlm"), ids=lambda f: f"line{f.line}")
def test_an_example_is_in_the_canonical_layout(fence: Fence) -> None:
    kind = fence.kind.partition(" ")[2]
    if kind in ("model", "train", "plan"):
        inside = "".join(f"  {line}" for line in fence.text.splitlines(keepends=True))
        name = "m " if kind == "model" else ""
        assert format_text(f"{kind} {name}{{\n{inside}}}\n") == f"{kind} {name}{{\n{inside}}}\n"
    else:
        assert format_text(fence.text) == fence.text


def test_the_listed_weights_are_those_of_the_example_above() -> None:
    (listed,) = fences("weights")
    above = [f for f in examples() if f.line < listed.line][-1]
    _, _, graph = case(above).run()
    assert graph is not None
    names = {w.instance(i) for w in graph.weights.values() for i in range(graph.count_of(w))}
    assert sorted(listed.text.split()) == sorted(names)


def commands() -> list[list[str]]:
    return [shlex.split(line) for f in fences("sh") for line in f.text.splitlines()]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_line_fits_the_first_example(words: list[str], tmp_path: Path) -> None:
    assert words[0] == "mlmdsl" and words[1] in ("check", "plan") and len(words) > 3
    given = {option: tuple(b for a, b in pairwise(words) if a == option) for option in ("--set", "--pin")}
    first = examples()[0]
    if not any(given.values()):
        path = tmp_path / "gpt.mlm"
        path.write_text(first.text, encoding="utf-8")
        assert main([word if word != "gpt.mlm" else str(path) for word in words[1:]]) == 0
        return
    assert compiled(case(first, given["--set"], given["--pin"])) != compiled(case(first))


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(first: str, section: str = "") -> list[list[str]]:
    """Rows of the table whose first heading is `first`, in the section that begins with `## section`; cells as written."""
    lines = PAGE[PAGE.index(f"\n## {section}") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line[1:-1].split("|")])
    assert rows
    return rows


def marked(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def words(cell: str) -> list[str]:
    return " ".join(marked(cell)).split()


def expression(text: str) -> syntax.Expr:
    found = Diagnostics()
    read = parse_expression(text, "value", found)
    assert read is not None, told(found.items)
    return read


def test_units() -> None:
    def dimension(example: str) -> str:
        value = Evaluator({}, Diagnostics()).value(expression(example))
        assert isinstance(value, Quantity)
        return value.dimension

    rows = {dimension(*marked(row[3])): row for row in table("kind")}
    assert {d: marked(row[3])[0] for d, row in rows.items()} == EXAMPLES
    for name, (_, units, prefixes, _) in rows.items():
        apart = " " if name in ("tokens", "sequences", "steps") else ""
        made = {f"{p}{apart if p else ''}{u}" for u in words(units) for p in ["", *words(prefixes)]}
        assert made == {u for u, (d, _) in UNITS.items() if d == name}


@pytest.mark.parametrize("row", table("value"), ids=lambda r: r[0])
def test_values_are_read(row: list[str]) -> None:
    for text in marked(row[1]):
        if not text.startswith("\\"):
            found = Diagnostics()
            Evaluator({}, found).value(expression(text))
            assert told(found.items) == []


def test_operators_bind_as_the_table_orders_them() -> None:
    rows = [words(row[0]) for row in table("operators")]
    assert rows[2] == ["not"] and rows[-2] == ["-"]
    binary = [row for row in rows if row not in (rows[2], rows[-2])]
    for index, row in enumerate(binary):
        for loose in row:
            for tight in (o for tighter in binary[index + 1 :] for o in tighter):
                one, other = expression(f"a {loose} b {tight} c"), expression(f"a {tight} b {loose} c")
                assert isinstance(one, syntax.Binary) and isinstance(other, syntax.Binary)
                assert (one.operator, other.operator) == (loose, loose)
            shown = expression(f"not a {loose} b")
            assert isinstance(shown, syntax.Binary if loose in ("or", "and") else syntax.Unary)
            shown = expression(f"-a {loose} b")
            assert isinstance(shown, syntax.Unary if loose == "**" else syntax.Binary)


# ---- tables of settings: probed through what the compiler says --------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the settings of a table stand: the item, and the setting whose call they belong to. base: settings that it
    cannot do without, beside those that the table calls required."""

    section: str
    item: str
    setting: str = ""
    call: str = ""
    leading: str = ""  # arguments that always come first
    base: tuple[tuple[str, str], ...] = ()

    @property
    def rows(self) -> list[list[str]]:
        return table(f"setting of `{self.call}`" if self.call else "setting", self.section)

    @property
    def needed(self) -> dict[str, str]:
        return {**dict(self.base), **{marked(r[0])[0]: marked(r[2])[0] for r in self.rows if r[3] == "required"}}

    def run(self, values: dict[str, str]) -> tuple[list[str], dict[str, Any] | None]:
        """What is said of the item with these settings alone, and what it comes to."""
        if self.call:
            arguments = ", ".join([self.leading] * bool(self.leading) + [f"{k} = {v}" for k, v in values.items()])
            values = {**REQUIRED[self.item], self.setting: f"{self.call}({arguments})"}
        return said(self.item, values)


REQUIRED = {
    "cluster": {"devices_per_node": "2", "device": "cpu(memory = 2 GiB, fp32 = 40 GFLOPS)"},
    "train": {
        "data": 'text("corpus.txt")',
        "seq_len": "64 tok",
        "batch": "8 seq",
        "stop": "10 steps",
        "optimizer": "adamw(lr = 1e-3)",
    },
}
PLACES = [
    Place("The cluster", "cluster", base=(("inter", "ethernet(1 GB/s per gpu)"),)),
    Place("Training", "train"),
    Place("The cluster", "cluster", "device", "gpu", base=(("bf16", "312 TFLOPS"),)),
    Place("The cluster", "cluster", "device", "cpu", base=(("fp32", "40 GFLOPS"),)),
    Place("The cluster", "cluster", "intra", "nvlink"),
    Place("Training", "train", "data", "jsonl", leading='"a.jsonl"'),
    Place("Training", "train", "objective", "masked_token"),
    Place("Training", "train", "objective", "span_corruption"),
    Place("Training", "train", "optimizer", "adamw"),
    Place("Training", "train", "schedule", "cosine"),
]
ROWS = [(place, row) for place in PLACES for row in place.rows]


TWO_SIDED = """model two_sided {
  input tokens: int[B, S]
  input decoder_tokens: int[B, T]
  table = Embedding(tokens, vocab = 400, dim = 64)
  h = Embedding(decoder_tokens, weight = table.weight)
  output Linear(h + CrossAttention(h, table, heads = 4), weight = table.weight)
}
"""


def said(item: str, values: dict[str, str]) -> tuple[list[str], dict[str, Any] | None]:
    text = "".join(f"{key} = {value}\n" for key, value in values.items())
    model = TWO_SIDED if "span_corruption" in text else ""
    found, resolved, _ = Case(wrapped("file", f"{model}{item} {'here ' if item == 'cluster' else ''}{{\n{text}}}\n"), {}).run()
    read = resolved.cluster if item == "cluster" else resolved.train
    values = read and {key: rounded(value) for key, value in asdict(read).items() if key not in ("span", "spans")}
    return told(found.items), values


def rounded(value: Any) -> Any:
    """Without the last digits, which differ between 5e-6 and 5 times 1e-6."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def offered(messages: list[str], code: str) -> list[str]:
    """The names in `one of a, b, c` of the message with this code."""
    (message,) = [m for m in messages if m.startswith(code)]
    return sorted(re.findall(r"\w+", message.partition("(one of ")[2]))


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.call or p.item)
def test_a_table_has_every_setting(place: Place) -> None:
    messages, _ = place.run({**place.needed, "zzqq": "1"})
    assert offered([m.replace("(...)", "") for m in messages], "MLM0211") == sorted(marked(row[0])[0] for row in place.rows)


@pytest.mark.parametrize(("place", "row"), ROWS, ids=lambda x: x.call or x.item if isinstance(x, Place) else marked(x[0])[0])
def test_a_setting_is_as_its_row_says(place: Place, row: list[str]) -> None:
    (key,), (example,) = marked(row[0]), marked(row[2])
    messages, set_ = place.run({**place.needed, key: example})
    assert messages == [] and set_ is not None
    rest = {k: v for k, v in place.needed.items() if k != key}
    if row[3] == "required":
        messages, _ = place.run(rest)
        assert any(m.startswith("MLM0310") and f"needs `{key}`" in m for m in messages)
    elif marked(row[3]):
        messages, silent = place.run(rest)
        assert messages == [] and silent == place.run({**rest, key: marked(row[3])[0]})[1]


def test_other_data_have_the_settings_that_the_page_says() -> None:
    rest = {
        "text": [],
        "python": [],
        "python_source": [],
        "parquet": ["column"],
        "pairs": ["source", "target"],
        "conversations": ["field"],
    }
    for call, own in rest.items():
        settings = sorted([*own, "validation"])
        messages, _ = said("train", {**REQUIRED["train"], "data": f'{call}("a", zzqq = 1)'})
        assert offered([m.replace("(...)", "") for m in messages], "MLM0211") == settings


@pytest.mark.parametrize(
    ("item", "setting", "first"),
    [("cluster", "intra", "link"), ("cluster", "inter", "link")]
    + [("train", setting, "call") for setting in ("data", "tokenizer", "objective", "optimizer", "schedule")],
)
def test_calls_stand_where_their_table_says(item: str, setting: str, first: str) -> None:
    messages, _ = said(item, {**REQUIRED[item], setting: "zzqq()"})
    listed = [
        marked(row[0])[0] for row in table(first, "Training" if item == "train" else "The cluster") if setting in words(row[1])
    ]
    assert offered([m.replace("(...)", "") for m in messages], "MLM0314") == sorted(listed)


def test_links_have_the_latencies_of_their_table() -> None:
    for name, place, latency in table("link", "The cluster"):
        setting, call = words(place)[0], marked(name)[0]
        plain = {**REQUIRED["cluster"], "nodes": "2", "inter": "ethernet(1 GB/s per gpu)"}
        silent = said("cluster", {**plain, setting: f"{call}(1 GB/s per gpu)"})
        assert silent == said(
            "cluster", {**plain, setting: f"{call}(bandwidth = 1 GB/s per gpu, latency = {marked(latency)[0]})"}
        )
        assert silent[0] == []


def test_links_inside_a_node_where_none_is_given() -> None:
    for device, link in table("device", "The cluster"):
        plain = {"devices_per_node": "2", "device": marked(device)[0]}
        messages, silent = said("cluster", plain)
        assert messages == [] and silent == said("cluster", {**plain, "intra": marked(link)[0]})[1]


def test_pools_take_over_the_settings_that_the_page_says() -> None:
    pool = "pool a {\ndevices_per_node = 2\ndevice = cpu(memory = 2 GiB, fp32 = 40 GFLOPS)\n%s\n}\n%s\n"
    for inside, outside, names in (
        ("zzqq = 1", "", ["device", "devices_per_node", "intra", "nodes"]),
        ("", "zzqq = 1", ["carbon", "energy", "inter", "mtbf", "price", "pue", "restart", "storage"]),
    ):
        text = f"cluster here {{\n{pool % (inside, outside)}}}\n"
        found, _, _ = Case(wrapped("file", text), {}).run()
        assert offered(told(found.items), "MLM0211") == names


# ---- the plan, and what ships ---------------------------------------------------------------------------------------


def planned(statement: str, pins: tuple[str, ...] = ()) -> list[str]:
    found, _, _ = Case(wrapped("plan", statement), {}, (), pins).run()
    return told(found.items)


def test_statements_of_a_plan() -> None:
    rows = {marked(row[0])[0]: row[1] for row in table("statement")}
    forms = get_args(get_type_hints(syntax.Rule)["form"])
    assert sorted(rows) == sorted(["minimize", "pin", *forms])
    assert offered(planned("minimize zzqq"), "MLM0213") == sorted(marked(rows["minimize"]))


def test_variables_of_a_plan() -> None:
    rows = {marked(row[0])[0]: row[1] for row in table("variable")}
    assert sorted(rows) == sorted(VARIABLES)
    assert words(rows["schedule"]) == list(SCHEDULES) and words(rows["recompute"]) == list(RECOMPUTE)
    assert words(rows["order"]) == list(ORDERS)
    samples = {"integer": ["4"], "truth value": ["true"], "list": ["[6, 6]"]}
    others = {"integer": "true", "truth value": "1", "list": "3"}
    for name, kind in rows.items():
        for value in samples.get(kind) or words(kind):
            assert planned(f"pin {name} = {value}") == planned("", (f"{name}={value}",)) == []
        wrong = planned(f"pin {name} = {others.get(kind, '4')}")
        assert [m[:7] for m in wrong] == ["MLM0320"]


def test_facts_of_a_plan() -> None:
    rows = {marked(row[0])[0]: row[1] for row in table("fact")}
    assert sorted(name.partition(".")[0] for name in rows) == sorted(set(FACTS) - set(VARIABLES))
    for name, what in rows.items():
        value = (marked(what) or ["1 GiB" if name == "device.memory" else "0.5"])[0]
        assert planned(f"require {name} <= {value}") == []
    listed = PAGE.partition("; the axes ")[2].partition("also have")[0]
    assert sorted(marked(listed)) == sorted(AXES)
    assert planned("\n".join(f"avoid {axis}.crosses_nodes" for axis in AXES)) == []


def test_shipped_blocks_and_devices() -> None:
    files = [parse(read_file(path), path, Diagnostics()) for path in std_blocks()]
    blocks = {b.name: [f.name for f in b.formals] for file in files for b in file.items if isinstance(b, syntax.Block)}
    assert {marked(row[0])[0]: words(row[1]) for row in table("block")} == blocks
    devices = [i.name for i in parse(read_file(DEVICES), DEVICES, Diagnostics()).items if isinstance(i, syntax.Const)]
    paragraph = PAGE.partition("A device comes from the library: ")[2].partition(". Or it is")[0]
    assert marked(paragraph) == devices


def test_types_of_arguments() -> None:
    values = {"int": "3", "float": "0.5", "bool": "true", "string": '"a"', "quantity": "3 tok", "weight": "tok.weight"}
    listed = marked(PAGE.partition("Its arguments have types: ")[2].partition("(of a call")[0])
    assert sorted(listed) == sorted(values)
    for kind, value in values.items():
        block = f"block Given(x: [B, S, d], a: {kind}) {{ output x }}\n"
        body = "tok = Embedding(t, vocab = 9, dim = 8)\noutput Linear(Given(tok, a = %s), out = 9)"
        model = f"model m {{\ninput t: int[B, S]\n{body}\n}}\n"
        assert told(Case(wrapped("file", block + model % value), {}).run()[0].items) == []
        other = '"a"' if kind != "string" else "1"
        assert [d.code for d in Case(wrapped("file", block + model % other), {}).run()[0].items] == ["MLM0257"]
