"""Every family against transformers, as a table: `make huggingface`."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mlmdsl.runtime import mesh
from tests.huggingface.models import CASES, Case, batch, exported, imported, loaded, ours, saved

LOGITS, GRADIENTS = 1e-4, 1e-4


@dataclass(frozen=True)
class Compared:
    """A model of transformers, what it has become here, and what came back."""

    model: nn.Module
    back: nn.Module
    logits: float  # largest of transformers': small ones say nothing
    imported: float  # the largest difference of logits
    exported: float
    gradients: dict[str, float]  # by name of theirs: the largest difference over the largest value

    @property
    def gradient(self) -> float:
        return max(self.gradients.values())

    @property
    def good(self) -> bool:
        return max(self.imported, self.exported) < LOGITS and self.gradient <= GRADIENTS


def compared(case: Case, folder: Path) -> Compared:
    """Imports a checkpoint with random weights, exports it again, and takes one backward pass on both sides."""
    model: Any
    model, run = imported(case, folder)
    mine, rows = ours(run), batch(case)
    back = loaded(exported(run, folder / "back"), case.head)
    theirs = model(**rows.theirs, labels=rows.labels)
    found = mine.model(*rows.ours)
    with torch.no_grad():
        again = back(**rows.theirs).logits
    theirs.loss.backward()
    (mine.loss(found, rows.targets, mesh.single(torch.device("cpu"))) / (rows.targets != -100).sum()).backward()
    return Compared(
        model,
        back,
        _most(theirs.logits),
        _most(theirs.logits - found),
        _most(theirs.logits - again),
        _relative(_gradients(model, folder / "gradients"), mine.gradients(), {name for name, _ in model.named_buffers()}),
    )


def _most(x: Tensor) -> float:
    return float(x.detach().abs().max())


def _relative(expected: dict[str, Tensor], found: dict[str, Tensor], buffers: set[str]) -> dict[str, float]:
    """`buffers` have no gradient: biases that balance experts."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    expected = {name: value for name, value in expected.items() if name not in buffers}
    least = 1e-3 * max(map(_most, expected.values()))  # of key biases rounding alone is left
    return {name: _most(value - found[name]) / max(_most(value), least) for name, value in expected.items()}


def _gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """Under the names that files have, which are not always those in memory: saved in the place of the weights."""
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.grad
    found = load_file(saved(model, folder) / "model.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data = values[name]
    return found


def main() -> int:
    width = max(map(len, CASES))
    print(f"{'model':{width}}  {'family':12}  max |d logits|       max rel d grad")
    print(f"{'':{width}}  {'':12}  imported  exported")
    bad = 0
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as made:
            row = compared(case, Path(made))
        bad += not row.good
        figures = f"{row.imported:8.1e}  {row.exported:8.1e}  {row.gradient:8.1e}"
        print(f"{name:{width}}  {case.family:12}  {figures}{'' if row.good else '  TOO LARGE'}", flush=True)
    families = len({case.family for case in CASES.values()})
    print(f"{len(CASES)} models of {families} families, {bad} outside of {LOGITS:.0e} and {GRADIENTS:.0e}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
