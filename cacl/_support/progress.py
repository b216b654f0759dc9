"""Progress bars: where there is a terminal, and in one of several processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from cacl._support.distributed import rank


def watched(
    items: Iterable[Any] | None, *, total: int | None, desc: str, progress: bool, unit: str = "image", initial: int = 0
) -> Any:
    """``items`` with a progress bar, or a bar alone that is moved by ``update``; the only place that makes one."""
    hidden = None if progress and rank() == 0 else True
    return tqdm(items, total=total, initial=initial, desc=desc, unit=unit, disable=hidden)
