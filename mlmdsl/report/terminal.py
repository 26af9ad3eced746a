"""A plan, drawn for a terminal: 80 columns, plain text when piped, colour only as decoration."""

from __future__ import annotations

from collections.abc import Iterator

from mlmdsl import words
from mlmdsl.planner.mesh import Mesh
from mlmdsl.planner.plan import Alternative, Plan, PlanVariables, SoftConstraint, StageMemory

_BOLD, _DIM, _OFF = "\x1b[1m", "\x1b[2m", "\x1b[0m"

_GLUE = "\N{NO-BREAK SPACE}"  # keeps words on one line; printed as a space

# The ledger's entries in the order of the bar: (letter, colour, word, fields of StageMemory)
_LEDGER = (
    ("w", "\x1b[34m", "weights", ("weights_bytes", "master_weights_bytes", "unsharded_weights_bytes")),
    ("g", "\x1b[36m", "gradients", ("gradients_bytes",)),
    ("o", "\x1b[35m", "optimizer", ("optimizer_bytes",)),
    ("a", "\x1b[33m", "activations", ("activations_bytes",)),
    ("l", "\x1b[32m", "logits and loss", ("logits_and_loss_bytes",)),
    ("x", "\x1b[90m", "buffers, workspace, context", ("buffers_bytes", "workspace_bytes", "context_bytes")),
)


def render_plan(plan: Plan, *, color: bool = False, width: int = 80) -> str:
    """The whole preview, sections parted by empty lines, no line longer than `width` (at least 80)."""
    ink = Ink(color)
    sections = (_head, _mesh, _step, _memory, _links, _price, _soft, _alternatives, _search, _notes)
    drawn = ("\n".join(section(plan, ink, max(width, 80))) for section in sections)
    return "\n\n".join(text for text in drawn if text)


def render_summary(plan: Plan, *, color: bool = False) -> str:
    """Two lines before training starts."""
    name, predicted = Ink(color).bold(plan.model.name), plan.predicted
    peak = words.gib(max(predicted.peak_memory_bytes))
    return (
        f"{name}  {plan.model.parameters:,} parameters on {_machine(plan)}\n"
        f"{plan.plan.described}; predicted {words.seconds(predicted.step_time_s)} a step, peak memory {peak}"
    )


class Ink:
    def __init__(self, color: bool):
        self._color = color

    def paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_OFF}" if self._color and text else text

    def bold(self, text: str) -> str:
        return self.paint(_BOLD, text)

    def dim(self, text: str) -> str:
        return self.paint(_DIM, text)


# ---- sections: each yields lines ------------------------------------------------------------------------------------


def _machine(plan: Plan) -> str:
    cluster = plan.cluster
    if cluster.pools:
        each = ((p.nodes * p.devices_per_node, p.device, p.nodes, p.devices_per_node) for p in cluster.pools)
        return " + ".join(_devices(*pool).replace(" ", _GLUE) for pool in each)
    return _devices(cluster.world_size, cluster.device, cluster.nodes, cluster.devices_per_node)


def _devices(count: int, device: str, nodes: int, per_node: int) -> str:
    return f"{count:,} x {device} ({'1 node' if nodes == 1 else f'{nodes:,} nodes of {per_node}'})"


def _head(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    yield f"{ink.bold(plan.model.name)}  {plan.model.parameters:,} parameters"
    yield from wrapped(f"on {_machine(plan)}", width, "", "   ")
    tokens = plan.batch * plan.seq_len
    yield f"batch {plan.batch:,} sequences of {plan.seq_len:,} tokens ({tokens:,}), {plan.precision}"
    yield ""
    yield from wrapped(plan.plan.described, width, ink.bold("plan") + "    ", " " * 8)
    micro_batches = plan.batch // (plan.plan.data * plan.plan.micro_batch)
    each = f" on each of {plan.plan.data:,} data ranks" if plan.plan.data > 1 else ""
    yield f"        {micro_batches:,} micro-batch{'es' if micro_batches > 1 else ''} a step{each}"


def _mesh(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    """Rows are pipeline stages, columns data ranks; a cell is the range of its context and tensor ranks."""
    p = plan.plan
    if p.world_size == 1:
        return
    mesh = p.mesh(plan.cluster.devices_per_node)
    cell = max(len(_ranks(mesh, p.pipeline - 1, p.data - 1)), len(f"data {p.data - 1}")) + 2
    lying = [_lies_on(plan, stage) for stage in range(p.pipeline)]
    layers = max(len(_layers(p, stage)) for stage in range(p.pipeline)) + 2 + max(map(len, lying))
    columns = _elided(p.data, max(3, (width - 17 - layers) // cell))
    within = f", {p.context} parts of a sequence one after another" if p.context > 1 else ""
    yield f"{ink.bold('mesh')}    a row is a pipeline stage, a column a data rank, a cell its ranks{within}"
    if p.expert > 1:
        whose = "data ranks" if p.context == 1 else "replicas (data and context)"
        yield f"        {p.expert} neighbouring {whose} share one set of experts"
    if plan.cluster.pools:
        yield "        stages lie on the pools " + " and ".join(f"{pool.name} ({pool.device})" for pool in plan.cluster.pools)
    yield " " * 17 + "".join(("..." if c is None else f"data {c}").rjust(cell) for c in columns)
    for stage in _elided(p.pipeline, 8):
        if stage is None:
            yield "        ..."
            continue
        cells = "".join(("..." if c is None else _ranks(mesh, stage, c)).rjust(cell) for c in columns)
        yield f"        stage {stage:<3}{cells}  {ink.dim(_layers(p, stage) + lying[stage])}"


def _lies_on(plan: Plan, stage: int) -> str:
    """` on new`, ` on new and old`: of several pools."""
    pools = plan.cluster.pools_of(stage)
    return f" on {' and '.join(pool.name for pool in pools)}" if pools else ""


def _elided(count: int, most: int) -> list[int | None]:
    """0 .. count - 1, with a gap (None) where there are more than `most`."""
    if count <= most:
        return list(range(count))
    return [*range(most - 2), None, count - 1]


def _ranks(mesh: Mesh, stage: int, data: int) -> str:
    inner, first = mesh.context * mesh.tensor, mesh.rank(stage, data)
    return str(first) if inner == 1 else f"{first}-{first + inner - 1}"


def _layers(plan: PlanVariables, stage: int) -> str:
    """`layers 0-19`, or one range per virtual stage."""
    ranges: list[str] = []
    for virtual in range(stage, len(plan.stages), plan.pipeline):
        first = sum(plan.stages[:virtual])
        last = first + plan.stages[virtual] - 1
        ranges.append(f"{first}-{last}" if last > first else f"{first}")
    shown = ranges if len(ranges) <= 3 else [*ranges[:2], "...", ranges[-1]]
    return "layers " + " ".join(shown)


def _step(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    predicted, peak = plan.predicted, plan.cluster.peak_flops_per_second / 1e12
    tokens, flops = predicted.tokens_per_s_per_device, predicted.model_tflops_per_device
    yield f"{ink.bold('step')}    {words.seconds(predicted.step_time_s)}, {tokens:,.0f} tokens/s per device"
    yield f"        {flops:,.4g} TFLOP/s per device, {words.percent(predicted.mfu)} MFU of {peak:,.4g} TFLOP/s {plan.precision}"
    yield f"        {ink.dim('(FLOPs of matrix products only, causal attention counted half)')}"
    parts = {name: value for name, value in predicted.breakdown_s.items() if value > 0}
    whole = max(sum(parts.values()), 1e-12)
    for name, value in parts.items():
        bar = "█" * round(36 * value / whole)
        yield f"        {name:<11}{words.seconds(value):>9} {words.percent(value / whole):>6}  {ink.paint(_CYAN, bar)}".rstrip()


_CYAN = "\x1b[36m"


def _memory(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    capacities = [plan.cluster.memory_of(stage) for stage in range(len(plan.memory))]
    sizes = dict.fromkeys(words.gib(size) for size in capacities)
    yield f"{ink.bold('memory')}  per device at its peak, of {' and '.join(sizes)}"
    for stage in _elided(len(plan.memory), 8):
        if stage is None:
            yield "        ..."
            continue
        entry, capacity = plan.memory[stage], capacities[stage]
        share = words.percent(entry.total_bytes / capacity)
        yield f"        stage {entry.stage:<5}{words.gib(entry.total_bytes):>9} {share:>6}  {_bar(entry, capacity, ink)}"
    fullest = max(plan.memory, key=lambda m: m.total_bytes / capacities[m.stage])
    entries = [(f"{letter} {word}", _sum(fullest, fields)) for letter, _, word, fields in _LEDGER]
    line = ", ".join(f"{name} {words.gib(value)}".replace(" ", _GLUE) for name, value in entries if value)
    yield from wrapped(f"the fullest, stage {fullest.stage}: {line}", width, "        ")


def _sum(entry: StageMemory, fields: tuple[str, ...]) -> int:
    return sum(getattr(entry, name) for name in fields)


def _bar(entry: StageMemory, capacity: int, ink: Ink, length: int = 36) -> str:
    """The ledger as letters, the free rest as dots; rounding is cumulative, so that the bar's length is right."""
    drawn, filled, total = "", 0, 0
    for letter, color, _, fields in _LEDGER:
        total += _sum(entry, fields)
        upto = min(length, round(length * total / capacity))
        drawn += ink.paint(color, letter * (upto - filled))
        filled = max(filled, upto)
    return drawn + "." * (length - filled)


def _links(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    for number, (axis, link) in enumerate(plan.cluster.links.items()):
        head = ink.bold("links") + "   " if number == 0 else " " * 8
        speed, latency = float(link["bytes_per_second"]), float(link["latency_seconds"])
        yield f"{head}{axis:<11}{link['link']!s:<14}{words.rate(speed):>10} per device, {words.seconds(latency)} latency"


def _price(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    predicted = plan.predicted
    cost = "" if predicted.cost_usd is None else f", {words.amount(predicted.cost_usd)} USD"
    yield f"{ink.bold('run')}     {words.days(predicted.train_days)}{cost}, {words.amount(predicted.energy_kwh)} kWh"


def _soft(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    for number, rule in enumerate(plan.soft):
        head = ink.bold("wishes") + "  " if number == 0 else " " * 8
        yield from wrapped(f"{rule.text}: {_wish(rule)}", width, head, " " * 8)


def _wish(rule: SoftConstraint) -> str:
    if rule.price_s is None:
        return "not kept, no plan that fits keeps it"
    if rule.kept:
        return f"kept, costs {words.seconds(rule.price_s)} a step" if rule.price_s > 0 else "kept, costs nothing"
    return f"not kept, would cost {words.seconds(rule.price_s)} a step"


def _alternatives(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    if plan.alternatives:
        yield f"{ink.bold('next')}    the runners-up, and what each would cost"
    for other in plan.alternatives:
        yield from wrapped(_alternative(plan, other), width, "        ", " " * 25)


def _alternative(plan: Plan, other: Alternative) -> str:
    more = other.predicted.step_time_s / plan.predicted.step_time_s - 1
    memory = words.gib(max(other.predicted.peak_memory_bytes))
    return f"{100 * more:+6.1f} % {memory:>9} {other.plan.described}"


def _search(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    search = plan.search
    took = f" in {search.seconds:.2f} s" if search.seconds else ""
    yield f"{ink.bold('search')}  {search.candidates:,} candidates{took}, {search.feasible:,} found to fit"
    proofs = ((search.outpaced, "to be slower"), (search.bounded, "not to fit"))
    if proved := ", ".join(f"{count:,} {what}" for count, what in proofs if count):
        yield from wrapped(f"bounds prove {proved}; the others are measured", width, "        ")
    for rejection in search.rejected:
        yield from wrapped(f"{rejection.count:>9,} {rejection.reason}: {rejection.closest}", width, "        ", " " * 18)


def _notes(plan: Plan, ink: Ink, width: int) -> Iterator[str]:
    for note in plan.notes:
        yield from wrapped(note, width, ink.bold("note") + "    ", " " * 8)


def wrapped(text: str, width: int, first: str, rest: str | None = None) -> Iterator[str]:
    """Words of `text` on lines of `width`; `first` (8 columns wide when drawn) leads the first line, `rest` the others."""
    lead, indent = first, rest if rest is not None else first
    room, line = width - (8 if rest is not None else len(first)), ""
    for word in _words(text):
        if line and len(line) + len(word) > room:
            yield (lead + line.rstrip()).replace(_GLUE, " ")
            lead, line, room = indent, "", width - len(indent)
        line += word
    yield (lead + line.rstrip()).replace(_GLUE, " ")


def _words(text: str) -> list[str]:
    """Pieces that keep their spaces: " 1,204 memory: needs" -> [" 1,204 ", "memory: ", "needs"]."""
    pieces: list[str] = []
    for piece in text.split(" "):
        if piece == "" and pieces:
            pieces[-1] += " "
        else:
            pieces.append(piece + " ")
    return pieces
