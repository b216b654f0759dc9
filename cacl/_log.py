"""``log.jsonl``: what a run measured while it trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cacl._files import write_text

Record = dict[str, Any]
Callback = Callable[[Record], None]


class Log:
    """``log.jsonl``: a JSON object a line, appended and flushed as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[Record]:
        """All whole lines; a line that was cut off by a kill is left out."""
        records = []
        for line in self._text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def rewind(self, stage: str, step: int) -> None:
        """Forget what ``stage`` wrote after ``step``."""
        records = self.records()
        kept = [record for record in records if record.get("stage") != stage or record.get("step", 0) <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if text != self._text():
            write_text(self.path, text)

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
