"""The JSON files that benchmarks have left in a folder, in one Markdown file: ``python benchmarks/tables.py OUT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def rows(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(where it stands, what it is) of every number and text in nested objects and lists."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from rows(each, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for number, each in enumerate(value):
            yield from rows(each, (*path, str(number)))
    else:
        texts = [
            f"{each:.4g}" if isinstance(each, float) else str(each)
            for each in (value if isinstance(value, list) else [value])
        ]
        yield " / ".join(path), ", ".join(texts)


def main() -> None:
    folder = Path(sys.argv[1])
    parts = []
    for path in sorted(folder.glob("*.json")):
        lines = [f"| {name} | {text} |" for name, text in rows(json.loads(path.read_text(encoding="utf-8")))]
        parts.append("\n".join([f"## {path.stem}", "", "| | |", "|---|---|", *lines, ""]))
    if not parts:
        sys.exit(f"{folder}: no JSON files here")
    (folder / "table.md").write_text("\n".join(parts), encoding="utf-8")
    print(folder / "table.md")


if __name__ == "__main__":
    main()
