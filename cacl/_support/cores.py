"""How many cores there are for this process, and what the system says of the processor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def usable_cores() -> int:
    """How many cores this process may keep busy: those of its affinity mask, and no more than its container's quota."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return mask if quota is None else max(1, min(mask, math.ceil(quota)))


def processor_says(field: str, file: Path = Path("/proc/cpuinfo")) -> str:
    """What the system says of the first processor, such as ``"flags"``; nothing where it does not say."""
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def _quota(system: Path = Path("/")) -> float | None:
    """The CPU quota of this process's control group and those around it, in cores; None where there is none."""
    quotas = []
    with suppress(OSError, ValueError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds and "cpu" not in kinds.split(","):
                continue
            mounted = [system / "sys/fs/cgroup" / name for name in ("cpu", kinds)]  # not every system has links
            root = next((folder for folder in mounted if kinds and folder.is_dir()), system / "sys/fs/cgroup")
            inner = root / group.lstrip("/")
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):
                    if kinds:  # version 1
                        most, period = (int((folder / f"cpu.cfs_{x}_us").read_text()) for x in ("quota", "period"))
                    else:
                        most, period = map(int, (folder / "cpu.max").read_text().split())  # "max" is no number
                    if most > 0 and period > 0:
                        quotas.append(most / period)
                if folder == root:
                    break
    return min(quotas, default=None)


@contextmanager
def threads_of_cores() -> Iterator[None]:
    """No more of torch's threads than :func:`usable_cores`; more would only wait for a quota to be filled again."""
    before, cores = torch.get_num_threads(), usable_cores()
    if before <= cores:
        yield
        return
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)
