"""What a user can mend, said in one line that names the thing, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pickle import UnpicklingError


class InputError(ValueError):
    """Something that the user gave (an argument, a file, a setting) is wrong; the message is one line."""


class InputTypeError(InputError, TypeError):
    """As :class:`InputError`, where the type is wrong."""


class NotFiniteError(RuntimeError):
    """A loss became NaN or infinite; the message names the step and its images."""


def expected(argument: str, wanted: str, got: object) -> InputError:
    """The error for an argument of the right type with a wrong value."""
    return InputError(f"Expected argument `{argument}` to be {wanted}, but got {got}.")


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    if isinstance(error, UnpicklingError) or "allow_pickle" in str(error):  # whose text advises to run what is in it
        return "it holds something else than tensors and plain values"
    if isinstance(error, RecursionError):  # which each version of Python says in other words
        return "it is nested too deep"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(value: object) -> str:
    """A path or a text as it is, or in quotes and escaped where it would not stay one line that can be printed."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def quoted(value: object) -> str:
    """A value as it was given, on one line and cut off where it is long."""
    try:
        text = " ".join(map(str.strip, repr(value).splitlines()))
    except ValueError:  # Python writes no numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean "margin"?``, or nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


class ElsewhereError(InputError):
    """What another process raised, and tells the user."""


class LostProcessError(ConnectionError):
    """Another process died, or has not answered in time."""
