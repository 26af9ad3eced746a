"""Checkpoints that are not what they should be: a code, what and where, no traceback, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlmdsl.cli import main
from tests.huggingface.models import CASES, saved, theirs

Breaks = Callable[[Path], None]


def config(**changes: Any) -> Breaks:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({name: value for name, value in fields.items() if value != "gone"}), encoding="utf-8")

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Breaks:
    def changed(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return changed


def put(name: str, tensor: torch.Tensor) -> Breaks:
    return weights(lambda found: found.update({name: tensor}))


def text(name: str, content: str) -> Breaks:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8") and None


def cut(bytes_: int) -> Breaks:
    def shorten(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:bytes_])

    return shorten


def no_file(name: str) -> Breaks:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded_without_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


NORM = "model.layers.1.input_layernorm.weight"
BROKEN: dict[str, tuple[Breaks, str, str]] = {
    "no config": (no_file("config.json"), "MLM0800", "it has no config.json"),
    "no weights": (no_file("model.safetensors"), "MLM0800", "neither model.safetensors nor"),
    "a pickle": (pickled, "MLM0801", "pytorch_model.bin"),
    "config is no JSON": (text("config.json", "{"), "MLM0802", "config.json cannot be read"),
    "config is a list": (text("config.json", "[]"), "MLM0802", "no table of fields"),
    "config lacks a field": (config(hidden_size="gone"), "MLM0802", "there is no `hidden_size`"),
    "config makes no model": (config(num_key_value_heads=3), "MLM0802", "make no model"),
    "config of text": (config(hidden_size="many"), "MLM0802", "make no model"),
    "an unknown type": (config(model_type="lama"), "MLM0803", "did you mean `llama`?"),
    "no type": (config(model_type="gone"), "MLM0803", "known are"),
    "another activation": (config(hidden_act="relu"), "MLM0804", 'hidden_act = "relu"'),
    "another scaling": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "MLM0804", 'rope_type = "yarn"'),
    "quantized": (config(quantization_config={"quant_method": "fp8"}), "MLM0809", "quantized"),
    "cut in the header": (cut(100), "MLM0805", "fewer than its header asks for"),
    "cut in the values": (cut(50_000), "MLM0805", "in the middle of"),
    "empty": (cut(0), "MLM0805", "it has 0 bytes"),
    "a file of text": (text("model.safetensors", "not a safetensors file at all"), "MLM0805", "is damaged"),
    "a shard is missing": (sharded_without_one, "MLM0805", "names model-00002-of-00002.safetensors"),
    "an index of another form": (text("model.safetensors.index.json", "{}"), "MLM0805", "cannot be read"),
    "a missing weight": (weights(lambda found: found.__delitem__(NORM)), "MLM0806", f"has no {NORM}"),
    "a weight too many": (put("model.layers.0.extra", torch.ones(3)), "MLM0807", "model.layers.0.extra"),
    "another shape": (put(NORM, torch.ones(33)), "MLM0808", f"{NORM} has shape [33] in the checkpoint, and [32]"),
    "integers": (put(NORM, torch.ones(32, dtype=torch.int32)), "MLM0809", "stored as I32"),
    "sizes of another model": (config(intermediate_size=60), "MLM0808", "[56, 32] in the checkpoint, and [60, 32]"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(theirs(CASES["llama2"]), tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said(name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaks, code, said = BROKEN[name]
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    breaks(folder)
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 4
    shown = capsys.readouterr().err
    assert f"error[{code}]" in shown and said in shown and "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["broken"], "nothing is left behind"


def test_all_weights_that_do_not_fit_are_told_at_once(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights(lambda found: [found.pop(name) for name in sorted(found) if "layers.2" in name] and None)(folder)
    put(NORM, torch.ones(5))(folder)
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 4
    assert capsys.readouterr().err.count("error[MLM08") == 10


def test_unknown_fields_are_warned_of(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fields"
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config(logit_cap=30.0)(folder)
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert "warning[MLM0813]: fields of config.json that are not looked at: logit_cap" in capsys.readouterr().err


def test_what_transformers_writes_causes_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, case in enumerate(CASES.values()):
        folder = saved(theirs(case), tmp_path / f"theirs-{number}")
        assert main(["import", str(folder), "--out", str(tmp_path / f"run-{number}")]) == 0
        assert capsys.readouterr().err == "", case


def test_fields_as_versions_before_5_wrote_them(tmp_path: Path) -> None:
    """rope_theta and rope_scaling beside one another, and names without the part of the whole model."""
    from mlmdsl.huggingface.config import read_config

    folder = saved(theirs(CASES["llama3.1"]), tmp_path / "theirs")
    expected = read_config(folder).params
    new = json.loads((folder / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    scaling = {name: value for name, value in new.items() if name != "rope_theta"}
    config(rope_parameters="gone", rope_theta=new["rope_theta"], rope_scaling=scaling)(folder)
    assert read_config(folder).params == expected


def test_names_of_a_bare_model(tmp_path: Path) -> None:
    """As in the GPT-2 of the hub: wte.weight for transformer.wte.weight, and buffers of masks."""
    folder = saved(theirs(CASES["gpt2"]), tmp_path / "theirs")
    found = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    found |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    save_file(found, folder / "model.safetensors")
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
