"""Which of several processes this is, by what torchrun tells it; known before torch is imported."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun has started this process with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process speaks for the run, also before and after it has taken part in a group."""
    return not launched() or os.environ["RANK"] == "0"
