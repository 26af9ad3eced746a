"""The sharding pass on blocks that everybody knows, and on some that nobody does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from mlmdsl.graph.graph import Graph
from mlmdsl.planner.choice import Problem
from mlmdsl.planner.mesh import Network
from mlmdsl.planner.plan import RegionLayout
from mlmdsl.planner.sharding import Infeasible, Sharding, reference_micro_batch, replicated, shard_graph
from mlmdsl.planner.verify_layout import verify_regions
from tests.planner.models import CPU, GPT, H100, LLAMA, LOOPBACK, PARALLEL, costs_of, graph_of

SIZES = {"B": 4, "S": 2048}
Golden = Callable[[str, str], None]


def sharded(text: str, tensor: int = 8, sequence: bool = True) -> tuple[Graph, Sharding]:
    graph = graph_of(text)
    found = shard_graph(graph, tensor, sequence, costs_of(tensor, SIZES))
    assert isinstance(found, Sharding), found
    verify_regions(graph, found.layouts(SIZES, 2), tensor, sequence, SIZES, 2)
    return graph, found


def collectives(found: Sharding, region: int) -> list[tuple[str | None, str | None]]:
    return [(m.step.forward, m.step.backward) for m in found.moves if m.region == region]


def drawn(layouts: Sequence[RegionLayout]) -> str:
    """Layouts as text, for golden files."""
    lines: list[str] = []
    for layout in layouts:
        lines.append(f"region {layout.region or '(straight)'} {layout.boundary or ''}".rstrip())
        for node in layout.nodes:
            inputs, weights = ", ".join(node.inputs), "".join(f" [{w}]" for w in node.weights)
            lines.append(f"  {node.path}: {node.strategy} ({inputs}){weights} -> {node.output}")
        for t in layout.transitions:
            calls = f"{t.forward} / {t.backward}, dim {t.dim}" + (f" to {t.target_dim}" if t.target_dim is not None else "")
            lines.append(
                f"  * {t.value} {t.source} -> {t.target} for {', '.join(t.consumers)}: {calls}, {t.bytes} bytes: {t.reason}"
            )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(("name", "text"), [("llama", LLAMA), ("gpt", GPT), ("parallel", PARALLEL)])
def test_golden(name: str, text: str, sequence: bool, golden: Golden) -> None:
    _, found = sharded(text, 8, sequence)
    golden(f"sharding/{name}_{'sequence' if sequence else 'plain'}.txt", drawn(found.layouts(SIZES, 2)))


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("text", [LLAMA, GPT])
def test_megatron_with_sequence_parallelism(text: str, tensor: int) -> None:
    """One all_gather and one reduce_scatter per half block, duals backward (arXiv:2205.05198)."""
    _, found = sharded(text, tensor, True)
    assert collectives(found, 1) == [("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")] * 2
    matrices = {key: found.weights[key].dim for key in found.weights if len(found.graph.weights[key].shape) == 2}
    for key, dim in matrices.items():
        if key.startswith("blocks."):
            assert dim == (1 if "out" in key or "down" in key else 0), key


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("text", [LLAMA, GPT])
def test_megatron_f_and_g(text: str, tensor: int) -> None:
    """Without sequence parallelism: nothing forward and an all_reduce backward, then the other way round (arXiv:1909.08053)."""
    _, found = sharded(text, tensor, False)
    assert collectives(found, 1) == [(None, "all_reduce"), ("all_reduce", None)] * 2


def test_a_parallel_block_pays_once() -> None:
    assert collectives(sharded(PARALLEL, 8, True)[1], 1) == [("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")]
    assert collectives(sharded(PARALLEL, 8, False)[1], 1) == [(None, "all_reduce"), ("all_reduce", None)]


def test_one_gather_serves_all_that_ask() -> None:
    _, found = sharded(LLAMA)
    gathers = [m.consumers for m in found.moves if m.region == 1 and m.step.forward == "all_gather"]
    assert gathers[0] == ("blocks.attention.query", "blocks.attention.key", "blocks.attention.value")
    assert gathers[1] == ("blocks.swi_glu.gate", "blocks.swi_glu.up")


def test_tied_weights_agree() -> None:
    graph, found = sharded(GPT)
    placements = {
        found.strategies[path].weights[node.weights.index("tok.weight")]
        for path, node in graph.nodes.items()
        if "tok.weight" in node.weights
    }
    assert len(placements) == 1
    assert placements.pop().dim == 0


def test_heads_that_do_not_divide_are_refused() -> None:
    graph = graph_of(LLAMA)
    found = shard_graph(graph, 16, True, costs_of(16, SIZES))
    assert isinstance(found, Infeasible)
    assert (found.reason, found.node, found.attribute) == ("heads", "blocks.attention.a", "kv_heads")
    assert found.message == "tensor = 16 cannot split kv_heads = 8"


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    found = shard_graph(graph_of(LLAMA), 8, True, costs_of(8, {"B": 1, "S": 1001}))
    assert isinstance(found, Infeasible) and (found.reason, found.attribute) == ("sequence", "S")
    assert isinstance(shard_graph(graph_of(LLAMA), 8, False, costs_of(8, {"B": 1, "S": 1001})), Sharding)


@pytest.mark.parametrize("sequence", [True, False])
def test_an_odd_vocabulary_has_a_way(sequence: bool) -> None:
    graph, found = sharded(GPT.replace("50_304", "50_257"), 4, sequence)
    assert found.strategies[graph.loss].name != "vocabulary"
    assert collectives(found, 1) == collectives(sharded(GPT, 4, sequence)[1], 1)


def test_two_stacks_and_a_captured_memory() -> None:
    """A decoder whose every pass attends to the encoder's result, which is brought where it is wanted once."""
    text = """
    model pair {
      input tokens: int[B, S]
      tok = Embedding(tokens, vocab = 32_000, dim = 1024)
      h = tok
      repeat 4 as encoder { h = h + Attention(RMSNorm(h), heads = 16) }
      memory = RMSNorm(h)
      y = tok
      repeat 6 as decoder {
        q = split_heads(Linear(RMSNorm(y), out = 1024, bias = false), heads = 16)
        k = split_heads(Linear(memory, out = 1024, bias = false), heads = 16)
        v = split_heads(Linear(memory, out = 1024, bias = false), heads = 16)
        y = y + Linear(merge_heads(attend(q, k, v, causal = true)), out = 1024, bias = false)
      }
      output Linear(y, out = 32_000, bias = false)
    }
    """
    graph, found = sharded(text, 8, True)
    moves = [m for m in found.moves if m.value == "memory"]
    assert len(moves) == 1 and graph.regions[moves[0].region].name == ""
    assert len(moves[0].consumers) == 2 and (moves[0].step.forward, moves[0].step.backward) == ("all_gather", "reduce_scatter")


def test_a_repeat_right_after_a_repeat_brings_its_own_captures() -> None:
    text = """
    model pair {
      input tokens: int[B, S]
      tok = Embedding(tokens, vocab = 32_000, dim = 1024)
      h = tok
      repeat 4 as first { h = h + Linear(relu(Linear(h, out = 4096, bias = false)), out = 1024, bias = false) }
      y = tok
      repeat 6 as second { y = y + Linear(h, out = 1024, bias = false) }
      output Linear(y, out = 32_000, bias = false)
    }
    """
    graph, found = sharded(text, 8, True)
    captured = [m for m in found.moves if any(c.startswith("second.") for c in m.consumers) and m.value.startswith("first.")]
    assert captured and all(graph.regions[m.region].name == "second" for m in captured)


def test_local_elements_never_grow_with_the_axis() -> None:
    graph = graph_of(GPT)
    elements = [sum(replicated(graph).local_elements(key) for key in graph.weights)]
    for tensor in (2, 4, 8):
        found = sharded(GPT, tensor)[1]
        elements.append(sum(found.local_elements(key) for key in graph.weights))
    assert elements == sorted(elements, reverse=True)
    assert elements[-1] < elements[0] / 7


def test_bytes_follow_the_micro_batch() -> None:
    _, found = sharded(LLAMA)
    move = next(m for m in found.moves if m.region == 1)
    assert found.move_bytes(move, {"B": 1, "S": 2048}, 2) == 2048 * 2048 * 2
    assert found.move_bytes(move, {"B": 3, "S": 2048}, 2) == 3 * 2048 * 2048 * 2


@pytest.mark.parametrize("text", [LLAMA, GPT, PARALLEL])
@pytest.mark.parametrize("sequence", [True, False])
def test_the_choice_inside_blocks_is_that_of_any_micro_batch(text: str, sequence: bool) -> None:
    graph = graph_of(text)
    chosen = []
    for micro_batch in (1, 2, 8):
        found = shard_graph(graph, 8, sequence, costs_of(8, {"B": micro_batch, "S": 2048}))
        assert isinstance(found, Sharding)
        chosen.append({path: s for path, s in found.strategies.items() if path.startswith("blocks.")})
    assert chosen[0] == chosen[1] == chosen[2]
    assert reference_micro_batch(2048) == 4 and reference_micro_batch(16_384) == 1


def test_slow_links_with_latency_change_nothing_in_a_block() -> None:
    sizes = {"B": 8, "S": 64}
    text = GPT.replace("2048", "128").replace("50_304", "256").replace("heads = 16", "heads = 4")
    network = Network(LOOPBACK, LOOPBACK, 4)
    found = shard_graph(graph_of(text), 2, True, costs_of(2, sizes, network=network, device=CPU, precision="fp32"))
    assert isinstance(found, Sharding)
    assert collectives(found, 1) == [("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")] * 2


def test_the_result_is_a_function_of_its_arguments() -> None:
    first, second = (sharded(GPT)[1] for _ in range(2))
    assert first.layouts(SIZES, 2) == second.layouts(SIZES, 2)


def test_one_rank_has_no_transitions() -> None:
    graph = graph_of(GPT)
    found = shard_graph(graph, 1, False, costs_of(1, SIZES))
    assert isinstance(found, Sharding) and found.moves == ()
    assert {s.name for s in found.strategies.values()} == {"replicated"}


def test_the_price_of_the_choice_is_below_that_of_its_rivals() -> None:
    """Megatron's layout is what the problem's own prices say, not a rule."""
    graph = graph_of(LLAMA)
    problem = Problem(graph, 8, True, costs_of(8, SIZES))
    chosen = problem.solve()
    assert chosen is not None
    price = problem.seconds(chosen)
    for path, strategy in chosen.items():
        for other in problem.domains[problem.index[path]]:
            assert other == strategy or problem.seconds({**chosen, path: other}) >= price


def test_the_device_does_not_matter_to_the_blocks() -> None:
    slow = replace(H100, peak_flops_per_second={"bf16": 50e12}, memory_bytes_per_second=0.8e12)
    found = shard_graph(graph_of(LLAMA), 4, True, costs_of(4, SIZES, device=slow))
    assert isinstance(found, Sharding)
    assert collectives(found, 1) == [("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")] * 2
