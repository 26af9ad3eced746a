"""Published runs beside their predictions: Korthikanti et al. 2022, table 5; Narayanan et al., SC'21, table 1; SimuMax's on a
B200; two of torchtitan's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from mlmdsl.cli import main
from mlmdsl.grammar.library import STD
from mlmdsl.validation.judge import Row, left_out, validate
from mlmdsl.validation.runs import Problem, read_runs

PUBLISHED = Path(__file__).with_name("published.csv")
HEAD = "id,layers,hidden,heads,gpu,arch,precision,attention,tensor,experts,experts_per_token,expert,data,step_time_s\n"


@pytest.fixture(scope="module")
def rows() -> tuple[Row, ...]:
    return validate(PUBLISHED.read_text(encoding="utf-8")).rows


def of(source: str, rows: Iterable[Row]) -> list[float]:
    return [abs(row.time_error) for row in rows if row.source.startswith(source) and row.time_error is not None]


def test_every_run_is_predicted(rows: tuple[Row, ...]) -> None:
    assert len(rows) == 31 and not any(row.reason for row in rows)


def test_korthikanti(rows: tuple[Row, ...]) -> None:
    """Calculon's mean on the same rows is 3.65 %, its worst 8.87 %."""
    found = of("Korthikanti", rows)
    assert len(found) == 9 and sum(found) / 9 <= 0.036 and max(found) < 0.0887


def test_sc21(rows: tuple[Row, ...]) -> None:
    found = of("SC21", rows)
    assert len(found) == 10 and sum(found) / 10 <= 0.05 and max(found) < 0.1


def test_steps_on_one_device() -> None:
    """A hand-written step of PyTorch on one H100 and one H200; the eager one makes its norms of simple operations."""
    found = validate(PUBLISHED.with_name("one_device.csv").read_text(encoding="utf-8"))
    compiled = sorted(abs(row.time_error or 1.0) for row in found.rows if not row.id.endswith("eager"))
    assert len(compiled) == 13 and compiled[6] < 0.06 and compiled[-1] < 0.1
    memory = [row.memory_error for row in found.rows if row.memory_error is not None]
    assert len(memory) == 14 and min(memory) > -0.1 and sum(map(abs, memory)) / 14 < 0.06  # which keep weights in fp32 alone


def test_memory_is_never_far_below_what_was_measured(rows: tuple[Row, ...]) -> None:
    errors = sorted(row.memory_error for row in rows if row.memory_error is not None)
    assert len(errors) == 12 and errors[0] > -0.05 and abs(errors[6]) < 0.06


def test_a_summary_of_each_source_and_of_one_left_out() -> None:
    summary = validate(PUBLISHED.read_text(encoding="utf-8")).summary
    assert summary.predicted == summary.runs == 31
    assert {"pytorch/torchtitan", "pytorch/torchtitan, one node", "pytorch/torchtitan, many nodes"} <= set(
        summary.step_time_by_source
    )
    assert summary.step_time is not None and summary.step_time.median < 0.07
    assert summary.leave_one_source_out is not None
    assert summary.leave_one_source_out.left_out < 1.5 * summary.leave_one_source_out.in_sample


def test_a_fit_without_a_source_knows_nothing_of_it() -> None:
    """Runs of one source take twice as long as predicted: the others' factors leave them at half."""
    honest = [Row(id=f"a{i}", source="a", nodes=1, measured_step_time_s=1.0, predicted_step_time_s=1.0) for i in range(4)]
    other = [Row(id="b", source="b", nodes=1, measured_step_time_s=2.0, predicted_step_time_s=1.0)]
    found = left_out([*honest, *other])
    assert found is not None
    assert found.by_source["b"] == pytest.approx(0.5, abs=0.01)
    assert found.by_source["a"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_every_device_of_the_library(precision: str, attention: str) -> None:
    """Also dense or with experts, and with next to nothing said."""
    names = [line.split()[1] for line in (STD / "devices.mlm").read_text().splitlines() if line.startswith("const")]
    lines = [f"{name},12,1024,16,{name.replace('_', '-')},llama,{precision},{attention},2,,,,4,\n" for name in names]
    lines += [f"moe-{name},12,1024,16,{name},moe,{precision},{attention},1,8,2,4,8,\n" for name in names]
    lines += [f"bare-{name},12,1024,16,{name},,,,,,,,,\n" for name in names]
    found = validate(HEAD + "".join(lines))
    assert len(names) > 10 and len(found.rows) == 3 * len(names)
    for row in found.rows:
        assert not row.reason and row.predicted_step_time_s and row.predicted_peak_memory_bytes, row


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x,12,1024,16,TPU-v4,llama,bf16,flash,,,,,,1", "there is no `TPU_v4`"),
        ("x,12,1024,16,A100-SXM-80GB,llama,int8,flash,,,,,,1", "precision is 'int8'"),
        ("x,12,1024,16,A100-SXM-80GB,llama,bf16,paged,,,,,,1", "attention is 'paged'"),
        ("x,12,1024,15,A100-SXM-80GB,llama,bf16,flash,,,,,,1", "1024 / 15"),
        ("x,12,1024,16,A100-SXM-80GB,llama,bf16,flash,3,,,,,1", "tensor = 3 cannot split heads = 16"),
        ("x,twelve,1024,16,A100-SXM-80GB,llama,bf16,flash,,,,,,1", "layers is 'twelve', which is no number"),
        ("x,,1024,16,A100-SXM-80GB,llama,bf16,flash,,,,,,1", "layers is missing"),
        ("x,12,1024,16,A100-SXM-80GB,llama,bf16,flash,4,,,,4,1", "wants 16 devices, and there are 8"),
    ],
)
def test_what_cannot_be_predicted_is_listed_with_its_reason(line: str, reason: str) -> None:
    (row,) = validate(HEAD + line + "\n").rows
    assert reason in row.reason and row.predicted_step_time_s is None


def test_no_table_is_an_error() -> None:
    with pytest.raises(Problem, match="no column layers"):
        read_runs("a,b\n1,2\n")


def test_tokens_a_second_stand_for_a_step_time() -> None:
    text = HEAD.replace("step_time_s", "tokens_per_s_per_gpu") + "x,12,1024,16,A100-SXM-80GB,llama,bf16,flash,,,,,8,4096\n"
    (row,) = validate(text).rows
    assert row.measured_step_time_s == pytest.approx(8 * 2048 / (4096 * 8))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(
        HEAD + "x,12,1024,16,A100-SXM-80GB,llama,bf16,flash,,,,,,1.5\ny,12,1024,16,TPU,,,,,,,,,\n", encoding="utf-8"
    )
    assert main(["validate", str(table)]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 runs predicted" in said and "y                 not predicted: there is no `TPU` here" in said
    assert main(["validate", str(table), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"id", "measured_step_time_s", "predicted_step_time_s"} <= set(data["rows"][0])
    assert {"measured_peak_memory_bytes", "predicted_peak_memory_bytes"} <= set(data["rows"][1])
    assert data["rows"][0]["measured_step_time_s"] == 1.5 and data["rows"][1]["predicted_step_time_s"] is None
    assert main(["validate", str(tmp_path / "none.csv")]) == 2
    table.write_text("", encoding="utf-8")
    assert main(["validate", str(table)]) == 2
