"""Every family against transformers: the same logits and gradients both ways, and weights that come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlmdsl.huggingface.families import families
from tests.huggingface.models import CASES, exported, imported, loaded, theirs, tokens
from tests.huggingface.table import GRADIENTS, LOGITS, compared


def test_every_family_has_a_case() -> None:
    assert {case.family for case in CASES.values()} == set(families())


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_same_both_ways(name: str, tmp_path: Path) -> None:
    found = compared(CASES[name], tmp_path)
    assert found.logits > 1.0, "logits that say nothing"
    assert found.imported < LOGITS
    assert found.exported < 1e-5, "memory lies elsewhere: rounding alone"
    worst = max(found.gradients, key=lambda key: found.gradients[key])
    assert found.gradients[worst] <= GRADIENTS, worst
    for key, weight in found.model.state_dict().items():
        assert torch.equal(weight, found.back.state_dict()[key]), key
    assert _described(found.model) == _described(found.back)


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
