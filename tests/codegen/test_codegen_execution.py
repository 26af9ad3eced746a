"""Emitted single-device programs compute what the same model written by hand in PyTorch computes."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlmdsl.codegen.emit import emit
from mlmdsl.planner.plan import PlanVariables
from mlmdsl.runtime.mesh import single
from tests.codegen.samples import TINY_GPT, TINY_LLAMA, graph_of, plan, spec

Weights = dict[str, Tensor]


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without fused kernels, [B, H, S, D]."""
    scores = (q @ k.transpose(-1, -2)) * q.size(-1) ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(-2)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"])


def dense(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def gpt(w: Weights, tokens: Tensor) -> Tensor:
    h = w["tok.weight"][tokens] + w["position.weight"][: tokens.size(1)]
    for i in range(4):
        b = f"blocks.{i}."
        x = norm(w, b + "layer_norm", h)
        q, k, v = (heads(dense(w, f"{b}attention.{name}", x), 4) for name in ("query", "key", "value"))
        h = h + dense(w, b + "attention.out", attend(q, k, v))
        x = norm(w, b + "layer_norm_2", h)
        h = h + dense(w, b + "mlp.down", F.gelu(dense(w, b + "mlp.up", x)))
    return norm(w, "layer_norm", h) @ w["tok.weight"].T


def rotate(x: Tensor) -> Tensor:
    """Complex rotation of [B, H, S, D], element i paired with i + D/2."""
    half = x.size(-1) // 2
    angles = torch.outer(torch.arange(x.size(2)), 500_000.0 ** (-torch.arange(half) / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def llama(w: Weights, tokens: Tensor) -> Tensor:
    h = w["h.weight"][tokens]
    for i in range(5):
        b = f"blocks.{i}."
        x = rms(h, w[b + "attn_norm.weight"])
        q, k, v = (heads(dense(w, f"{b}attn.{n}", x), c) for n, c in (("query", 4), ("key", 2), ("value", 2)))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        h = h + dense(w, b + "attn.out", attend(rotate(q), rotate(k), v))
        x = rms(h, w[b + "mlp_norm.weight"])
        h = h + dense(w, b + "mlp.down", F.silu(dense(w, b + "mlp.gate", x)) * dense(w, b + "mlp.up", x))
    return rms(h, w["norm.weight"]) @ w["linear.weight"].T


@pytest.mark.parametrize(("model", "reference", "layers"), [(TINY_GPT, gpt, 4), (TINY_LLAMA, llama, 5)])
def test_forward_and_gradients(model: str, reference: types.FunctionType, layers: int):
    graph = graph_of(model)
    program = types.ModuleType("program")
    exec(emit(spec(), graph, plan(graph, PlanVariables(stages=(layers,)))).text, program.__dict__)
    mesh = single(torch.device("cpu"))
    stage = program.Stage(0, mesh)
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    tokens = torch.randint(256, (3, 16), generator=generator)
    targets = torch.randint(256, (3, 16), generator=generator)
    targets[1, 5:] = -100

    program.loss(stage(tokens), targets, mesh).backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in stage.named_parameters()}
    logits = reference(weights, tokens)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    torch.testing.assert_close(stage(tokens), logits, rtol=1e-5, atol=1e-5)
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_weights_have_the_graphs_names_and_shapes():
    graph = graph_of(TINY_GPT)
    program = types.ModuleType("program")
    exec(emit(spec(), graph, plan(graph, PlanVariables(stages=(4,)))).text, program.__dict__)
    stage = program.Stage(0, single(torch.device("cpu")))
    expected = {
        weight.instance(index): weight.shape for weight in graph.weights.values() for index in range(graph.count_of(weight))
    }
    assert {name: tuple(p.shape) for name, p in stage.named_parameters()} == expected
