"""The `cluster` item: nodes, devices, links, prices."""

from __future__ import annotations

from typing import Any

from mlmdsl.diagnostics import Span
from mlmdsl.grammar.evaluate import CallValue
from mlmdsl.grammar.settings import Settings
from mlmdsl.grammar.spec import Cluster, Device, Link, Operation, Pool
from mlmdsl.units import Quantity

# What one device reaches inside its node where the text is silent: (kind, bytes/s in one direction, latency)
_INTRA_DEFAULT = {
    "cuda": Link(kind="pcie", bytes_per_second=25e9, latency_seconds=5e-6),  # PCIe 4.0 x16 as NCCL sees it
    "rocm": Link(kind="infinity_fabric", bytes_per_second=50e9, latency_seconds=5e-6),
    "cpu": Link(kind="loopback", bytes_per_second=2e9, latency_seconds=100e-6),
}
_LATENCY = {
    "nvlink": 4e-6,
    "pcie": 5e-6,
    "infinity_fabric": 3e-6,
    "shm": 20e-6,
    "loopback": 100e-6,
    "infiniband": 5e-6,
    "roce": 8e-6,
    "ethernet": 30e-6,
}
POOL = ("nodes", "devices_per_node", "device", "intra")  # settings of a pool
_INTRA = ("nvlink", "pcie", "infinity_fabric", "shm", "loopback")
_INTER = ("infiniband", "roce", "ethernet", "loopback")
_PEAKS = ("fp32", "tf32", "fp16", "bf16", "fp8")
# Efficiency curves that `mlmdsl probe` writes, part by part: the numbers of each; `fill` is a time (docs/probe.md)
CURVES = {
    "matmul": ("share", "half_depth", "wave_outputs"),
    "attention_forward": ("share", "half_length", "half_head", "half_rows"),
    "attention_backward": ("share", "half_length", "half_head", "half_rows"),
    "streams": ("share", "optimizer_share"),
}
# Marketing figures are the sum of both directions (NVIDIA's NVLink pages): the most that one direction of one device can be
_NVLINK_ONE_WAY = {"V100": 150e9, "A100": 300e9, "H100": 450e9, "H200": 450e9, "B200": 900e9, "GB200": 900e9}


def read_cluster(name: str, settings: Settings, pools: tuple[tuple[str, Settings], ...]) -> Cluster | None:
    """`pools` are the cluster's `pool` blocks; without one the cluster's own settings make a single pool."""
    found = [_finished_pool(n, inner) for n, inner in pools] or [_pool(name, settings)]
    nodes = sum(p.nodes for p in found if p)
    per_node = max((p.devices_per_node for p in found if p), default=1)
    inter = _link(settings, "inter", _INTER, per_node)
    price = settings.quantity("price", "usd_per_device_hour")
    energy = settings.quantity("energy", "usd_per_kwh")
    operation = _operation(settings, per_node)
    if all(found) and nodes > 1 and inter is None and "inter" not in settings.values:
        settings.missing["inter"] = "infiniband(bandwidth = 400 Gb/s per gpu)"
        settings.failed = True
    if not settings.finish() or not all(found):
        return None
    whole: Span = settings.whole
    sound = tuple(p for p in found if p)
    prices: Any = {"usd_per_device_hour": price, "usd_per_kwh": energy}
    return Cluster(name=name, pools=sound, inter=inter, operation=operation, span=whole, **prices)


def _operation(settings: Settings, per_node: int) -> Operation:
    storage = settings.raw_quantity("storage", "bytes_per_second")
    if storage is not None and storage.per is None:
        help = f"write {storage} per node, or {storage} per gpu"
        settings.problem("MLM0308", "this bandwidth could be per device or per node", "storage", help=help)
    speed = None if storage is None else storage.value * (per_node if storage.per == "gpu" else 1)
    given = {
        "mtbf_seconds": settings.quantity("mtbf", "seconds"),
        "storage_bytes_per_second": speed,
        "restart_seconds": settings.quantity("restart", "seconds"),
        "pue": settings.number("pue", least=1.0, example="1.2"),
        "kg_per_kwh": settings.quantity("carbon", "kg_per_kwh"),
    }
    return Operation(**{key: value for key, value in given.items() if value is not None})


def _finished_pool(name: str, settings: Settings) -> Pool | None:
    found = _pool(name, settings)
    return found if settings.finish() else None


def _pool(name: str, settings: Settings) -> Pool | None:
    nodes = settings.integer("nodes", 1, example="4")
    per_node = settings.integer("devices_per_node", required=True, example="8")
    device = _device(settings)
    intra = _link(settings, "intra", _INTRA, per_node or 1)
    if intra and device:
        _one_way(settings, intra, device)
    if nodes is None or per_node is None or device is None:
        return None
    return Pool(name=name, nodes=nodes, devices_per_node=per_node, device=device, intra=intra or _INTRA_DEFAULT[device.kind])


def _device(settings: Settings) -> Device | None:
    call = settings.call("device", ("gpu", "cpu"), required=True, example="H100_SXM_80GB")
    return None if call is None else read_device(call, settings)


def read_device(call: CallValue, settings: Settings) -> Device | None:
    """`gpu(memory = 80 GiB, bandwidth = 2 TB/s, bf16 = 312 TFLOPS, power = 400 W)`, `cpu(memory = 2 GiB, fp32 = 50 GFLOPS)`."""
    inner = settings.of_call(call)
    cpu = call.name == "cpu"
    kind: Any = "cpu" if cpu else inner.word("kind", ("cuda", "rocm"), "cuda")
    memory = inner.quantity("memory", "bytes", required=True)
    bandwidth = inner.quantity("bandwidth", "bytes_per_second", 10e9 if cpu else None, required=not cpu)
    peaks = {p: v for p in _PEAKS if (v := inner.quantity(p, "flops_per_second")) is not None}
    compute = inner.quantity("compute", "flops_per_second")
    if compute is not None:
        peaks = {"fp32": compute, "bf16": compute, **peaks}
    elif cpu and "fp32" in peaks:
        peaks = {"bf16": peaks["fp32"], **peaks}
    launch = inner.quantity("launch", "seconds", 10e-6)
    cores = inner.number("cores", above=True, example="0.5") if cpu else None
    power = inner.quantity("power", "watts", 50.0 if cpu else 400.0)
    name = inner.text("name", "cpu" if cpu else "gpu")
    curves = _curves(inner)
    if not peaks and not inner.failed:
        inner.missing["fp32" if cpu else "bf16"] = "50 GFLOPS" if cpu else "312 TFLOPS"
        inner.failed = True
    if not inner.finish():
        settings.failed = True
        return None
    assert memory and bandwidth and launch is not None and power is not None and name is not None
    return Device(
        name=name,
        kind=kind,
        memory_bytes=int(memory),
        memory_bytes_per_second=bandwidth,
        peak_flops_per_second=peaks,
        launch_seconds=launch,
        cores=cores,
        power_watts=power,
        curves=curves,
    )


def _curves(device: Settings) -> dict[str, dict[str, float]] | None:
    """`curves = curves(matmul = curve(share = 0.7, ...), ...)`: what `probe` measured; None where nothing was."""
    call = device.call("curves", ("curves",), example="curves(matmul = curve(...), ...)")
    if call is None:
        return None
    whole = device.of_call(call)
    found = {part: _curve(whole, part, numbers) for part, numbers in CURVES.items()}
    if not whole.finish():
        device.failed = True
        return None
    return {part: values for part, values in found.items() if values}


def _curve(whole: Settings, part: str, numbers: tuple[str, ...]) -> dict[str, float] | None:
    example = f"curve({', '.join(f'{name} = 0.8' for name in numbers)})"
    call = whole.call(part, ("curve",), required=True, example=example)
    if call is None:
        return None
    inner = whole.of_call(call)
    values = {name: inner.number(name, above=True, required=True, example="0.8") for name in numbers}
    if part != "streams":
        values["fill_seconds"] = inner.quantity("fill", "seconds", required=True)
    if not inner.finish():
        whole.failed = True
        return None
    return {name: value for name, value in values.items() if value is not None}


def _link(settings: Settings, key: str, kinds: tuple[str, ...], per_node: int) -> Link | None:
    call = settings.call(key, kinds, example=f"{kinds[0]}(bandwidth = 400 Gb/s per gpu)")
    if call is None:
        return None
    inner = settings.of_call(call, ("bandwidth",))
    bandwidth = inner.raw_quantity("bandwidth", "bytes_per_second", required=True)
    latency = inner.quantity("latency", "seconds", _LATENCY[call.name])
    over = inner.number("oversubscription", 1.0, least=1.0, example="2.0")
    if bandwidth is not None and bandwidth.per is None:
        inner.problem(
            "MLM0308",
            "this bandwidth could be per device or per node",
            "bandwidth",
            help=f"write {bandwidth} per gpu, or {bandwidth} per node",
        )
    if not inner.finish():
        settings.failed = True
        return None
    assert bandwidth is not None and latency is not None and over is not None
    speed = bandwidth.value / (per_node if bandwidth.per == "node" else 1)
    return Link(kind=call.name, bytes_per_second=speed, latency_seconds=latency, oversubscription=over)


def _one_way(settings: Settings, intra: Link, device: Device) -> None:
    """NVLink figures are often printed as the sum of both directions."""
    most = next((v for part, v in _NVLINK_ONE_WAY.items() if device.name.startswith(part)), None)
    if intra.kind == "nvlink" and most is not None and intra.bytes_per_second > 1.01 * most:
        settings.problem(
            "MLM0309",
            f"{intra.bytes_per_second / 1e9:g} GB/s is more than one direction of {device.name}'s NVLink",
            "intra",
            help=f"datasheets add both directions; write nvlink(bandwidth = {most / 1e9:g} GB/s per gpu)",
        )


def quantity_env(cluster: Cluster) -> dict[str, Any]:
    """`device.memory` and so on, for rules of the plan."""
    device = cluster.pools[0].device
    return {"memory": Quantity(float(min(p.device.memory_bytes for p in cluster.pools)), "bytes"), "name": device.name}
