"""``log.jsonl`` and ``times.json``: what a run measured, and what each stage cost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cacl._support.clock import spent
from cacl._support.distributed import rank
from cacl._support.files import naming, read_json, to_json, write_json, write_text
from cacl.images import Pixels

Record = dict[str, Any]
"""A line of ``log.jsonl``."""
Callback = Callable[[Record], None]
"""Gets every record as it is written."""
Pictures = Callable[[str, int, Pixels], None]
"""Gets a stage, a step, and a picture ``(H, W, 3)``."""
T = TypeVar("T")


class Log:
    """``log.jsonl``: a JSON object a line, appended and flushed as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Record) -> None:
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", opener=_not_through_a_link) as file:
                file.write(to_json(record) + "\n")

    def records(self) -> list[Record]:
        """All whole lines; one that was cut off by a kill, or is no record, is left out."""
        records = []
        for line in self._text().splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step", 0), int):
                records.append(record)
        return records

    def rewind(self, stage: str, step: int) -> None:
        """Forget what ``stage`` wrote after ``step``."""
        self._keep(lambda record: record.get("stage") != stage or record.get("step", 0) <= step)

    def keep(self, stages: Collection[str]) -> None:
        """Forget all but what some stages wrote."""
        self._keep(lambda record: record.get("stage") in stages)

    def _keep(self, wanted: Callable[[Record], bool]) -> None:
        kept = filter(wanted, self.records())
        text = "".join(to_json(record) + "\n" for record in kept)
        if text != self._text():
            write_text(self.path, text)

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""


@dataclass(frozen=True)
class Journal:
    """What a training leaves of itself while it runs.

    Args:
        checkpoint: file to go on from and to save to; removed by nobody here.
        key: a checkpoint with another key is of another training and is not used.
        log: where records go.
        callback: gets every record.
        checkpoint_seconds: time between checkpoints.
        name: what records are filed under; the training's own name if empty.
        pictures: gets a picture of some CAMs after each pass over the images, where CAMs are trained; of rank 0.
    """

    checkpoint: Path | None = None
    key: str = ""
    log: Log | None = None
    callback: Callback | None = None
    checkpoint_seconds: float = 60.0
    name: str = ""
    pictures: Pictures | None = None


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def measured(path: Path, stage: str, *, again: bool) -> Iterator[dict[str, float]]:
    """Add up in ``path`` the seconds that a stage takes over all its stops, and the peak memory in it, of rank 0.

    Args:
        path: ``times.json``: stage -> ``seconds``, of which so many for each of :data:`cacl._support.clock.KINDS`, and
            ``memory_mb`` where the system says it.
        stage: the stage.
        again: begin at 0.

    Yields:
        The stage's entry, which is up to date when the block has ended.
    """
    known = None if again else read_json(path).get(stage)
    numbers = {k: v for k, v in known.items() if isinstance(v, int | float)} if isinstance(known, dict) else {}
    cost: dict[str, float] = {"seconds": 0.0, **numbers}
    start, before = time.monotonic(), spent()
    with suppress(OSError):  # Linux only; the high-water mark begins anew
        Path("/proc/self/clear_refs").write_text("5")

    def add() -> None:
        cost["seconds"] = round(cost["seconds"] + time.monotonic() - start, 2)
        for kind, seconds in spent(before).items():
            if (whole := round(cost.get(kind, 0.0) + seconds, 2)) > 0:
                cost[kind] = whole
        if (peak := _peak_mb()) is not None:
            cost["memory_mb"] = max(peak, cost.get("memory_mb", 0.0))
        if rank() == 0:
            write_json(path, {**read_json(path), stage: cost})

    try:
        yield cost
    except BaseException:
        with suppress(OSError):  # what went wrong before is what counts: a full disk is full for this file too
            add()
        raise
    add()


def keep_costs(path: Path, stages: Collection[str]) -> None:
    """Take all but some stages out of ``times.json``."""
    known = read_json(path)
    kept = {stage: cost for stage, cost in known.items() if stage in stages}
    if kept != known:
        write_json(path, kept)


def _peak_mb() -> float | None:
    """The most memory that this process has held at once, in MB; None where the system does not say it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return None
