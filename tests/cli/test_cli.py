"""Commands as a user types them: exit status, what goes where, no traceback, no torch while planning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlmdsl.cli import main

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "specs" / "quickstart.mlm")
LLAMA = str(ROOT / "specs" / "models" / "llama3_8b.mlm")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mlmdsl", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- what works -----------------------------------------------------------------------------------------------------


def test_check_says_ok_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", LLAMA]) == 0
    assert "8,030,261,248 parameters" in capsys.readouterr().out


def test_check_as_json_is_an_empty_list_where_nothing_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", LLAMA, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_plan_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QUICKSTART, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["version"] == 1 and len(plan["spec_sha256"]) == 64
    assert set(plan["plan"]) >= {
        "tensor", "sequence_parallel", "context", "pipeline", "interleave", "schedule", "data", "replicate", "zero", "expert",
        "micro_batch", "recompute", "stages",
    }  # fmt: skip
    assert set(plan["predicted"]) >= {
        "step_time_s", "tokens_per_s_per_device", "model_tflops_per_device", "mfu", "bubble_fraction", "peak_memory_bytes",
        "train_days", "cost_usd", "energy_kwh",
    }  # fmt: skip
    assert set(plan["model"]) >= {"parameters", "parameters_active", "flops_per_token"}
    assert set(plan["search"]) >= {"candidates", "feasible", "seconds", "rejected"}
    assert all(set(other) >= {"plan", "predicted"} for other in plan["alternatives"])


def test_plan_is_drawn_in_80_plain_columns_when_piped() -> None:
    done = run("plan", QUICKSTART)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert "\x1b" not in done.stdout


def test_the_same_spec_gives_the_same_plan(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert main(["plan", LLAMA, "-o", str(first)]) == 0
    assert main(["plan", LLAMA, "-o", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("until", ["syntax", "spec", "graph", "plan"])
def test_every_pass_can_be_printed(until: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--emit", until]) == 0
    assert json.loads(capsys.readouterr().out)


def test_emit_program_prints_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--emit", "program"]) == 0
    compile(capsys.readouterr().out, "program.py", "exec")


def test_set_and_pin_are_heard(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--json", "--pin", "tensor=4", "--set", "train.batch=64 seq"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["plan"]["tensor"], plan["batch"]) == (4, 64)


@pytest.mark.parametrize("command", ["check", "plan", "run", "generate", "fmt"])
def test_every_command_explains_itself_by_example(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"mlmdsl {command}" in done.stdout


@pytest.mark.parametrize("module", ["torch", "pydantic"])
def test_planning_never_imports(module: str) -> None:
    script = (
        "import sys; from mlmdsl.cli import main; status = main(['plan', sys.argv[1]]); "
        f"assert '{module}' not in sys.modules, '{module} was imported'; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script, LLAMA], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- what does not --------------------------------------------------------------------------------------------------


def test_a_wrong_spec_exits_1_with_its_lines(tmp_path: Path) -> None:
    text = Path(LLAMA).read_text(encoding="utf-8").replace("cluster", "clutser", 1)
    done = run("check", write(tmp_path, "bad.mlm", text))
    assert done.returncode == 1
    assert "error[MLM" in done.stderr and "bad.mlm:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "no/such/file.mlm"),
        ("plan", "."),
        ("check", LLAMA, "--format", "yaml"),
        ("run", LLAMA, "--procs", "0"),
        ("generate", "no/such/run"),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_no_plan_that_fits_exits_3_and_says_what_would(tmp_path: Path) -> None:
    done = run("plan", LLAMA, "--set", "cluster.nodes=1", "--set", "cluster.devices_per_node=1")
    assert done.returncode == 3, done.stderr
    assert "error[MLM06" in done.stderr
    assert "help:" in done.stderr


def test_binary_input_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.mlm"
    path.write_bytes(b"\xff\xfe\x00model")
    done = run("check", str(path))
    assert done.returncode == 2
    assert "not UTF-8" in done.stderr


def test_a_saved_plan_is_refused_once_its_spec_has_drifted(tmp_path: Path) -> None:
    spec = write(tmp_path, "model.mlm", Path(LLAMA).read_text(encoding="utf-8"))
    saved = str(tmp_path / "plan.json")
    assert main(["plan", spec, "-o", saved]) == 0
    write(tmp_path, "model.mlm", Path(LLAMA).read_text(encoding="utf-8").replace("seq_len = 8192 tok", "seq_len = 4096 tok"))
    done = run("run", saved)
    assert done.returncode == 3, done.stderr
    assert "error[MLM06" in done.stderr


def test_a_broken_saved_plan_is_no_traceback(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"version": 99}'):
        done = run("run", write(tmp_path, "plan.json", text))
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr


def test_a_run_never_overwrites_another(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    done = run("run", QUICKSTART, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_local_gpus_are_matched_with_the_device_library() -> None:
    from mlmdsl.diagnostics import UsageError
    from mlmdsl.local import local_gpus

    assert local_gpus("") == []
    assert "cluster.device=H100_SXM_80GB" in local_gpus("NVIDIA H100 80GB HBM3, 81559\n")
    assert "cluster.devices_per_node=2" in local_gpus("NVIDIA A100-SXM4-40GB, 40960\nNVIDIA A100-SXM4-40GB, 40960\n")
    with pytest.raises(UsageError):
        local_gpus("Imaginary 9000, 1234\n")


def test_a_run_wants_the_machine_that_its_plan_is_for(tmp_path: Path) -> None:
    """One node of GPUs that are not here, and several nodes: said before any process is started."""
    done = run("run", LLAMA, "--out", str(tmp_path / "many"))
    assert done.returncode == 2 and "MLM0753" in done.stderr and "torchrun --nnodes 8 --nproc-per-node 8" in done.stderr
    assert (tmp_path / "many" / "program.py").exists()
    gpt = str(ROOT / "specs" / "models" / "gpt2_124m.mlm")
    sets = ("--set", "cluster.devices_per_node=512", "--set", "train.batch=512 seq")
    done = run("run", gpt, *sets, "--out", str(tmp_path / "one"))
    assert done.returncode == 2 and "MLM0752" in done.stderr and "--here" in done.stderr
    assert not (tmp_path / "one").exists()
