"""`mlmdsl probe`: what is measured becomes a file that specs import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlmdsl.cli import main
from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import SpecError
from mlmdsl.grammar.format import format_text
from mlmdsl.planner.communication import Group, collective_seconds
from mlmdsl.planner.compute import curves_of
from mlmdsl.planner.machine import machine_of, machine_text
from mlmdsl.probing import probe

QUICKSTART = (Path(__file__).resolve().parents[2] / "specs" / "quickstart.mlm").read_text(encoding="utf-8")
LATENCY, SPEED = 2e-4, 1e9


def measured(nodes: int = 1) -> dict[str, Any]:
    """A machine of 50 GFLOP/s, 5 GB/s and 10 us a launch, whose links are as the formulas say."""
    shapes = [(m, k, n) for m in (128, 1024) for k in (64, 256, 1024) for n in (64, 256, 1024)]
    kernels = [["matmul_fp32", m, k, n, 0, 1e3 * (2 * m * k * n / 50e9 + 1e-5)] for m, k, n in shapes]
    for b, s in ((8, 64), (4, 256), (1, 512)):
        seconds = 2 * b * 4 * s * s * 32 / 30e9
        kernels += [["sdpa_causal_fwd", b, 4, s, 32, 1e3 * (seconds + 1e-5)]]
        kernels += [["sdpa_causal_fwdbwd", b, 4, s, 32, 1e3 * (3.5 * seconds + 3e-5)]]
    kernels += [["copy_fp32", 1 << 23, 0, 0, 0, 1e3 * (1 << 26) / 5e9], ["launch_us", 1, 0, 0, 0, 0.01]]
    groups = [(4, 4, Group(4, 4, SPEED, LATENCY, SPEED, LATENCY))]
    groups += [(2, 1, Group(2, 1, SPEED, LATENCY, SPEED / 10, 2 * LATENCY))] * (nodes > 1)
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "send")
    links = [
        {"kind": kind, "bytes": size, "ranks": n, "per_node": local, "seconds": collective_seconds(kind, size, group)}
        for n, local, group in groups
        for kind in kinds
        for size in (1 << 10, 1 << 17, 1 << 22)
    ]
    return {
        "kind": "cpu",
        "name": 'A "processor"',
        "torch": "2.13.0",
        "per_node": 4,
        "nodes": nodes,
        "cores": 4,
        "threads": 1,
        "memory_bytes": 4 << 30,
        "precisions": ["fp32"],
        "kernels": kernels,
        "links": links,
    }


def test_links_that_follow_the_formulas_are_found() -> None:
    machine = machine_of(measured(nodes=2))
    assert machine.intra is not None and machine.inter is not None
    assert machine.intra.bytes_per_second == pytest.approx(SPEED, rel=0.03)
    assert machine.intra.latency_seconds == pytest.approx(LATENCY, rel=0.03)
    assert machine.inter.bytes_per_second == pytest.approx(SPEED / 10, rel=0.03)
    assert max(machine.intra.error, machine.inter.error, machine.kernels.errors["matmul_fp32"]) < 0.05


def test_a_spec_imports_the_machine(tmp_path: Path) -> None:
    machine = machine_of(measured())
    text = machine_text(machine)
    assert format_text(text) == text
    (tmp_path / "machine.mlm").write_text(text, encoding="utf-8")
    head, _, rest = QUICKSTART.partition("cluster laptop {")
    spec = 'import "machine.mlm" as here\n' + head + "cluster mine from here.machine { }\n" + rest.partition("}\n")[2]
    done = compile_spec(spec, path=str(tmp_path / "spec.mlm"), until="plan")
    assert done.spec is not None and done.plan is not None and done.plan.cluster.devices_per_node == 4
    device = done.spec.cluster.pools[0].device
    assert device.launch_seconds == pytest.approx(1e-5)
    given, read = machine.kernels.curves, curves_of(device)
    assert read.measured and read.matmul.half_depth == pytest.approx(given.matmul.half_depth, rel=1e-4)
    assert read.memory.share == pytest.approx(given.memory.share, rel=1e-4)


def test_curves_that_lack_a_number_are_pointed_at() -> None:
    whole = machine_text(machine_of(measured()))
    broken = whole.replace("wave_outputs", "wave_output")
    head, _, rest = QUICKSTART.partition("cluster laptop {")
    with pytest.raises(SpecError) as raised:
        compile_spec(head + broken + rest.partition("}\n")[2], until="spec")
    assert "wave_outputs" in str([d.help for d in raised.value.diagnostics])
    assert {d.code for d in raised.value.diagnostics} == {"MLM0211"}


def test_a_file_is_overwritten_only_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "measured.json").write_text(json.dumps(measured()), encoding="utf-8")
    out = tmp_path / "machine.mlm"
    command = ["probe", "--measured", str(tmp_path / "measured.json"), "--out", str(out)]
    assert main(command) == 0
    assert 'import "machine.mlm" as here' in capsys.readouterr().out
    out.write_text("mine", encoding="utf-8")
    assert main(command) == 2 and out.read_text(encoding="utf-8") == "mine"
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0 and "const device" in out.read_text(encoding="utf-8")


def test_two_ranks_are_measured() -> None:
    text, lines = probe(2, ["--small", "--seconds", "0.002", "--windows", "1"])
    assert "devices_per_node = 2" in text and "loopback(" in text
    assert any(line.strip().startswith("products") for line in lines)
