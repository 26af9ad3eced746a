"""Times of kernels: near what was measured, never below a bound, smooth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlmdsl.planner.compute
from mlmdsl.grammar.spec import Device
from mlmdsl.graph.ops.base import Work
from mlmdsl.planner.compute import Kernels, curves_of
from tests.planner.models import CPU, H100

KERNELS = Kernels(H100, "bf16")
H200 = replace(H100, name="H200_SXM_141GB", memory_bytes_per_second=4.8e12)

# ms of bf16 F.linear of M tokens from K to N on one H100 and one H200 (SXM), torch 2.11, CUDA 13.0
LINEAR = {
    (512, 8192, 8192): (0.0922, 0.0885),
    (2048, 4096, 4096): (0.0914, 0.0961),
    (2048, 16384, 4096): (0.3954, 0.3538),
    (8192, 4096, 4096): (0.3922, 0.4020),
    (8192, 12288, 12288): (3.4119, 3.4721),
}
# ms of causal attention forward, and forward with backward: batch, heads, sequence, head dim, on the H100
ATTENTION = {
    (4, 16, 2048, 64): (0.1014, 0.4218),
    (2, 32, 4096, 128): (0.4901, 1.9773),
    (1, 32, 8192, 128): (0.9139, 3.5627),
    (1, 8, 32768, 128): (3.4198, 14.176),
}


def linear(m: int, k: int, n: int) -> Work:
    moved = 2.0 * (m * k + k * n + m * n)
    return Work(
        "matmul",
        flops_forward=2.0 * m * k * n,
        flops_backward=4.0 * m * k * n,
        bytes_forward=moved,
        bytes_backward=2 * moved,
        kernels_backward=2,
        matmul=(m, k, n),
    )


def attention(batch: int, heads: int, length: int, size: int) -> Work:
    flops = 2.0 * batch * heads * length * length * size
    moved = 8.0 * batch * heads * length * size
    return Work(
        "attention",
        flops_forward=flops,
        flops_backward=2 * flops,
        bytes_forward=moved,
        bytes_backward=2.5 * moved,
        kernels_backward=2,
        attention=(batch, heads, length, length, size),
    )


def alone(device: Device) -> Kernels:
    """Kernels that are measured by themselves, and not in a step that never pauses."""
    return Kernels(device, "bf16", slowest=curves_of(device).sustained)


@pytest.mark.parametrize("shape", LINEAR)
def test_products_are_near_the_measured(shape: tuple[int, int, int]) -> None:
    for device, measured in zip((H100, H200), LINEAR[shape], strict=True):
        assert alone(device).forward_seconds(linear(*shape)) * 1e3 == pytest.approx(measured, rel=0.2), device.name


@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_is_near_the_measured(shape: tuple[int, int, int, int]) -> None:
    work = attention(*shape)
    forward, both = ATTENTION[shape]
    kernels = alone(H100)
    assert kernels.forward_seconds(work) * 1e3 == pytest.approx(forward, rel=0.2)
    assert (kernels.forward_seconds(work) + kernels.backward_seconds(work)) * 1e3 == pytest.approx(both, rel=0.3)


def test_power_slows_arithmetic_in_a_step_and_not_memory() -> None:
    """14 training steps on an H100 and an H200 took 5 % longer in the mean than their kernels by themselves."""
    product, copy = linear(8192, 8192, 8192), Work("memory", bytes_forward=1e9)
    assert KERNELS.forward_busy(product) == pytest.approx(alone(H100).forward_busy(product) / 0.95, rel=0.01)
    assert KERNELS.forward_busy(copy) == alone(H100).forward_busy(copy)


sizes = st.integers(1, 65536)


@given(sizes, sizes, sizes)
def test_a_product_stays_under_the_roofline(m: int, k: int, n: int) -> None:
    work = linear(m, k, n)
    for seconds, flops, moved in (
        (KERNELS.forward_seconds(work), work.flops_forward, work.bytes_forward),
        (KERNELS.backward_seconds(work), work.flops_backward, work.bytes_backward),
    ):
        assert seconds >= flops / 989e12 and seconds >= moved / 3.35e12
    assert KERNELS.forward_seconds(work) >= H100.launch_seconds and KERNELS.backward_seconds(work) >= 2 * H100.launch_seconds


@given(sizes, sizes, sizes)
def test_a_larger_product_never_takes_less_time(m: int, k: int, n: int) -> None:
    seconds = KERNELS.busy_seconds(linear(m, k, n))
    for larger in (linear(m + 1, k, n), linear(m, k, n + 1), linear(m, k + 1, n)):
        assert KERNELS.busy_seconds(larger) >= seconds * (1 - 1e-12)


@given(st.floats(1, 1e12))
def test_memory_bound_work_is_bytes_over_bandwidth(moved: float) -> None:
    work = Work("memory", bytes_forward=moved, kernels_forward=0)
    assert KERNELS.forward_seconds(work) == pytest.approx(moved / (3.35e12 * 0.9))
    assert KERNELS.optimizer_seconds(moved) > KERNELS.memory_seconds(moved)


def test_many_small_kernels_cost_their_launches() -> None:
    assert KERNELS.forward_seconds(Work("memory", bytes_forward=8.0, kernels_forward=6)) == 6 * H100.launch_seconds
    assert KERNELS.forward_seconds(Work("none", kernels_forward=0)) == 0.0


def test_a_device_without_a_file_takes_the_curves_of_its_kind() -> None:
    unknown = replace(H100, name="GPU_OF_TOMORROW")
    assert curves_of(unknown).origin.startswith("Not measured")
    assert curves_of(H100).origin.startswith("One NVIDIA H100")
    assert Kernels(CPU, "fp32").forward_seconds(linear(4096, 1024, 1024)) == pytest.approx(2 * 4096 * 2**20 / 8e10, rel=0.25)


def test_every_file_of_curves_tells_its_origin() -> None:
    files = sorted((Path(mlmdsl.planner.compute.__file__).parent / "hardware").glob("*.json"))
    assert {path.stem for path in files} >= {"cpu", "cuda", "rocm", "h100_sxm", "h200_sxm"}
    for path in files:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert len(data["origin"]) > 40, path
        assert 0 < data["matmul"]["share"] < 1 and 0 < data["memory"]["share"] < 1
