"""Regret of the planner: every feasible plan of a small model is run and timed; how much slower is the chosen than the best?

    python benchmarks/regret.py [--ranks 4 8] [--links loopback throttled] [--rounds 5] [--steps 4] [--out benchmarks/regret.md]

For each number of ranks the machine is probed first, and the planner chooses for the machine file that comes out. `loopback`:
all ranks on one node. `throttled`: two network namespaces, joined by a pair of virtual interfaces whose rate tc's token bucket
limits, are two nodes, each with half of the machine's cores; needs root and `ip` and `tc` on Linux, and is left out with a word
where they are missing.

All plans stay loaded in the same processes, and are stepped in turn, a few steps of each a round: what else the machine does
strikes all alike. After a round of all, the fastest ones and the chosen one have more rounds. A plan's time is the median over
its rounds of its fastest step in the round, on the slowest rank; the chosen plan's regret is the median over the rounds of its
time over the best plan's in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mlmdsl.codegen.emit import emit
from mlmdsl.compile import compile_spec
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner import assemble
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.machine import machine_of, machine_text
from mlmdsl.planner.plan import SearchReport
from mlmdsl.planner.search import explore, search

ROOT = Path(__file__).resolve().parents[1]
RATE = "400mbit"  # of the throttled link, in each direction
CLOSE = 12  # plans that have all rounds
SPEC = """
import "machine.mlm" as here

block GPTBlock(x: [B, S, d], heads: int) {
  h = x + Attention(LayerNorm(x), heads = heads, causal = true)
  output h + MLP(LayerNorm(h), hidden = 4 * d)
}
model small {
  param d = 128
  param layers = 4
  input tokens: int[B, S]
  h = Embedding(tokens, vocab = 512, dim = d)
  repeat layers as blocks { h = GPTBlock(h, heads = 4) }
  output Linear(LayerNorm(h), out = 512, bias = false)
}
cluster mine from here.machine { }
train {
  data = text("unused.txt")
  tokenizer = bytes()
  seq_len = 64 tok
  batch = 8 seq
  stop = 100 steps
  optimizer = adamw(lr = 1e-3)
  precision = fp32
}
plan {
  pin recompute = none
  pin micro_batch = 1
}
"""


@dataclass(frozen=True)
class Plan:
    name: str
    predicted: float
    program: Path


@dataclass(frozen=True)
class Result:
    """Of one number of ranks on one kind of link; `times`: by plan, a time for each round that it was in."""

    title: str
    plans: Sequence[Plan]
    chosen: str
    times: Sequence[Sequence[float]]

    @property
    def regret(self) -> float:
        chosen, best = (self._index(name) for name in (self.chosen, self.best))
        return median(mine / least for mine, least in zip(self.times[chosen], self.times[best], strict=True)) - 1

    @property
    def best(self) -> str:
        """Of those that were in all rounds."""
        rounds = max(map(len, self.times))
        return min(
            (plan.name for plan, times in zip(self.plans, self.times, strict=True) if len(times) == rounds), key=self.seconds
        )

    def seconds(self, name: str) -> float:
        return median(self.times[self._index(name)])

    def _index(self, name: str) -> int:
        return next(i for i, plan in enumerate(self.plans) if plan.name == name)


# ---- the network ----------------------------------------------------------------------------------------------------


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two, joined by a link of RATE. RuntimeError where this machine cannot make them."""
    names = f"mlm{os.getpid()}a", f"mlm{os.getpid()}b"
    ends = f"v{os.getpid()}a", f"v{os.getpid()}b"
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", end, "name", "node0")
            _ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "node0")
            _ip("-n", name, "link", "set", "node0", "up")
            bucket = ("tbf", "rate", RATE, "burst", "128kb", "latency", "100ms")
            _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "node0", "root", *bucket)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise RuntimeError("there is no `ip` or no `tc`")
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`ip {' '.join(arguments)}` says: {done.stderr.strip()}")


def start(ranks: int, nodes: Sequence[str], command: Sequence[str]) -> None:
    """Runs a command on so many ranks, shared out over network namespaces ("": this process's own). RuntimeError where one
    fails; its output goes to the terminal."""
    per_node, cores = ranks // len(nodes), sorted(os.sched_getaffinity(0))
    shares = [set(cores[i :: len(nodes)]) or set(cores) for i in range(len(nodes))]  # nodes have cores of their own
    threads = max(1, len(cores) // ranks)
    running: list[subprocess.Popen[bytes]] = []
    port = str(20_000 + (os.getpid() * 7 + int(time.time())) % 20_000)
    for rank in range(ranks):
        node, own = nodes[rank // per_node], shares[rank // per_node]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": "10.77.0.1" if node else "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "node0" if node else "lo",
            "OMP_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": "10000",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # namespaces have no names for their hosts
        }
        enter = ["ip", "netns", "exec", node] if node else []
        process = subprocess.Popen([*enter, sys.executable, *command], env=environment)
        os.sched_setaffinity(process.pid, own)
        running.append(process)
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                raise RuntimeError(f"a rank of {' '.join(command)} failed")
            time.sleep(0.1)
        if any(process.returncode for process in running):
            raise RuntimeError(f"a rank of {' '.join(command)} failed")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


# ---- plans ----------------------------------------------------------------------------------------------------------


def plans(folder: Path, most: int | None) -> tuple[list[Plan], str]:
    """Programs of all feasible plans in the folder, or of `most` spread evenly over the predicted order, and first the chosen
    one, whose name it is."""
    done = compile_spec(SPEC, path=str(folder / "spec.mlm"), until="graph")
    assert done.spec is not None and done.graph is not None
    outcome = explore(Setting(done.spec, done.graph), done.spec.plan)
    outcome.exhaust()
    found = outcome.found
    if most is not None and len(found) > most:
        found = [found[i * (len(found) - 1) // (most - 1)] for i in range(most)]
    report = SearchReport(candidates=1, feasible=1, seconds=0.0, rejected=())
    every = [_written(done.spec, done.graph, assemble.plan_of(f.place, f.candidate, report), folder) for f in found]
    chosen = _written(done.spec, done.graph, search(done.spec, done.graph), folder)
    return [chosen, *(plan for plan in every if plan.name != chosen.name)], chosen.name


def _written(spec: Spec, graph: Graph, plan: Any, folder: Path) -> Plan:
    variables = plan.plan
    stages = "/".join(map(str, variables.stages)) if len(set(variables.stages)) > 1 else ""
    name = variables.described.replace(", recompute none", "") + (f", stages {stages}" if stages else "")
    out = folder / "".join(c if c.isalnum() else "-" for c in name)
    emit(spec, graph, plan).write(out)
    return Plan(name, plan.predicted.step_time_s, out / "program.py")


# ---- a rank ---------------------------------------------------------------------------------------------------------


def step_all(listed: Path, rounds: int, steps: int, out: Path) -> None:
    """On each rank: every plan in turn, the chosen first. Rank 0 writes seconds by plan and round."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    grids: dict[Any, Any] = {}
    trainers = [_trainer(Path(program), grids) for program in json.loads(listed.read_text(encoding="utf-8"))]

    def fastest(index: int, steps: int) -> float:
        seconds: list[float] = []
        for _ in range(steps):
            dist.barrier()
            started = time.perf_counter()
            trainers[index].step()
            taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds.append(float(taken))
        return min(seconds)

    every = range(len(trainers))
    for index in every:
        fastest(index, 1)  # warms up
    times = [[fastest(index, steps)] for index in every]
    close = sorted(every, key=lambda index: (index > 0, times[index]))[: CLOSE + 1]
    for _ in range(rounds - 1):
        for index in close:
            times[index].append(fastest(index, steps))
    if dist.get_rank() == 0:
        out.write_text(json.dumps(times), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _trainer(program: Path, grids: dict[Any, Any]) -> Any:
    """Programs with the same axes share one grid of ranks, whose groups take long to make."""
    import torch

    from mlmdsl.runtime import mesh as meshes
    from mlmdsl.runtime.train import Trainer

    class Tokens:
        @property
        def batches(self) -> int:
            return 1

        def batch(self, step: int, low: int, high: int) -> dict[str, torch.Tensor]:
            rows = torch.randint(0, 256, (high - low, 65), generator=torch.Generator().manual_seed(1))
            return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program.read_text(encoding="utf-8"), str(program), "exec"), names)
    parallel = names["PARALLEL"]
    key = (parallel.pipeline, parallel.data, parallel.context, parallel.tensor, parallel.expert)
    if key not in grids:
        grids[key] = meshes.create(parallel, torch.device("cpu"))
    return Trainer(names["Stage"], names["loss"], parallel, names["TRAINING"], grids[key], Tokens())


# ---- the benchmark --------------------------------------------------------------------------------------------------


def run(ranks: int, nodes: Sequence[str], title: str, options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(prefix="mlmdsl-regret-") as name:
        folder = Path(name)
        measured, listed, out = folder / "measured.json", folder / "plans.json", folder / "times.json"
        start(ranks, nodes, ["-m", "mlmdsl.runtime.probe", str(measured)])
        text = machine_text(machine_of(json.loads(measured.read_text(encoding="utf-8"))))
        (folder / "machine.mlm").write_text(text, encoding="utf-8")
        every, chosen = plans(folder, options.most)
        print(f"{title}: {len(every)} plans; the planner's choice is {chosen}", flush=True)
        listed.write_text(json.dumps([str(plan.program) for plan in every]), encoding="utf-8")
        worker = [__file__, "--worker", str(listed), "--out", str(out)]
        start(ranks, nodes, [*worker, "--rounds", str(options.rounds), "--steps", str(options.steps)])
        return Result(title, every, chosen, json.loads(out.read_text(encoding="utf-8")))


def table(result: Result) -> str:
    """As Markdown, fastest measured first."""
    rows = sorted(zip(result.plans, map(median, result.times), strict=True), key=lambda row: row[1])
    lines = [f"## {result.title}", ""]
    lines += ["| measured rank | plan | predicted ms | measured ms |", "| --- | --- | --- | --- |"]
    for number, (plan, seconds) in enumerate(rows, 1):
        name = f"**{plan.name}** (chosen)" if plan.name == result.chosen else plan.name
        lines.append(f"| {number} | {name} | {1e3 * plan.predicted:.1f} | {1e3 * seconds:.1f} |")
    return "\n".join(lines) + "\n"


def page(results: Sequence[Result], options: argparse.Namespace) -> str:
    lines = ["# Regret: the planner's choice beside every other plan, measured", ""]
    rounds = (
        f"{options.steps} steps of each plan, and of the {CLOSE} fastest and the chosen one {options.rounds} rounds of them"
    )
    lines += [f"{len(os.sched_getaffinity(0))} cores; {rounds}. Written by `make regret`.", ""]
    lines += ["| | plans | regret | chosen, ms | best, ms |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        chosen, best = (f"{1e3 * result.seconds(name):.1f}" for name in (result.chosen, result.best))
        lines.append(f"| {result.title} | {len(result.plans)} | {result.regret:.1%} | {chosen} | {best} |")
    return "\n".join(lines) + "\n\n" + "\n".join(map(table, results))


def cases(options: argparse.Namespace) -> Iterator[Result]:
    for ranks in options.ranks:
        if "loopback" in options.links:
            yield run(ranks, [""], f"{ranks} ranks, loopback", options)
        if "throttled" in options.links:
            try:
                with namespaces() as nodes:
                    yield run(ranks, nodes, f"{ranks} ranks on 2 nodes, {RATE} between them", options)
            except RuntimeError as problem:
                print(f"{ranks} ranks, throttled: left out, {problem}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--links", nargs="+", choices=("loopback", "throttled"), default=["loopback", "throttled"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--most", type=int, help="no more plans than this, spread over the predicted order")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "regret.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return step_all(options.worker, options.rounds, options.steps, options.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ranks are ended and namespaces removed on the way out
    results: list[Result] = []
    for result in cases(options):
        results.append(result)
        options.out.write_text(page(results, options), encoding="utf-8")
        print(f"{result.title}: {len(result.plans)} plans, regret {result.regret:.1%}", flush=True)


if __name__ == "__main__":
    main()
