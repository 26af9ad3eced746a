"""No process holds the model: an import, four ranks that load what was imported, an export, and what their processes had in
memory at most.

`python -m tests.huggingface.test_memory 1200` does the same with a checkpoint of 1.2 GB and prints the figures.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mlmdsl.huggingface import files
from mlmdsl.huggingface.config import read_config, recognise
from mlmdsl.huggingface.layouts import exchange
from mlmdsl.runtime.exchange import header
from mlmdsl.runtime.pieces import Tensor

ROOT = Path(__file__).resolve().parents[2]
MiB, GiB = 1 << 20, 1 << 30
PLANS = {  # of four ranks that go on from an import
    "tensor 2 x data 2, ZeRO 3": ("tensor=2", "data=2", "zero=3"),
    "tensor 2 x pipeline 2": ("tensor=2", "pipeline=2"),
    "pipeline 4": ("pipeline=4",),
}
BUFFERS = 250 * MiB  # blocks on their way: read, turned, in float32, written; the parts that an export keeps


def checkpoint(folder: Path, megabytes: int) -> Path:
    """A Llama of bfloat16 weights with random values in two files, as wide as its size asks for."""
    layers, d, vocab = 12, 1024, 32_000
    ff = ((megabytes * 500_000 - 2 * vocab * d) // layers - 4 * d * d) // (3 * d) // 64 * 64
    fields = {
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": ff,
        "num_attention_heads": 16,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    graph = read_config(folder).graph()
    shapes = exchange(recognise(graph, "llama"), graph).theirs
    names = sorted(shapes)
    halves = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, tensors in halves.items():
        with (folder / file).open("wb") as stream:
            stream.write(header({name: shapes[name] for name in tensors}, "BF16"))
            for name in tensors:
                stream.write(memoryview(torch.randn(shapes[name]).bfloat16().view(torch.uint8).view(-1).numpy()))
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in halves.items() for name in tensors}}
    (folder / files.INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder


def peaks(*arguments: str) -> list[int]:
    """Bytes that the command's processes held at most, the largest first: Linux keeps each process's high-water mark."""
    return _peaks("-m", "mlmdsl", *arguments)


def _peaks(*arguments: str) -> list[int]:
    found: dict[int, int] = {}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=said, stderr=said)
        while process.poll() is None:
            for pid in _tree(process.pid):
                found[pid] = max(found.get(pid, 0), _peak(pid))
            time.sleep(0.01)
        said.seek(0)
        assert process.returncode == 0, said.read().decode()
    return sorted(found.values(), reverse=True)


@dataclass(frozen=True)
class Loading:
    """What each of four ranks held at most until a run stood in its memory, and the largest share that the plan's ledger gives
    one: weights, the optimizer's state, and without ZeRO the buffer of gradients."""

    peaks: list[int]
    share: int


def loading(source: Path, out: Path, *pins: str, steps: int = 0) -> Loading:
    """A run under a plan that goes on from `source`, and stops there or after so many steps."""
    (corpus := out.with_suffix(".txt")).write_text("All the words that it takes to begin.\n" * 4000, encoding="utf-8")
    settings = (f'train.data=text("{corpus}")', "train.tokenizer=bytes()", "train.seq_len=64 tok", "train.precision=fp32")
    arguments = [
        "run",
        str(source / "spec.mlm"),
        "--out",
        str(out),
        "--resume",
        str(source),
        "--steps",
        str(steps),
        "--procs",
        "4",
    ]
    arguments += [word for pin in pins for word in ("--pin", pin)] + [word for value in settings for word in ("--set", value)]
    held = peaks(*arguments)[:4]
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    parts = ["weights_bytes", "master_weights_bytes", "optimizer_bytes", *([] if plan["plan"]["zero"] else ["gradients_bytes"])]
    return Loading(held, max(sum(stage[part] for part in parts) for stage in plan["memory"]))


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in _tree(int(child)))]


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    mark = re.search(r"^VmHWM:\s+(\d+) kB", status, re.M)
    return int(mark[1]) * 1024 if mark else 0


def test_no_process_holds_the_model(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "theirs", 400)
    importing_torch = _peaks("-c", "import torch.distributed.checkpoint")[0]
    found = peaks("import", str(source), "--out", str(tmp_path / "run"), "--procs", "4")
    assert len(found) >= 5 and found[0] < importing_torch + BUFFERS, [peak // MiB for peak in found]
    found = peaks("export", str(tmp_path / "run"), "--out", str(tmp_path / "back"))
    assert found[0] < importing_torch + BUFFERS, [peak // MiB for peak in found]
    read, written = files.tensors(source), files.tensors(tmp_path / "back")
    for name in ("lm_head.weight", "model.layers.7.mlp.down_proj.weight"):
        assert _end(written[name]) == _end(read[name])
    loaded = loading(tmp_path / "run", tmp_path / "tuned", *PLANS["tensor 2 x data 2, ZeRO 3"])
    assert loaded.peaks[0] < loaded.share + GiB, loaded


def _end(place: Tensor) -> bytes:
    """The last values of a weight."""
    with Path(place.path).open("rb") as file:
        file.seek(place.offset + 2 * prod(place.shape) - 1000)
        return file.read(1000)


def measured(folder: Path, megabytes: int) -> None:
    """Prints what each process of an import, of loading under each plan and of an export held at most."""

    def show(what: str, held: list[int], begun: float, more: str = "") -> None:
        print(f"{what}: {[peak // MiB for peak in held]} MiB, {time.perf_counter() - begun:.0f} s{more}", flush=True)

    big = checkpoint(folder / "theirs", megabytes)
    show("importing torch", _peaks("-c", "import torch.distributed.checkpoint"), time.perf_counter())
    begun = time.perf_counter()
    show("import", peaks("import", str(big), "--out", str(folder / "run"), "--procs", "4"), begun)
    for number, (name, pins) in enumerate(PLANS.items()):
        begun = time.perf_counter()
        found = loading(folder / "run", folder / f"tuned-{number}", *pins)
        over = (found.peaks[0] - found.share) // MiB
        show(f"load under {name}", found.peaks, begun, f"; share {found.share // MiB} MiB, over it {over} MiB")
    loading(folder / "run", folder / "trained", *next(iter(PLANS.values())), steps=1)
    begun = time.perf_counter()
    show("export of what four ranks wrote", peaks("export", str(folder / "trained"), "--out", str(folder / "back")), begun)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        measured(Path(made), int(sys.argv[1]))
