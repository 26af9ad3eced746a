"""Training curves of emitted programs on forked ranks, over a synthetic dataset with uneven counts of valid tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlmdsl.runtime import mesh as meshes
from mlmdsl.runtime.config import AdamW, Data, Objective, Parallel, Schedule, Tokenizer, Training
from mlmdsl.runtime.parallel import place
from mlmdsl.runtime.state import Held
from mlmdsl.runtime.train import Trainer
from tests.parity.ranks import run_ranks

# AdamW divides by the square root of the second moment: with its usual epsilon a gradient of 1e-9 moves its weight as far as
# one of 1, and rounding decides where to. With a large one it is close to SGD with momentum, and curves can be compared.
NEXT_TOKEN = Objective()
STRETCH = 4.0  # of initial weights
SETTINGS = AdamW(lr=0.05, betas=(0.9, 0.95), eps=0.1, weight_decay=0.1, clip=1.0)


def training(sequence: int = 16, batch: int = 8, steps: int = 8, **changes: Any) -> Training:
    """Settings of a run on synthetic data. The clip is small enough to act."""
    return Training(
        data=Data("text", ("unused",)),
        tokenizer=Tokenizer("bytes"),
        sequence=sequence,
        batch=batch,
        steps=steps,
        optimizer=SETTINGS,
        schedule=Schedule("cosine", warmup=2, min_lr=0.01),
        **changes,
    )


@dataclass(frozen=True)
class Synthetic:
    """Tokens by a formula; each row has another length, the rest of it is padding; some rows have no valid token at all.

    `inputs` of the model and their objective as in Training: `valid` says what is no padding, `segments` changes half-way,
    and a row has three `documents`."""

    batch_size: int
    sequence: int
    vocab: int
    batches: int = 2
    inputs: tuple[str, ...] = ("tokens",)
    objective: Objective = NEXT_TOKEN

    def batch(self, step: int, low: int, high: int) -> dict[str, Tensor]:
        rows = range(step * self.batch_size + low, step * self.batch_size + high)
        predicted = self.objective.required[-1]
        stream = {name: self._rows(rows, name) for name in (*self.inputs, predicted) if name.endswith("tokens")}
        lengths = {name: found[1] for name, found in stream.items()}
        made = {name: found[0][:, :-1].contiguous() for name, found in stream.items()}
        places = torch.arange(self.sequence)
        made["valid"] = (places < lengths.get("tokens", lengths[predicted]).clamp(min=1)[:, None]).long()
        ends = torch.tensor([[3 + row % 5, 9 + row % 4] for row in rows])
        made["documents"] = (places >= ends[..., None]).sum(1)
        made["segments"] = (places >= self.sequence // 2).long().expand(len(rows), -1)
        targets = stream[predicted][0][:, 1:].clone()
        targets[torch.arange(targets.size(1)) >= lengths[predicted][:, None]] = -100
        return {**{name: made[name] for name in self.inputs}, "targets": targets}

    def _rows(self, rows: Sequence[int], name: str) -> tuple[Tensor, Tensor]:
        """Tokens [rows, length + 1], and how many of each are to be learnt."""
        length = self.objective.length(name, self.sequence)
        found = [self._row(sample + 1000 * (name != "tokens"), length) for sample in rows]
        return torch.stack([tokens for tokens, _ in found]), torch.tensor([valid for _, valid in found])

    def _row(self, sample: int, size: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(1000 + sample)
        start, stride = (int(x) for x in torch.randint(1, 7, (2,), generator=generator))
        noise = torch.randint(0, 3, (size + 1,), generator=generator)
        length = int(torch.randint(1, size + 1, (), generator=generator)) if sample % 5 else 0
        return (start + stride * torch.arange(size + 1) + noise) % self.vocab, length


@dataclass(frozen=True)
class Curve:
    """Losses and norms of each step, validation loss after the last, gradients of the step after that, weights before it and at
    the beginning."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    validation: float
    gradients: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    beginning: Mapping[str, Tensor]


def _executed(program_text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program_text, "program.py", "exec"), names)
    return names


def train_curve(
    program_text: str, ranks: int, steps: int = 5, *, vocab: int = 64, timeout: float = 120.0, double: bool = False
) -> Curve:
    """Runs an emitted program on `ranks` forked processes; what rank 0 saw. Optimizer settings are replaced by SETTINGS. With
    `double` every float32 is a float64: what then differs is no rounding."""
    run = _double_curve_of_rank if double else _curve_of_rank
    return run_ranks(run, ranks, program_text, steps, vocab, timeout=timeout)[0]


def _double_curve_of_rank(*arguments: Any) -> Curve | None:
    """In a process that was forked for it alone."""
    torch.set_default_dtype(torch.float64)
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    return _curve_of_rank(*arguments)


def _curve_of_rank(rank: int, program_text: str, steps: int, vocab: int) -> Curve | None:
    trainer = make_trainer(program_text, vocab)
    stretch(trainer, STRETCH)
    beginning = collected(trainer, [held.master for held in trainer.state.held])
    reports = [trainer.step() for _ in range(steps)]
    validation = trainer.validate()
    weights = collected(trainer, [held.master for held in trainer.state.held])
    trainer.backward()
    gradients = collected(trainer, list(map(_comparable, trainer.state.held, trainer.state.gradients)))
    assert validation is not None
    return (
        Curve(tuple(r.loss for r in reports), tuple(r.grad_norm for r in reports), validation, gradients, weights, beginning)
        if rank == 0
        else None
    )


def _comparable(held: Held, gradient: Tensor) -> Tensor:
    """Counts are no gradients: beside those they are large, and would hide them."""
    return gradient / 2**20 if held.info.balance else gradient


def make_trainer(program_text: str, vocab: int = 64, device: torch.device | None = None) -> Trainer:
    names = _executed(program_text)
    parallel: Parallel = names["PARALLEL"]
    run: Training = replace(names["TRAINING"], optimizer=SETTINGS)
    data = Synthetic(run.batch, run.sequence, vocab, inputs=run.inputs, objective=run.objective)
    grid = meshes.create(parallel, device or torch.device("cpu"))
    return Trainer(names["Stage"], names["loss"], parallel, run, grid, data, data)


@torch.no_grad()
def stretch(trainer: Trainer, factor: float) -> None:
    """Makes the random weights larger: with a standard deviation of 0.02 so small a model is all but linear, and the gradients
    of its queries and keys drown in rounding. A power of two changes no digit."""
    for held in trainer.state.held:
        if held.info.init.kind == "normal":
            held.master.mul_(factor)
    trainer.state.publish()


def collected(trainer: Trainer, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The whole of every weight's tensor, on rank 0, put together from every rank's part."""
    state, mesh = trainer.state, trainer.mesh
    mine = [
        (held.name, held.info.shape, place(held.info, mesh, sharded=state.sharded).offsets, part.detach().cpu().clone())
        for held, part in zip(state.held, parts, strict=True)
    ]
    every: list[Any] = [mine]
    if mesh.world_size > 1:
        every = [None] * mesh.world_size
        dist.gather_object(mine, every if dist.get_rank() == 0 else None)
    whole: dict[str, Tensor] = {}
    for name, shape, offsets, part in (item for found in every if found for item in found):
        box = tuple(slice(low, low + size) for low, size in zip(offsets, part.shape, strict=True))
        whole.setdefault(name, torch.full(shape, torch.nan))[box] = part
    return whole


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """Largest relative differences of two curves."""

    loss: float
    norm: float
    validation: float
    gradient: float
    worst: str  # the weight whose gradient differs most

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.validation, self.gradient)


def compare(one: Curve, other: Curve) -> Differences:
    """Gradients weight by weight, by the norm of the difference over the norm of the weight's gradient, or over a thousandth of
    the largest norm where that is more: some gradients (of key biases: softmax does not see them) are zero but for rounding."""
    assert one.gradients.keys() == other.gradients.keys(), one.gradients.keys() ^ other.gradients.keys()
    least = 1e-3 * max(float(gradient.norm()) for gradient in one.gradients.values())
    by_weight = {name: difference(one.gradients[name], other.gradients[name], least) for name in one.gradients}
    worst = max(by_weight, key=lambda name: by_weight[name])
    return Differences(
        loss=max(map(_relative, one.losses, other.losses)),
        norm=max(map(_relative, one.norms, other.norms)),
        validation=_relative(one.validation, other.validation),
        gradient=by_weight[worst],
        worst=worst,
    )


def difference(one: Tensor, other: Tensor, least: float = 0.0) -> float:
    """Norm of the difference relative to the norm, or to `least`; not-a-number counts as infinite."""
    scale = max(float(one.norm()), least)
    found = float((one - other).norm())
    return 0.0 if found == 0 else found / scale if scale and found == found else math.inf


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), 1e-30)
