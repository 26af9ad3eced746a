"""What a run costs beyond its steps: failures and checkpoints, money, energy, CO2."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, sqrt

from mlmdsl.frozen import frozen
from mlmdsl.grammar.spec import Spec
from mlmdsl.planner.plan import Plan

_HOUR, _DAY = 3600.0, 86_400.0
# A checkpoint holds weights and AdamW's two moments in fp32 (runtime/checkpoint.py)
_CHECKPOINT_BYTES = 12

# USD of a device for an hour where the cluster has no `price`: what clouds asked without commitment in 2025, rounded (Lambda's
# instances of eight: V100, A100, H100, B200; AWS g6e: L40S; RunPod's: RTX 4090, MI300X, H200)
DEFAULT_PRICE: Mapping[str, float] = {
    "V100": 0.55,
    "A100": 1.80,
    "H100": 3.00,
    "H200": 3.80,
    "B200": 5.00,
    "GB200": 6.00,
    "L40S": 1.90,
    "RTX_4090": 0.70,
    "MI300X": 2.50,
}


@frozen
class Goodput:
    """interval_s: between checkpoints, in whole steps, by Young and Daly; share: of the time, what steps take that are kept;
    train_days: with checkpoints, failures and restarts."""

    failure_every_s: float
    checkpoint_bytes: int
    checkpoint_s: float
    interval_s: float
    interval_steps: int
    share: float
    train_days: float


@frozen
class Bill:
    """Of the whole run. usd: of devices, and of energy where that has a price; price_usd: of a device for an hour;
    default_price: of the documented ones, as the cluster has none."""

    days: float
    usd: float | None
    price_usd: float | None
    default_price: bool
    energy_kwh: float
    co2_kg: float


def goodput(spec: Spec, plan: Plan) -> Goodput:
    """Failures strike devices independently of each other; saving holds the steps up; after one the run starts again from the
    last checkpoint. Interval: sqrt(2 save x mean time between failures) - save (Daly, A higher order estimate of the optimum
    checkpoint interval, FGCS 22, 2006; Young 1974)."""
    cluster, operation = spec.cluster, spec.cluster.operation
    failure = operation.mtbf_seconds / cluster.world_size
    size = _CHECKPOINT_BYTES * plan.model.parameters
    save = size / (operation.storage_bytes_per_second * sum(pool.nodes for pool in cluster.pools))
    best = sqrt(2 * save * failure) - save if save < 2 * failure else failure
    step = plan.predicted.step_time_s
    steps = max(1, min(round(best / step), spec.train.steps))
    share = kept_share(steps * step, save, operation.restart_seconds + save, failure)
    return Goodput(
        failure_every_s=failure,
        checkpoint_bytes=size,
        checkpoint_s=save,
        interval_s=steps * step,
        interval_steps=steps,
        share=share,
        train_days=plan.predicted.train_days / max(share, 1e-9),
    )


def kept_share(interval: float, save: float, restart: float, failure: float) -> float:
    """Useful part of the time under failures that come as a Poisson process (Daly 2006, his complete model): seconds of work
    between checkpoints over the seconds that these take with all that goes wrong meanwhile."""
    exponent = (interval + save) / failure
    if exponent > 500 or restart / failure > 500:
        return 0.0
    return interval / (failure * exp(restart / failure) * (exp(exponent) - 1))


def bill(spec: Spec, days: float) -> Bill:
    """Of so many days on the whole cluster."""
    cluster, hours = spec.cluster, days * _DAY / _HOUR
    watts = sum(pool.nodes * pool.devices_per_node * pool.device.power_watts for pool in cluster.pools)
    energy = hours * watts * cluster.operation.pue / 1000
    price = cluster.usd_per_device_hour
    if price is None:
        price = default_price(spec)
    usd = None if price is None else hours * cluster.world_size * price + energy * (cluster.usd_per_kwh or 0.0)
    return Bill(
        days=days,
        usd=usd,
        price_usd=price,
        default_price=cluster.usd_per_device_hour is None and price is not None,
        energy_kwh=energy,
        co2_kg=energy * cluster.operation.kg_per_kwh,
    )


def default_price(spec: Spec) -> float | None:
    """USD of one device for an hour, the mean over pools; None where a device has none."""
    found = [(pool.nodes * pool.devices_per_node, _price(pool.device.name)) for pool in spec.cluster.pools]
    total = 0.0
    for count, price in found:
        if price is None:
            return None
        total += count * price
    return total / spec.cluster.world_size


def _price(device: str) -> float | None:
    names = [name for name in DEFAULT_PRICE if device.startswith(name)]
    return DEFAULT_PRICE[max(names, key=len)] if names else None
