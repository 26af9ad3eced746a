"""The plan: frozen, serialisable, complete. The emitted program executes exactly what stands here.

Sizes are bytes per rank; times are seconds. `Collective.bytes` is the size of the larger side of one call's local buffer (an
all_gather's output, a reduce_scatter's input, an all_reduce's tensor).
"""

from __future__ import annotations

from typing import Literal

from mlmdsl.grammar.spec import Frozen

CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "recv", "split"]
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b"]
Recompute = Literal["none", "selective", "full"]


class PlanVariables(Frozen):
    """The names of language.md. `stages` has one entry per virtual stage in model order: pipeline * interleave of them."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    pipeline: int = 1
    interleave: int = 1
    schedule: Schedule = "1f1b"
    data: int = 1
    replicate: int = 1
    zero: int = 0
    expert: int = 1
    micro_batch: int = 1
    recompute: Recompute = "none"
    stages: tuple[int, ...]

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data


class Transition(Frozen):
    """A value changes its placement on the tensor axis, once, for all `consumers` that ask for `target`.

    forward and backward name the collectives ("split": a local slice; None: nothing to do). `dim` is the dim that is gathered,
    scattered or split; for an all_to_all `dim` is the one split in the source and `target_dim` the one split after."""

    value: str
    source: str
    target: str
    consumers: tuple[str, ...]
    forward: CollectiveKind | None
    backward: CollectiveKind | None
    dim: int | None = None
    target_dim: int | None = None
    bytes: int = 0  # per micro-batch and pass
    reason: str = ""


class NodeLayout(Frozen):
    """The strategy chosen for one node; placements as `str(Placement)` and `str(WeightPlacement)`."""

    path: str
    strategy: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    output: str


class RegionLayout(Frozen):
    """One region of the graph, in the graph's order, on the tensor axis. `boundary` is the placement of the carried (and
    stage-to-stage) values by path."""

    region: str
    nodes: tuple[NodeLayout, ...]
    transitions: tuple[Transition, ...]
    boundary: dict[str, str]


class Collective(Frozen):
    """Calls that a rank of `stage` makes in one step: all alike in kind, axis and size."""

    stage: int  # pipeline rank
    kind: CollectiveKind
    axis: Literal["tensor", "pipeline", "data", "world"]
    bytes: int
    count: int
    reason: str


class StageMemory(Frozen):
    """The ledger of the fullest rank of one pipeline stage at its peak."""

    stage: int
    weights_bytes: int
    master_weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_and_loss_bytes: int
    unsharded_weights_bytes: int  # ZeRO 3: what is gathered at the peak
    buffers_bytes: int  # collectives, pipeline sends and receives
    workspace_bytes: int  # transient of one operation, allocator slack
    context_bytes: int  # device context, libraries
    total_bytes: int


class Predicted(Frozen):
    """`model_tflops_per_device` and `mfu` count matrix products only, causal attention half; mfu divides by the device's dense
    datasheet peak in the training precision."""

    step_time_s: float
    tokens_per_s_per_device: float
    model_tflops_per_device: float
    mfu: float
    bubble_fraction: float
    peak_memory_bytes: tuple[int, ...]  # by pipeline stage
    train_days: float
    cost_usd: float | None
    energy_kwh: float
    breakdown_s: dict[
        str, float
    ]  # parts of the step of the slowest rank: compute, recompute, tensor, pipeline, data, optimizer, bubble


class ModelFacts(Frozen):
    name: str
    parameters: int
    parameters_active: int
    flops_per_token: float


class Rejection(Frozen):
    """Why candidates fell out: a true reason, how many, and the closest one with what would make it fit."""

    reason: str  # "memory", "heads", "layers", "batch", "pin", "require", "forbid", "slower", ...
    count: int
    closest: str


class SearchReport(Frozen):
    candidates: int
    feasible: int
    seconds: float
    rejected: tuple[Rejection, ...]


class Alternative(Frozen):
    plan: PlanVariables
    predicted: Predicted


class SoftConstraint(Frozen):
    """A `prefer` or `avoid` that the plan breaks or keeps, with its price against the plan without it."""

    text: str
    kept: bool
    price_s: float


class ClusterFacts(Frozen):
    name: str
    device: str
    device_memory_bytes: int
    peak_flops_per_second: float  # of one device in the training precision
    nodes: int
    devices_per_node: int
    world_size: int
    links: dict[str, dict[str, float | str]]  # axis -> {"link": "nvlink", "bytes_per_second": ..., "latency_seconds": ...}


class Plan(Frozen):
    version: int = 1
    spec: str = "spec.mlm"  # where the spec lies, relative to the plan's file
    spec_sha256: str
    overrides: tuple[str, ...] = ()  # the `--set`s that were in force
    plan: PlanVariables
    predicted: Predicted
    model: ModelFacts
    cluster: ClusterFacts
    search: SearchReport
    alternatives: tuple[Alternative, ...]
    soft: tuple[SoftConstraint, ...] = ()
    notes: tuple[str, ...] = ()  # warnings in plain words
    seq_len: int
    batch: int
    precision: str
    memory: tuple[StageMemory, ...]
    layout: tuple[RegionLayout, ...]
    collectives: tuple[Collective, ...]
    timeline: tuple[dict[str, float | int | str], ...] = ()

    def to_json(self) -> str:
        """Stable text: the same spec gives the same bytes, apart from `search.seconds` (left out of saved plans: 0)."""
        return self.model_dump_json(indent=1) + "\n"
