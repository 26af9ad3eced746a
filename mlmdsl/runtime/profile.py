"""`--profile`: torch.profiler traces of a few steps of every rank, in OUT/logs/profile, where TensorBoard with
torch-tb-profiler lists them as the run "profile" (tensorboard --logdir OUT/logs).

The first steps are left out (allocations, connections), one warms the profiler up, three are recorded: a trace of a whole
run would be too large to look at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import profiler as torch_profiler

SKIPPED_STEPS, WARM_UP_STEPS, RECORDED_STEPS = 2, 1, 3


class Profiler(Protocol):
    def step(self) -> None:
        """A training step has ended."""


class Off:
    """Where no profile was asked for."""

    def step(self) -> None: ...


@contextlib.contextmanager
def profiler(out: Path, rank: int, enabled: bool, steps: int) -> Iterator[Profiler]:
    """Profiles some of the `steps` steps that are taken inside, at least one; `step()` is to be called after each."""
    if not enabled:
        yield Off()
        return
    skipped, warm_up, recorded = _division(steps)
    activities = [torch_profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch_profiler.ProfilerActivity.CUDA)
    with torch_profiler.profile(
        activities=activities,
        schedule=torch_profiler.schedule(wait=skipped, warmup=warm_up, active=recorded, repeat=1),
        on_trace_ready=torch_profiler.tensorboard_trace_handler(
            str(out / "logs" / "profile"), worker_name=f"rank_{rank}", use_gzip=True
        ),
        record_shapes=True,
        profile_memory=True,
    ) as running:
        yield running


def _division(steps: int) -> tuple[int, int, int]:
    """Steps to skip, to warm up with and to record; a short run gives up the first two first."""
    recorded = max(1, min(RECORDED_STEPS, steps))
    warm_up = min(WARM_UP_STEPS, max(0, steps - recorded))
    return min(SKIPPED_STEPS, max(0, steps - recorded - warm_up)), warm_up, recorded
