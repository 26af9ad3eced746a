"""Wall time of `mlmdsl plan`, process start included, as multiples of starting Python with the compiler imported.

python benchmarks/planning.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

MODELS = Path(__file__).resolve().parents[1] / "specs" / "models"
SPECS = ("gpt2_124m", "llama3_8b", "llama3_70b", "gpt3_175b", "llama3_405b")
START = (sys.executable, "-c", "import mlmdsl.cli, mlmdsl.compile, mlmdsl.report.terminal")


def seconds(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    commands = {"start": START} | {
        name: (sys.executable, "-m", "mlmdsl", "plan", str(MODELS / f"{name}.mlm")) for name in SPECS
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(seconds(command))
    start = median(times["start"])
    print(f"{'':14}{'median':>9}{'ratio':>8}")
    for name, found in times.items():
        print(f"{name:14}{median(found):8.2f} s{median(found) / start:7.2f}x")


if __name__ == "__main__":
    main()
