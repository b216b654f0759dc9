"""What a device computes in natively."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

_FLAGS = {"avx512_bf16", "amx_bf16"}


def native_precision(device: torch.device | str) -> Literal["fp32", "bf16"]:
    """``"bf16"`` where a device has instructions for it: GPUs from Ampere on, and x86 with AVX-512 BF16 or AMX.

    Elsewhere torch emulates it, many times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and not _FLAGS.isdisjoint(_processor())
    return "bf16" if native else "fp32"


def _processor(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The features of the processor; nothing where the system does not say."""
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, flags = line.partition(":")
            if name.strip() == "flags":
                return set(flags.split())
    return set()
