"""Initial weights that every plan starts from: a value depends on the seed, the weight's name and its place in the whole.

Counter-based: element i of a weight is a hash of (key of the name, i), turned into a normal number by operations that IEEE 754
rounds alike everywhere (integer arithmetic, + - * / and sqrt of float64; no library's log or cos), so that a shard holds bit
for bit what the whole would, on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # filled at once: about 100 bytes of scratch each


@dataclass(frozen=True)
class Init:
    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


zeros, ones = Init("zeros"), Init("ones")


def normal(std: float) -> Init:
    """Mean 0."""
    return Init("normal", std)


@torch.no_grad()
def fill(out: Tensor, name: str, init: Init, seed: int, shape: Sequence[int], offsets: Sequence[int]) -> None:
    """Writes into `out` the part of the weight `name` of `shape` that begins at `offsets`."""
    if init.kind != "normal":
        out.fill_(1.0 if init.kind == "ones" else 0.0)
        return
    if out.numel() == 0:
        return
    key = _signed(int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little"))
    rows = max(1, CHUNK_ELEMENTS // max(1, out.numel() // out.size(0)))
    for low in range(0, out.size(0), rows):
        part = out[low : low + rows]
        places = _places(part.shape, shape, (offsets[0] + low, *offsets[1:]), out.device)
        part.copy_(standard_normal(places, key) * init.std)


def _places(local: Sequence[int], shape: Sequence[int], offsets: Sequence[int], device: torch.device) -> Tensor:
    """Index in the flattened whole of every element of a part."""
    places = torch.zeros((), dtype=torch.int64, device=device)
    for dim, (size, offset) in enumerate(zip(local, offsets, strict=True)):
        stride = math.prod(shape[dim + 1 :])
        places = places[..., None] + (torch.arange(size, device=device) + offset) * stride
    return places


# ---- numbers --------------------------------------------------------------------------------------------------------


def standard_normal(places: Tensor, key: int) -> Tensor:
    """Float64 normal numbers for int64 counters."""
    bits = _hash(places, key)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53  # strictly between 0 and 1
    return _inverse_normal(uniform)


def _hash(counter: Tensor, key: int) -> Tensor:
    """splitmix64 (Steele, Lea, Flood, OOPSLA 2014) at `counter` of the stream that starts at `key`; int64 wraps round."""
    x = counter * _signed(0x9E3779B97F4A7C15) + key
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _inverse_normal(p: Tensor) -> Tensor:
    """Quantiles of the normal distribution to 7 digits: PPND7 of Wichura's AS 241 (Applied Statistics 37, 1988)."""
    q = p - 0.5
    r = 0.180625 - q * q
    middle = q * _ratio(r, (3.3871327179, 50.434271938, 159.29113202, 59.109374720), (17.895169469, 78.757757664, 67.187563600))
    r = (-_log(torch.minimum(p, 1.0 - p))).sqrt()
    near = _ratio(r - 1.6, (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (0.73700164250, 0.12021132975))
    far = _ratio(r - 5.0, (6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (0.24197894225, 0.012258202635))
    tail = torch.where(r <= 5.0, near, far)
    return torch.where(q.abs() <= 0.425, middle, torch.where(q < 0, -tail, tail))


def _ratio(r: Tensor, above: Sequence[float], below: Sequence[float]) -> Tensor:
    return _polynomial(r, above) / _polynomial(r, (1.0, *below))


def _polynomial(r: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Lowest power first."""
    value = torch.full_like(r, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * r + coefficient
    return value


def _log(x: Tensor) -> Tensor:
    """log x = e log 2 + 2 artanh s for x = m 2^e, s = (m - c) / (m + c), with c the square root of a half taken out of m."""
    mantissa, exponent = torch.frexp(x)  # 0.5 <= mantissa < 1
    c = math.sqrt(0.5)
    s = (mantissa - c) / (mantissa + c)
    series = _polynomial(s * s, [1.0 / (2 * k + 1) for k in range(12)])
    return (exponent.double() - 0.5) * math.log(2.0) + 2.0 * s * series
