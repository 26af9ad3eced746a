"""AdamW on local float32 tensors, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlmdsl.runtime.config import AdamW, Schedule

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(schedule: Schedule, peak: float, steps: int, step: int) -> float:
    """Of step `step`, counted from 0, in a run of `steps`. Warm-up ends at `peak`; decay starts there and would reach min_lr
    after the last step."""
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return peak
    progress = min(1.0, (step - schedule.warmup) / max(1, steps - schedule.warmup))
    remaining = 1.0 - progress if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_lr + (peak - schedule.min_lr) * remaining


class Optimizer:
    """Decoupled weight decay (arXiv:1711.05101) on the weights that want it; the fused kernels, so no temporaries.

    `weights` are this rank's parts, updated in place; empty ones (FSDP2 leaves some ranks without a row) have moments, too, so
    that checkpoints are alike everywhere, but nothing to step. `how` says of each whether it decays, and its `balance`: if that
    is not 0 the weight has no moments, and each step moves it by so much against the sign of its gradient, at any learning rate
    (arXiv:2408.15664)."""

    def __init__(self, settings: AdamW, weights: Sequence[Tensor], how: Sequence[tuple[bool, float]]):
        self.weights = list(weights)
        self.balance = [balance for _, balance in how]
        decay = [decays for decays, _ in how]
        moments = [() if balance else MOMENTS for balance in self.balance]
        self.moments = [{m: torch.zeros_like(w) for m in names} for w, names in zip(weights, moments, strict=True)]
        self._stepped = [i for i, w in enumerate(weights) if w.numel() and not self.balance[i]]
        groups = [
            {
                "params": [weights[i] for i in self._stepped if decay[i] is decayed],
                "weight_decay": settings.weight_decay * decayed,
            }
            for decayed in (True, False)
        ]
        self._adamw = None
        if self._stepped:
            self._adamw = torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps, fused=True)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Puts the moments, as they are now, at `step` optimizer steps."""
        if self._adamw is None:
            return
        for i in self._stepped:
            weight = self.weights[i]
            count = torch.tensor(float(step), device=weight.device)
            self._adamw.state[weight] = {"step": count, **self.moments[i]}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        for weight, gradient, balance in zip(self.weights, gradients, self.balance, strict=True):
            if balance:
                weight.sub_(gradient.sign(), alpha=balance)
        if self._adamw is None:
            return
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        for i in self._stepped:
            self.weights[i].grad = gradients[i]
        self._adamw.step()
        for i in self._stepped:
            self.weights[i].grad = None
