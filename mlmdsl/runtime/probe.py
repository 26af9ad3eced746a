"""Measures what the ranks of a machine do at the same time: kernels, links, memory. The figures go to a JSON file, from which
planner/machine.py makes a device and a cluster.

Every kernel runs on all ranks at once from a barrier on, a number of times; its time is what the last rank takes, by call,
since ranks that share cores wait for each other. Of several such windows the fastest counts: what else the machine does only
lengthens them.
Collectives are taken over all ranks of a node, over pairs side by side and, with several nodes, across them (as many groups
at once as a node has ranks), so that groups share the links as they do in training.

    python -m mlmdsl.runtime.probe FILE [--seconds 0.04] [--windows 2] [--small]     under torchrun, or as one process
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mlmdsl.runtime import collectives
from mlmdsl.runtime.launch import place_in_node
from mlmdsl.runtime.mesh import Axis

Row = tuple[str, int, int, int, int, float]  # kind, a, b, c, d, milliseconds: as planner/fitting.py reads them
Call = Callable[[], object]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MESSAGES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22)  # bytes, of the larger side
_LONG_MESSAGES = (1 << 24, 1 << 26, 1 << 28)  # on GPUs
_CHAIN = 50  # kernels in a row, for the launch


@dataclass(frozen=True)
class Clock:
    """Windows of `seconds` each; `device` is waited for."""

    device: torch.device
    seconds: float
    windows: int

    def each(self, call: Call) -> float:
        """Seconds of one call while all ranks make theirs: until the last rank is done, in the fastest window."""
        call()
        self._wait()
        once = self._over_ranks(min(self._window(call, 1) for _ in range(3)), dist.ReduceOp.MIN)
        calls = max(1, int(self.seconds / max(1e-7, once)))
        return min(self._over_ranks(self._window(call, calls), dist.ReduceOp.MAX) for _ in range(self.windows)) / calls

    def _window(self, call: Call, calls: int) -> float:
        _barrier()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _over_ranks(self, value: float, op: Any) -> float:
        if not dist.is_initialized():
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op)
        return float(shared)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---- kernels --------------------------------------------------------------------------------------------------------


def kernels(clock: Clock, small: bool) -> list[Row]:
    """Rows of matrix products, attention, copies, additions, the optimizer and launches."""
    return [row for rows in (_products, _attention, _streams, _launches) for row in rows(clock, small)]


def precisions(device: torch.device) -> tuple[str, ...]:
    """Those in which products are measured; a GPU's fp32 comes last, since it is slow."""
    return ("fp32", "bf16") if device.type == "cpu" else ("bf16", "fp16", "fp32")


def _products(clock: Clock, small: bool) -> Iterator[Row]:
    for precision in precisions(clock.device)[: 1 if small else None]:
        for m, k, n in _product_shapes(clock.device, small):
            if clock.device.type == "cpu" and precision != "fp32" and min(k, n) < 256:
                continue  # the precision's peak is all that is taken from these
            x, w = (_random(clock.device, _DTYPES[precision], *shape) for shape in ((m, k), (n, k)))
            yield f"matmul_{precision}", m, k, n, 0, 1e3 * clock.each(lambda: F.linear(x, w))  # noqa: B023 - called here


def _product_shapes(device: torch.device, small: bool) -> list[tuple[int, int, int]]:
    """Tokens x inner x outer, of narrow and wide layers, up and down."""
    if device.type == "cpu":
        tokens, widths = (128, 1024), (64, 128, 256, 512)
    else:
        tokens, widths = (1024, 4096, 16384), (768, 1024, 2048, 4096, 8192)
    if small:
        tokens, widths = tokens[:2], widths[:2]
    return [(m, k, n) for m in tokens for d in widths for k, n in ((d, d), (d, 4 * d), (4 * d, d))]


def _attention(clock: Clock, small: bool) -> Iterator[Row]:
    cpu = clock.device.type == "cpu"
    shapes = [(8, 4, 64, 32), (2, 4, 128, 32), (4, 4, 256, 64), (1, 8, 512, 64)] if cpu else _LONG_ATTENTION
    dtype = torch.float32 if cpu else torch.bfloat16
    for b, h, s, d in shapes[:2] if small else shapes:
        q, k, v = (_random(clock.device, dtype, b, h, s, d).requires_grad_() for _ in range(3))
        gradient = torch.ones_like(q)

        def forward() -> object:
            with torch.no_grad():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: B023

        def both() -> object:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: B023
            return torch.autograd.grad(out, (q, k, v), gradient)  # noqa: B023

        yield "sdpa_causal_fwd", b, h, s, d, 1e3 * clock.each(forward)
        yield "sdpa_causal_fwdbwd", b, h, s, d, 1e3 * clock.each(both)


_LONG_ATTENTION = [
    (8, 12, 1024, 64),
    (2, 16, 2048, 64),
    (1, 32, 2048, 128),
    (1, 32, 4096, 128),
    (4, 32, 4096, 128),
    (1, 16, 8192, 128),
]


def _streams(clock: Clock, small: bool) -> Iterator[Row]:
    cpu = clock.device.type == "cpu"
    dtype, suffix = (torch.float32, "fp32") if cpu else (torch.bfloat16, "bf16")
    sizes = [1 << 16, 1 << 20, 1 << 23] if cpu else [1 << 20, 1 << 24, 1 << 26, 1 << 28]
    for n in sizes[:2] if small else sizes:
        x, y, z = (_random(clock.device, dtype, n) for _ in range(3))
        yield f"copy_{suffix}", n, 0, 0, 0, 1e3 * clock.each(lambda: z.copy_(x))  # noqa: B023
        yield f"add_{suffix}", n, 0, 0, 0, 1e3 * clock.each(lambda: torch.add(x, y, out=z))  # noqa: B023
    for n in (sizes[0], sizes[1]) if small else (1 << 18, 1 << 22) if cpu else (1 << 22, 1 << 26):
        weight = torch.nn.Parameter(_random(clock.device, torch.float32, n))
        weight.grad = torch.ones_like(weight)
        yield "adamw_fused_fp32", n, 0, 0, 0, 1e3 * clock.each(torch.optim.AdamW([weight], fused=True).step)


def _launches(clock: Clock, small: bool) -> Iterator[Row]:
    """Of one kernel, forward and backward alike: a chain of tiny ones with gradients."""
    x = _random(clock.device, torch.float32, 16).requires_grad_()

    def chain() -> object:
        y = x
        for _ in range(_CHAIN):
            y = y * 1.01
        return torch.autograd.grad(y.sum(), x)

    yield "launch_us", 1, 0, 0, 0, 1e3 * clock.each(chain) / (2 * _CHAIN)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


# ---- links ----------------------------------------------------------------------------------------------------------


def links(clock: Clock, per_node: int, small: bool) -> list[dict[str, Any]]:
    """One entry per collective, message size and kind of group: kind, bytes of the larger side, ranks, how many of them on a
    node, seconds."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    messages: Iterable[int] = _MESSAGES[1::2] if small else _MESSAGES
    if clock.device.type == "cuda" and not small:
        messages = (*messages, *_LONG_MESSAGES)
    found: list[dict[str, Any]] = []
    for members, local in _groupings(world, per_node):
        mine = _my_group(members)
        for size in messages:
            for kind, call in _collectives(mine, size, clock.device):
                seconds = clock.each(call)
                found.append({"kind": kind, "bytes": size, "ranks": len(members[0]), "per_node": local, "seconds": seconds})
    return found


def _groupings(world: int, per_node: int) -> list[tuple[list[list[int]], int]]:
    """Partitions of the ranks into groups, and the ranks of a node in each."""
    ranks = list(range(world))
    nodes = [ranks[i : i + per_node] for i in range(0, world, per_node)]
    found = [(nodes, per_node)] if per_node > 1 else []
    if per_node > 2 and per_node % 2 == 0:
        found.append(([node[i : i + 2] for node in nodes for i in range(0, per_node, 2)], 2))
    if len(nodes) > 1:
        found.append(([ranks[i::per_node] for i in range(per_node)], 1))
        if per_node > 1:
            found.append(([ranks], per_node))
    return found


def _my_group(groups: list[list[int]]) -> dist.ProcessGroup:
    made = [dist.new_group(members) for members in groups]
    return next(group for group, members in zip(made, groups, strict=True) if dist.get_rank() in members)


def _collectives(group: dist.ProcessGroup, size: int, device: torch.device) -> Iterator[tuple[str, Call]]:
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    elements = max(n, size // 4 // n * n)
    whole = torch.ones(elements, device=device)
    part = torch.ones(elements // n, device=device)
    axis = Axis("probed", n, rank, group.group_name)
    yield "all_reduce", lambda: collectives.reduced(whole, axis)
    yield "all_gather", lambda: collectives.gathered(part, axis, 0)
    yield "reduce_scatter", lambda: collectives.scattered(whole, axis, 0)
    after, before = (dist.get_global_rank(group, (rank + step) % n) for step in (1, -1))
    received = torch.empty_like(whole)

    def around() -> None:
        sent = [dist.P2POp(dist.isend, whole, after, group), dist.P2POp(dist.irecv, received, before, group)]
        for work in dist.batch_isend_irecv(sent):
            work.wait()

    yield "send", around


# ---- the process ----------------------------------------------------------------------------------------------------


def measure(seconds: float, windows: int, small: bool) -> dict[str, Any]:
    """Everything, on this rank and the others of the default process group (or alone)."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    place = place_in_node()
    per_node = place.local_world_size if place else 1
    clock = Clock(device, seconds, windows)
    return {
        "kind": "cpu" if device.type == "cpu" else "rocm" if torch.version.hip else "cuda",
        "name": _name(device),
        "torch": torch.__version__,
        "per_node": per_node,
        "nodes": (dist.get_world_size() if dist.is_initialized() else 1) // per_node,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(device, per_node),
        "precisions": list(precisions(device)[: 1 if small else None]),
        "kernels": kernels(clock, small),
        "links": links(clock, per_node, small),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory_bytes(device: torch.device, per_node: int) -> int:
    """Of one rank: a GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--seconds", type=float, default=0.04, help="of one window")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="few shapes, one precision")
    options = parser.parse_args()
    place = place_in_node()
    if place is not None:
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = measure(options.seconds, options.windows, options.small)
    if place is None or dist.get_rank() == 0:
        Path(options.file).write_text(json.dumps(found), encoding="utf-8")
    if dist.is_initialized():
        _barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
