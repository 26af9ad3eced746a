"""What an emitted program tells the runtime: plain frozen values, no torch.

They appear literally in `program.py`, so that the settings of a run can be read and changed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mlmdsl.frozen import frozen

QUERY_BLOCK = 256  # queries whose scores are in memory at one time where attention is computed without a fused kernel


def even_dim(shape: Sequence[int], ranks: int) -> int:
    """Along which dim ZeRO cuts a rank's local weight over the ranks that share it out: the first that they divide, or dim 0 in
    chunks of ceil(rows / ranks), whose last ones FSDP2 pads."""
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def cut_over_copies(shape: Sequence[int], copies: int) -> bool:
    """Whether ZeRO cuts a rank's local stack of experts along dim 1 over the ranks that have the same ones: where that is
    even."""
    return copies > 1 and len(shape) > 1 and shape[1] % copies == 0


@frozen
class Parallel:
    """The plan's variables as executed. Ranks lie in a grid whose axes `order` names, the outermost first.

    `stages` gives layers per virtual stage in model order, pipeline * interleave of them. Ranks of data and context hold the
    same weights: zero 0: gradients all-reduced over them; 1: optimizer state sharded; 2: gradients sharded too; 3: weights too
    (FSDP2); but of experts `expert` neighbours among them hold one set together, and ZeRO shards the optimizer state of each
    set's copies. Of the rest every weight is sharded `replicate` times, over as many groups of neighbours, and gradients are
    all-reduced over these (hybrid sharding, arXiv:2304.11277, section 3.2.2)."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    interleave: int = 1
    schedule: str = "1f1b"  # gpipe, 1f1b, interleaved_1f1b, zb_v, dualpipe_v
    stages: tuple[int, ...] = (0,)
    zero: int = 0
    replicate: int = 1
    micro_batch: int = 1
    recompute: str | tuple[str, ...] = "none"  # none, selective, full; or one of them for each layer
    order: str = "pipeline_data_context_tensor"  # or data_pipeline_context_tensor

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @cached_property
    def grid(self) -> list[list[list[int]]]:
        """Ranks by pipeline rank, tensor rank and place among the replicas, which are the ranks of data with those of context
        next to each other."""
        stride: dict[str, int] = {}
        size = 1
        for axis in reversed(self.order.split("_")):
            stride[axis], size = size, size * getattr(self, axis)

        def along(axis: str) -> list[int]:
            return [place * stride[axis] for place in range(getattr(self, axis))]

        replicas = [data + context for data in along("data") for context in along("context")]
        columns = [[tensor + replica for replica in replicas] for tensor in along("tensor")]
        return [[[stage + rank for rank in column] for column in columns] for stage in along("pipeline")]

    def pipeline_rank(self, stage: int) -> int:
        """Where virtual stage `stage` runs: round and round, or in a V, whose second half comes back over the ranks (Qi et al.
        2024, arXiv:2405.15362)."""
        turn, place = divmod(stage, self.pipeline)
        return self.pipeline - 1 - place if turn % 2 and self.schedule in ("zb_v", "dualpipe_v") else place

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The virtual stages of a pipeline rank, in model order."""
        return tuple(stage for stage in range(len(self.stages)) if self.pipeline_rank(stage) == rank)


@frozen
class Data:
    kind: str  # text, jsonl, parquet, python, python_source, pairs, conversations
    paths: tuple[str, ...]
    field: str | None = None
    validation: float = 0.05
    source: str | None = None  # fields of pairs
    target: str | None = None

    @property
    def records(self) -> bool:
        """Read record by record, and not as one stream."""
        return self.kind in ("pairs", "conversations")


@frozen
class Tokenizer:
    kind: str  # bytes, hf
    path: str | None = None


@frozen
class Objective:
    """What is predicted. `probability` of a token to be masked; `density` of spans that are cut out, of `mean_length` tokens;
    `target` is the length of decoder_tokens and of their targets, None where there are none."""

    kind: str = "next_token"  # next_token, masked_token, span_corruption, seq2seq, chat
    probability: float = 0.15
    density: float = 0.15
    mean_length: float = 3.0
    target: int | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """The inputs that a model has to have; the targets have the last one's shape."""
        if self.kind == "seq2seq":
            return ("tokens", "valid", "decoder_tokens")
        return ("tokens", "decoder_tokens") if self.kind == "span_corruption" else ("tokens",)

    @property
    def fed(self) -> tuple[str, ...]:
        """All inputs that it can feed."""
        more = {
            "masked_token": ("segments", "documents"),
            "next_token": ("documents",),
            "span_corruption": ("decoder_tokens",),
            "seq2seq": ("decoder_tokens",),
        }
        return ("tokens", "valid", *more.get(self.kind, ()))

    def length(self, name: str, sequence: int) -> int:
        """Tokens of a row of the input `name`, where those of `tokens` are `sequence`."""
        return self.target or sequence if name == "decoder_tokens" else sequence


def span_lengths(sequence: int, density: float, mean_length: float) -> tuple[int, int, int]:
    """(tokens of text, spans cut out, tokens of the target) such that text with its spans replaced by one sentinel each, and an
    end, fills `sequence` tokens (arXiv:1910.10683, section 3.1.4)."""
    found = (0, 0, 0)
    for length in range(2, 2 * sequence + 2):
        noise = min(max(round(length * density), 1), length - 1)
        spans = max(1, min(round(noise / mean_length), noise, length - noise))
        if length - noise + spans + 1 > sequence:
            break
        found = (length, spans, noise + spans + 1)
    return found


@frozen
class AdamW:
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0


@frozen
class Schedule:
    kind: str  # constant, linear, cosine
    warmup: int = 0
    min_lr: float = 0.0


@frozen
class Training:
    """`batch` and `sequence` in sequences and tokens; `steps` optimizer steps."""

    data: Data
    tokenizer: Tokenizer
    sequence: int
    batch: int
    steps: int
    optimizer: AdamW
    schedule: Schedule = Schedule("constant")
    precision: str = "fp32"  # fp32, bf16
    seed: int = 0
    validate_every: int | None = None
    validation_batches: int = 8
    checkpoint_every: int | None = None
    flops_per_token: float = 0.0  # of the model, forward and backward, for MFU
    peak_flops_per_second: float = 0.0  # of one device, what MFU is divided by
    objective: Objective = Objective()
    inputs: tuple[str, ...] = ("tokens",)  # that the model reads, in its order
    whole: tuple[str, ...] = ()  # of them those that every rank of the context axis is given whole, and not its part
    vocab: int = 0  # of the model: no token id may reach it; 0 is unchecked
