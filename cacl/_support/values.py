"""Numbers and texts that a user gave, checked without torch: one line that names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real

from cacl._support.names import composed
from cacl.constants import Range
from cacl.errors import InputError, InputTypeError, expected, quoted


def check_range(argument: str, value: object, low: float, high: float) -> None:
    """Require ``low <= value <= high``, both finite or not; NaN never passes."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"Expected argument `{argument}` to be a number, but got {type(value).__name__}.")
    if not low <= float(value) <= high:
        raise expected(argument, f"a number in [{low:g}, {high:g}]", value)


def check_integer(argument: str, value: object, low: int, high: float = float("inf")) -> None:
    """Require an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        wanted = f"of at least {low}" if high == float("inf") else f"in [{low}, {high:g}]"
        raise expected(argument, f"an integer {wanted}", repr(value))


def check_positive(argument: str, value: object) -> None:
    """Require an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise expected(argument, "a positive integer", repr(value))


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise expected(argument, "one of " + ", ".join(f'"{c}"' for c in choices), repr(value))


def check_words(argument: str, words: Iterable[str]) -> tuple[str, ...]:
    """A non-empty tuple of non-empty, different strings, or an error that names the argument."""
    if isinstance(words, str) or not isinstance(words, Iterable):
        raise InputTypeError(f"Expected `{argument}` to be a list of strings, but got {words!r}.")
    result = tuple(words)
    if not result:
        raise InputError(f"Expected `{argument}` to have at least one entry, but it is empty.")
    seen = set()
    for word in result:
        if not isinstance(word, str):
            raise InputTypeError(f"Expected `{argument}` to be a list of strings, but it has {word!r}.")
        if not word.strip():
            raise InputError(f"Expected `{argument}` to have no empty entry, but it has {word!r}.")
        same = composed(word).lower()
        if same in seen:
            raise InputError(f"Expected `{argument}` to have no duplicates, but {word!r} stands twice.")
        seen.add(same)
    return result


def check_span(range: object, name: str = "") -> Range:
    """What values may span: two finite numbers, the lower one first; else an error that names them."""
    if isinstance(range, list | tuple) and len(range) == 2 and all(type(value) in (int, float) for value in range):
        low, high = range
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return low, high
    raise InputError(f"{name}expected two numbers, the lower one first, such as [0, 4095], but got {quoted(range)}")
