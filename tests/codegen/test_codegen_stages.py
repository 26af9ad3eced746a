"""Stages cut anywhere compute what one stage computes."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.codegen.emit import emit
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.plan import PlanVariables
from tests.codegen.samples import UNPLEASANT, graph_of, plan, spec, two_stacks


def load(graph: Graph, stages: tuple[int, ...], **more: object) -> types.ModuleType:
    variables = PlanVariables(stages=stages, pipeline=len(stages), **more)  # type: ignore[arg-type]
    module = types.ModuleType("program")
    exec(emit(spec(), graph, plan(graph, variables)).text, module.__dict__)
    return module


def build(module: types.ModuleType, index: int) -> torch.nn.Module:
    """A stage whose weights depend on their names alone."""
    stage = module.Stage(index, types.SimpleNamespace(tensor=None))
    for name, parameter in stage.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return stage


def run(module: types.ModuleType, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output of the stages in a row, and gradients by name, those of a weight on several stages summed."""
    stages = [build(module, index) for index in range(len(module.PARALLEL.stages))]
    values: tuple[torch.Tensor, ...] = (tokens,)
    for stage in stages:
        wanted = inspect.signature(stage.forward).parameters.values()
        keywords = {"tokens": tokens} if any(p.kind is p.KEYWORD_ONLY for p in wanted) else {}
        result = stage(*values, **keywords)
        values = result if isinstance(result, tuple) else (result,)
    values[0].square().mean().backward()
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = gradients.get(name, torch.zeros(())) + parameter.grad
    return values[0].detach(), gradients


def cuts(total: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Layers of 1 to 5 stages, some of them empty."""
    places = st.lists(st.integers(0, total), max_size=4).map(sorted)
    return places.map(lambda p: tuple(b - a for a, b in zip([0, *p], [*p, total], strict=True)))


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    return (tokens, *run(load(two_stacks(3, 4), (7,)), tokens))


@settings(max_examples=25, deadline=None)
@given(stages=cuts(7))
def test_stages_in_a_row_equal_one(reference: tuple[torch.Tensor, ...], stages: tuple[int, ...]):
    tokens, output, gradients = reference
    got, got_gradients = run(load(two_stacks(3, 4), stages), tokens)
    torch.testing.assert_close(got, output)
    assert got_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(got_gradients[name], value)


@pytest.mark.parametrize("stages", [(3, 4), (2, 2, 3), (1, 2, 4)])
def test_unpleasant_names_compute_the_same(stages: tuple[int, ...]):
    tokens = torch.arange(10).view(2, 5)
    output, gradients = run(load(graph_of(UNPLEASANT), (7,)), tokens)
    got, got_gradients = run(load(graph_of(UNPLEASANT), stages), tokens)
    torch.testing.assert_close(got, output)
    torch.testing.assert_close(got_gradients, gradients)


def test_names_of_weights_are_the_models():
    stage = build(load(two_stacks(1, 1), (2,)), 0)
    assert [name for name, _ in stage.named_parameters()] == [
        "tok.weight",
        "shared.weight",
        "encoder.0.a.weight",
        "bridge.weight",
        "bridge.bias",
        "decoder.0.half_.weight",
    ]
