"""This machine's GPUs, as settings of a cluster: found with nvidia-smi, so that planning stays free of torch."""

from __future__ import annotations

import shutil
import subprocess

from mlmdsl.diagnostics import Diagnostic, UsageError

# (part of the name that the driver prints, least memory in MiB) -> device of the library; the first match holds
_KNOWN = (
    ("H200", 130_000, "H200_SXM_141GB"),
    ("H100 PCIe", 70_000, "H100_PCIE_80GB"),
    ("H100", 90_000, "H100_SXM_96GB_500W"),
    ("H100", 70_000, "H100_SXM_80GB"),
    ("GB200", 150_000, "GB200_186GB"),
    ("B200", 150_000, "B200_SXM_192GB"),
    ("A100-PCIE", 70_000, "A100_PCIE_80GB"),
    ("A100 80GB PCIe", 70_000, "A100_PCIE_80GB"),
    ("A100", 70_000, "A100_SXM_80GB"),
    ("A100", 35_000, "A100_SXM_40GB"),
    ("V100", 30_000, "V100_SXM3_32GB"),
    ("L40S", 40_000, "L40S_48GB"),
    ("RTX 4090", 20_000, "RTX_4090_24GB"),
)


def local_gpus(listing: str | None = None) -> list[str]:
    """Overrides that make the cluster this machine's GPUs; empty where there are none.

    `listing` is nvidia-smi's answer, one "name, MiB" a line (asked for when None). Raises UsageError for a GPU that the device
    library does not know."""
    rows = _query() if listing is None else listing
    cards = [line.rsplit(",", 1) for line in rows.splitlines() if "," in line]
    if not cards:
        return []
    name, memory = cards[0][0].strip(), float(cards[0][1])
    device = next((d for part, least, d in _KNOWN if part in name and memory >= least), None)
    if device is None:
        raise UsageError(
            [
                Diagnostic(
                    "MLM0751",
                    f"the device library has no {name} with {memory:,.0f} MiB",
                    help="describe it in the spec: device = gpu(memory = 80 GiB, bf16 = 312 TFLOPS, ...)",
                )
            ]
        )
    overrides = ["cluster.nodes=1", f"cluster.devices_per_node={len(cards)}", f"cluster.device={device}"]
    return overrides + (["cluster.intra=pcie(bandwidth = 25 GB/s per gpu)"] if len(cards) > 1 else [])


def _query() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return found.stdout if found.returncode == 0 else ""
