"""What objects of a user's own answer: one line names the member, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cacl._support.checks import kind_of, shape
from cacl.errors import InputError, InputTypeError, quoted

_MEANT = ("image_embeds", "text_embeds", "pooler_output", "out", "features")
"""What the tensor that is wanted is called, where models give several."""


def described(value: object) -> str:
    """What came in place of a tensor, and how the tensor is got from it."""
    if isinstance(value, type):
        return f"the class {value.__name__}; give an object of it, such as {value.__name__}()"
    if isinstance(value, Mapping):
        held = ", ".join(repr(key) for key in [*value][:4]) or "nothing"
        meant = next((name for name in _MEANT if name in value), None)
        return f"{type(value).__name__} with {held}; give {f'its {meant!r}' if meant else 'the tensor'} alone"
    if isinstance(value, tuple | list):
        held = ", ".join(type(each).__name__ for each in value[:4]) or "nothing"
        return f"{type(value).__name__} of {held}; give the tensor alone"
    meant = next((name for name in _MEANT if name in getattr(value, "__dict__", {})), None)
    return kind_of(value) + (f"; give its `{meant}`" if meant else "")


def check_answer(expecting: str, answer: object, sizes: tuple[int | None, ...], wanted: str) -> Tensor:
    """Require a floating point tensor of these sizes, None for any.

    Args:
        expecting: how the message begins, such as ``"Expected `encoder.encode_text` to return"``.
        answer: what came.
        sizes: of each dimension.
        wanted: the same in words, such as ``"(4, D) for 4 texts"``.
    """
    if not isinstance(answer, Tensor):
        raise InputTypeError(f"{expecting} a tensor {wanted}, but got {described(answer)}.")
    if not answer.is_floating_point():
        raise InputTypeError(f"{expecting} {wanted} of a floating point type, but got {answer.dtype}.")
    fits = answer.ndim == len(sizes) and all(
        size is None or have == size for size, have in zip(sizes, answer.shape, strict=True)
    )
    if not fits or answer.layout != torch.strided:
        raise InputError(f"{expecting} {wanted}, but got {shape(answer) if not fits else answer.layout}.")
    return answer


def check_text_features(answer: object, texts: int) -> Tensor:
    """Require what ``encode_text`` gives to be ``(texts, D)``, finite."""
    expecting = "Expected `encoder.encode_text` to return"
    features = check_answer(expecting, answer, (texts, None), f"({texts}, D) for {texts} texts")
    if features.is_meta:
        raise InputError(f"{expecting} features with values, but got them on the device meta.")
    if not features.isfinite().all():
        raise InputError(f"{expecting} finite features, but got NaN or infinity.")
    return features


def check_image_features(answer: object, images: Tensor, width: int) -> Tensor:
    """Require what ``encode_image`` gives for images to be ``(N, width)``, where they are and with a way back to them.

    On the CPU, where it costs no wait, they are finite too if the images are.
    """
    expecting = "Expected argument `encoder.encode_image` to be returning"
    features = check_answer(expecting, answer, (len(images), None), f"({len(images)}, D) features")
    if features.shape[1] != width:
        raise InputError(f"{expecting} features as long as `encode_text`'s {width}, but got {shape(features)}.")
    if features.device != images.device:
        raise InputError(f"{expecting} features on the images' device {images.device}, but got {features.device}.")
    if images.requires_grad and torch.is_grad_enabled() and not features.requires_grad:
        raise InputError(
            f"{expecting} features that are differentiable with respect to the images, but they have no gradient, so "
            "that nothing would be trained: leave torch.no_grad(), torch.inference_mode() and detach() out of it."
        )
    if features.device.type == "cpu" and not features.isfinite().all() and images.isfinite().all():
        raise InputError(f"{expecting} finite features, but got NaN or infinity.")
    return features


def check_dense_features(answer: Any, images: Tensor, width: int) -> Any:
    """Require what ``encode_dense`` gives for images to be features, activations and attention that go together."""
    expecting = "Expected argument `encoder.encode_dense` to be returning"
    if not all(hasattr(answer, member) for member in ("features", "activations", "attention")):
        raise InputTypeError(f"{expecting} cacl.dense.DenseFeatures, but got {described(answer)}.")
    count = len(images)
    features = check_answer(
        expecting, answer.features, (count, width, None, None), f"features ({count}, {width}, h, w)"
    )
    height, width = features.shape[2:]
    wanted = f"activations ({count}, C, {height}, {width})"
    activations = check_answer(expecting, answer.activations, (count, None, height, width), wanted)
    if answer.attention is not None:
        places = height * width
        check_answer(expecting, answer.attention, (count, places, places), f"attention ({count}, {places}, {places})")
    if not activations.requires_grad or not features.requires_grad:
        raise InputError(f"{expecting} features that are differentiable with respect to its activations.")
    return answer


def check_encoder(encoder: object, *, dense: bool = False) -> None:
    """Require the five members of an encoder, of their types, and what tells what it sees where if that is needed."""
    if isinstance(encoder, type):
        raise InputTypeError(f"Expected argument `encoder` to be an object, but got {described(encoder)}.")
    dense_members = ("encode_dense",) if dense else ()
    for member in ("image_size", "mean", "std", "encode_image", "encode_text", *dense_members):
        if not hasattr(encoder, member):
            hint = f"; load_encoder({encoder!r}) makes one" if isinstance(encoder, str) else ""
            raise InputTypeError(
                f"Expected argument `encoder` to have `{member}`, but {type(encoder).__name__} lacks it{hint}."
            )
    for member in ("encode_image", "encode_text", *dense_members):
        check_callable(f"encoder.{member}", getattr(encoder, member))
    side_of(encoder)
    statistics_of(encoder)


def side_of(encoder: Any) -> int:
    """The side in pixels of the square that an encoder sees."""
    given = encoder.image_size
    try:
        side = 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        raise InputTypeError(
            "Expected `encoder.image_size` to be one integer, the side in pixels of the square that it sees, "
            f"but got {quoted(given)}."
        ) from None
    if side < 1:
        raise InputError(f"Expected `encoder.image_size` to be a positive integer, but got {quoted(given)}.")
    return side


def statistics_of(encoder: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of an encoder's input, a number a channel."""
    mean, std = (_numbers(f"encoder.{name}", getattr(encoder, name)) for name in ("mean", "std"))
    if max(map(abs, mean)) > 1:  # of pixels of 0 … 255; what the encoder would see is (nearly) constant
        raise InputError(f"Expected `encoder.mean` to be of pixels of 0 to 1, but got {quoted(encoder.mean)}.")
    if min(std) <= 0:
        raise InputError(f"Expected `encoder.std` to be positive, but got {quoted(encoder.std)}.")
    if max(std) > 1:
        raise InputError(f"Expected `encoder.std` to be of pixels of 0 to 1, but got {quoted(encoder.std)}.")
    return mean, std


def _numbers(member: str, given: Any) -> tuple[float, ...]:
    wanted = f"Expected `{member}` to be three finite numbers, one a channel, but got {quoted(given)}."
    try:
        values = given.reshape(-1).tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
        numbers = tuple(math.nan if isinstance(value, str) else float(value) for value in values)
    except (TypeError, ValueError, RuntimeError):  # no list, or of something else than numbers
        raise InputTypeError(wanted) from None
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise InputError(wanted)
    return numbers


def check_terms(terms: Any) -> None:
    """Require what a criterion gives to be a NamedTuple with a ``total``: a scalar with a gradient."""
    wanted = "Expected argument `criterion` to return a NamedTuple with a `total`"
    if not hasattr(terms, "_asdict"):
        raise InputTypeError(f"{wanted}, but got {type(terms).__name__}.")
    total = getattr(terms, "total", None)
    if not isinstance(total, Tensor):
        came = "no `total`" if total is None else f"a `total` that is {type(total).__name__}"
        raise InputTypeError(f"{wanted}, a tensor, but got {came} in {type(terms).__name__}.")
    if total.shape != () or not total.is_floating_point():
        raise InputError(f"{wanted}, a scalar of a floating point type, but got {shape(total)} of {total.dtype}.")
    if not total.requires_grad:
        raise InputError(f"{wanted} that has a gradient, but the one that came (detached?) would train nothing.")


def check_given(encoder: object, backbone: object, criterion: object) -> None:
    """Require what is given to a run to be objects, where it is given: a class in the place of one is seen at once."""
    if isinstance(encoder, type):
        check_encoder(encoder)
    if backbone is not None and not isinstance(backbone, nn.Module):
        channels_of(backbone)
    if isinstance(criterion, type):
        raise InputTypeError(f"Expected argument `criterion` to be an object, but got {described(criterion)}.")
    if criterion is not None:
        check_callable("criterion", criterion)


def check_callable(argument: str, value: object) -> None:
    if not callable(value):
        raise InputTypeError(f"Expected argument `{argument}` to be callable, but got {type(value).__name__}.")


def channels_of(backbone: object) -> int:
    """The channels of a backbone's features, from its ``out_channels``."""
    return _channels(backbone, "an integer `out_channels`", getattr(backbone, "out_channels", None))


def levels_of(backbone: object) -> tuple[int, ...]:
    """The channels of each of a backbone's levels, from its ``level_channels``, or its ``out_channels`` alone."""
    given = getattr(backbone, "level_channels", None) or getattr(backbone, "out_channels", None)
    wanted = "`levels` and `level_channels`, or with an integer `out_channels`"
    return tuple(_channels(backbone, wanted, each) for each in (given if isinstance(given, list | tuple) else [given]))


def _channels(backbone: object, wanted: str, given: Any) -> int:
    try:
        channels = operator.index(given)
    except TypeError:
        channels = 0
    if not isinstance(backbone, nn.Module) or isinstance(given, bool) or channels < 1:
        is_module = isinstance(backbone, nn.Module)
        came = type(backbone).__name__ if is_module else described(backbone)
        held = f" with {quoted(given)}" if is_module and given is not None else ""
        raise InputTypeError(
            f"Expected argument `backbone` to be a ResNet's name or a module with {wanted}, but got {came}{held}."
        )
    return channels


def check_maps(answer: object, images: Tensor, weight: Tensor) -> Tensor:
    """Require what a backbone gives for images to be ``(B, channels, h, w)``, as a convolution's weight is made for."""
    channels = weight.shape[1]
    expecting, wanted = "Expected argument `backbone` to be giving", f"(B, {channels}, h, w)"
    maps = check_answer(expecting, answer, (images.shape[0], channels, None, None), wanted)
    if 0 in maps.shape[2:]:
        raise InputError(f"{expecting} {wanted}, but got {shape(maps)}: are the images too small for it?")
    if maps.device != weight.device:
        raise InputError(f"{expecting} maps on the network's device {weight.device}, but got {maps.device}.")
    if maps.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise InputTypeError(f"{expecting} maps of the network's type {weight.dtype}, but got {maps.dtype}.")
    return maps


def check_levels(answer: object, images: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Require what a backbone's ``levels`` gives for images to be a list of ``(B, channels, h, w)``."""
    wanted = f"Expected argument `backbone` to give {len(weights)} levels"
    if not isinstance(answer, list | tuple):
        raise InputTypeError(f"{wanted}, but got {type(answer).__name__}.")
    if len(answer) != len(weights):
        raise InputError(f"{wanted}, but got {len(answer)}.")
    return [check_maps(each, images, weight) for each, weight in zip(answer, weights, strict=True)]
