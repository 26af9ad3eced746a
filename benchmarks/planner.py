"""How `mlmdsl plan` grows with devices and layers: writes planner.md beside this file.

python benchmarks/planner.py

Each row is one process, from its start to its end, of three the quickest: CPU seconds (user and system), wall seconds,
candidates of the search, candidates a second of the search's own time, and the process' largest resident size. Bytecode is
cached, as it is where the package is installed. Machines differ: the page says what a loop of Python takes on this one.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "specs" / "models"
INTRO = """# Growth of planning

Written by `python benchmarks/planner.py` on {machine}, where `for i in range(5_000_000): n += i` takes a function
{loop:.2f} s at its quickest. Each row is a process of its own, start included, the quickest of three; CPU seconds are user and
system. *Proved*: candidates that a bound proves not to fit, or to be slower.

"""
HEAD = "| | CPU s | wall s | candidates | proved | candidates/s | peak MiB |\n| --- | --- | --- | --- | --- | --- | --- |\n"


def spec(nodes: int, batch: int, layers: int = 126) -> str:
    """Llama 3 405B, every axis free."""
    text = (MODELS / "llama3_405b.mlm").read_text()
    text = text[: text.index("plan {")]
    text = "\n".join(line for line in text.splitlines() if "expect params" not in line)
    changed = text.replace("nodes = 2048", f"nodes = {nodes}").replace("batch = 16 Mi tok", f"batch = {batch} seq")
    return changed.replace("layers = 126", f"layers = {layers}")


def trillion(nodes: int, batch: int) -> str:
    """GPT 1T (arXiv:2104.04473, table 1), every axis free."""
    text = (MODELS / "gpt3_175b.mlm").read_text()
    text = "\n".join(line for line in text.splitlines() if "expect params" not in line)
    for old, new in (("d = 12288", "d = 25600"), ("layers = 96", "layers = 128"), ("heads = 96", "heads = 160")):
        text = text.replace(old, new)
    return text.replace("nodes = 128", f"nodes = {nodes}").replace("batch = 1536", f"batch = {batch}")


def loop() -> float:
    """CPU seconds of a plain loop, the quickest of five."""

    def once() -> float:
        started, n = time.process_time(), 0
        for i in range(5_000_000):
            n += i
        return time.process_time() - started

    return min(once() for _ in range(5))


def row(name: str, text: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "spec.mlm"), Path(folder, "plan.json")
        path.write_text(text)
        cpu, wall, peak, failed = min(planned(path, out) for _ in range(3))
        if failed:
            return f"| {name} | {cpu:.2f} | {wall:.2f} | nothing fits | | | {peak:.0f} |\n"
        search = json.loads(out.read_text())["search"]
    rate = f"{search['candidates'] / max(search['seconds'], 1e-3):,.0f}"
    counts = f"{search['candidates']:,} | {search['bounded'] + search['outpaced']:,} | {rate}"
    return f"| {name} | {cpu:.2f} | {wall:.2f} | {counts} | {peak:.0f} |\n"


def planned(path: Path, out: Path) -> tuple[float, float, float, int]:
    """CPU seconds, wall seconds and MiB of one process, and how it ended."""
    started = time.perf_counter()
    cached = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with out.open("w") as file:
        command = (sys.executable, "-m", "mlmdsl", "plan", str(path), "--json")
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL, env=cached)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, cpu = time.perf_counter() - started, used.ru_utime + used.ru_stime
    return cpu, wall, used.ru_maxrss / 1024, process.returncode


def tables() -> Iterator[str]:
    yield "## Large runs\n\n" + HEAD
    yield row("Llama 3 405B on 16,384 H100", spec(2048, 2048))
    yield row("GPT 1T on 3,072 A100", trillion(384, 3072))
    yield row("Llama 3 405B on 100,000 H100", spec(12500, 12500))
    yield row("GPT 1T on 98,304 A100", trillion(12288, 12288))
    yield row("Llama 3 70B on 256 A100 and 256 H100", (MODELS / "llama3_70b_mixed.mlm").read_text())
    yield row("DeepSeek-V3 671B on 2,048 H800", (MODELS / "deepseek_v3.mlm").read_text().partition("plan {")[0])
    yield "\n## Devices\n\nLlama 3 405B's shapes with 16 layers, 4 sequences a device.\n\n" + HEAD
    for devices in (8, 64, 512, 4096, 16384, 100_000):
        yield row(f"{devices:,} devices", spec(devices // 8, 4 * devices, 16))
    yield "\n## Layers\n\nThe same on 4,096 devices.\n\n" + HEAD
    for layers in (8, 32, 128, 512):
        yield row(f"{layers} layers", spec(512, 4096, layers))


def main() -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = INTRO.format(machine=machine, loop=loop()) + "".join(tables())
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
