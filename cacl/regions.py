"""Foreground and background regions of every present (image, class) pair (CA-CL, eq. 2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from cacl._support.checks import check_labels, check_tensor, shape
from cacl._support.values import check_positive
from cacl.errors import expected


class Regions(NamedTuple):
    """The masked images of N pairs."""

    foreground: Tensor
    """``(N, 3, size, size)``: image · CAM."""
    background: Tensor
    """``(N, 3, size, size)``: image · (1 − CAM)."""
    image_index: Tensor
    """The image of each pair, ``(N,)`` int64."""
    class_index: Tensor
    """The class of each pair, ``(N,)`` int64."""


def present_pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The (image, class) pairs whose label is set.

    The number of pairs depends on the labels' values: labels on a GPU make the call wait for it, labels on the CPU
    do not.

    Args:
        labels: ``(B, K)``, 0 or 1.

    Returns:
        Image indices and class indices, both ``(N,)`` int64, in the order of the images.

    Raises:
        ValueError: if the shape is another, or a label is neither 0 nor 1 (looked at on the CPU only).

    Example:
        >>> present_pairs(torch.tensor([[0, 1, 1], [1, 0, 0]]))
        (tensor([0, 0, 1]), tensor([1, 2, 0]))
    """
    check_labels(labels)
    image_index, class_index = labels.nonzero(as_tuple=True)
    return image_index, class_index


def split_regions(images: Tensor, cams: Tensor, labels: Tensor, *, size: int = 224) -> Regions:
    """Split each image into foreground and background for every class that it shows (CA-CL, eq. 2).

    Image and CAM are resized bilinearly to the encoder's input, then multiplied; only the CAMs of present classes
    are resized. Where a mask is 0, a normalised image becomes its data set's mean colour.

    Args:
        images: ``(B, 3, H, W)``, normalised.
        cams: ``(B, K, h, w)`` in [0, 1].
        labels: ``(B, K)``, 0 or 1; on the CPU, so that nothing waits for the device.
        size: side of the regions in pixels.

    Returns:
        :class:`Regions` of the N pairs; differentiable with respect to ``images`` and ``cams``.

    Raises:
        ValueError: if the shapes do not go together, or a label is neither 0 nor 1 (looked at on the CPU only).
    """
    check_tensor("images", images, "(B, 3, H, W)")
    check_tensor("cams", cams, "(B, K, h, w)")
    image_index, class_index = present_pairs(labels)
    if images.shape[1] != 3:
        raise expected("images", "a tensor (B, 3, H, W)", shape(images))
    if len(cams) != len(images):
        raise expected("cams", f"of the same batch size as `images` {len(images)}", shape(cams))
    if cams.device != images.device:
        raise expected("cams", f"on the device of `images`, {images.device}", cams.device)
    if labels.shape != cams.shape[:2]:
        raise expected("labels", f"of shape {tuple(cams.shape[:2])}, as `cams`", shape(labels))
    check_positive("size", size)
    image_index = image_index.to(images.device, non_blocking=True)
    class_index = class_index.to(images.device, non_blocking=True)
    mask = resize(cams[image_index, class_index][:, None], size)
    chosen = resize(images, size)[image_index]
    foreground = chosen * mask
    return Regions(foreground, chosen - foreground, image_index, class_index)


def resize(images: Tensor, size: int) -> Tensor:
    """``(N, C, H, W)`` -> ``(N, C, size, size)``, bilinear."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
