"""A training step of the emitted program on one process against the same model in plain PyTorch: ratios of their times.

    python benchmarks/step.py [--rounds 4] [--steps 15]

Both train the quickstart's model in fp32 with AdamW and clipping on the same tokens, a few steps of one and then of the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mlmdsl.compile import compile_spec
from mlmdsl.runtime import mesh as meshes
from mlmdsl.runtime.train import Trainer

QUICKSTART = Path(__file__).resolve().parents[1] / "specs" / "quickstart.mlm"
VOCAB, WIDTH, HEADS, LAYERS, SEQUENCE, BATCH = 256, 128, 4, 4, 64, 32


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h):
        x = self.first(h)
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in self.qkv)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return h + self.down(F.gelu(self.up(self.second(h))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(SEQUENCE, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        h = self.tokens(tokens) + self.positions.weight
        return F.linear(self.norm(self.blocks(h)), self.tokens.weight)


class Tokens:
    """The same random tokens for both."""

    batches = 0

    def batch(self, step: int, low: int, high: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, VOCAB, (high - low, SEQUENCE + 1), generator=generator)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def plain() -> Callable[[], object]:
    """One step of the model by hand."""
    model, data = GPT(), Tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    done = 0

    def step() -> None:
        nonlocal done
        tokens, targets = data.batch(done, 0, BATCH).values()
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    return step


def emitted() -> Callable[[], object]:
    """One step of the program that the compiler writes for one process."""
    text = QUICKSTART.read_text(encoding="utf-8")
    pins = (f"micro_batch={BATCH}", "recompute=none")
    overrides = ("cluster.devices_per_node=1",)
    program = compile_spec(text, path=str(QUICKSTART), overrides=overrides, pins=pins).program
    assert program is not None
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program.text, "program.py", "exec"), names)
    mesh = meshes.create(names["PARALLEL"], torch.device("cpu"))
    return Trainer(names["Stage"], names["loss"], names["PARALLEL"], names["TRAINING"], mesh, Tokens()).step


def seconds(step: Callable[[], object], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as each of several ranks on one machine has
    steps = {"plain PyTorch": plain(), "emitted program": emitted()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, step in steps.items():
            found = seconds(step, options.steps)
            times[name] += [found] if round_ else []
    base = median(times["plain PyTorch"])
    for name, found in times.items():
        print(f"{name:16}{1000 * median(found):8.1f} ms{median(found) / base:7.2f}x")


if __name__ == "__main__":
    main()
