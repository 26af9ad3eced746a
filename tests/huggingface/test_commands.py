"""`mlmdsl import` and `mlmdsl export` as a user types them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from mlmdsl.cli import main
from mlmdsl.huggingface.importing import import_checkpoint
from mlmdsl.runtime import checkpoint
from mlmdsl.runtime.config import Training
from mlmdsl.runtime.data import TokenDataset
from tests.huggingface.models import CASES, imported, loaded, ours, saved, theirs, tokens

ROOT = Path(__file__).resolve().parents[2]

# GPT-2 as one would write it oneself: other names, sums the other way round, no params
OTHER_NAMES = """
block Layer(x: [B, S, d]) {
  h = Attention(LayerNorm(x), heads = 4, causal = true) + x
  output MLP(LayerNorm(h), hidden = 4 * d, tanh = true) + h
}

model mine {
  param width = 32
  input ids: int[B, S]
  words = Embedding(ids, vocab = 96, dim = width)
  h = Position(ids, max = 64, dim = width) + words
  repeat 3 as layers { h = Layer(h) }
  output Linear(LayerNorm(h), weight = words.weight)
}

cluster here {
  nodes = 1
  devices_per_node = 4
  device = cpu(memory = 4 GiB, fp32 = 50 GFLOPS)
  intra = loopback(bandwidth = 1 GB/s per gpu, latency = 500 us)
}

train {
  data = python("pydoc_data.topics")
  tokenizer = bytes()
  objective = next_token()
  seq_len = 32 tok
  batch = 8 seq
  stop = 2 steps
  optimizer = adamw(lr = 1e-3)
  schedule = constant(warmup = 1 steps)
  precision = fp32
}
"""


def mine(folder: Path, text: str = OTHER_NAMES) -> Path:
    path = folder / "mine.mlm"
    path.write_text(text, encoding="utf-8")
    return path


def test_import_and_export_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(theirs(CASES["llama2"]), tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert main(["import", str(tmp_path / "small"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "34,784 parameters from 30 weights (llama)" in said and f"mlmdsl generate {tmp_path / 'run'}" in said
    assert main(["check", str(tmp_path / "run" / "spec.mlm")]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "back"), "--shard-size", "50 KB"]) == 0
    assert "as llama" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "back").iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 64 and config["eos_token_id"] == 2


def test_a_spec_of_other_names_takes_the_checkpoint(tmp_path: Path) -> None:
    model, spec = theirs(CASES["gpt2"]), mine(tmp_path)
    folder = saved(model, tmp_path / "theirs")
    import_checkpoint(folder, tmp_path / "run", (str(spec), spec.read_text(encoding="utf-8")))
    found = ours(tmp_path / "run")
    with torch.no_grad():
        assert (model(tokens()).logits - found.model(tokens())).abs().max() < 1e-4
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "back")]) == 0
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, loaded(tmp_path / "back")(tokens()).logits)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("tanh = true", "tanh = false", "has tanh = false instead of true"),
        ("repeat 3", "repeat 2", "stands in a repeat of 2 instead of 3"),
        ("heads = 4", "heads = 8", "has heads = 8 instead of 4"),
        ("width = 32", "width = 48", "of shape [96, 48] instead of [96, 32]"),
        ("causal = true", "causal = false", "has causal = false instead of true"),
        ("Linear(LayerNorm(h), weight = words.weight)", "Linear(LayerNorm(h), out = 96, bias = false)", "not the weight that"),
    ],
)
def test_a_spec_of_another_model_is_refused_where_it_differs(
    before: str, after: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(theirs(CASES["gpt2"]), tmp_path / "theirs")
    spec = mine(tmp_path, OTHER_NAMES.replace(before, after))
    assert main(["import", str(tmp_path / "theirs"), str(spec), "--out", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().err
    assert "error[MLM0810]" in shown and said in shown and f"{spec}:" in shown
    assert not (tmp_path / "run").exists()


def test_a_model_that_transformers_cannot_load_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same names and shapes as GPT-2, another activation."""
    saved(theirs(CASES["gpt2"]), tmp_path / "theirs")
    spec = mine(tmp_path)
    assert main(["import", str(tmp_path / "theirs"), str(spec), "--out", str(tmp_path / "run")]) == 0
    written = tmp_path / "run" / "spec.mlm"
    written.write_text(OTHER_NAMES.replace("tanh = true", "tanh = false"), encoding="utf-8")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "back")]) == 4
    shown = capsys.readouterr().err
    assert "error[MLM0811]" in shown and "nearest is gpt2" in shown and "tanh = false" in shown
    assert not (tmp_path / "back").exists()


def test_trained_on_under_two_plans_it_is_where_transformers_is(tmp_path: Path) -> None:
    """Imported by three processes, a step under tensor 2 x pipeline 2, one under data 4 with ZeRO 3, exported: the model that
    transformers has after the same two steps. Keys' biases have no part in a softmax: their gradients are rounding alone, which
    AdamW makes as large as any."""
    model: Any = theirs(CASES["gpt2"])
    saved(model, tmp_path / "theirs", max_shard_size="30KB")
    spec, run = mine(tmp_path), tmp_path / "run"
    environment = {**os.environ, "MLMDSL_CACHE": str(tmp_path / "cache")}

    def mlmdsl(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mlmdsl", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    mlmdsl("import", str(tmp_path / "theirs"), str(spec), "--out", str(run), "--procs", "3")
    # the model has 96 tokens: bytes of capitals and digits
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("0123456789 !?+-*/ ()[]<> ABCDEFGHIJKLMNOPQRSTUVWXYZ\n" * 200, encoding="utf-8")
    data = ["--set", f'train.data=text("{corpus}")']
    for name, before, step, said, pins in (
        ("first", run, "1", "tensor 2 x pipeline 2", ("tensor=2", "pipeline=2")),
        ("second", tmp_path / "first", "2", "data 4, ZeRO 3", ("data=4", "zero=3")),
    ):
        plan = [word for pin in pins for word in ("--pin", pin)]
        where = ["--out", str(tmp_path / name), "--resume", str(before), "--steps", step]
        assert said in mlmdsl("run", str(spec), *where, *plan, *data)
    mlmdsl("export", str(tmp_path / "second"), "--out", str(tmp_path / "back"), "--dtype", "fp32")
    _step_twice(model, runpy.run_path(str(tmp_path / "second" / "program.py"))["TRAINING"], tmp_path / "cache")
    back = loaded(tmp_path / "back")
    with torch.no_grad():
        assert (back(tokens()).logits - model(tokens()).logits).abs().max() < 1e-4
        assert (back(tokens()).logits - loaded(tmp_path / "theirs")(tokens()).logits).abs().max() > 1e-2, "it has moved"
    for name, weight in model.state_dict().items():
        if not name.endswith("attn.c_attn.bias"):
            assert (back.state_dict()[name] - weight).abs().max() < 1e-5, name


def _step_twice(model: Any, training: Training, cache: Path) -> None:
    """torch's own AdamW over the same rows; norms and biases do not decay."""
    weights = list(model.parameters())
    settings = training.optimizer
    groups = [
        {"params": [w for w in weights if (w.ndim > 1) is decays], "weight_decay": settings.weight_decay * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps)
    data = TokenDataset(training, "train", cache)
    for step in range(2):
        batch = data.batch(step, 0, training.batch)
        logits = model(batch["tokens"] if "tokens" in batch else batch["ids"]).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()


def _tokenizer() -> tokenizers.Tokenizer:
    """Of 95 words and an end."""
    words = {f"w{i}": i for i in range(95)} | {"<|endoftext|>": 95}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found.add_special_tokens(["<|endoftext|>"])
    return found


def test_an_imported_model_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its own tokenizer, greedily: what transformers' logits say."""
    model = theirs(CASES["llama3.1"])
    folder = saved(model, tmp_path / "theirs")
    _tokenizer().save(str(folder / "tokenizer.json"))
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    ids = [5, 17, 3, 40]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = main(["generate", str(tmp_path / "run"), "--prompt", "w5 w17 w3 w40", "--tokens", "6", "--temperature", "0"])
    assert said == 0 and 95 not in ids
    written = capsys.readouterr().out.replace("w", " ").split()
    assert [int(word) for word in written] == ids


def test_fine_tuned_it_keeps_its_tokenizer_and_template(tmp_path: Path) -> None:
    """The command that docs/huggingface.md gives, and an export of what it wrote."""
    folder = saved(theirs(CASES["llama2"]), tmp_path / "theirs")
    _tokenizer().save(str(folder / "tokenizer.json"))
    beside = {"tokenizer_config.json": '{"model_max_length": 64}', "chat_template.jinja": "{{ messages }}"}
    for name, text in beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    run, tuned, back = (tmp_path / name for name in ("run", "tuned", "back"))
    assert main(["import", str(folder), "--out", str(run)]) == 0
    (tmp_path / "corpus.txt").write_text("w1 w2 w3 w4 w5 w6 w7 " * 2000, encoding="utf-8")
    settings = (f'train.data=text("{tmp_path}/*.txt")', "train.seq_len=32 tok", "train.stop=1 steps")
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["run", str(run / "spec.mlm"), "--resume", str(run), "--out", str(tuned), "--procs", "1", *words]
    done = subprocess.run(
        [sys.executable, "-m", "mlmdsl", *command],
        cwd=ROOT,
        env={**os.environ, "MLMDSL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert main(["export", str(tuned), "--out", str(back)]) == 0
    for name in (*beside, "tokenizer.json", "generation_config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((back / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == 2
    assert (loaded(back).lm_head.weight - loaded(folder).lm_head.weight).abs().max() > 0


def test_an_imported_run_counts_from_zero_with_a_fresh_optimizer(tmp_path: Path) -> None:
    _, run = imported(CASES["llama2"], tmp_path)
    folder = checkpoint.latest(run)
    assert folder is not None and folder.name == "step-00000000"
    manifest = checkpoint.read_manifest(folder)
    assert manifest.step == 0 and manifest.facts["weights_only"] is True
    assert checkpoint.damage(folder) is None


@pytest.mark.parametrize("command", ["import", "export"])
def test_nothing_that_exists_is_overwritten(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, run = imported(CASES["llama2"], tmp_path)
    source = tmp_path / "theirs" if command == "import" else run
    assert main([command, str(source), "--out", str(run)]) == 4
    assert "error[MLM0812]" in capsys.readouterr().err
    assert checkpoint.latest(run) is not None
