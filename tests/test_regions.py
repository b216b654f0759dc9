"""Foreground and background regions against numpy (CA-CL, eq. 2)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from cacl import present_pairs, split_regions

LABELS = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
PAIRS = [(0, 1), (0, 2), (2, 0)]


@pytest.fixture
def images(randn):
    return randn(3, 3, 16, 16)


@pytest.fixture
def cams(images, randn):
    return randn(3, 3, 16, 16).sigmoid()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.uint8])
def test_present_pairs(dtype):
    image_index, class_index = present_pairs(LABELS.to(dtype))
    assert list(zip(image_index.tolist(), class_index.tolist(), strict=True)) == PAIRS
    assert image_index.dtype == class_index.dtype == torch.int64


def test_split_is_eq_2(images, cams):
    foreground, background, image_index, class_index = split_regions(images, cams, LABELS, size=16)
    assert list(zip(image_index.tolist(), class_index.tolist(), strict=True)) == PAIRS
    for n, (b, k) in enumerate(PAIRS):
        image, mask = images[b].numpy(), cams[b, k].numpy()
        np.testing.assert_allclose(foreground[n].numpy(), image * mask, atol=1e-6)
        np.testing.assert_allclose(background[n].numpy(), image * (1 - mask), atol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_image_and_cam_are_resized_then_multiplied(images, cams, size):
    regions = split_regions(images, cams[..., :4, :6], LABELS, size=size)
    whole = F.interpolate(images, (size, size), mode="bilinear")[[b for b, _ in PAIRS]]
    mask = torch.stack(
        [F.interpolate(cams[b : b + 1, k : k + 1, :4, :6], (size, size), mode="bilinear")[0] for b, k in PAIRS]
    )
    assert regions.foreground.shape == regions.background.shape == (3, 3, size, size)
    torch.testing.assert_close(regions.foreground, whole * mask)
    torch.testing.assert_close(regions.foreground + regions.background, whole)


def test_default_size_is_clip_s(images, cams):
    assert split_regions(images, cams, LABELS).foreground.shape == (3, 3, 224, 224)


def test_images_that_are_not_square(randn):
    images, cams = randn(1, 3, 20, 33), randn(1, 2, 3, 4).sigmoid()
    assert split_regions(images, cams, torch.ones(1, 2), size=8).foreground.shape == (2, 3, 8, 8)


def test_masks_of_zero_and_one_give_nothing_and_everything(images):
    regions = split_regions(images, torch.zeros(3, 3, 4, 4), LABELS, size=16)
    assert not regions.foreground.any()
    torch.testing.assert_close(regions.background, images[[0, 0, 2]])
    regions = split_regions(images, torch.ones(3, 3, 4, 4), LABELS, size=16)
    assert not regions.background.any()


@pytest.mark.parametrize("size", [8, 16])
def test_no_labels_give_no_pairs_with_a_graph(images, cams, size):
    cams.requires_grad_()
    regions = split_regions(images, cams, LABELS * 0, size=size)
    assert regions.foreground.shape == regions.background.shape == (0, 3, size, size)
    assert regions.image_index.shape == regions.class_index.shape == (0,)
    (regions.foreground.sum() + regions.background.sum()).backward()
    assert not cams.grad.any()


def test_no_images():
    regions = split_regions(torch.ones(0, 3, 9, 9), torch.ones(0, 2, 3, 3), torch.ones(0, 2), size=4)
    assert regions.foreground.shape == (0, 3, 4, 4)


def test_absent_classes_get_no_gradient(images, cams):
    cams.requires_grad_()
    split_regions(images, cams, LABELS, size=8).foreground.square().sum().backward()
    seen = cams.grad.abs().sum((2, 3)) > 0
    assert torch.equal(seen, LABELS.bool())


def test_gradcheck(randn):
    images, cams = randn(2, 3, 3, 2).double().requires_grad_(), randn(2, 2, 2, 2).double().sigmoid().requires_grad_()
    labels = torch.tensor([[1, 1], [0, 1]])
    assert gradcheck(lambda x, y: split_regions(x, y, labels, size=3)[:2], (images, cams), fast_mode=True)


IMAGES, CAMS = torch.ones(3, 3, 4, 4), torch.ones(3, 3, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (
            (IMAGES[0], CAMS, LABELS),
            ValueError,
            "Expected argument `images` to be a tensor (B, 3, H, W), but got shape (3, 4, 4).",
        ),
        (
            (IMAGES[:, :1], CAMS, LABELS),
            ValueError,
            "Expected argument `images` to be a tensor (B, 3, H, W), but got shape (3, 1, 4, 4).",
        ),
        (
            (IMAGES.byte(), CAMS, LABELS),
            TypeError,
            "Expected argument `images` to be of a floating point type, but got torch.uint8.",
        ),
        (
            (IMAGES, CAMS[0], LABELS),
            ValueError,
            "Expected argument `cams` to be a tensor (B, K, h, w), but got shape (3, 2, 2).",
        ),
        (
            (IMAGES, CAMS[:2], LABELS[:2]),
            ValueError,
            "Expected argument `cams` to be of the same batch size as `images` 3, but got shape (2, 3, 2, 2).",
        ),
        (
            (IMAGES, CAMS, LABELS[:, :2]),
            ValueError,
            "Expected argument `labels` to be of shape (3, 3), as `cams`, but got shape (3, 2).",
        ),
        (
            (IMAGES, CAMS, LABELS[0]),
            ValueError,
            "Expected argument `labels` to be a tensor (B, K), but got shape (3,).",
        ),
        ((IMAGES, CAMS, [[1]]), TypeError, "Expected argument `labels` to be a tensor (B, K), but got list."),
    ],
)
def test_inputs_are_checked(arguments, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        split_regions(*arguments)


@pytest.mark.parametrize("size", [0, -1, 8.0, True, (8, 8)])
def test_size_is_checked(size):
    text = f"Expected argument `size` to be a positive integer, but got {size!r}."
    with pytest.raises(ValueError, match=re.escape(text)):
        split_regions(IMAGES, CAMS, LABELS, size=size)
