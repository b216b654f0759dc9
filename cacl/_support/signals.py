"""Being asked to stop: Ctrl-C and SIGTERM wait until there is something whole to leave behind."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

_ONE_REQUEST = 2.0
"""Seconds; a signal to a group of processes may come from several of them."""


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is only noted; another one, later, has its usual effect at once.

    What was noted has its usual effect when the block ends. A signal that is ignored stays ignored. Outside the main
    thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as in a script's background job
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if kind is None and self._number is not None:
            self.take_effect()

    @property
    def came(self) -> bool:
        return self._number is not None

    def came_before(self, seconds: float) -> bool:
        """Whether it is so long ago that a signal was noted."""
        return self.came and time.monotonic() - self._when > seconds

    def take_effect(self) -> None:
        """What the signal would have done when it came; SIGTERM where it came to another process.

        Where a handler of the user's own lets the work go on, signals have their usual effect from then on.
        """
        number = signal.SIGTERM if self._number is None else self._number
        self._number = None
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came and time.monotonic() - self._when > _ONE_REQUEST:
            self._number = number
            self.take_effect()
        elif not self.came:
            self._number, self._when = number, time.monotonic()
