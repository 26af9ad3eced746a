"""From a model's text to its graph: names of weights, folding, tying, scopes."""

from __future__ import annotations

import pytest

from mlmdsl.diagnostics import Diagnostic, Diagnostics
from mlmdsl.grammar.resolve import resolve
from mlmdsl.graph.build import build
from mlmdsl.graph.graph import Graph
from mlmdsl.graph.verify import verify

REST = """
cluster c { nodes = 1
  devices_per_node = 1
  device = cpu(memory = 1 GiB, compute = 10 GFLOPS)
}
train {
  data = text("a.txt")
  seq_len = 16 tok
  batch = 2 seq
  stop = 1 steps
  optimizer = adamw(lr = 1e-3)
}
"""


def graph_of(model: str) -> Graph:
    found = Diagnostics()
    resolved = resolve("test.mlm", model + REST, found)
    graph = build(resolved.model, found) if resolved.model else None
    assert not found.errors, found.errors
    assert graph is not None
    verify(graph)
    return graph


BLOCK = """
block Layer(x: [B, S, d], heads: int) {
  attn = Attention(LayerNorm(x), heads = heads, causal = true)
  h = x + attn
  output h + MLP(LayerNorm(h))
}
"""
MODEL = (
    BLOCK
    + """
model m {
  param d = 16
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 32, dim = d)
  h = tok
  repeat 3 as blocks { h = Layer(h, heads = 2) }
  output Linear(LayerNorm(h), weight = tok.weight)
}
"""
)


def test_weights_are_named_after_what_calls_are_assigned_to() -> None:
    weights = graph_of(MODEL).weights
    assert "blocks.attn.query.weight" in weights
    assert weights["blocks.attn.query.weight"].instance(2) == "blocks.2.attn.query.weight"
    assert {"blocks.layer_norm.weight", "blocks.layer_norm_2.bias", "blocks.mlp.up.weight", "tok.weight"} <= set(weights)


def test_a_block_that_is_not_alone_in_its_repeat_keeps_its_name() -> None:
    graph = graph_of(MODEL.replace("h = Layer(h, heads = 2)", "h = Layer(RMSNorm(h), heads = 2)"))
    assert "blocks.h.attn.query.weight" in graph.weights
    assert "blocks.rms_norm.weight" in graph.weights


def test_a_repeat_stays_folded_whatever_its_count() -> None:
    deep = graph_of(MODEL.replace("repeat 3", "repeat 3_000"))
    assert len(deep.nodes) == len(graph_of(MODEL).nodes)
    assert deep.layers == 3000
    assert deep.count_of(deep.weights["blocks.attn.query.weight"]) == 3000


def test_tied_weights_count_once() -> None:
    tied = graph_of(MODEL)
    untied = graph_of(MODEL.replace("weight = tok.weight", "out = 32, bias = false"))
    assert untied.parameters - tied.parameters == 32 * 16


def test_a_repeat_inside_a_block_is_written_out() -> None:
    inner = BLOCK.replace("h = x + attn", "h = x + attn\n  repeat 2 as inner { h = h + Linear(h, out = d) }")
    graph = graph_of(inner + MODEL.removeprefix(BLOCK))
    assert {"blocks.inner.0.linear.weight", "blocks.inner.1.linear.weight"} <= set(graph.weights)


def test_if_is_decided_when_the_graph_is_built() -> None:
    graph = graph_of(MODEL.replace("causal = true", "causal = true, rope_theta = 1e4"))
    assert {"rotary"} < {node.op for node in graph.nodes.values()}
    assert "rotary" not in {node.op for node in graph_of(MODEL).nodes.values()}


def test_two_values_are_carried() -> None:
    model = MODEL.replace("h = tok\n", "h = tok\n  g = tok * 0.5\n").replace(
        "{ h = Layer(h, heads = 2) }", "{ h = Layer(h, heads = 2)\n g = g + h\n }"
    )
    graph = graph_of(model.replace("LayerNorm(h), weight", "LayerNorm(h + g), weight"))
    (region,) = (r for r in graph.regions if r.repeated)
    assert [c.variable for c in region.carried] == ["h", "g"]


def test_what_the_loss_does_not_need_is_dropped_with_a_warning() -> None:
    found = Diagnostics()
    text = MODEL.replace("h = tok\n", "h = tok\n  unused = sigmoid(tok)\n") + REST
    graph = build(resolve("test.mlm", text, found).model, found)  # pyright: ignore[reportArgumentType]
    assert graph is not None and "sigmoid" not in {node.op for node in graph.nodes.values()}
    assert [(d.code, d.severity) for d in found.items] == [("MLM0513", "warning")]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_heads_shrink_keys_and_values(heads: int) -> None:
    graph = graph_of(MODEL.replace("heads = heads, causal", f"heads = 4, kv_heads = {heads}, causal"))
    assert graph.weights["blocks.attn.key.weight"].shape == (4 * heads, 16)
    assert graph.weights["blocks.attn.query.weight"].shape == (16, 16)


# ---- where mistakes are shown ---------------------------------------------------------------------------------------


def mistakes(model: str) -> list[Diagnostic]:
    found = Diagnostics()
    resolved = resolve("test.mlm", model + REST, found)
    assert resolved.model is None or build(resolved.model, found) is None
    return list(found.errors)


def test_a_mistake_that_shows_inside_a_shipped_block_is_the_calls() -> None:
    """The user's call first, the place inside as the other half."""
    text = MODEL.replace("heads = heads, causal", "heads = 4, kv_heads = 3, causal")
    (mistake,) = mistakes(text)
    assert mistake.code == "MLM0411" and mistake.span is not None and mistake.span.file == "test.mlm"
    line = text.splitlines()[mistake.span.line - 1]
    assert line[mistake.span.column - 1 :].startswith("Attention(")
    assert [label.span.file for label in mistake.secondary] == ["std/attention.mlm"]


@pytest.mark.parametrize(("count", "code"), [("several", "MLM0201"), ("0", "MLM0518")])
def test_the_body_of_a_repeat_is_read_whatever_its_count(count: str, code: str) -> None:
    text = MODEL.replace("repeat 3 as", f"repeat {count} as").replace("Layer(h, heads = 2)", "Layer(h, heads = 2, deep = 1)")
    assert [mistake.code for mistake in mistakes(text)] == [code, "MLM0251"]
