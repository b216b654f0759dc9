"""Values on their way from the device, which no step waits for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cacl._support.clock import timed
from cacl._support.distributed import all_reduce_sum, world_size
from cacl.errors import NotFiniteError


class Pending:
    """Values on their way from the device: looked at when they have come, so that no step waits for them.

    They are the mean over all processes. With them travels whether one of these was asked to stop: ``stop`` is the
    number of steps after which all do, ``failed`` that after which all raise ``failure``. Where values come late, the
    processes see these at different steps, but all of them before that one.
    """

    def __init__(self, name: str, emit: Callable[[dict[str, Any]], None], patience: int = 8) -> None:
        self.name, self.emit, self.patience = name, emit, patience
        self.stop: int | None = None
        self.failed: int | None = None
        self.failure = NotFiniteError()
        self.queue: deque[
            tuple[dict[str, Any], Callable[[], list[str]], list[tuple[str, int]], Tensor, torch.cuda.Event | None]
        ] = deque()

    def add(
        self, record: dict[str, Any], ids: Callable[[], list[str]], terms: Mapping[str, Tensor], stopping: bool
    ) -> None:
        asked = torch.full((1,), float(stopping), device=terms["loss"].device)
        flat = all_reduce_sum(torch.cat([asked, *(value.detach().float().reshape(-1) for value in terms.values())]))
        event = None
        if flat.is_cuda:
            stream = torch.cuda.current_stream(flat.device)
            flat = flat.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        # One number stays a number, several become a list.
        sizes = [(key, value.numel() if value.ndim else 0) for key, value in terms.items()]
        self.queue.append((record, ids, sizes, flat, event))
        while self.queue and (len(self.queue) > self.patience or self._arrived()):
            self._pop()

    def flush(self) -> None:
        while self.queue:
            self._pop()

    def _arrived(self) -> bool:
        event = self.queue[0][-1]
        return event is None or bool(event.query())  # type: ignore[no-untyped-call]

    def _pop(self) -> None:
        record, ids, sizes, flat, event = self.queue.popleft()
        if event is not None:
            with timed("network"):  # for what it was sent to do
                event.synchronize()
        values = iter((flat / world_size()).tolist())
        seen_by_all = record["step"] + (0 if event is None or world_size() == 1 else self.patience + 1)
        if next(values) > 0 and self.stop is None:
            self.stop = seen_by_all
        for key, size in sizes:
            record[key] = [short(next(values)) for _ in range(size)] if size else short(next(values))
        if not math.isfinite(record["loss"]) and self.failed is None:
            self.failed = seen_by_all
            self.failure = NotFiniteError(
                f"{self.name}: the loss is {record['loss']} at step {record['step']} (images {', '.join(ids())}); "
                "the last good checkpoint is kept. A lower learning rate may help."
            )
        if self.failed is None:
            self.emit(record)

    def due(self, when: int | None, steps: int) -> bool:
        return when is not None and steps >= when


def short(value: float) -> float:
    """To six digits."""
    return float(f"{value:.6g}")
