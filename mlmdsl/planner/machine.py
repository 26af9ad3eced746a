"""From what runtime/probe.py measured to mlm text: a device with its curves, and a cluster of the machine's links."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import exp, log
from statistics import median
from typing import Any

from mlmdsl.grammar.cluster import CURVES
from mlmdsl.grammar.format import format_text
from mlmdsl.grammar.spec import Device
from mlmdsl.planner.communication import Group, collective_seconds, share_of
from mlmdsl.planner.compute import Curves
from mlmdsl.planner.fitting import Fit, Row, descend, fit

_MOST = 0.5  # of a row's error, as in fitting.py
# The links' kinds as a cluster names them: what is measured already has the kind's share of its line rate in it
_LINKS = {"cpu": ("loopback", "loopback"), "cuda": ("pcie", "ethernet"), "rocm": ("infinity_fabric", "ethernet")}


@dataclass(frozen=True)
class LinkFit:
    """One link's bandwidth and latency, and the median error of the collectives over it."""

    bytes_per_second: float
    latency_seconds: float
    error: float


@dataclass(frozen=True)
class Machine:
    device: Device
    kernels: Fit
    intra: LinkFit | None
    inter: LinkFit | None
    measured: Mapping[str, Any]


def machine_of(measured: Mapping[str, Any]) -> Machine:
    """Fits the curves and links. Raises ValueError where kernels are missing in `measured`."""
    rows: list[Row] = [(k, a, b, c, d, ms) for k, a, b, c, d, ms in measured["kernels"]]
    precision = measured["precisions"][0]
    launch = median(row[5] for row in rows if row[0] == "launch_us") * 1e-3
    peaks = {name: _best(rows, f"matmul_{name}", launch) for name in measured["precisions"]}
    device = Device(
        name=measured["name"],
        kind=measured["kind"],
        memory_bytes=measured["memory_bytes"],
        memory_bytes_per_second=_bandwidth(rows),
        peak_flops_per_second=peaks,
        launch_seconds=launch,
        cores=measured["cores"] / measured["per_node"] if measured["kind"] == "cpu" else None,
        power_watts=50.0 if measured["kind"] == "cpu" else 400.0,
    )
    found = fit(rows, device, precision, f"mlmdsl probe, torch {measured['torch']}")
    # another precision's curve is this one's over a peak that gives what its best product reached
    share = min(1.0, found.curves.matmul.share)
    wide = {name: peak if name == precision else peak / share for name, peak in peaks.items()}
    device = replace(device, peak_flops_per_second=wide)
    intra = _link([row for row in measured["links"] if row["ranks"] == row["per_node"]], measured["kind"], None)
    inter = _link([row for row in measured["links"] if row["ranks"] > row["per_node"]], measured["kind"], intra)
    return Machine(device, found, intra, inter, measured)


def _best(rows: Iterable[Row], kind: str, launch: float) -> float:
    """FLOP/s of products, without the call, that a quarter of the shapes exceed: the very best may be a stroke of luck."""
    products = [(2.0 * a * b * c, ms * 1e-3) for k, a, b, c, _, ms in rows if k == kind]
    reached = sorted(flops / (seconds - launch if seconds > 2 * launch else seconds) for flops, seconds in products)
    return reached[3 * len(reached) // 4]


def _bandwidth(rows: Iterable[Row]) -> float:
    """Of the best copy that no cache holds: a read and a write of each element."""
    copies = [(a, ms, 4 if kind.endswith("fp32") else 2) for kind, a, *_, ms in rows if kind.startswith("copy")]
    most = max(elements for elements, _, _ in copies)
    return max(2 * elements * each / (ms * 1e-3) for elements, ms, each in copies if elements * 16 > most)


def _link(rows: Sequence[Mapping[str, Any]], kind: str, intra: LinkFit | None) -> LinkFit | None:
    """Bandwidth and latency under which collectives take what they took: least mean |log(predicted / measured)|, each row at
    most a half. `intra`: of the link inside, where the rows cross nodes."""
    if not rows:
        return None

    def errors(values: Sequence[float]) -> list[float]:
        speed, latency = map(exp, values)
        inside = (intra.bytes_per_second, intra.latency_seconds) if intra else (speed, latency)
        return [abs(log(_seconds(row, inside, (speed, latency)) / row["seconds"])) for row in rows]

    def loss(values: Sequence[float]) -> float:
        return sum(min(_MOST, error) for error in errors(values)) / len(rows)

    large = max(rows, key=lambda row: row["bytes"])
    small = min(rows, key=lambda row: row["bytes"])
    best = descend(loss, [log(large["bytes"] / large["seconds"]), log(small["seconds"] / 2)])
    return LinkFit(exp(best[0]), exp(best[1]), exp(median(errors(best))) - 1)


def _seconds(row: Mapping[str, Any], inside: tuple[float, float], across: tuple[float, float]) -> float:
    return collective_seconds(row["kind"], row["bytes"], Group(row["ranks"], row["per_node"], *inside, *across))


# ---- as mlm ---------------------------------------------------------------------------------------------------------


def machine_text(machine: Machine, name: str = "machine") -> str:
    """A file that specs import: `const device`, and a cluster of this name."""
    measured, device = machine.measured, machine.device
    kind = "cpu" if device.kind == "cpu" else "gpu"
    peaks = [f"{p} = {value / 1e9:.5g} GFLOPS" for p, value in device.peak_flops_per_second.items()]
    settings = [
        f'name = "{_plain(device.name)}"',
        *(['kind = "rocm"'] if device.kind == "rocm" else []),
        f"memory = {device.memory_bytes / 2**30:.5g} GiB",
        f"bandwidth = {device.memory_bytes_per_second / 1e9:.5g} GB/s",
        *peaks,
        f"launch = {device.launch_seconds * 1e6:.4g} us",
        *([f"cores = {_digits(device.cores)}"] if device.cores else []),
        f"curves = {_curves_text(machine.kernels.curves)}",
    ]
    links = [f"intra = {_link_text(_LINKS[device.kind][0], machine.intra)}"] if machine.intra else []
    links += [f"inter = {_link_text(_LINKS[device.kind][1], machine.inter)}"] if machine.inter else []
    text = (
        _heading(machine)
        + f"const device = {kind}({', '.join(settings)})\n\n"
        + f"cluster {name} {{ nodes = {measured['nodes']}\n devices_per_node = {measured['per_node']}\n device = device\n"
        + "\n".join(links)
        + "\n}\n"
    )
    return format_text(text)


def _heading(machine: Machine) -> str:
    """What was measured and how well the curves fit it, as comments."""
    measured = machine.measured
    ranks = measured["nodes"] * measured["per_node"]
    errors = [f"{kind} {error:.0%}" for kind, error in machine.kernels.errors.items()]
    errors += [f"links {link.error:.0%}" for link in (machine.intra, machine.inter) if link]
    shared = f"{ranks} rank{'s' * (ranks > 1)} at once, each with {measured['threads']} of {measured['cores']} cores' threads"
    return (
        f"# Measured by mlmdsl probe on {_plain(measured['name'])}, torch {measured['torch']}: {shared}.\n"
        f"# Median errors of the fit: {', '.join(errors)}. Peaks are what a quarter of the shapes exceed.\n\n"
    )


def _plain(name: str) -> str:
    return "".join(letter if letter.isprintable() and letter not in '"\\{}' else " " for letter in name)


def _curves_text(curves: Curves) -> str:
    parts = {part: getattr(curves, "memory" if part == "streams" else part) for part in CURVES}
    return f"curves({', '.join(f'{part} = curve({_numbers(value)})' for part, value in parts.items())})"


def _numbers(curve: Any) -> str:
    given = ((field.name, getattr(curve, field.name)) for field in fields(curve))
    return ", ".join(f"fill = {v * 1e6:.4g} us" if n == "fill_seconds" else f"{n} = {_digits(v)}" for n, v in given)


def _digits(value: float) -> str:
    """Five significant digits without an exponent."""
    return f"{float(f'{value:.5g}'):.12f}".rstrip("0").rstrip(".")


def _link_text(kind: str, link: LinkFit) -> str:
    speed = link.bytes_per_second / share_of(kind) / 1e9
    return f"{kind}(bandwidth = {_digits(speed)} GB/s per gpu, latency = {link.latency_seconds * 1e6:.4g} us)"
