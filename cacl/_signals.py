"""Being asked to stop: Ctrl-C and SIGTERM wait until there is something whole to leave behind."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one has its usual effect at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    @property
    def came(self) -> bool:
        return self._number is not None

    def take_effect(self) -> None:
        """What the signal would have done when it came; SIGTERM where it came to another process."""
        self.__exit__()
        signal.raise_signal(signal.SIGTERM if self._number is None else self._number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self._number = number
            self.take_effect()
        self._number = number
