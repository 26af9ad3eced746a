"""Why this plan: runners-up with their price, what wishes cost, why candidates fell out, and what would let a plan fit where
none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace

from mlmdsl import words
from mlmdsl.diagnostics import Diagnostic, Label, PlanError, Span
from mlmdsl.grammar.constraints import USUAL
from mlmdsl.grammar.spec import Pin, PlanConstraints, PlanValue, Spec
from mlmdsl.planner import memory
from mlmdsl.planner.assemble import ledger, links_of, predicted, variables
from mlmdsl.planner.bench import Setting
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.outcome import Found, Outcome, Tally
from mlmdsl.planner.plan import Alternative, Plan, Rejection, SoftConstraint, StageMemory
from mlmdsl.planner.pools import size_of
from mlmdsl.planner.pricing import Place

_RUNNERS_UP = 5
_TIGHT = 0.97  # of what a plan may use
_LARGE_BUBBLE = 0.2
_NOTABLE = 0.01  # of a step
_MESH = ("tensor", "sequence_parallel", "context", "expert", "pipeline", "data", "micro_batch", "schedule", "interleave")

Explore = Callable[[Setting, PlanConstraints], Outcome]


# ---- beside the plan ------------------------------------------------------------------------------------------------


def runners_up(outcome: Outcome) -> tuple[Alternative, ...]:
    """The best plan of each other mesh; where there are few meshes, the next best plans of any."""
    best, chosen = outcome.found[0], dict[Candidate, Found]()
    meshes = {best.mesh}
    for found in outcome.best_first(but=meshes):
        meshes.add(found.mesh)
        chosen[found.candidate] = found
        if len(chosen) == _RUNNERS_UP:
            break
    for found in outcome.best_first() if len(chosen) < _RUNNERS_UP else ():
        if found.candidate is not best.candidate:
            chosen.setdefault(found.candidate, found)
        if len(chosen) == _RUNNERS_UP:
            break
    shown = sorted(chosen.values(), key=lambda found: (found.objective, found.order()))
    return tuple(Alternative(plan=variables(f.candidate), predicted=predicted(f.place, f.candidate)) for f in shown)


def wishes(outcome: Outcome) -> tuple[SoftConstraint, ...]:
    return tuple(_wish(outcome, index) for index in range(len(outcome.wishes)))


def _wish(outcome: Outcome, index: int) -> SoftConstraint:
    bit, best = 1 << index, outcome.found[0]
    without = next(outcome.best_first(ignored=bit))
    keeping = next(outcome.best_first(wished=bit), None)
    price = max(0.0, keeping.times.total - without.times.total) if keeping else None
    text = " ".join(outcome.wishes[index].rule.text.split())
    return SoftConstraint(text=text, kept=not best.broken & bit, price_s=price)


def notes(outcome: Outcome, plan: Plan, explore: Explore) -> tuple[str, ...]:
    setting = outcome.setting
    return (*_on_pools(setting, plan, explore), *_notes(setting, plan), *_order(outcome.found[0]))


def _notes(setting: Setting, plan: Plan) -> Iterator[str]:
    usable = [memory.usable_bytes(plan.cluster.memory_of(stage.stage)) for stage in plan.memory]
    left, capacity = min((room - stage.total_bytes, room) for room, stage in zip(usable, plan.memory, strict=True))
    if left < (1 - _TIGHT) * capacity:
        yield f"memory is tight: {words.gib(left)} would be left of what a plan may use"
    if plan.predicted.bubble_fraction > _LARGE_BUBBLE:
        share = words.percent(plan.predicted.bubble_fraction)
        yield f"the pipeline's ranks idle {share} of their time: a larger batch has more micro-batches to fill it"
    peaks = setting.device.peak_flops_per_second
    if plan.precision == "bf16" and setting.device.kind != "cpu" and peaks.get("bf16", 0.0) <= peaks.get("fp32", 0.0):
        yield f"{setting.device.name} has no bf16 matrix units: products run at the speed of fp32"


def _order(best: Found) -> Iterator[str]:
    """What stages next to each other gain, where they are."""
    c, place = best.candidate, best.place
    usual = Place(place.bench.over_experts(c.expert), c.pipeline, c.data)
    near, far = (links_of(each).get("pipeline") for each in (place, usual))
    if c.order == USUAL or near is None or far is None or near == far:
        return
    more = usual.times(c._replace(order=USUAL)).total / best.times.total - 1
    took = f", and a step of this plan take {words.percent(more)} longer" if more > 0 else ""
    yield (
        f"the stages of a pipeline share a node and send over {_named(near)}; in the usual order of ranks they would send over"
        f" {_named(far)}{took}"
    )


def _named(link: Mapping[str, float | str]) -> str:
    return f"{link['link']} at {words.rate(float(link['bytes_per_second']))}"


def _on_pools(setting: Setting, plan: Plan, explore: Explore) -> Iterator[str]:
    """Which stages do not have a pool to themselves, and whether the pools would better stand the other way round."""
    if setting.alike:
        return
    cluster = plan.cluster
    straddling = [stage for stage in range(plan.plan.pipeline) if len(cluster.pools_of(stage)) > 1]
    if straddling:
        names = " and ".join(pool.name for pool in cluster.pools_of(straddling[0]))
        which = "every rank" if plan.plan.pipeline == 1 else f"stage {straddling[0]}"
        yield f"{which} is planned as the weakest of what it lies on, pools {names}: slowest kernels, least memory"
    yield "the peak that MFU is a share of is the sum of all pools' peaks"
    reverse = _in_reverse_order(setting, plan, explore) if plan.plan.pipeline > 1 else plan.predicted.step_time_s
    if reverse < (1 - _NOTABLE) * plan.predicted.step_time_s:
        yield f"with the cluster's pools in reverse order the same mesh would take {words.seconds(reverse)} a step"


def _in_reverse_order(setting: Setting, plan: Plan, explore: Explore) -> float:
    """Seconds of a step of the best plan with this one's degrees and schedule; infinite where none fits."""
    limits, cluster = setting.spec.plan, setting.spec.cluster
    values = {name: getattr(plan.plan, name) for name in _MESH if name not in {pin.variable for pin in limits.pins}}
    pins = (*limits.pins, *(Pin(variable=name, value=value, text=name, span=cluster.span) for name, value in values.items()))
    turned = replace(cluster, pools=cluster.pools[::-1])
    spec = replace(setting.spec, cluster=turned, plan=replace(limits, pins=pins))
    found = explore(Setting(spec, setting.graph), spec.plan).found
    return found[0].times.total if found else float("inf")


def rejections(outcome: Outcome) -> tuple[Rejection, ...]:
    """The most frequent reason first."""
    outcome.find_closest()
    ordered = sorted(outcome.rejected.items(), key=lambda item: (-item[1].count, item[0]))
    return tuple(Rejection(reason=_reason(key), count=t.count, closest=closest(outcome, key, t)) for key, t in ordered)


def _reason(key: tuple[str, str]) -> str:
    """`memory`, or the rule itself."""
    return " ".join(key[1].split()) or key[0]


def closest(outcome: Outcome, key: tuple[str, str], tally: Tally) -> str:
    """The candidate of a tally that was nearest to passing, and what it lacks."""
    if tally.closest is None or tally.place is None:
        return tally.words
    described = variables(tally.closest).described
    if key[0] == "memory":
        return f"{described} needs {_shortage(tally.place, tally.closest)}"
    times = tally.place.times(tally.closest)
    return f"{described} breaks it, at {words.seconds(times.total)} a step"


def _shortage(place: Place, candidate: Candidate) -> str:
    """`3.1 GiB more than the 76.6 GiB that a plan may use (activations are 40 GiB of it)`."""
    stages = zip(ledger(place, candidate), place.benches, strict=True)
    fullest, bench = max(stages, key=lambda each: each[0].total_bytes - each[1].site.capacity_bytes)
    name, size = _largest(fullest)
    usable = bench.site.capacity_bytes
    where = "" if place.bench.setting.alike else f" of stage {fullest.stage}'s {bench.site.device.name}"
    over = words.gib(fullest.total_bytes - usable)
    return f"{over} more than the {words.gib(usable)} that a plan may use{where} ({name} {words.gib(size)})"


def _largest(stage: StageMemory) -> tuple[str, int]:
    sizes = {f.name: getattr(stage, f.name) for f in fields(stage) if f.name not in ("stage", "moment", "total_bytes")}
    name = max(sizes, key=sizes.__getitem__)
    return name.removesuffix("_bytes").replace("_", " "), sizes[name]


# ---- no plan --------------------------------------------------------------------------------------------------------


def nothing_fits(outcome: Outcome, explore: Explore) -> PlanError:
    """MLM0601 memory, MLM0602 a rule, MLM0603 the pins, MLM0604 nothing legal: the tightest true reason, and what would
    help."""
    rules = {key: tally for key, tally in outcome.rejected.items() if key[1]}
    if rules:
        diagnostic = _rules(outcome, rules, explore)
    elif ("memory", "") in outcome.rejected:
        diagnostic = _memory(outcome, explore)
    else:
        diagnostic = _nothing_legal(outcome, explore)
    return PlanError([diagnostic])


def _rules(outcome: Outcome, rules: dict[tuple[str, str], Tally], explore: Explore) -> Diagnostic:
    limits = outcome.setting.spec.plan
    hard = [rule for rule in limits.rules if any(rule.text == text for _, text in rules)]
    last = max(hard, key=lambda rule: rules[rule.form, rule.text].count)
    nearest = closest(outcome, (last.form, last.text), rules[last.form, last.text])
    without = explore(outcome.setting, replace(limits, rules=tuple(r for r in limits.rules if r != last)))
    help = _would_fit(without, "without this rule the best plan is") or _pins_that_help(outcome, explore)
    others = tuple(Label(rule.span, "so does this") for rule in hard if rule != last)
    text = " ".join(last.text.split())
    message = f"no plan that fits keeps `{text}`"
    label = "leaves no plan"
    return Diagnostic(
        "MLM0602", message, last.span, label, (*others, *_pin_labels(limits.pins)), _joined(f"the closest: {nearest}", help)
    )


def _memory(outcome: Outcome, explore: Explore) -> Diagnostic:
    tally = outcome.rejected["memory", ""]
    spec = outcome.setting.spec
    nearest = closest(outcome, ("memory", ""), tally)
    devices = " + ".join(f"{size_of(pool):,} x {pool.device.name}" for pool in spec.cluster.pools)
    message = f"none of {outcome.candidates:,} plans for {outcome.setting.graph.model} fits the memory of {devices}"
    help = _pins_that_help(outcome, explore) or _more_nodes(outcome, explore)
    help = _joined(f"the closest: {nearest}", help)
    return Diagnostic("MLM0601", message, spec.cluster.span, "this cluster", _pin_labels(spec.plan.pins), help)


def _nothing_legal(outcome: Outcome, explore: Explore) -> Diagnostic:
    spec = outcome.setting.spec
    reasons = "; ".join(tally.words for tally in outcome.rejected.values() if tally.words)
    help = _pins_that_help(outcome, explore)
    if spec.plan.pins and help:
        span: Span = spec.plan.pins[0].span
        message = "no plan can have " + " and ".join(pinned(pin) for pin in spec.plan.pins)
        return Diagnostic("MLM0603", message, span, "pinned here", _pin_labels(spec.plan.pins[1:]), _joined(reasons, help))
    message = f"no plan can use all {spec.cluster.world_size:,} devices"
    batch = spec.train.spans.get("batch")
    labels = (Label(batch, f"{spec.train.batch:,} sequences"),) if batch else ()
    help = _joined(reasons, _fewer_nodes(outcome, explore))
    return Diagnostic("MLM0604", message, spec.cluster.span, "this cluster", labels, help)


def _pin_labels(pins: tuple[Pin, ...]) -> tuple[Label, ...]:
    return tuple(Label(pin.span, f"{pin.variable} is pinned here") for pin in pins)


def pinned(pin: Pin) -> str:
    return assigned(pin.variable, pin.value)


def assigned(variable: str, value: PlanValue) -> str:
    """As a pin would be written: `stages = [6, 6]`."""
    if isinstance(value, tuple):
        return f"{variable} = [{', '.join(map(str, value))}]"
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{variable} = {shown}"


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _would_fit(outcome: Outcome, lead: str) -> str:
    if not outcome.found:
        return ""
    best = outcome.found[0]
    return f"{lead} {variables(best.candidate).described}, {words.seconds(best.times.total)} a step"


def _pins_that_help(outcome: Outcome, explore: Explore) -> str:
    """One pin whose absence lets a plan fit, or all of them."""
    limits = outcome.setting.spec.plan
    for pin in limits.pins:
        others = tuple(other for other in limits.pins if other != pin)
        found = explore(outcome.setting, replace(limits, pins=others))
        if found.found:
            return _would_fit(found, f"without the pin {pinned(pin)} the best plan is")
    if len(limits.pins) > 1:
        found = explore(outcome.setting, replace(limits, pins=()))
        return _would_fit(found, "without the pins the best plan is")
    return ""


def _more_nodes(outcome: Outcome, explore: Explore) -> str:
    """The smallest power of two of the cluster on which a plan fits."""
    for factor in (2, 4, 8, 16, 32):
        spec = _scaled(outcome.setting.spec, factor)
        found = explore(Setting(spec, outcome.setting.graph), spec.plan)
        if found.found:
            return _would_fit(found, f"on {spec.cluster.world_size:,} devices the best plan is")
    return ""


def _scaled(spec: Spec, factor: int) -> Spec:
    """With `factor` times the nodes."""
    pools = tuple(replace(pool, nodes=pool.nodes * factor) for pool in spec.cluster.pools)
    inter = spec.cluster.inter or spec.cluster.pools[0].intra
    return replace(spec, cluster=replace(spec.cluster, pools=pools, inter=inter))


def _fewer_nodes(outcome: Outcome, explore: Explore) -> str:
    """The most nodes below the cluster's that a plan can use."""
    spec = outcome.setting.spec
    pool, *others = spec.cluster.pools
    if others:
        return ""
    for nodes in range(pool.nodes - 1, max(0, pool.nodes - 16), -1):
        cluster = replace(spec.cluster, pools=(replace(pool, nodes=nodes),))
        smaller = replace(spec, cluster=cluster)
        found = explore(Setting(smaller, outcome.setting.graph), smaller.plan)
        if found.found:
            return _would_fit(found, f"on {nodes * pool.devices_per_node:,} devices the best plan is")
    return ""
