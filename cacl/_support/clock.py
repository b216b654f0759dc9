"""Where the time goes: what this process, and those that work for it, have spent on what."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

KINDS = {
    "photos": "waiting for photos",
    "network": "network",
    "walk": "random walk",
    "crf": "CRF",
    "files": "files of the run",
}
"""What is told apart, and what people call it; what remains is everything else."""
Kind = Literal["photos", "network", "walk", "crf", "files"]

_spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
_lock = threading.Lock()
_here = threading.local()


@contextmanager
def timed(kind: Kind) -> Iterator[None]:
    """The time of a block, or of a function that it decorates, is spent on this; what is within, on this too."""
    if getattr(_here, "busy", False):
        yield
        return
    _here.busy, start = True, time.monotonic()
    try:
        yield
    finally:
        _here.busy = False
        add({kind: time.monotonic() - start})


def add(times: Mapping[str, float], share: float = 1.0) -> None:
    """Time that another process has spent, of which so much was waited for here."""
    with _lock:
        for kind, seconds in times.items():
            _spent[kind] += share * seconds


def spent(since: Mapping[str, float] | None = None) -> dict[str, float]:
    """Kind -> seconds, since the process has begun or since there were so many."""
    with _lock:
        return {kind: seconds - (since or {}).get(kind, 0.0) for kind, seconds in _spent.items()}
