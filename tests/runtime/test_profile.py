"""Traces that TensorBoard's profiler plugin lists and reads; the plugin is asked through its own routes, without a server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.plugins.base_plugin import TBContext
from torch_tb_profiler.plugin import TorchProfilerPlugin
from werkzeug.test import Client

from mlmdsl.runtime.profile import profiler


def train(out: Path, rank: int, steps: int, *, enabled: bool = True) -> None:
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with profiler(out, rank, enabled, steps) as running:
        for _ in range(steps):
            layer(torch.ones(4, 8)).sum().backward()
            optimizer.step()
            running.step()


def ask(plugin: TorchProfilerPlugin, route: str, **query: str) -> Any:
    return json.loads(Client(plugin.get_plugin_apps()[f"/{route}"]).get("/", query_string=query).data)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_lists_the_run(tmp_path: Path) -> None:
    for rank in range(2):
        train(tmp_path, rank, steps=7)
    plugin = TorchProfilerPlugin(TBContext(logdir=str(tmp_path / "logs")))
    end = time.monotonic() + 60
    while not (found := ask(plugin, "runs"))["runs"] and time.monotonic() < end:
        time.sleep(0.1)
    assert found["runs"] == ["profile"]
    assert {"Overview", "Operator", "Trace", "Memory"} <= set(ask(plugin, "views", run="profile"))
    assert ask(plugin, "workers", run="profile", view="Overview") == ["rank_0", "rank_1"]
    (span,) = ask(plugin, "spans", run="profile", view="Operator", worker="rank_0")
    where = {"run": "profile", "worker": "rank_0", "span": span}
    operators = ask(plugin, "operation/table", **where, group_by="Operation")["data"]
    calls = {row["name"]: row["calls"] for row in operators}
    assert calls["aten::linear"] == 3  # the recorded steps


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 30])
def test_a_short_run_is_profiled_too(tmp_path: Path, steps: int) -> None:
    train(tmp_path, 3, steps)
    (trace,) = (tmp_path / "logs" / "profile").iterdir()
    assert trace.name.startswith("rank_3.") and trace.name.endswith(".pt.trace.json.gz")


def test_off(tmp_path: Path) -> None:
    train(tmp_path, 0, 3, enabled=False)
    assert not list(tmp_path.iterdir())
