"""What a machine is, for whoever compares results and times: no name of a machine or a user, and no path."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from typing import Any

import torch
import torchvision

from cacl._support.cores import processor_says, usable_cores


def described() -> dict[str, Any]:
    """Processor, cores that may be used, GB of memory, GPUs, and the versions that compute."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor_says("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gb": _memory(),
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
    }


def _memory() -> float | None:
    """None where the system does not say."""
    if sys.platform == "win32":
        return None
    with suppress(OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
