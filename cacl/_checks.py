"""Errors that a user can mend: one line that names the thing, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pickle import UnpicklingError

import torch
from torch import Tensor


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
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(value: object) -> str:
    """A path or a text as it is, or in quotes and escaped where it would not stay one line that can be printed."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def quoted(value: object) -> str:
    """A value as it was given, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def check_tensor(argument: str, value: object, dims: str) -> None:
    """Require a floating point tensor with as many dimensions as ``dims`` names, for example ``"(N, D)"``."""
    if not isinstance(value, Tensor):
        raise InputTypeError(f"Expected argument `{argument}` to be a tensor {dims}, but got {type(value).__name__}.")
    if not value.is_floating_point():
        raise InputTypeError(f"Expected argument `{argument}` to be of a floating point type, but got {value.dtype}.")
    if value.ndim != dims.count(",") + 1:
        raise expected(argument, f"a tensor {dims}", shape(value))


def check_weights(source: object, weights: Mapping[str, Tensor]) -> None:
    """Require weights from a file to be plain tensors, no larger than what was stored of them, and finite."""
    for name, value in weights.items():
        plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"{source}: {name!r}: expected a tensor with all of its values")
        if not value.isfinite().all():
            raise InputError(f"{source}: {name!r}: expected finite weights, but got NaN or infinity")


def check_same_shape(dims: str, **tensors: Tensor) -> None:
    """Require floating point tensors of one shape."""
    (first, reference), *others = tensors.items()
    check_tensor(first, reference, dims)
    for name, tensor in others:
        check_tensor(name, tensor, dims)
        if tensor.shape != reference.shape:
            raise expected(name, f"of the same shape as `{first}` {tuple(reference.shape)}", shape(tensor))


def check_classes(classes: Tensor, pairs: int, num_classes: int | None) -> None:
    """Require int64 class indices ``(N,)``; their range is looked at on the CPU only, where it costs no wait."""
    if not isinstance(classes, Tensor) or classes.dtype not in (torch.int64, torch.int32):
        kind = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise InputTypeError(f"Expected argument `classes` to be an integer tensor (N,), but got {kind}.")
    if tuple(classes.shape) != (pairs,):
        raise expected("classes", f"a tensor ({pairs},), one class a pair", shape(classes))
    if num_classes is not None and classes.device.type == "cpu" and classes.numel():
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_classes:
            raise expected("classes", f"in [0, {num_classes - 1}]", low if low < 0 else high)


def check_range(argument: str, value: float, low: float, high: float) -> None:
    """Require ``low <= value <= high``, both finite or not; NaN never passes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputTypeError(f"Expected argument `{argument}` to be a number, but got {type(value).__name__}.")
    if not low <= value <= high:
        raise expected(argument, f"a number in [{low:g}, {high:g}]", value)


def check_integer(argument: str, value: object, low: int, high: float = float("inf")) -> None:
    """Require an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        wanted = f"of at least {low}" if high == float("inf") else f"in [{low}, {high:g}]"
        raise expected(argument, f"an integer {wanted}", repr(value))


def check_positive(argument: str, value: object) -> None:
    """Require an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
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
        if word.lower() in seen:
            raise InputError(f"Expected `{argument}` to have no duplicates, but {word!r} stands twice.")
        seen.add(word.lower())
    return result


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean "margin"?``, or nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""
