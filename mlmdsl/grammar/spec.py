"""What a user described, resolved: every name looked up, every quantity in SI units, every setting checked.

Bytes are bytes, seconds are seconds, bandwidths are bytes per second in one direction per device; counts of tokens and
sequences are plain ints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY
from typing import Literal

from mlmdsl.diagnostics import Span
from mlmdsl.frozen import frozen
from mlmdsl.grammar import syntax
from mlmdsl.runtime import config

Precision = Literal["fp32", "bf16"]


# ---- the cluster ----------------------------------------------------------------------------------------------------


@frozen
class Device:
    """One accelerator. `peak_flops_per_second` by precision ("fp32", "tf32", "fp16", "bf16", "fp8"), dense (datasheet)."""

    _: KW_ONLY
    name: str
    kind: Literal["cuda", "rocm", "cpu"]
    memory_bytes: int
    memory_bytes_per_second: float
    peak_flops_per_second: dict[str, float]
    launch_seconds: float  # host time to launch one kernel, eager
    cores: float | None = None  # of a CPU, while all devices of the node are busy: below one they share them; None: not said
    power_watts: float
    curves: dict[str, dict[str, float]] | None = None  # measured: by part and parameter of planner/compute.py's curves


@frozen
class Link:
    """One level of the network: what one device can send in one direction while the others do the same."""

    kind: str  # "nvlink", "pcie", "infinity_fabric", "infiniband", "ethernet", "shm", "loopback"
    bytes_per_second: float
    latency_seconds: float
    oversubscription: float = 1.0


@frozen
class Pool:
    """Alike nodes."""

    name: str
    nodes: int
    devices_per_node: int
    device: Device
    intra: Link


@frozen
class Operation:
    """How a cluster is run. Defaults: a failure per device in 50,677 hours (419 in 54 days of 16,384 H100) and 1 GB/s of
    storage a node (2 TB/s sustained for 2,000 nodes), both of arXiv:2407.21783, section 3.3; ten minutes to find a failure and
    start again (arXiv:2402.15627); PUE 1.2 (BLOOM's, arXiv:2211.02001); 0.445 kg of CO2 a kWh, the world's mean in 2024 (IEA,
    Electricity 2025)."""

    mtbf_seconds: float = 50_677 * 3600.0  # of one device
    storage_bytes_per_second: float = 1e9  # of checkpoints, per node
    restart_seconds: float = 600.0
    pue: float = 1.2  # energy of the building per energy of the devices
    kg_per_kwh: float = 0.445


@frozen
class Cluster:
    _: KW_ONLY
    name: str
    pools: tuple[Pool, ...]  # one, unless the text has `pool` blocks
    inter: Link | None  # None on a single node
    usd_per_device_hour: float | None = None
    usd_per_kwh: float | None = None
    operation: Operation = Operation()
    span: Span

    @property
    def world_size(self) -> int:
        return sum(p.nodes * p.devices_per_node for p in self.pools)


# ---- training -------------------------------------------------------------------------------------------------------


@frozen
class Data:
    """`paths` are absolute patterns (resolved against the spec's folder); for "python" they are module names."""

    kind: Literal["text", "jsonl", "parquet", "python", "python_source", "pairs", "conversations"]
    paths: tuple[str, ...]
    field: str | None = None  # of jsonl and parquet that of the text, of conversations that of the messages
    source: str | None = None  # fields of pairs
    target: str | None = None
    validation: float = 0.05  # share of the token stream held out at its end


@frozen
class Tokenizer:
    kind: Literal["bytes", "hf"]
    path: str | None = None
    vocab: int | None = None  # bytes: 256 (+ end of text where asked for); hf: read from the file when training starts


@frozen
class Objective:
    """As runtime/config.py's, which says what each feeds."""

    kind: Literal["next_token", "masked_token", "span_corruption", "seq2seq", "chat"]
    probability: float = 0.15
    density: float = 0.15
    mean_length: float = 3.0
    target: int | None = None

    @property
    def feeds(self) -> config.Objective:
        return config.Objective(self.kind, self.probability, self.density, self.mean_length, self.target)


@frozen
class Optimizer:
    kind: Literal["adamw"]
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0


@frozen
class LearningRateSchedule:
    kind: Literal["constant", "linear", "cosine"]
    warmup_steps: int = 0
    min_lr: float = 0.0


@frozen
class Train:
    _: KW_ONLY
    data: Data
    tokenizer: Tokenizer
    objective: Objective
    documents: Literal["joined", "separate"] = "joined"  # of one row: whether attention crosses from one to another
    seq_len: int  # tokens
    batch: int  # sequences
    steps: int
    optimizer: Optimizer
    schedule: LearningRateSchedule
    precision: Precision
    seed: int = 0
    validate_every: int | None = None  # steps; None: at the end only
    validation_batches: int = 8
    checkpoint_every: int | None = None  # steps; None: at the end only
    spans: dict[str, Span]  # where each setting was written, for diagnostics


# ---- constraints on the plan ----------------------------------------------------------------------------------------

PlanValue = int | bool | str | tuple[int, ...] | tuple[str, ...]


@frozen
class Pin:
    variable: str
    value: PlanValue
    text: str
    span: Span


@frozen
class Rule:
    """`condition` is boolean over plan variables and `memory`, `device.memory`, `step_time`, `bubble`, `cost`, and the
    facts `<axis>.crosses_nodes`."""

    form: Literal["require", "prefer", "avoid", "forbid"]
    condition: syntax.Expr
    text: str
    span: Span


@frozen
class PlanConstraints:
    minimize: Literal["time", "cost", "memory"] = "time"
    pins: tuple[Pin, ...] = ()
    rules: tuple[Rule, ...] = ()


# ---- all of it ------------------------------------------------------------------------------------------------------


@frozen
class ModelSource:
    """The model as text still: its shapes are checked when the graph is built. `values` holds the consts and params in force
    (after `--set`) by name; `blocks` every block by its qualified name, with the values of the file it was written in; `names`
    those that the model can call, by the names it calls them by."""

    model: syntax.Model
    values: dict[str, object]
    blocks: Mapping[str, BlockSource]
    names: dict[str, str]


@frozen
class BlockSource:
    block: syntax.Block
    values: dict[str, object]
    blocks: dict[str, str]  # names as written inside this block's file -> keys of ModelSource.blocks
    qualified: str  # "std/attention.mlm:Attention"


@frozen
class Spec:
    """`sources` maps each file read to its text; `sha256` is over the entry file, its imports (not std) and the overrides.
    `folder` is where relative paths of data and tokenizer start."""

    path: str
    folder: str
    sources: dict[str, str]
    sha256: str
    overrides: tuple[str, ...]
    model: ModelSource
    cluster: Cluster
    train: Train
    plan: PlanConstraints


def fingerprint(texts: Iterable[str], overrides: Iterable[str]) -> str:
    """`Spec.sha256` of the files read, in the order of reading."""
    return hashlib.sha256("\0".join([*texts, *overrides]).encode("utf-8", "surrogatepass")).hexdigest()
