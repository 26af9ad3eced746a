"""A sound spec, and mistakes of a user of it: each replaces one piece of text, and has one code at one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlmdsl.diagnostics import Diagnostic, Diagnostics
from mlmdsl.grammar.resolve import resolve
from mlmdsl.graph.build import build
from mlmdsl.planner.check import check

PATH = "shop.mlm"
MARK = "▸"
SOUND = """import "std/devices.mlm" as devices

const width = 128

block Layer(x: [B, S, d], heads: int, ff: int) {
  a = x + Attention(RMSNorm(x), heads = heads, causal = true)
  gate = Linear(RMSNorm(a), out = ff)
  output a + Linear(gelu(gate), out = d)
}

model small {
  param layers = 4
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 256, dim = width)
  h = tok + Position(tokens, max = 64, dim = width)
  repeat layers as blocks {
    h = Layer(h, heads = 4, ff = 4 * width)
  }
  last = RMSNorm(h)
  output Linear(last, weight = tok.weight)
  expect params < 1_000_000
}

cluster desk {
  nodes = 1
  devices_per_node = 4
  device = devices.L40S_48GB
  intra = pcie(bandwidth = 32 GB/s per gpu, latency = 5 us)
  price = 0.80 USD/gpu/hour
}

train {
  data = text("corpus/*.txt")
  tokenizer = bytes()
  seq_len = 64 tok
  batch = 32 seq
  stop = 200 steps
  optimizer = adamw(lr = 2e-3, betas = (0.9, 0.95), weight_decay = 0.1)
  schedule = cosine(warmup = 20 steps, min_lr = 2e-4)
  precision = bf16
}

plan {
  minimize time
  pin tensor = 2
  require pipeline <= 2
}
"""


@dataclass(frozen=True)
class Mistake:
    """`right`, which stands once in SOUND, becomes `wrong`; MARK in it is where the diagnostic points."""

    name: str
    code: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Found:
    code: str
    line: int
    column: int


def seeded(mistakes: Sequence[Mistake]) -> tuple[str, list[Found]]:
    """The text with the mistakes, and what has to be found, in the order of the text."""
    text, at = SOUND, {}
    for index, mistake in enumerate(mistakes):
        assert text.count(mistake.right) == 1, mistake.name
        text = text.replace(mistake.right, mistake.wrong.replace(MARK, chr(0xE000 + index)))
        at[chr(0xE000 + index)] = mistake.code
    found: list[Found] = []
    for number, line in enumerate(text.split("\n"), 1):
        while marks := [c for c in line if c in at]:
            found.append(Found(at[marks[0]], number, line.index(marks[0]) + 1))
            line = line.replace(marks[0], "", 1)
    for mark in at:
        text = text.replace(mark, "")
    return text, found


def front_end(text: str) -> list[Diagnostic]:
    """All problems that the passes before the search report."""
    found = Diagnostics()
    resolved = resolve(PATH, text, found)
    graph = build(resolved.model, found, resolved.spec and resolved.spec.train) if resolved.model else None
    if resolved.spec and graph and not found.errors:
        check(resolved.spec, graph, found)
    return found.items


def places(items: Sequence[Diagnostic]) -> list[Found]:
    """Where the diagnostics point, in the order of the text."""
    spans = [(d.code, d.span) for d in items]
    assert all(span is not None and span.file == PATH for _, span in spans), items
    return sorted((Found(code, s.line, s.column) for code, s in spans if s), key=lambda f: (f.line, f.column))


MISTAKES = (
    # characters and syntax
    Mistake("a missing comma", "MLM0002", "heads = 4, ff = 4 * width", "heads = 4 ▸ff = 4 * width"),
    Mistake("a misspelt keyword", "MLM0003", "repeat layers", "▸repaet layers"),
    Mistake("a missing operand", "MLM0001", "h = tok + Position(", "h = tok + ▸* Position("),
    Mistake("an unclosed call", "MLM0004", "gate = Linear(RMSNorm(a), out = ff)", "gate = Linear▸(RMSNorm(a), out = ff"),
    Mistake("an unclosed string", "MLM0005", 'text("corpus/*.txt")', 'text(▸"corpus/*.txt)'),
    Mistake("a semicolon", "MLM0006", "last = RMSNorm(h)", "last = RMSNorm(h)▸;"),
    Mistake(
        "a bracket too many", "MLM0008", "output a + Linear(gelu(gate), out = d)", "output a + Linear(gelu(gate), out = d)▸)"
    ),
    Mistake("a missing equals sign", "MLM0009", "stop = 200 steps", "stop ▸200 steps"),
    Mistake("a set without a comma", "MLM0002", "require pipeline <= 2", "require pipeline in {1 ▸2}"),
    Mistake("a pin in train", "MLM0007", "  precision = bf16", "  precision = bf16\n  ▸pin zero = 1"),
    # names and arguments
    Mistake("an unknown function", "MLM0250", "gelu(gate)", "▸gleu(gate)"),
    Mistake("an unknown name in the model", "MLM0201", "dim = width)\n  h", "dim = ▸widht)\n  h"),
    Mistake("an unknown argument", "MLM0251", "causal = true", "▸casual = true"),
    Mistake("a missing argument", "MLM0253", "Embedding(tokens, vocab = 256, dim", "▸Embedding(tokens, dim"),
    Mistake("an unknown weight", "MLM0255", "weight = tok.weight", "weight = tok.▸wieght"),
    Mistake("an unknown setting", "MLM0211", "seq_len = 64 tok", "seq_len = 64 tok\n  ▸sequence = 64 tok"),
    Mistake("an unknown plan variable", "MLM0212", "pin tensor = 2", "pin ▸tensors = 2"),
    Mistake("an unknown import", "MLM0101", '"std/devices.mlm"', '▸"std/device.mlm"'),
    Mistake("an unknown device", "MLM0201", "devices.L40S_48GB", "devices.▸L40S"),
    Mistake("a const given twice", "MLM0104", "const width = 128", "const width = 128\nconst ▸width = 64"),
    # quantities and settings
    Mistake("an unknown unit", "MLM0301", "32 GB/s per gpu", "▸32 GX/s per gpu"),
    Mistake("a bare bandwidth", "MLM0308", "32 GB/s per gpu", "▸32 GB/s"),
    Mistake("a percentage", "MLM0302", "weight_decay = 0.1", "weight_decay = ▸10%"),
    Mistake("a time for a price", "MLM0306", "0.80 USD/gpu/hour", "▸0.80 hours"),
    Mistake("a batch of no unit", "MLM0305", "batch = 32 seq", "batch = ▸32"),
    Mistake("a batch of half sequences", "MLM0401", "batch = 32 seq", "batch = ▸100 tok"),
    Mistake("an unknown precision", "MLM0313", "precision = bf16", "precision = ▸bf61"),
    Mistake("an unknown schedule", "MLM0314", "schedule = cosine(", "schedule = ▸cosin("),
    Mistake("a missing setting", "MLM0310", 'train {\n  data = text("corpus/*.txt")\n', "▸train {\n"),
    Mistake("a number out of range", "MLM0312", "devices_per_node = 4", "devices_per_node = ▸0"),
    Mistake("a setting given twice", "MLM0315", "nodes = 1\n", "nodes = 1\n  ▸nodes = 2\n"),
    # shapes
    Mistake(
        "another width",
        "MLM0501",
        "tok + Position(tokens, max = 64, dim = width)",
        "▸tok + Position(tokens, max = 64, dim = 96)",
    ),
    Mistake("tokens for values", "MLM0502", "last = RMSNorm(h)", "last = RMSNorm(▸tokens)"),
    Mistake("heads that do not divide", "MLM0410", "heads = heads, causal", "heads = ▸2 * heads + 1, causal"),
    Mistake("a failing expectation", "MLM0520", "expect params < 1_000_000", "expect ▸params < 1_000"),
    Mistake("an objective that is none", "MLM0213", "minimize time", "minimize ▸speed"),
)
