"""Errors that a user can mend: one line that names the thing, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacl.errors import InputTypeError, expected


def shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def kind_of(value: object) -> str:
    """What came in place of a tensor, and how one is made of it."""
    hint = "; torch.from_numpy makes a tensor of it" if isinstance(value, np.ndarray) else ""
    return type(value).__name__ + hint


def check_tensor(argument: str, value: object, dims: str) -> None:
    """Require a floating point tensor with as many dimensions as ``dims`` names, for example ``"(N, D)"``."""
    if not isinstance(value, Tensor):
        raise InputTypeError(f"Expected argument `{argument}` to be a tensor {dims}, but got {kind_of(value)}.")
    if value.layout != torch.strided:
        raise InputTypeError(f"Expected argument `{argument}` to be a dense tensor {dims}, but got {value.layout}.")
    if not value.is_floating_point():
        raise InputTypeError(f"Expected argument `{argument}` to be of a floating point type, but got {value.dtype}.")
    if value.ndim != dims.count(",") + 1:
        raise expected(argument, f"a tensor {dims}", shape(value))


def as_array(argument: str, value: object, dims: str = "", *, numbers: bool = False) -> NDArray[Any]:
    """An array, or a tensor on any device, or nested lists, as an array of integers, or with ``numbers`` of real ones.

    ``dims`` names as many dimensions as it has, for example ``"(H, W)"``; empty for any number.
    """
    try:
        if isinstance(value, Tensor):
            value = (value.detach().float() if value.dtype == torch.bfloat16 else value.detach()).cpu().numpy()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors that are sparse or have no values
        array = np.asarray(None)
    kind = array.dtype if array.dtype.kind in "fcmMUS" or isinstance(value, np.ndarray) else type(value).__name__
    if array.dtype.kind not in ("fiub" if numbers else "iub") and array.size:
        wanted = "real numbers" if numbers else "integers"
        raise InputTypeError(f"Expected argument `{argument}` to hold {wanted}, but got {kind}.")
    if dims and array.ndim != len(dims.rstrip(",)").split(",")):
        raise expected(argument, f"an array {dims}", f"shape {array.shape}")
    return array


def as_indices(argument: str, value: object, last: int) -> NDArray[np.int64]:
    """Class indices ``(C,)`` from 0 to ``last`` in an array, a tensor or a list, as an array."""
    array = as_array(argument, value, numbers=True)
    array = array if array.size else np.zeros(0, np.int64)
    wanted = f"class indices (C,) in [0, {last}]"
    if array.dtype.kind not in "iu":
        raise InputTypeError(f"Expected argument `{argument}` to be {wanted}, but got {array.dtype}.")
    if array.ndim != 1:
        raise expected(argument, wanted, f"shape {array.shape}")
    wrong = array[(array < 0) | (array > last)]
    if len(wrong):
        raise expected(argument, wanted, int(wrong[0]))
    return array.astype(np.int64)


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


_LABELS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
"""Types of labels; torch counts no ones among others."""


def check_labels(labels: object, classes: int | None = None) -> None:
    """Require ``(B, K)`` of 0 and 1, or bool; the values are looked at on the CPU only, where it costs no wait."""
    columns = "K" if classes is None else classes
    if not isinstance(labels, Tensor):
        raise InputTypeError(f"Expected argument `labels` to be a tensor (B, {columns}), but got {kind_of(labels)}.")
    if labels.dtype not in _LABELS or labels.layout != torch.strided or labels.is_meta:
        came = labels.layout if labels.layout != torch.strided else "meta" if labels.is_meta else labels.dtype
        raise InputTypeError(f"Expected argument `labels` to be bool, or plain integers or numbers, but got {came}.")
    if labels.ndim != 2 or (classes is not None and labels.shape[1] != classes):
        raise expected("labels", f"a tensor (B, {columns})", shape(labels))
    if labels.device.type == "cpu" and labels.dtype != torch.bool:
        wrong = (labels != 0) & (labels != 1)  # NaN too
        if wrong.any():
            image, k = wrong.nonzero()[0].tolist()
            value = labels[image, k].item()
            raise expected("labels", "0 (absent) or 1 (present)", f"{value} for image {image}, class {k}")
