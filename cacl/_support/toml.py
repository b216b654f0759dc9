"""TOML in and out: files, overrides of single keys, values."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacl.errors import InputError, first_line, shown


def read_toml(path: Path, presets: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a file, or an error that says why it has none; ``presets``: what its name might have meant."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = f" and no preset ({', '.join(presets)})" if presets and len(path.parts) == 1 and not path.suffix else ""
        raise InputError(f"{shown(path)}: no such file{hint}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: numbers of thousands of digits too
        raise InputError(f"{shown(path)}: expected a TOML file, but {first_line(error)}") from None


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``"table.key=value"`` -> table -> key -> value, the value as in TOML, or else a string."""
    tables: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        table, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise InputError(f"Expected an override like cacl.epochs=3, but got {override!r}.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text.strip()
        tables.setdefault(table, {})[name] = value
    return tables


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base``, and over it the values of ``over``, table by table."""
    result = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = {**result[name], **value} if both else value
    return result


def toml_value(value: Any) -> str:
    """A value as TOML has it."""
    # JSON's strings, finite numbers, booleans and lists of them are TOML's, but for DEL; escaped, JSON writes what is
    # outside of the 16-bit range as two halves, which TOML refuses.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
