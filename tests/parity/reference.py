"""The same two models once more, in plain PyTorch on one process, with their own step: nothing of mlmdsl but the names of the
weights. Parity with it is parity with something that was not emitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Model = Callable[[Weights, Tensor, int], Tensor]


def gpt(w: Weights, tokens: Tensor, layers: int) -> Tensor:
    h = w["tok.weight"][tokens] + w["position.weight"][: tokens.size(1)]
    for i in range(layers):
        b = f"blocks.{i}."
        x = F.layer_norm(h, (32,), w[b + "layer_norm.weight"], w[b + "layer_norm.bias"])
        h = h + _attention(w, b + "attention.", x, heads=4, kv_heads=4, rotated=False)
        x = F.layer_norm(h, (32,), w[b + "layer_norm_2.weight"], w[b + "layer_norm_2.bias"])
        h = h + _linear(w, b + "mlp.down", F.gelu(_linear(w, b + "mlp.up", x)))
    return F.layer_norm(h, (32,), w["layer_norm.weight"], w["layer_norm.bias"]) @ w["tok.weight"].T


def llama(w: Weights, tokens: Tensor, layers: int) -> Tensor:
    h = w["h.weight"][tokens]
    for i in range(layers):
        b = f"blocks.{i}."
        h = h + _attention(w, b + "attn.", _rms(h, w[b + "rms_norm.weight"]), heads=8, kv_heads=4, rotated=True)
        x = _rms(h, w[b + "rms_norm_2.weight"])
        gated = F.silu(_linear(w, b + "swi_glu.gate", x)) * _linear(w, b + "swi_glu.up", x)
        h = h + _linear(w, b + "swi_glu.down", gated)
    return _rms(h, w["rms_norm.weight"]) @ w["linear.weight"].T


MODELS: dict[str, Model] = {"gpt": gpt, "llama": llama}


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _attention(w: Weights, prefix: str, x: Tensor, heads: int, kv_heads: int, rotated: bool) -> Tensor:
    q, k, v = (
        _linear(w, prefix + name, x).unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    )
    if rotated:
        q, k = _rotate(q), _rotate(k)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    y = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
    return _linear(w, prefix + "out", y.transpose(1, 2).flatten(-2))


def _rotate(x: Tensor) -> Tensor:
    """[B, H, S, D] as complex numbers, element i paired with i + D/2, turned by position."""
    half = x.size(-1) // 2
    angles = torch.outer(torch.arange(x.size(2)), 10_000.0 ** (-torch.arange(half) / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


# ---- a step, by definition ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    peak: float
    warmup: int
    min_lr: float
    steps: int
    betas: tuple[float, float]
    eps: float
    decay: float
    clip: float


def curve(
    model: Model, beginning: Weights, batches: list[tuple[Tensor, Tensor]], layers: int, s: Settings
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and gradient norms of a step for each batch but the last; the gradients of the last."""
    w = {name: tensor.clone().requires_grad_() for name, tensor in beginning.items()}
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in beginning.items()}
    losses, norms = [], []
    for step, (tokens, targets) in enumerate(batches[:-1]):
        loss, gradients = _gradients(model, w, tokens, targets, layers)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        losses.append(loss)
        norms.append(norm)
        factor = min(1.0, s.clip / norm)
        with torch.no_grad():
            for name, weight in w.items():
                _adamw(weight, gradients[name] * factor, moments[name], step, s)
    return losses, norms, _gradients(model, w, *batches[-1], layers)[1]


def _gradients(model: Model, w: Weights, tokens: Tensor, targets: Tensor, layers: int) -> tuple[float, dict[str, Tensor]]:
    """Mean over the valid tokens of the whole batch."""
    logits = model(w, tokens, layers)
    valid = targets != -100
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    loss = -picked[valid].sum() / valid.sum()
    return float(loss.detach()), dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def _adamw(weight: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, s: Settings) -> None:
    if step < s.warmup:
        rate = s.peak * (step + 1) / s.warmup
    else:
        rate = s.min_lr + (s.peak - s.min_lr) * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup))) / 2
    m, v = moments
    m.mul_(s.betas[0]).add_(gradient * (1 - s.betas[0]))
    v.mul_(s.betas[1]).add_(gradient.square() * (1 - s.betas[1]))
    weight.mul_(1 - rate * (s.decay if weight.dim() > 1 else 0.0))
    m_hat, v_hat = m / (1 - s.betas[0] ** (step + 1)), v / (1 - s.betas[1] ** (step + 1))
    weight.sub_(rate * m_hat / (v_hat.sqrt() + s.eps))
