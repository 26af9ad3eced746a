"""The plan: frozen, serialisable, complete. The emitted program executes exactly what stands here.

Sizes are bytes per rank; times are seconds. `Collective.bytes` is the size of the larger side of one call's local buffer (an
all_gather's output, a reduce_scatter's input, an all_reduce's tensor).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, replace
from typing import ClassVar, Literal, get_args

from mlmdsl.diagnostics import Diagnostic, PlanError
from mlmdsl.frozen import frozen
from mlmdsl.grammar.constraints import USUAL, Order
from mlmdsl.grammar.spec import Spec
from mlmdsl.planner.mesh import Mesh

CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "recv", "split"]
# As mesh.py has them
CollectiveAxis = Literal[
    "tensor", "context", "pipeline", "data", "replicas", "shards", "replicate", "expert", "copies", "world"
]
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zb_v", "dualpipe_v"]
Recompute = Literal["none", "selective", "full"]


@frozen
class PlanVariables:
    """The names of language.md. `stages` has one entry per virtual stage in model order: pipeline * interleave of them.
    `recompute` is one word, or one for each layer where they differ."""

    _: KW_ONLY
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
    recompute: Recompute | tuple[Recompute, ...] = "none"
    stages: tuple[int, ...]
    order: Order = USUAL

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def described(self) -> str:
        """`tensor 8 x pipeline 4 x data 8, 1f1b, ZeRO 1, micro-batch 1, recompute selective`; degrees of one are left out."""
        sizes = (("tensor", self.tensor), ("context", self.context), ("pipeline", self.pipeline), ("data", self.data))
        degrees = [f"{name} {size}" for name, size in sizes if size > 1] or ["one device"]
        parts = [" x ".join(degrees)]
        if self.order != USUAL:
            parts.append(f"{self.order.partition('_')[0]} outermost")
        if self.tensor > 1 and self.sequence_parallel:
            parts.append("sequence parallel")
        if self.pipeline > 1:
            parts.append(self.schedule + (f" x {self.interleave}" if self.schedule == "interleaved_1f1b" else ""))
        if self.expert > 1:
            parts.append(f"expert {self.expert}")
        if self.data * self.context > 1:
            parts.append(f"ZeRO {self.zero}" + (f" x {self.replicate}" if self.replicate > 1 else ""))
        return ", ".join([*parts, f"micro-batch {self.micro_batch}", f"recompute {self.recomputed}"])

    def mesh(self, devices_per_node: int) -> Mesh:
        """The grid of ranks."""
        degrees = (self.tensor, self.data, self.pipeline)
        return Mesh(*degrees, devices_per_node, self.context, self.expert, self.replicate, self.order)

    @property
    def recomputed(self) -> str:
        """`full`, or `full of 3 layers, selective of 37 layers`."""
        if isinstance(self.recompute, str):
            return self.recompute
        counts = ((mode, self.recompute.count(mode)) for mode in reversed(get_args(Recompute)))
        return ", ".join(f"{mode} of {count} layer{'s' * (count > 1)}" for mode, count in counts if count)


@frozen
class Transition:
    """A value changes its placement on one axis, once, for all `consumers` that ask for `target`.

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


@frozen
class NodeLayout:
    """The strategy chosen for one node; placements as `str(Placement)` and `str(WeightPlacement)`."""

    path: str
    strategy: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    output: str


@frozen
class RegionLayout:
    """One region of the graph, in the graph's order, on one axis. `boundary` is the placement of the carried (and
    stage-to-stage) values by path."""

    region: str
    nodes: tuple[NodeLayout, ...]
    transitions: tuple[Transition, ...]
    boundary: dict[str, str]


@frozen
class Collective:
    """Calls that a rank of `stage` makes in one step: all alike in kind, axis and size."""

    stage: int  # pipeline rank
    kind: CollectiveKind
    axis: CollectiveAxis
    bytes: int
    count: int
    reason: str


@frozen
class StageMemory:
    """The ledger of the fullest rank of one pipeline stage at its peak: at the moment when it holds the most (moments.py)."""

    _: KW_ONLY
    stage: int
    moment: str = ""
    weights_bytes: int
    master_weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_and_loss_bytes: int
    unsharded_weights_bytes: int  # ZeRO 3: what is gathered then
    buffers_bytes: int  # collectives, pipeline sends and receives
    workspace_bytes: int  # transient of one operation, allocator slack
    slack_bytes: int = 0  # the allocator's part of workspace
    context_bytes: int  # device context, libraries
    total_bytes: int


@frozen
class Predicted:
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
    ]  # of the busiest rank: compute, recompute, tensor, context, expert, pipeline, data, optimizer, bubble


@frozen
class ModelFacts:
    name: str
    parameters: int
    parameters_active: int
    flops_per_token: float


@frozen
class Rejection:
    """Why candidates fell out: a true reason, how many, and the closest one with what would make it fit."""

    reason: str  # "memory", "heads", "layers", "batch", "pin", "require", "forbid", "slower", ...
    count: int
    closest: str


@frozen
class SearchReport:
    """Every candidate is found to fit (`feasible`), rejected (`bounded` of these by a bound on memory), or `outpaced`: a bound
    on time proves it to be slower than the plan and its runners-up, so that nobody asks whether it fits."""

    _: KW_ONLY
    candidates: int
    feasible: int
    bounded: int = 0
    outpaced: int = 0
    seconds: float
    rejected: tuple[Rejection, ...]


@frozen
class Alternative:
    plan: PlanVariables
    predicted: Predicted


@frozen
class SoftConstraint:
    """A `prefer` or `avoid` that the plan keeps or breaks. price_s: seconds of a step that keeping it costs against the best
    plan without it; None where no plan that fits keeps it."""

    text: str
    kept: bool
    price_s: float | None


@frozen
class StageTime:
    """One pipeline stage in a step: `starts_s` is when its first forward pass can start; forward and backward passes are those
    of one micro-batch through all of the rank's virtual stages, sends and recomputation included; idle_s counts from the first
    forward pass of any stage to the last backward pass."""

    stage: int
    layers: int
    starts_s: float
    forward_s: float
    backward_s: float
    busy_s: float
    idle_s: float
    in_flight: int  # micro-batches held at once, over the virtual stages


@frozen
class PoolFacts:
    """Alike nodes of a cluster of several pools: their ranks from `first_rank` on, and the pipeline stages that lie on them, as
    a whole or in part."""

    name: str
    device: str
    device_memory_bytes: int
    peak_flops_per_second: float  # of one device in the training precision
    nodes: int
    devices_per_node: int
    first_rank: int
    stages: tuple[int, ...]


@frozen
class ClusterFacts:
    """Of a cluster of several pools `device_memory_bytes` is the least of all, `peak_flops_per_second` the mean of devices (so
    that MFU is a share of the sum of all peaks), and `devices_per_node` how many ranks in a row share a node everywhere."""

    name: str
    device: str
    device_memory_bytes: int
    peak_flops_per_second: float  # of one device in the training precision
    nodes: int
    devices_per_node: int
    world_size: int
    links: dict[str, dict[str, float | str]]  # axis -> {"link": "nvlink", "bytes_per_second": ..., "latency_seconds": ...}
    pools: tuple[PoolFacts, ...] = ()  # where there are several

    @property
    def torchrun(self) -> str:
        """How each node of several pools starts its processes: their ranks follow the number of the node, pool by pool."""
        sizes = {pool.devices_per_node for pool in self.pools}
        each = sizes.pop() if len(sizes) == 1 else "gpu"
        return f"--nnodes {self.nodes} --node-rank NODE --nproc-per-node {each} --master-addr HOST"

    def pools_of(self, stage: int) -> tuple[PoolFacts, ...]:
        """Of several pools those that a stage lies on."""
        return tuple(pool for pool in self.pools if stage in pool.stages)

    def memory_of(self, stage: int) -> int:
        """Bytes of a stage's device; of unlike ones the least."""
        return min((pool.device_memory_bytes for pool in self.pools_of(stage)), default=self.device_memory_bytes)


@frozen
class Plan:
    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}  # of all that it consists of, when it is read

    _: KW_ONLY
    version: int = 1
    spec: str = "spec.mlm"  # where the spec lies, relative to the plan's file
    spec_sha256: str
    folder: str | None = None  # where relative paths of data start; None: beside the spec
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
    tensors: tuple[StageMemory, ...] = ()  # likewise, at the moment when tensors alone are the most, which `verify` measures
    layout: tuple[RegionLayout, ...]  # on the tensor axis
    context_layout: tuple[RegionLayout, ...] = ()  # on the context axis, where that has several ranks
    collectives: tuple[Collective, ...]
    flops: tuple[
        float, ...
    ] = ()  # by pipeline stage: of matrix products and attention on one rank in one step, recomputed ones too
    timeline: tuple[StageTime, ...] = ()

    def to_json(self) -> str:
        """Stable text: the same spec gives the same bytes, apart from `search.seconds`."""
        from mlmdsl.serialization import to_json

        return to_json(self) + "\n"

    def saved(self) -> Plan:
        """As it is written to a file: without what differs from one search to the next."""
        return replace(self, search=replace(self.search, seconds=0.0))


def load_plan(text: str, path: str = "plan.json") -> Plan:
    """A saved plan. Raises PlanError: MLM0620 where the text is none, MLM0621 where it is of another version."""
    from mlmdsl.serialization import Mismatch, from_json

    try:
        version = json.loads(text).get("version")
        if version != Plan.version:
            raise _unreadable("MLM0621", f"{path} is a plan of version {version}", "make it again: mlmdsl plan SPEC -o PLAN")
        return from_json(Plan, text)
    except Mismatch as problem:
        raise _unreadable("MLM0620", f"{path} is not a saved plan: {problem}") from None
    except (ValueError, AttributeError):  # not JSON, or no object
        raise _unreadable("MLM0620", f"{path} is not a saved plan: it is not a JSON object") from None


def _unreadable(code: str, message: str, help: str = "write one with `mlmdsl plan SPEC -o PLAN`") -> PlanError:
    return PlanError([Diagnostic(code, message, help=help)])


def verify_spec(plan: Plan, spec: Spec) -> None:
    """A saved plan belongs to one text: raises PlanError (MLM0630) where the spec has changed since."""
    if plan.spec_sha256 != spec.sha256:
        message = f"{spec.path} has changed since the plan was made (it or a file that it imports)"
        raise PlanError([Diagnostic("MLM0630", message, help="plan again, or take the spec that the plan was made from")])
