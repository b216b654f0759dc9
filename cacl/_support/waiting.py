"""Waiting for other processes of this machine: as long as they do something, and no longer than that."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from cacl.errors import first_line

logger = logging.getLogger("cacl")

POLL = 2.0
"""Seconds after which a wait looks up: whether it was asked to stop, and whether those it waits for still work."""
PATIENCE = 600.0
"""Seconds for which processes may do nothing while they are waited for."""
WAITED = 5.0
"""Seconds; a training that is asked to stop does so without the step of a batch that does not come in this time."""
_WORK = 1.0
"""Seconds of computing that count as doing something; less is what looking for work takes."""


class Patience:
    """How long some processes have done nothing: a large photo on a slow machine takes what it takes.

    Where the system does not say how long they have computed, it is the time that they have been waited for.
    """

    def __init__(self, processes: Iterable[int | None]) -> None:
        self._processes = list(processes)
        self._since, self._work = time.monotonic(), 0.0

    def check(self, what: str) -> None:
        """Give up processes that have done nothing for :data:`PATIENCE`; ``what`` they are for.

        Raises:
            ChildProcessError: if they are given up.
        """
        now, work = time.monotonic(), self._computed()
        if work - self._work >= _WORK:
            self._since, self._work = now, work
        elif now - self._since > PATIENCE:
            raise ChildProcessError(
                f"The processes that {what} have done nothing for {PATIENCE / 60:.0f} minutes: they were stopped, or "
                "wait for a disk that does not answer. With 0 workers no process is needed."
            )

    def _computed(self) -> float:
        """Seconds that the processes have computed; 0 where the system does not say."""
        if sys.platform == "win32":
            return 0.0
        ticks = 0
        for process in self._processes:
            with suppress(OSError, ValueError):  # it has ended, or the system has no such file
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])  # in the program, and in the system for it
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0


@cache
def warn_once(text: str) -> None:
    """A warning of what is the same for everything that this process does."""
    logger.warning("%s", text)


def why_not(error: BaseException) -> str:
    """Why no process could be started, and what helps."""
    return f"{first_line(error)} (is /dev/shm there, with room in it? docker run --shm-size=1g)"
