"""Every collective that a rank of each stage makes in one step: what the emitted program calls, and what the runtime adds.

Over the tensor and context axes the plan's transitions and the operations' own, over the expert axis rows to their experts
and back (as many bytes as there are where they are spread evenly), over the pipeline sends and receives, over the replicas
(data, with context where that has ranks) what ZeRO asks for (FSDP2 takes each layer, and the rest of a stage, as a unit; with
hybrid sharding over those of a copy, and sums over the copies once a step), and at the step's end the counts and norms of all
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from mlmdsl.planner.blend import regions_of
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.holdings import Units
from mlmdsl.planner.memory import crossings
from mlmdsl.planner.moments import reduces_each_pass
from mlmdsl.planner.plan import Collective, CollectiveAxis, CollectiveKind
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.stages import Part

Call = tuple[CollectiveKind, CollectiveAxis, int, int, str]  # kind, axis, bytes, count, reason


def collectives(place: Place, c: Candidate) -> tuple[Collective, ...]:
    """By stage; calls that are alike in kind, axis, size and reason together."""
    found: list[Collective] = []
    mesh, alike = place.mesh_of(c.replicate), dict[tuple[object, ...], tuple[Call, ...]]()
    for rank in range(place.pipeline):
        counted: dict[tuple[CollectiveKind, CollectiveAxis, int, str], int] = {}
        for kind, axis, size, count, reason in _of_rank(place, c, rank, alike):
            if count and mesh.size(axis) > 1:
                key = (kind, axis, size, reason)
                counted[key] = counted.get(key, 0) + count
        found += [
            Collective(stage=rank, kind=kind, axis=axis, bytes=size, count=count, reason=reason)
            for (kind, axis, size, reason), count in counted.items()
        ]
    return tuple(found)


def flops(place: Place, c: Candidate) -> tuple[float, ...]:
    """By stage: of the matrix products and the attention of one rank in one step, as its kernels compute them."""
    bench, m = place.bench, place.micro_batches(c.micro_batch)
    costs, chain = bench.passes(c.micro_batch).costs, bench.setting.chain
    return tuple(
        m
        * sum(
            n * (costs[i].flops + costs[i].again[mode].flops)
            for stage in c.cut.placed[rank]
            for i, mode, n in regions_of(chain, c.cut.parts[stage], place.how(c, stage))
        )
        for rank in range(place.pipeline)
    )


def _of_rank(place: Place, c: Candidate, rank: int, alike: dict[tuple[object, ...], tuple[Call, ...]]) -> Iterator[Call]:
    """`alike`: what stages call, by all that it follows from."""
    for stage in c.cut.placed[rank]:
        key = (c.cut.parts[stage], place.how(c, stage), place.crossings(c, stage))
        if key not in alike:
            alike[key] = (*_transitions(place, c, stage), *_over_pipeline(place, c, stage))
        yield from alike[key]
    parts = c.cut.held(rank)
    yield from _over_replicas(place, c, parts)
    partial, tied = place.partial_elements(c, parts), place.tied_elements(c, parts)
    yield "all_reduce", "tensor", 4 * partial, int(partial > 0), "gradients that are partial sums"
    yield "all_reduce", "pipeline", 4 * tied, int(tied > 0), "gradients of tied weights"
    for kind, size, count in place.expert_exchanges(parts, c.zero):
        yield kind, "copies", size, count, "weights of experts" if kind == "all_gather" else "gradients of experts"
    yield "all_reduce", _replicas(place), 8, 1, "valid tokens of the step"
    yield "all_reduce", "world", place.norm_bytes, 1, "norm of the gradients, loss"


def _replicas(place: Place) -> CollectiveAxis:
    return "data" if place.context == 1 else "replicas"


def _transitions(place: Place, c: Candidate, stage: int) -> Iterator[Call]:
    """Of the emitted program: each transition on every pass of every micro-batch, again where it is recomputed."""
    bench, m = place.bench, place.micro_batches(c.micro_batch)
    passes, sharding = bench.passes(c.micro_batch), bench.sharding
    for index, mode, count in regions_of(bench.setting.chain, c.cut.parts[stage], place.how(c, stage)):
        for move in (move for move in sharding.moves if move.region == index):
            reason, step = f"{move.value}: {sharding.reason(move)}", move.step
            again = sum(repeated is move for repeated in passes.costs[index].again[mode].moves)
            if step.forward not in (None, "split"):
                yield step.forward, move.axis, passes.move_bytes(move, step.forward), (1 + again) * count * m, reason
            if step.backward not in (None, "split"):
                yield step.backward, move.axis, passes.move_bytes(move, step.backward), count * m, reason + ", backward"
        for node in bench.setting.graph.regions[index].nodes:
            for kind, size, calls in passes.inner(node):
                yield (
                    cast(CollectiveKind, kind),
                    "tensor",
                    size,
                    calls * count * m,
                    f"{node.path}: {sharding.strategies[node.path].name}",
                )
            again = sum(repeated is node for repeated in passes.costs[index].again[mode].deliveries)
            forward, backward = passes.delivered(node)
            yield "all_to_all", "expert", forward, (1 + again) * count * m * (forward > 0), f"{node.path}: rows to experts"
            yield "all_to_all", "expert", backward, count * m * (backward > 0), f"{node.path}: rows to experts, backward"


def _over_pipeline(place: Place, c: Candidate, stage: int) -> Iterator[Call]:
    given, handed = place.crossings(c, stage)
    received, sent = crossings(place.bench.passes(c.micro_batch), place.bench.setting.chain, c.cut.parts[stage])
    m = place.micro_batches(c.micro_batch)
    for size in received:
        yield "recv", "pipeline", size, m * given, "activations"
        yield "send", "pipeline", size, m * given, "gradients of activations"
    for size in sent:
        yield "send", "pipeline", size, m * handed, "activations"
        yield "recv", "pipeline", size, m * handed, "gradients of activations"


def _over_replicas(place: Place, c: Candidate, parts: tuple[Part, ...]) -> Iterator[Call]:
    holdings, shards = place.bench.holdings, place.shards(c)
    axis = _replicas(place) if c.replicate == 1 else "shards"
    if not c.zero:
        yield "all_reduce", axis, 4 * sum(holdings.of(part).elements for part in parts), 1, "gradients"
        return
    m, width = place.micro_batches(c.micro_batch), place.bench.setting.width
    each_pass = reduces_each_pass(c.zero, place.pipeline > 1)
    for part in parts:
        for name, units, size, gathers in _units(holdings.units(part, shards), c.zero, place.pipeline, m):
            if size:
                yield "all_gather", axis, width * size, units * gathers, f"weights of {name}"
                yield "reduce_scatter", axis, 4 * size, units * (m if each_pass else 1), f"gradients of {name}"
                yield "all_reduce", "replicate", 4 * size // shards, units, f"gradients of {name}, over the copies"


def _units(units: Units, zero: int, pipeline: int, m: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, how many, elements, gathers in a step) of FSDP2's units. The root stays gathered from forward to backward pass;
    under a pipeline torch leaves what a backward pass has gathered for the next forward pass."""
    layer, root = (1, 1) if zero < 3 else (2 * m, m) if pipeline == 1 else (m + 1, 1)
    for count, size in units.layers:
        yield "a layer", count, size, layer
    yield "the stage's embedding, head and norms", 1, units.root, root
