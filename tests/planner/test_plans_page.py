"""docs/plans.md: the plan of every shipped spec at its real size, a line each. The diff of the page is what a change to the
planner does: `pytest tests/planner/test_plans_page.py --update-golden`, and read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmdsl.compile import compile_spec

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "plans.md"
SPECS = sorted((ROOT / "specs" / "models").glob("*.mlm"))
# Searches of seconds, for batches of many divisors: where the page is rewritten only
DEAR = {"deepseek_v3", "gpt3_175b", "megatron_8p3b", "olmo_7b", "pythia_6p9b", "qwen3_32b"}
HEAD = "| spec | devices | batch | plan | step | MFU | memory |\n| --- | --- | --- | --- | --- | --- | --- |\n"


def line(path: Path) -> str:
    """Sequences x tokens of a batch, seconds of a step, share of the peak, GiB at the peak of the fullest rank."""
    done = compile_spec(path.read_text(encoding="utf-8"), path="/specs/x.mlm", until="plan")
    assert done.plan is not None and done.spec is not None
    train, cluster, predicted = done.spec.train, done.spec.cluster, done.plan.predicted
    cells = (
        path.stem,
        " + ".join(f"{pool.nodes * pool.devices_per_node:,} x {pool.device.name}" for pool in cluster.pools),
        f"{train.batch:,} x {train.seq_len:,}",
        done.plan.plan.described,
        f"{predicted.step_time_s:.3g} s",
        f"{100 * predicted.mfu:.0f} %",
        f"{max(predicted.peak_memory_bytes) / 2**30:.0f} GiB",
    )
    return f"| {' | '.join(cells)} |\n"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        every = metafunc.config.getoption("--update-golden")
        metafunc.parametrize("path", [p for p in SPECS if every or p.stem not in DEAR], ids=lambda path: path.stem)


def test_the_page_has_the_plan_of_every_spec(path: Path, request: pytest.FixtureRequest) -> None:
    found = line(path)
    if request.config.getoption("--update-golden"):
        _rewrite(found)
    assert found in PAGE.read_text(encoding="utf-8"), "pytest tests/planner/test_plans_page.py --update-golden: read the diff"


def _rewrite(found: str) -> None:
    """The line in the place of the one of the same spec; lines of specs that are gone go."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
    table, _, after = rest.partition("\n\n")
    lines = {old.split(" ")[1]: f"{old}\n" for old in table.split("\n") if old}
    lines[found.split(" ")[1]] = found
    kept = "".join(lines[spec.stem] for spec in SPECS if spec.stem in lines)
    PAGE.write_text(f"{before}{HEAD}{kept}\n{after}", encoding="utf-8")


def test_the_page_has_no_other_lines() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(HEAD)[2].partition("\n\n")[0]
    assert [row.split(" ")[1] for row in table.splitlines()] == [path.stem for path in SPECS]
