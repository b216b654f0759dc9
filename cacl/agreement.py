"""How far masks agree with the image-text encoder and with the photos' colours: a figure that needs no true mask.

An encoder (CA-CL, eq. 4 and 9) takes a region that is too small for another thing, and hardly minds one that is too
large. Colours (the variance between regions, Otsu 1979; the step across a border) like regions that end where
something ends in the photo, and hardly mind what is left out. Together they rank masks as their true mean IoU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cacl._support.answers import check_encoder, check_image_features, side_of, statistics_of
from cacl._support.checks import check_labels, check_tensor, kind_of, shape
from cacl._support.features import cosine, full, renormalisation
from cacl._support.values import check_words
from cacl._support.weights import evaluating
from cacl.constants import IGNORE
from cacl.criterion import check_texts
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputTypeError, expected
from cacl.prompts import BackgroundSet, PromptSet
from cacl.regions import present_pairs, resize, split_regions

_FLAT = 1e-6
"""Of normalised colours: variance or steps below it are rounding."""


class Agreement(NamedTuple):
    """How far a set of masks agrees with the encoder and with the colours of their photos."""

    evidence: float
    """By how much a region lies nearer to a text of its class (s_ff of eq. 4) than to the nearest of the class's
    background prompts (s_fl of eq. 9): a difference of cosines, the mean over pairs."""
    explained: float
    """Share of a photo's variance of colours that lies between the regions of its mask, in [0, 1]; mean over images.
    0 where a mask has one region."""
    edges: float
    """Mean step of colour between neighbours of different regions over that between all neighbours; mean over images.
    1 where borders lie anywhere, 0 where a mask has none."""
    pairs: int
    """Number of (image, class) pairs."""
    images: int

    @classmethod
    def of(cls, rows: Tensor) -> Agreement:
        """From the rows ``(B, 5)`` of :class:`MaskJudge`, of any number of batches; all 0 where there is none."""
        evidence, pairs, explained, edges, images = rows.double().reshape(-1, 5).sum(0).tolist()
        pairs, images = round(pairs), round(images)
        return cls(evidence / max(pairs, 1), explained / max(images, 1), edges / max(images, 1), pairs, images)

    @property
    def total(self) -> float:
        r"""The figure, in [0, 1], higher is better: the better of two sets of masks of the same photos has the larger.

        .. math:: \sqrt{\max(\text{evidence}, 0) \cdot \sqrt{\text{explained} \cdot \tfrac{E}{1 + E}}}

        with E for ``edges``. 0 where the regions are no nearer to their classes than to the background words.
        """
        evidence, share = min(max(self.evidence, 0.0), 1.0), self.edges / (1 + self.edges)
        return sqrt(evidence * sqrt(self.explained * share))


class MaskJudge:
    """How far masks agree with an encoder, and with the colours of their photos, without any truth.

    Everything is looked at at the encoder's input size. Texts are encoded here, once. The encoder stays in the mode
    that it is in; nothing has a gradient.

    Args:
        encoder: the image-text encoder.
        names: the K class names.
        prompts: context templates; the paper's four by default.
        backgrounds: background words; the built-in ones by default, if VOC's or COCO's list has each of ``names``.

    Raises:
        ValueError: if a class has no background words.
        TypeError: if ``encoder`` lacks a member of :class:`ImageTextEncoder`, or one is of another type.

    Example:
        >>> from cacl import load_encoder
        >>> backgrounds = BackgroundSet({"boat": ["water"]})
        >>> judge = MaskJudge(load_encoder("scenes"), ["boat"], backgrounds=backgrounds)
        >>> images, masks = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
        >>> rows = judge(images, masks, torch.ones(2, 1))
        >>> Agreement.of(rows).total  # no region at all
        0.0
    """

    def __init__(
        self,
        encoder: ImageTextEncoder,
        names: Sequence[str],
        *,
        prompts: PromptSet | None = None,
        backgrounds: BackgroundSet | None = None,
    ) -> None:
        check_encoder(encoder)
        check_texts(prompts, backgrounds)
        self.encoder, self.names = encoder, check_words("names", names)
        prompts = PromptSet() if prompts is None else prompts
        backgrounds = BackgroundSet.built_in(self.names) if backgrounds is None else backgrounds
        self._text = prompts.encode(encoder, self.names)
        self._words = backgrounds.encode(encoder, self.names, prompts)

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
        """What each mask of a batch adds to an :class:`Agreement`.

        Args:
            images: ``(B, 3, H, W)``, normalised with ImageNet's statistics, on the encoder's device.
            masks: ``(B, h, w)`` of integers: 0 for the background, class + 1, and 255 for what is left open, which
                counts as background. A class that an image shows and its mask lacks has an empty region.
            labels: ``(B, K)``, 0 or 1, on the CPU.

        Returns:
            ``(B, 5)`` on the images' device, which :meth:`Agreement.of` reads, some or all of them: evidence, summed
            over the image's pairs, their number, explained, edges, and 1.

        Raises:
            ValueError: if shapes or devices do not go together, a label is neither 0 nor 1, or a mask has a value that
                is no class. Values are looked at on the CPU only.
            TypeError: if an argument, or what the encoder gives, is of another type.
        """
        self._check(images, masks, labels)
        size = side_of(self.encoder)
        small = full(resize(images, size))
        open_ = masks.to(images.device, torch.float32)[:, None]
        values = F.interpolate(open_, size=(size, size), mode="nearest-exact")[:, 0].long()
        values = values.masked_fill(values == IGNORE, 0)
        image_index, class_index = (index.to(images.device) for index in present_pairs(labels))
        rows = small.new_zeros(len(images), 5)
        rows[:, 0].index_add_(0, image_index, self._evidence(small, values, image_index, class_index))
        rows[:, 1] = torch.bincount(image_index, minlength=len(images))
        rows[:, 2], rows[:, 3], rows[:, 4] = _explained(small, values, len(self.names)), _edges(small, values), 1
        return rows

    def _evidence(self, images: Tensor, masks: Tensor, image_index: Tensor, class_index: Tensor) -> Tensor:
        """s_ff - max_l s_fl of every pair, ``(N,)``."""
        pairs, size = len(image_index), images.shape[-1]
        if not pairs:
            return images.new_zeros(0)
        scale, shift = renormalisation(*statistics_of(self.encoder), images.device)
        hard = (masks[image_index] == class_index[:, None, None] + 1)[:, None].to(images.dtype)
        seen = (images * scale + shift)[image_index]
        regions = split_regions(seen, hard, torch.ones(pairs, 1, device="cpu"), size=size).foreground
        with evaluating(self.encoder):
            answer: object = self.encoder.encode_image(regions)
        features = check_image_features(answer, regions, self._text.shape[2])[:, None]
        text, words = (texts.to(images.device)[class_index] for texts in (self._text, self._words))
        padding = ~words.any(-1)  # of classes with fewer words than others
        nearest = cosine(features, words).masked_fill(padding, -torch.inf).amax(1)
        return (cosine(features, text).amax(1) - nearest).to(images.dtype)

    def _check(self, images: Tensor, masks: Tensor, labels: Tensor) -> None:
        check_tensor("images", images, "(B, 3, H, W)")
        if images.shape[1] != 3:
            raise expected("images", "a tensor (B, 3, H, W)", shape(images))
        if not isinstance(masks, Tensor):
            raise InputTypeError(f"Expected argument `masks` to be a tensor (B, h, w), but got {kind_of(masks)}.")
        if masks.is_floating_point() or masks.is_complex() or masks.dtype == torch.bool:
            raise InputTypeError(f"Expected argument `masks` to be of integers, but got {masks.dtype}.")
        if masks.ndim != 3 or len(masks) != len(images) or 0 in masks.shape[1:]:
            raise expected("masks", f"a tensor ({len(images)}, h, w)", shape(masks))
        check_labels(labels, len(self.names))
        if len(labels) != len(images):
            raise expected("labels", f"of the same batch size as `images` {len(images)}", shape(labels))
        if masks.device.type == "cpu":
            wrong = masks[(masks != IGNORE) & ((masks < 0) | (masks > len(self.names)))]
            if len(wrong):
                raise expected("masks", f"of values in [0, {len(self.names)}] or {IGNORE}", int(wrong[0]))


def _explained(colours: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Variance between the regions over that of the whole image, ``(B, 3, h, w)`` and ``(B, h, w)`` -> ``(B,)``."""
    pixels, labels = colours.flatten(2), masks.flatten(1)
    pixels = pixels - pixels.mean(2, keepdim=True)
    sizes = pixels.new_zeros(len(pixels), num_classes + 1).scatter_add_(1, labels, torch.ones_like(pixels[:, 0]))
    sums = pixels.new_zeros(len(pixels), 3, num_classes + 1)
    sums.scatter_add_(2, labels[:, None].expand(-1, 3, -1), pixels)
    between = (sums.square().sum(1) / sizes.clamp(min=1)).sum(1)
    whole = pixels.square().sum((1, 2))
    return torch.where(whole > _FLAT * labels.shape[1], between / whole.clamp(min=_FLAT), 0).clamp(max=1)


def _edges(colours: Tensor, masks: Tensor) -> Tensor:
    """Mean step across borders over the mean step, ``(B, 3, h, w)`` and ``(B, h, w)`` -> ``(B,)``."""
    steps = torch.cat([colours.diff(dim=d).abs().mean(1).flatten(1) for d in (2, 3)], 1)
    border = torch.cat([(masks.diff(dim=d) != 0).flatten(1) for d in (1, 2)], 1)
    across = (steps * border).sum(1) / border.sum(1).clamp(min=1)
    whole = steps.sum(1) / max(steps.shape[1], 1)
    return torch.where(whole > _FLAT, across / whole.clamp(min=_FLAT), 0)
