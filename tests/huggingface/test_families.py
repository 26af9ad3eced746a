"""Every family against transformers: the same logits and gradients both ways, and weights that come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlmdsl.huggingface.families import families
from mlmdsl.runtime import mesh
from tests.huggingface.models import CASES, batch, exported, imported, loaded, ours, saved, theirs, tokens

LOGITS, GRADIENTS = 1e-4, 1e-4


def test_every_family_has_a_case() -> None:
    assert {case.family for case in CASES.values()} == set(families())


@pytest.mark.parametrize("name", CASES)
def test_imported_and_exported_it_computes_the_same(name: str, tmp_path: Path) -> None:
    model, run = imported(CASES[name], tmp_path)
    mine, rows = ours(run), batch(CASES[name])
    with torch.no_grad():
        expected, found = model(**rows.theirs).logits, mine.model(*rows.ours)
        back = loaded(exported(run, tmp_path / "back"), CASES[name].head)
        again = back(**rows.theirs).logits
    assert expected.abs().max() > 1.0, "logits that say nothing"
    assert (expected - found).abs().max() < LOGITS
    assert (expected - again).abs().max() < 1e-5, "memory lies elsewhere: rounding alone"
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[key]), key
    assert _described(model) == _described(back)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_one_step_agree(name: str, tmp_path: Path) -> None:
    model: Any
    model, run = imported(CASES[name], tmp_path)
    mine, rows = ours(run), batch(CASES[name])
    model(**rows.theirs, labels=rows.labels).loss.backward()
    total = mine.loss(mine.model(*rows.ours), rows.targets, mesh.single(torch.device("cpu")))
    (total / (rows.targets != -100).sum()).backward()
    found, expected = mine.gradients(), _saved_gradients(model, tmp_path / "gradients")
    assert found.keys() == expected.keys()
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())  # of key biases rounding alone is left
    for key, gradient in expected.items():
        assert (gradient - found[key]).abs().max() <= GRADIENTS * max(float(gradient.abs().max()), least), key


@pytest.mark.parametrize("name", ["gpt2", "llama3.1", "pythia"])
def test_sharded_files_both_ways(name: str, tmp_path: Path) -> None:
    model, run = imported(CASES[name], tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    folder = exported(run, tmp_path / "back", shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").exists()
    rows = tokens()
    with torch.no_grad():
        assert torch.equal(model(rows).logits, loaded(folder)(rows).logits)


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    model = theirs(CASES["llama2"])
    _, run = imported(CASES["llama2"], tmp_path)
    back = loaded(exported(run, tmp_path / "back", dtype="bf16"))
    for key, weight in model.state_dict().items():
        assert torch.equal(weight.bfloat16(), back.state_dict()[key]), key


def _saved_gradients(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Under the names that files have, which are not always those in memory: saved in the place of the weights."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    return load_file(saved(model, folder) / "model.safetensors")


def _described(model: Any) -> dict[str, Any]:
    """What a config says about the computation; dropout has no part in it."""
    fields = model.config.to_dict()
    for name in (
        "_name_or_path",
        "dtype",
        "transformers_version",
        "architectures",
        "n_inner",
        "use_cache",
        "head_dim",
        "hidden_activation",
    ):
        fields.pop(name, None)
    inner = fields.get("attn_config")
    if inner:
        inner.pop("dtype")
    return {name: value for name, value in fields.items() if "drop" not in name}
