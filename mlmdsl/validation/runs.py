"""Measured runs, a row of a table each: what was trained, on what, how, and what was measured.

Columns that a table lacks, or leaves empty, take the usual values: one node, the sequence's own length of batch, no ZeRO, bf16,
flash attention. `Problem` says why a row cannot be read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GIB = 2**30
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8")


class Problem(Exception):
    """Why a row cannot be predicted."""


@dataclass(frozen=True)
class Run:
    """Counts are of tokens and sequences; bandwidth in bytes a second, one direction per device; None: not said."""

    id: str
    source: str
    framework: str
    year: int | None
    model: str
    arch: str  # gpt: learnt positions, LayerNorm, biases, GELU; others: rotary positions, RMSNorm, SwiGLU
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    sequence: int
    gated_mlp: bool
    tied_embeddings: bool
    experts: int
    experts_per_token: int
    moe_ffn: int
    gpu: str
    nodes: int
    gpus_per_node: int
    inter_bytes_per_second: float | None
    precision: str
    attention: str
    compiled: bool
    tensor: int
    sequence_parallel: bool
    pipeline: int
    interleave: int
    data: int
    zero: int
    context: int
    expert: int
    micro_batch: int
    global_batch: int
    recompute: str
    schedule: str
    step_seconds: float | None
    peak_bytes: float | None
    memory_kind: str
    notes: str = field(default="", compare=False)

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data


def read_runs(text: str) -> list[tuple[str, Run | Problem]]:
    """(id, run or why not) by row, in order. Raises Problem where the text is no table of runs at all."""
    table = csv.DictReader(io.StringIO(text))
    missing = [name for name in ("layers", "hidden", "heads", "gpu") if name not in (table.fieldnames or ())]
    if missing:
        raise Problem(
            f"the table has no column {missing[0]}; it wants those of measured runs: id, layers, hidden, heads, gpu, ..."
        )
    found: list[tuple[str, Run | Problem]] = []
    for number, row in enumerate(table, 1):
        name = (row.get("id") or "").strip() or f"row {number}"
        try:
            found.append((name, _run(name, _Cells(row))))
        except Problem as problem:
            found.append((name, problem))
    return found


class _Cells:
    def __init__(self, row: Mapping[str, str | None]):
        self._row = {key: (value or "").strip() for key, value in row.items() if key}

    def text(self, name: str, default: str = "") -> str:
        return self._row.get(name) or default

    def number(self, name: str, default: float | None = None) -> float | None:
        text = self.text(name)
        if not text:
            return default
        try:
            return float(text)
        except ValueError:
            raise Problem(f"{name} is {text!r}, which is no number") from None

    def count(self, name: str, default: int | None = None) -> int:
        value = self.number(name)
        if value is None:
            if default is None:
                raise Problem(f"{name} is missing")
            return default
        if value != int(value) or value < 0:
            raise Problem(f"{name} is {value:g}, which is no count")
        return int(value)

    def one_of(self, name: str, words: Sequence[str], default: str) -> str:
        text = self.text(name, default).lower()
        if text not in words:
            raise Problem(f"{name} is {text!r}, not one of {', '.join(words)}")
        return text

    def flag(self, name: str, default: bool = False) -> bool:
        return self.text(name, str(int(default))).lower() in ("1", "true", "yes")


def _run(name: str, cells: _Cells) -> Run:
    heads, hidden, sequence = cells.count("heads"), cells.count("hidden"), cells.count("sequence", 2048)
    arch, per_node = cells.text("arch"), cells.count("gpus_per_node", 8)
    nodes, experts = cells.count("nodes", 1), cells.count("experts", 0)
    gated = cells.flag("gated_mlp", arch != "gpt")
    degrees = {axis: max(1, cells.count(axis, 1)) for axis in ("tensor", "pipeline", "context", "expert")}
    inner = degrees["tensor"] * degrees["pipeline"] * degrees["context"]
    data = max(1, cells.count("data", max(1, nodes * per_node // inner)))
    micro_batch = max(1, cells.count("micro_batch", 1))
    batch = cells.count("global_batch", micro_batch * data)
    gbps = cells.number("inter_node_gbps_per_gpu")
    peak, rate = cells.number("peak_memory_gib"), cells.number("tokens_per_s_per_gpu")
    seconds = cells.number("step_time_s")
    world = inner * data
    if seconds is None and rate:
        seconds = batch * sequence / (rate * world)
    return Run(
        id=name,
        source=cells.text("source", "unknown"),
        framework=cells.text("framework"),
        year=cells.count("year", 0) or None,
        model=cells.text("model"),
        arch=arch,
        layers=cells.count("layers"),
        hidden=hidden,
        ffn=cells.count("ffn", 4 * hidden if not gated else round(8 * hidden / 3)),
        heads=heads,
        kv_heads=cells.count("kv_heads", heads),
        vocab=cells.count("vocab", 50257),
        sequence=sequence,
        gated_mlp=gated,
        tied_embeddings=cells.flag("tied_embeddings", arch == "gpt"),
        experts=experts,
        experts_per_token=cells.count("experts_per_token", 2 if experts else 0),
        moe_ffn=cells.count("moe_ffn", 0),
        gpu=cells.text("gpu"),
        nodes=nodes,
        gpus_per_node=per_node,
        inter_bytes_per_second=None if gbps is None else gbps * 1e9 / 8,
        precision=cells.one_of("precision", PRECISIONS, "bf16"),
        attention=cells.one_of("attention", ("flash", "unfused"), "flash"),
        compiled=cells.flag("compiled"),
        sequence_parallel=cells.flag("sequence_parallel"),
        data=data,
        interleave=max(1, cells.count("interleave", 1)),
        zero=cells.count("zero", 0),
        micro_batch=micro_batch,
        global_batch=batch,
        recompute=cells.text("recompute", "none"),
        schedule=cells.text("schedule"),
        step_seconds=seconds,
        peak_bytes=None if peak is None else peak * GIB,
        memory_kind=cells.text("memory_kind"),
        notes=cells.text("notes"),
        **degrees,
    )
