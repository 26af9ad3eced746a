"""FLOPs per token by torch's own counter over transformers' own implementation, at full size on the meta device.

Nothing of this package is in the count but config.json, whose model has to have the published number of parameters. The counter
(torch.utils.flop_counter) sees matrix products only, forward and backward. Eager attention takes them over all S x S pairs of a
query and a key: of those count the pairs that the mask leaves, as mlmdsl says that it counts (the area, S^2 / 2 of causal
attention). `make published` prints the table.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from mlmdsl.diagnostics import RunError
from mlmdsl.graph.flops import flops_per_token
from mlmdsl.graph.graph import Graph
from mlmdsl.huggingface.config import config_of, recognise
from tests.published.test_parameters import TABLE, closed_form, compiled


@dataclass(frozen=True)
class Count:
    """`parameters` and FLOPs per token of another implementation; `source` says whose."""

    parameters: int
    flops_per_token: float
    source: str


def independent(name: str, graph: Graph, seq_len: int) -> Count:
    """By transformers where it has the family, else by the closed form of the published sizes."""
    try:
        found = recognise(graph)
    except RunError:
        return Count(TABLE[name].parameters, closed_form(TABLE[name], seq_len), "closed form")
    fields = config_of(found, seq_len, "bfloat16", {})
    (architecture,) = fields.pop("architectures")
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.use_cache = False
    if any("experts" in field for field in fields):
        config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
        counted = _step_flops(model.train(), seq_len, graph.lengths.get("T", seq_len))
    parameters = sum(p.numel() for p in model.parameters())
    return Count(parameters, counted / seq_len, f"transformers {architecture}")


def _step_flops(model: Any, seq_len: int, decoder_len: int) -> float:
    """Forward and backward pass of one sequence."""
    tokens = torch.zeros(1, seq_len, dtype=torch.long)
    given = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(seq_len)[None],
        "decoder_input_ids": tokens[:, :decoder_len],
    }
    known = set(inspect.signature(model.forward).parameters)
    if model.config.model_type in ("bert", "t5"):
        known.remove("attention_mask")  # which they would look into, and there are no values
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped}) as counter:
        model(**{name: value for name, value in given.items() if name in known}).logits.sum().backward()
    found: Mapping[Any, int] = counter.get_flop_counts()["Global"]
    scores = sum(flops for operation, flops in found.items() if "bmm" in str(operation))
    pairs = [_pairs(*each, model.config, seq_len, decoder_len) for each in _attentions(model)]
    return sum(found.values()) - scores * (1 - sum(seen for _, seen in pairs) / sum(every for every, _ in pairs))


def _attentions(model: Any) -> list[tuple[str, Any]]:
    """The innermost modules of attention, whose products are alike in size; in a model of two stacks, with their paths."""
    found = [(path, module) for path, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    return [(path, module) for path, module in found if not any(other.startswith(f"{path}.") for other, _ in found)]


def _grouped(one: Any, other: Any, *rest: Any, **options: Any) -> int:
    """Of rows that are grouped by expert: [T, K] by [experts, K, N], and [K, T] by [T, N] for the weights' gradient."""
    return 2 * one[0] * one[1] * other[-1]


def _pairs(path: str, module: Any, config: Any, seq_len: int, decoder_len: int) -> tuple[float, float]:
    """How many pairs of a query and a key a module computes, and how many of them its mask leaves."""
    if config.is_encoder_decoder:
        queries = decoder_len if "decoder" in path else seq_len
        keys = seq_len if "EncDec" in path else queries
        return queries * keys, queries * keys / (2 if "decoder" in path and "EncDec" not in path else 1)
    every = float(seq_len * seq_len)
    if config.model_type == "bert":
        return every, every
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
    return every, every / 2 - max(0, seq_len - window) ** 2 / 2 if window else every / 2


@dataclass(frozen=True)
class Row:
    """A shipped spec's own counts beside others."""

    name: str
    parameters: int
    tokens: int
    flops_per_token: float
    other: Count

    @property
    def ratio(self) -> float:
        return self.flops_per_token / self.other.flops_per_token

    def __str__(self) -> str:
        counts = f"{self.name:15} {self.parameters:15,} {TABLE[self.name].parameters:15,} {self.tokens:7,}"
        return (
            f"{counts} {self.flops_per_token:12.5e} {self.other.flops_per_token:12.5e} {self.ratio:9.6f}  {self.other.source}"
        )


def row(name: str) -> Row:
    done = compiled(name)
    assert done.graph is not None and done.spec is not None
    seq_len = done.spec.train.seq_len
    ours = flops_per_token(done.graph, seq_len)
    return Row(name, done.graph.parameters, seq_len, ours, independent(name, done.graph, seq_len))


def main() -> None:
    counts = f"{'model':15} {'parameters':>15} {'published':>15} {'tokens':>7}"
    print(f"{counts} {'FLOPs/token':>12} {'independent':>12} {'ratio':>9}  of")
    for name in sorted(TABLE):
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
