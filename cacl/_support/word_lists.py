"""Lists of words a class, in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cacl.errors import InputError, first_line


def load_words(path: Path) -> dict[str, list[Any]]:
    """A JSON file ``{"class": ["word", ...], ...}``; what the lists hold is not looked at."""
    try:
        words = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object of words a class, but {first_line(error)}") from None
    if not isinstance(words, dict) or not all(isinstance(value, list) for value in words.values()):
        raise InputError(f"{path}: expected a JSON object that maps each class to a list of words.")
    return words


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} stands twice.")
        result[name] = value
    return result
