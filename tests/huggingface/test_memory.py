"""No process holds the model: an import and an export of 400 MB, and what their processes had in memory at most.

`python -m tests.huggingface.test_memory 1200` does the same with a checkpoint of 1.2 GB and prints the figures.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import torch

from mlmdsl.huggingface import files
from mlmdsl.huggingface.config import read_config, recognise
from mlmdsl.huggingface.layouts import exchange
from mlmdsl.runtime.exchange import header

ROOT = Path(__file__).resolve().parents[2]
MiB = 1 << 20
BUFFERS = 250 * MiB  # blocks on their way: read, turned, in float32, written; the parts that an export keeps


def checkpoint(folder: Path, megabytes: int) -> Path:
    """A Llama of bfloat16 weights with random values, as wide as its size asks for."""
    layers, d, vocab = 12, 1024, 32_000
    ff = (megabytes * 500_000 - 2 * vocab * d) // layers // (3 * d) // 64 * 64
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
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(shapes, "BF16"))
        for shape in shapes.values():
            file.write(memoryview(torch.randn(shape).bfloat16().view(torch.uint8).view(-1).numpy()))
    return folder


def peaks(*arguments: str) -> list[int]:
    """Bytes that the command's processes held at most, the largest first: Linux keeps each process's high-water mark."""
    return _peaks("-m", "mlmdsl", *arguments)


def _peaks(*arguments: str) -> list[int]:
    found: dict[int, int] = {}
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            for pid in _tree(process.pid):
                found[pid] = max(found.get(pid, 0), _peak(pid))
            time.sleep(0.01)
        _, problems = process.communicate()
    assert process.returncode == 0, problems.decode()
    return sorted(found.values(), reverse=True)


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
    most = _peaks("-c", "import torch.distributed.checkpoint")[0] + BUFFERS
    found = peaks("import", str(source), "--out", str(tmp_path / "run"), "--procs", "4")
    assert len(found) >= 5 and found[0] < most, [peak // MiB for peak in found]
    found = peaks("export", str(tmp_path / "run"), "--out", str(tmp_path / "back"))
    assert found[0] < most, [peak // MiB for peak in found]
    written, read = (folder / "model.safetensors" for folder in (tmp_path / "back", source))
    for name in ("lm_head.weight", "model.layers.7.mlp.down_proj.weight"):
        assert _end(written, name) == _end(read, name)


def _end(path: Path, name: str) -> bytes:
    """The last values of a weight."""
    place = files.header(path)[name]
    with path.open("rb") as file:
        file.seek(place.offset + 2 * prod(place.shape) - 1000)
        return file.read(1000)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        big = checkpoint(Path(made) / "theirs", int(sys.argv[1]))
        for arguments in (
            ("import", str(big), "--out", f"{made}/run", "--procs", "4"),
            ("export", f"{made}/run", "--out", f"{made}/back"),
        ):
            begun = time.perf_counter()
            held = peaks(*arguments)
            print(arguments[0], [f"{peak // MiB} MiB" for peak in held], f"{time.perf_counter() - begun:.1f} s")
