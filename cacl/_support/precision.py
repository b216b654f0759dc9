"""What a device computes in natively, and computing in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cacl._support.cores import processor_says
from cacl._support.waiting import warn_once
from cacl.constants import Precision

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


def decided(precision: Precision | Literal["auto"], device: torch.device | str) -> Precision:
    """What a device computes in: the native one for ``"auto"``; a warning where it emulates another one."""
    if precision == "auto":
        return native_precision(device)
    unusual = precision == "bf16" or (precision == "fp16" and torch.device(device).type == "cpu")
    if unusual and native_precision(device) == "fp32":
        warn_once(f"{device}: {precision} is emulated here, many times slower than fp32")
    return precision


@contextmanager
def computing_in(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Autocast, with the weights as they are now.

    Torch keeps the weights that it has cast until nobody is in autocast any more, not even in one that is switched off:
    with another one around this, a training would compute with those of its first step for ever.
    """
    torch.clear_autocast_cache()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    try:
        with torch.autocast(torch.device(device).type, dtype, enabled=precision != "fp32"):
            yield
    finally:
        torch.clear_autocast_cache()


def head_of(features: Tensor, weight: Tensor, head: Callable[[Tensor], Tensor], *, training: bool) -> Tensor:
    """What a network's last layers make of its features: in evaluation, under autocast, in the type of their weight,
    since what decides between classes must not be rounded, and costs little beside the rest."""
    kind = features.device.type
    if training or not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return head(features)
    with torch.autocast(kind, enabled=False):  # not where it is off: an export traces none
        return head(features.to(weight.dtype))


def _processor(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The features of the processor; nothing where the system does not say."""
    return set(processor_says("flags", file).split())
