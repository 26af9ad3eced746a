"""`mlmdsl probe`: starts the ranks that measure, and turns what they found into mlm text."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlmdsl.planner.machine import Machine, machine_of, machine_text

_PROGRAM = "from mlmdsl.runtime.probe import main\n\nmain()\n"


def probe(ranks: int | None, arguments: Sequence[str] = (), measured: str | None = None) -> tuple[str, list[str]]:
    """The file's text and a few lines for the terminal. `ranks`: processes at once (None: one on each GPU, or on each core);
    `arguments`: of runtime/probe.py; `measured`: what it has written already. Raises RunError where a rank fails."""
    machine = machine_of(json.loads(measured or _measure(ranks, arguments)))
    return machine_text(machine), summary(machine)


def _measure(ranks: int | None, arguments: Sequence[str]) -> str:
    """JSON from ranks that this process starts."""
    from mlmdsl.runtime.launch import gpus, launch

    ranks = ranks or gpus() or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="mlmdsl-probe-") as folder:
        program, found = Path(folder) / "program.py", Path(folder) / "measured.json"
        program.write_text(_PROGRAM, encoding="utf-8")
        launch(program, ranks, [str(found), *arguments], Path(folder) / "logs")
        return found.read_text(encoding="utf-8")


def summary(machine: Machine) -> list[str]:
    """What was measured, in short."""
    device, measured = machine.device, machine.measured
    peaks = ", ".join(f"{name} {value / 1e9:,.1f} GFLOP/s" for name, value in device.peak_flops_per_second.items())
    ranks = measured["nodes"] * measured["per_node"]
    found = [
        f"{device.name}: {ranks} rank{'s' * (ranks > 1)} at once, each with",
        f"  products   up to {peaks}",
        f"  memory     {device.memory_bytes / 2**30:,.1f} GiB at {device.memory_bytes_per_second / 1e9:,.1f} GB/s",
        f"  launch     {device.launch_seconds * 1e6:,.1f} us a kernel",
    ]
    for name, link in (("inside", machine.intra), ("between", machine.inter)):
        if link is not None:
            latency = f"{link.latency_seconds * 1e6:,.0f} us"
            found.append(f"  {name:9}  {link.bytes_per_second / 1e9:,.2f} GB/s, {latency}; median error {link.error:.0%}")
    errors = ", ".join(f"{kind} {error:.0%}" for kind, error in machine.kernels.errors.items())
    return [*found, f"  the curves' median errors: {errors}"]
