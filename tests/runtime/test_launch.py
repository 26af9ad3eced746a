"""Local processes: they start, they log, and however a run ends there is one message and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime import launch as module
from mlmdsl.runtime.launch import Tee, cache_dir, last_step, launch

PROGRAM = """
import json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from mlmdsl.diagnostics import Diagnostic, RunError

assert __name__ == "__main__"
mode, out = sys.argv[1], Path(__file__).parent
dist.init_process_group("gloo")
rank = dist.get_rank()
(out / f"pid{rank}").write_text(str(os.getpid()))
print("hello from", rank, torch.get_num_threads())
x = torch.ones(2)
for step in range(1, 1 + int(sys.argv[2])):
    dist.all_reduce(x)
    time.sleep(0.01)
    if rank == 0:
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\\n")
    if step == 5 and mode == "raise" and rank == 1:
        raise ValueError("boom\\nover two lines")
    if step == 5 and mode == "kill" and rank == 1:
        os.kill(os.getpid(), 9)
    if step == 5 and mode == "user":
        raise RunError([Diagnostic("MLM0700", f"no file matches {rank - rank}", help="look again")])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def ended(program: Path, *arguments: str, procs: int = 2) -> Diagnostic:
    with pytest.raises(RunError) as caught:
        launch(program, procs, arguments, program.parent / "logs")
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def alive(pid: int) -> bool:
    """Zombies that nobody has reaped yet are dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def pids(program: Path) -> list[int]:
    return [int(path.read_text() or 0) for path in program.parent.glob("pid*")]


def test_every_rank_runs_the_program_and_logs(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    assert launch(program, 4, ["ok", "2"], program.parent / "logs") == 0
    assert launch(program, 4, ["ok", "2"], program.parent / "logs") == 0
    logs = [(program.parent / "logs" / f"rank{r}.log").read_text() for r in range(4)]
    assert [log.count(f"hello from {r} 1") for r, log in enumerate(logs)] == [2] * 4  # the second run appends
    shown = capfd.readouterr().out
    assert "hello from 1" not in shown
    assert {s: signal.getsignal(s) for s in before} == before and dict(os.environ) == environment


def test_one_rank_raises(program: Path) -> None:
    found = ended(program, "raise", "500")
    assert (found.code, found.message) == ("MLM0721", "rank 1 failed after step 5: over two lines")
    log = program.parent / "logs" / "rank1.log"
    assert str(log) in found.help and "ValueError: boom" in log.read_text()
    assert not any(map(alive, pids(program)))


def test_one_rank_is_killed(program: Path) -> None:
    found = ended(program, "kill", "500", procs=4)
    assert found.code == "MLM0720"
    assert found.message.startswith("rank 1 (pid ") and "SIGKILL" in found.message and found.message.endswith("after step 5")
    assert "no checkpoint had been written" in found.help
    assert not any(map(alive, pids(program)))


def test_a_user_error_is_told_once(program: Path) -> None:
    assert ended(program, "user", "500", procs=4) == Diagnostic("MLM0700", "no file matches 0", help="look again")


def test_a_program_that_cannot_start(program: Path) -> None:
    program.write_text("import no_such_module")
    found = ended(program)
    assert found.message == "rank 0 failed before its first step: ModuleNotFoundError: No module named 'no_such_module'" or (
        found.message.startswith("rank 1 failed before")
    )


def test_fresh_interpreters_where_a_fork_will_not_do(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_cuda", lambda: True)
    assert launch(program, 2, ["ok", "2"], program.parent / "logs") == 0
    assert "hello from 1" in (program.parent / "logs" / "rank1.log").read_text()
    assert ended(program, "kill", "500").code == "MLM0720"
    assert ended(program, "user", "500") == Diagnostic("MLM0700", "no file matches 0", help="look again")


DRIVER = """
import sys
from pathlib import Path
from mlmdsl.diagnostics import MlmError
from mlmdsl.runtime.launch import launch
program = Path(sys.argv[1])
try:
    sys.exit(launch(program, 2, ["run", "100000"], program.parent / "logs"))
except MlmError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphans_when_the_launcher_is_told_to_end(program: Path, number: signal.Signals) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", DRIVER, str(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert wait_for(lambda: (program.parent / "metrics.jsonl").exists())
        workers = pids(program)
        assert len(workers) == 2
        launcher.send_signal(number)
        output, _ = launcher.communicate(timeout=30)
    finally:
        launcher.kill()
    assert wait_for(lambda: not any(map(alive, workers)))
    if number != signal.SIGKILL:
        assert f"MLM0722: the run was interrupted by {number.name} after step" in output
        assert launcher.returncode == 4


def test_last_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) is None
    path.write_text('{"step": 3}\n{"step": 4}\n{"summary": {}}\n[1]\n{"ste')
    assert last_step(path) == 4


def test_rewriting_lines_stay_out_of_the_log(tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("w") as terminal, (tmp_path / "log").open("w") as log:
        tee = Tee(terminal, log)
        assert tee.write("a line\n") == 7
        tee.write("\rstep 1")
        tee.flush()
        assert not tee.isatty()
    assert (tmp_path / "terminal").read_bytes() == b"a line\n\rstep 1"
    assert (tmp_path / "log").read_text() == "a line\n"


def test_where_token_files_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLMDSL_CACHE", raising=False)
    assert cache_dir() == tmp_path / "mlmdsl"
    monkeypatch.setenv("MLMDSL_CACHE", str(tmp_path / "named"))
    assert cache_dir() == tmp_path / "named"
