"""What sharding is derived for blocks that everybody knows, as a page to read: tests/golden/typed_graph/.

Each file shows one pass of the layers: a line per operation with its type on one rank, its weights as that rank holds them, and
between the lines the collectives, forward and (backward). The layouts themselves are in golden/sharding; here it is the story:
Megatron's column/row pairs with sequence-parallel norms (arXiv:2205.05198, figure 5), and what a parallel block saves
(arXiv:2204.02311, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import pytest

from mlmdsl.graph.graph import Graph, Node, Region
from mlmdsl.graph.tensor import Dim, size_of
from mlmdsl.planner.sharding import Move, Sharding, shard_graph
from tests.planner.models import costs_of, graph_of

SIZES = {"B": 1, "S": 2048}
TENSOR = 4
Golden = Callable[[str, str], None]

_FRAME = """
block Block(x: [B, S, d]) {{
{body}
}}
model {name} {{
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 32_768, dim = 1024)
  repeat 8 as blocks {{ h = Block(h) }}
  output Linear(LayerNorm(h), out = 32_768, bias = false)
}}
"""
# One after the other, as in GPT-2 and Megatron
PLAIN = """  h = x + Attention(LayerNorm(x), heads = 16, causal = true)
  output h + MLP(LayerNorm(h), hidden = 4096)"""
# Side by side behind one norm, as in PaLM
PARALLEL = """  n = LayerNorm(x)
  output x + (Attention(n, heads = 16, causal = true, bias = false) + MLP(n, hidden = 4096, bias = false))"""
# The same with biases, and added one after the other: GPT-J
GPT_J = """  n = LayerNorm(x)
  output x + Attention(n, heads = 16, causal = true) + MLP(n, hidden = 4096)"""
# Few heads of keys and values: Falcon
FALCON = """  n = LayerNorm(x)
  attn = Attention(n, heads = 16, kv_heads = 4, causal = true, bias = false, rope_theta = 10_000)
  mlp = MLP(n, hidden = 4096, bias = false)
  output x + attn + mlp"""
# Norms of their own: GPT-NeoX
NEOX = """  output x + Attention(LayerNorm(x), heads = 16, causal = true) + MLP(LayerNorm(x), hidden = 4096)"""
BLOCKS = {"plain": PLAIN, "parallel": PARALLEL, "gpt_j": GPT_J, "falcon": FALCON, "gpt_neox": NEOX}

SEQUENCE_PAIR = [("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")]
PLAIN_PAIR = [(None, "all_reduce"), ("all_reduce", None)]


def sharded(name: str, sequence: bool) -> Sharding:
    graph = graph_of(_FRAME.format(body=BLOCKS[name], name=name))
    found = shard_graph(graph, TENSOR, sequence, costs_of(TENSOR, SIZES))
    assert isinstance(found, Sharding), found
    return found


def moves_of(found: Sharding) -> list[Move]:
    """Of one pass of the layers."""
    return [move for move in found.moves if found.graph.regions[move.region].name == "blocks"]


def pairs(found: Sharding) -> list[tuple[str | None, str | None]]:
    return [(move.step.forward, move.step.backward) for move in moves_of(found)]


def moved_bytes(found: Sharding) -> int:
    """Of one pass of the layers, forward and backward, in elements of two bytes."""
    each = ((found.move_bytes(m, SIZES, 2), m.step.forward, m.step.backward) for m in moves_of(found))
    return sum(size * sum(step is not None for step in steps) for size, *steps in each)


# ---- drawn ----------------------------------------------------------------------------------------------------------


def drawn(found: Sharding) -> str:
    region = next(r for r in found.graph.regions if r.name == "blocks")
    moves = moves_of(found)
    sequence = "sequence parallel" if found.sequence_parallel else "no sequence parallelism"
    lines = [f"one pass of {region.name}, tensor {found.tensor}, {sequence}", ""]
    for node in region.nodes:
        for move in (m for m in moves if m.consumers[0] == node.path):
            lines.append(_moved(found, move))
        lines += _node(found, region, node)
    calls = sum((m.step.forward is not None) + (m.step.backward is not None) for m in moves)
    return "\n".join([*lines, "", f"{calls} collectives, {moved_bytes(found):,} bytes a pass"]) + "\n"


def _moved(found: Sharding, move: Move) -> str:
    names = ", ".join(path.removeprefix("blocks.") for path in move.consumers)
    return f"  ==== {move.step.forward or '-'} ({move.step.backward or '-'}) of {_short(move.value)} for {names}"


def _short(path: str) -> str:
    return path.removeprefix("blocks.")


def _node(found: Sharding, region: Region, node: Node) -> Iterator[str]:
    strategy = found.strategies[node.path]
    local = _local(node.type.shape, strategy.output.dim if strategy.output.is_shard else None)
    partial = " partial sum" if str(strategy.output) == "partial" else ""
    weights = "".join(
        "  "
        + key.rpartition(".")[2]
        + _weight(found.graph, key, placed.dim)
        + (" gradient summed" if placed.partial_gradient else "")
        for key, placed in zip(node.weights, strategy.weights, strict=True)
    )
    yield f"  {_short(node.path):<22} {strategy.name:<10} [{local}]{partial}{weights}"


def _local(shape: tuple[Dim, ...], cut: int | None) -> str:
    return ", ".join(f"{dim}/{TENSOR}" if number == cut else str(dim) for number, dim in enumerate(shape))


def _weight(graph: Graph, key: str, cut: int | None) -> str:
    return f"[{_local(graph.weights[key].shape, cut)}]"


# ---- golden ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
@pytest.mark.parametrize("name", BLOCKS)
def test_golden(name: str, sequence: bool, golden: Golden) -> None:
    golden(f"typed_graph/{name}{'' if sequence else '_without_sequence'}.txt", drawn(sharded(name, sequence)))


@pytest.mark.parametrize(("sequence", "pair"), [(True, SEQUENCE_PAIR), (False, PLAIN_PAIR)])
def test_a_plain_block_has_two_pairs(sequence: bool, pair: list[tuple[str | None, str | None]]) -> None:
    assert pairs(sharded("plain", sequence)) == pair * 2


@pytest.mark.parametrize(("sequence", "pair"), [(True, SEQUENCE_PAIR), (False, PLAIN_PAIR)])
@pytest.mark.parametrize("name", ["parallel", "gpt_j", "falcon", "gpt_neox"])
def test_a_parallel_block_saves_one_and_half_the_bytes(
    name: str, sequence: bool, pair: list[tuple[str | None, str | None]]
) -> None:
    found = sharded(name, sequence)
    assert pairs(found) == pair
    assert 2 * moved_bytes(found) == moved_bytes(sharded("plain", sequence))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_matrix_is_cut_and_every_norm_works_on_its_part_of_the_sequence(name: str) -> None:
    found = sharded(name, True)
    region = next(r for r in found.graph.regions if r.name == "blocks")
    for node in region.nodes:
        strategy = found.strategies[node.path]
        if node.op == "linear":
            assert strategy.name in ("column", "row") and strategy.weights[0].dim is not None
        if node.op in ("layer_norm", "rms_norm") and name != "gpt_neox":  # whose two norms share the gathered input
            assert strategy.name == "sequence" and strategy.output.dim == 1
    held = sum(found.local_elements(key) for key in found.graph.weights if len(found.graph.weights[key].shape) == 2)
    assert (
        held == sum(prod(size_of(d, {}) for d in w.shape) for w in found.graph.weights.values() if len(w.shape) == 2) / TENSOR
    )
