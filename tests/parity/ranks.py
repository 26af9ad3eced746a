"""Ranks as forked processes: they inherit a torch that is imported already, so four are up in a tenth of a second.

The parent must not have used more than one thread in torch (a forked child would wait for threads it does not have); children
take one each. A rank that fails or hangs ends the others, and its traceback comes back.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

GRACE_SECONDS = 2.0  # after the first failure


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 90.0) -> list[Any]:
    """function(rank, *arguments) on `world` gloo ranks; what each returned (pickled), in the order of ranks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mlmdsl-ranks-") as folder:
        processes = {_forked(function, rank, world, arguments, Path(folder), timeout): rank for rank in range(world)}
        problem = _wait(dict(processes), time.monotonic() + timeout)
        answers = [_answer(Path(folder) / f"{rank}.answer") for rank in range(world)]
    failures = sorted((a for a in answers if a is not None and not a[0]), key=lambda a: a[2])
    if failures:
        raise RankFailed(f"{problem or 'a rank failed'}\n{failures[0][1]}")
    if problem or None in answers:
        raise RankFailed(problem or "a rank left nothing behind")
    return [answer[1] for answer in answers if answer is not None]


def _forked(
    function: Callable[..., Any], rank: int, world: int, arguments: tuple[Any, ...], folder: Path, timeout: float
) -> int:
    process = os.fork()
    if process:
        return process
    _child(function, rank, world, arguments, folder, timeout)


def _child(
    function: Callable[..., Any], rank: int, world: int, arguments: tuple[Any, ...], folder: Path, timeout: float
) -> NoReturn:
    status = 1
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        with _group(rank, world, folder / "store", timeout):
            answer: Any = function(rank, *arguments)
        _leave(folder, rank, (True, answer, time.time()))
        status = 0
    except BaseException as error:
        failures = getattr(error, "failures", {})  # of torch's CheckpointException
        text = "".join(traceback.format_exception(error)) + "".join(str(f) for f in failures.values())
        _leave(folder, rank, (False, f"rank {rank}: {text}", time.time()))
    finally:
        os._exit(status)


@contextlib.contextmanager
def _group(rank: int, world: int, store: Path, timeout: float) -> Iterator[None]:
    if world == 1:
        yield
        return
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    yield
    dist.barrier()


def _leave(folder: Path, rank: int, answer: tuple[bool, Any, float]) -> None:
    part = folder / f"{rank}.part"
    part.write_bytes(pickle.dumps(answer))
    part.rename(folder / f"{rank}.answer")


def _answer(path: Path) -> tuple[bool, Any, float] | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _wait(running: dict[int, int], deadline: float) -> str | None:
    """Until all have ended; ends them itself after the deadline, or soon after one has failed."""
    problem = None
    while running:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                rank = running.pop(process)
                if status and problem is None:
                    problem = f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}"
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            problem = problem or f"ranks {sorted(running.values())} did not end"
            for process in running:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            return problem
        time.sleep(0.005)
    return problem
