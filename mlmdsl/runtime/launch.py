"""Starts the processes of a run on this machine, watches them, and says in one message what went wrong.

The watching is torchrun's (`torch.distributed.launcher.api`): one agent, a rendezvous on a free local port, no restarts. On
the CPU its workers are forked from this process, which has imported torch already: four ranks are up in a fraction of a
second where four interpreters need several. With CUDA they are fresh interpreters, since CUDA does not survive a fork.

A worker runs `program.py` as `__main__`, exactly as `torchrun program.py` does. Its output goes to OUT/logs/rank<N>.log;
rank 0's standard output also to the terminal. No worker outlives this process, whatever kills it: Linux is asked to send
SIGKILL to them when their parent dies. This is the one file of the runtime that reads the environment.

    RunError MLM0720   a process was killed by a signal
             MLM0721   a process failed (its traceback is in its log)
             MLM0722   the run was interrupted
    or what the program itself raised, once, not once per rank
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import pickle
import re
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from mlmdsl.diagnostics import Diagnostic, MlmError, RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PR_SET_PDEATHSIG = 1  # linux/prctl.h

LOST_PEER = re.compile(r"closed by peer|reset by peer|[Bb]roken pipe|remote process exited|refused|recvValue failed")
LOST_PEER_SECONDS = 10.0  # how long a rank that has lost another waits, for the agent to see the cause before the effect
FAILED_SECONDS = 0.5  # a rank that failed keeps its connections open so long: the others' complaints come later than its own


def cache_dir() -> Path:
    """Where token files are kept: $MLMDSL_CACHE, $XDG_CACHE_HOME/mlmdsl or ~/.cache/mlmdsl."""
    if named := os.environ.get("MLMDSL_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mlmdsl"
    try:
        return Path.home() / ".cache" / "mlmdsl"
    except RuntimeError:  # a user id without a home
        return Path(tempfile.gettempdir()) / f"mlmdsl-{os.getuid()}"


@dataclass(frozen=True)
class Place:
    """Where torchrun has put this process."""

    local_rank: int
    local_world_size: int


def place_in_node() -> Place | None:
    """None in a process that torchrun (or `launch`) has not started."""
    if "RANK" not in os.environ:
        return None
    return Place(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def launch(program: Path, procs: int, arguments: Sequence[str], log_dir: Path) -> int:
    """Runs `program` on `procs` local processes to its end; 0, or a RunError. `log_dir` is OUT/logs."""
    log_dir.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // procs)
    with tempfile.TemporaryDirectory(prefix="mlmdsl-launch-") as folder, _environment(threads), _quiet_agent():
        job = Job(str(program), tuple(map(str, arguments)), str(log_dir), folder, threads, os.getpid())
        problem = _run_agent(job, procs)
        if problem is None:
            return 0
        raise _explained(problem, job)


# ---- the agent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What each worker is told. `reports` is a folder where a failing worker leaves a note."""

    program: str
    arguments: tuple[str, ...]
    log_dir: str
    reports: str
    threads: int
    parent: int

    @property
    def out(self) -> Path:
        return Path(self.log_dir).parent


@dataclass(frozen=True)
class Death:
    """How the agent saw the run end: the first process that failed, or the signal that reached the agent itself."""

    rank: int | None
    pid: int
    exit_code: int  # negative: a signal's number


def _run_agent(job: Job, procs: int) -> Death | None:
    """None where every worker ended well."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=procs,
        run_id="mlmdsl",
        role="rank",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(job.reports) / "agent")),
    )
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if _has_cuda():
            described = Path(job.reports) / "job.pickle"
            described.write_bytes(pickle.dumps(job))
            elastic_launch(settings, sys.executable)("-u", "-c", FRESH_WORKER, str(described))
        else:
            elastic_launch(settings, work)(job)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return Death(rank, failure.pid, failure.exitcode)
    except SignalException as error:
        return Death(None, os.getpid(), -int(error.sigval))
    return None


FRESH_WORKER = "import pickle, sys; from mlmdsl.runtime import launch; launch.work(pickle.load(open(sys.argv[1], 'rb')))"


def gpus() -> int:
    """How many this machine has for a run."""
    import torch

    return torch.cuda.device_count() if _has_cuda() else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()  # through NVML, see _environment: the driver is not initialised here


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """What the workers inherit, unless the user has set it; put back afterwards, with the signal handlers."""
    local = {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in (name for _, name in socket.if_nameindex()) else {}
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "10000",  # threads that spin longer at barriers take the cores of whatever else runs
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a store of the ranks' own: the agent's breaks on gloo at a restart
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
        "TOKENIZERS_PARALLELISM": "true",  # said aloud, tokenizers does not warn of the fork
        **local,
    }
    before, handlers = dict(os.environ), {s: signal.getsignal(s) for s in SIGNALS}
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        with contextlib.suppress(ValueError):  # only the main thread has set any
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent's log says in forty lines what `_explained` says in three."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# ---- a worker -------------------------------------------------------------------------------------------------------


def work(job: Job) -> None:
    """Runs the program in this process, which the agent has made for it."""
    _die_with(job.parent)
    logging.disable(logging.NOTSET)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    _open_log(Path(job.log_dir) / f"rank{rank}.log", shown=rank == 0)
    _limit_threads(job.threads)
    sys.argv = [job.program, *job.arguments]
    sys.path.insert(0, str(Path(job.program).resolve().parent))
    try:
        runpy.run_path(job.program, run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            _report_and_exit(job, rank, stop)
    except BaseException as error:
        _report_and_exit(job, rank, error)
    sys.stdout.flush()
    sys.stderr.flush()


def _die_with(parent: int) -> None:
    """SIGKILL for this process when `parent` dies, even by SIGKILL (Linux; elsewhere the agent alone looks after it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _limit_threads(threads: int) -> None:
    """Forked workers inherit a torch that has counted its threads already."""
    import torch

    torch.set_num_threads(threads)


def _open_log(path: Path, *, shown: bool) -> None:
    """Standard error, and for all but the shown rank standard output too, to `path`, after what an earlier run left there.

    Both the files (native code writes there) and Python's streams."""
    log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    os.dup2(log.fileno(), 2)
    sys.stderr = log
    if shown:
        sys.stdout = Tee(sys.stdout, log)  # type: ignore[assignment]
    else:
        os.dup2(log.fileno(), 1)
        sys.stdout = log


class Tee:
    """Standard output that also goes to the log, apart from lines that overwrite themselves on a terminal.

    Training goes on when nobody reads any more (`mlmdsl run ... | head`)."""

    def __init__(self, terminal: TextIO, log: TextIO):
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.terminal.write(text)
        if not text.startswith("\r"):
            self.log.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.terminal.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


def _report_and_exit(job: Job, rank: int, error: BaseException) -> NoReturn:
    """Leaves a note for the launcher and the traceback in the log, waits as long as the cause may need to be seen, exits."""
    expected = isinstance(error, MlmError | SystemExit)
    if not expected:
        traceback.print_exception(error)
    text = "".join(traceback.format_exception_only(error)).strip()
    lost = not expected and bool(LOST_PEER.search(text))
    note = Note(rank, time.time(), text.splitlines()[-1] if text else type(error).__name__, lost, _carried(error))
    part = Path(job.reports) / f"{rank}.part"
    part.write_bytes(pickle.dumps(note))
    part.rename(part.with_suffix(".note"))
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(LOST_PEER_SECONDS if lost else FAILED_SECONDS)
    os._exit(4)


@dataclass(frozen=True)
class Note:
    """What a failing worker tells: its error in a line; whether it only lost another rank; a user error as it was raised."""

    rank: int
    at: float
    text: str
    lost_peer: bool
    diagnostics: tuple[Diagnostic, ...]


def _carried(error: BaseException) -> tuple[Diagnostic, ...]:
    return error.diagnostics if isinstance(error, MlmError) else ()


# ---- what went wrong ------------------------------------------------------------------------------------------------


def _explained(death: Death, job: Job) -> RunError:
    """The one message: the first cause, how far the run came, and how to go on."""
    if sys.stdout.isatty():
        print()  # the progress line has no end yet
    state = _how_far(job.out)
    if death.rank is None or death.exit_code == -signal.SIGINT:
        name = signal.Signals(-death.exit_code).name
        return _error("MLM0722", f"the run was interrupted by {name} {state}", _how_to_resume(job))
    if death.exit_code < 0:
        return _error("MLM0720", f"rank {death.rank} (pid {death.pid}) was {_signalled(death)} {state}", _how_to_resume(job))
    notes = [pickle.loads(path.read_bytes()) for path in Path(job.reports).glob("*.note")]
    notes.sort(key=lambda note: (note.lost_peer, note.at))
    first = notes[0] if notes else None
    if first is not None and first.diagnostics:
        return RunError(first.diagnostics)
    rank = death.rank if first is None else first.rank
    reason = f"exit status {death.exit_code}" if first is None else first.text
    log = f"its traceback is in {Path(job.log_dir) / f'rank{rank}.log'}"
    return _error("MLM0721", f"rank {rank} failed {state}: {reason}", f"{log}; {_how_to_resume(job)}")


def _signalled(death: Death) -> str:
    names = {
        signal.SIGKILL: "killed by SIGKILL (kill -9, or the kernel because memory ran out)",
        signal.SIGTERM: "ended by SIGTERM",
        signal.SIGSEGV: "ended by SIGSEGV (a crash in native code)",
        signal.SIGBUS: "ended by SIGBUS (a file shrank under it, or shared memory is full)",
        signal.SIGABRT: "ended by SIGABRT (native code gave up; see its log)",
    }
    number = signal.Signals(-death.exit_code)
    return names.get(number, f"ended by {number.name}")


def _how_far(out: Path) -> str:
    step = last_step(out / "metrics.jsonl")
    return "before its first step" if step is None else f"after step {step:,}"


def _how_to_resume(job: Job) -> str:
    from mlmdsl.runtime.checkpoint import latest

    checkpoint = latest(job.out)
    if checkpoint is None:
        return "no checkpoint had been written: start again (checkpoint_every in the train block writes them on the way)"
    command = f"mlmdsl run {job.out / 'plan.json'} --out {job.out} --resume"
    return f"the last whole checkpoint is {checkpoint}; go on from it with: {command}"


def last_step(metrics: Path) -> int | None:
    """The step on the last whole line of a metrics.jsonl that has one."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            if isinstance(step := json.loads(line).get("step"), int):
                return step
    return None


def _error(code: str, message: str, help: str) -> RunError:
    return RunError([Diagnostic(code, message, help=help)])
