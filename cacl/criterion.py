"""The whole CA-CL loss, everything wired (CA-CL, eq. 2-14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cacl._support.answers import check_encoder, check_image_features, side_of, statistics_of
from cacl._support.checks import check_labels, check_tensor, shape
from cacl._support.distributed import world_size
from cacl._support.features import cosine, full, reduced, renormalisation
from cacl._support.values import check_choice, check_range, check_words
from cacl.constants import IMAGENET_MEAN, IMAGENET_STD
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputTypeError, expected
from cacl.losses import BGSuppressionLoss, ITCLoss, RegionLoss
from cacl.prompts import BackgroundSet, PromptSet
from cacl.regions import resize, split_regions
from cacl.selector import ContextSelector


class CACLTerms(NamedTuple):
    """The CA-CL loss and what it is made of; all scalars, only ``total`` … ``region`` with a graph."""

    total: Tensor
    itc: Tensor
    bgs: Tensor
    region: Tensor
    foreground_similarity: Tensor
    """Mean cosine of foreground and chosen prompt, s_ff of eq. 7."""
    background_similarity: Tensor
    """Mean cosine of background and chosen prompt, s_bf of eq. 7."""
    pass_rate: Tensor
    """Share of the background prompts with a similarity of at least θ."""


class EncodedRegions(NamedTuple):
    """What an encoder sees of N pairs of an image and a class that it shows."""

    foreground: Tensor
    """``(N, D)``: of the image times the CAM, v_f."""
    background: Tensor
    """``(N, D)``: of the image times 1 − CAM, v_b."""
    class_index: Tensor
    """``(N,)`` int64."""


class RegionEncoder(nn.Module):
    """Foreground and background of every present class through an image-text encoder, in one call (CA-CL, eq. 2 and 3).

    The encoder is frozen and follows ``.to()``, but is no part of ``state_dict()`` or ``parameters()``.

    Args:
        encoder: the image-text encoder.
        texts: its features of the K classes, ``(K, D)`` or ``(K, m, D)``; they say where it is.
        normalization: ``"encoder"`` re-normalises the images to the encoder's statistics, ``"imagenet"`` leaves them.

    Raises:
        ValueError: if a member of the encoder or the normalisation is another one.
        TypeError: if ``encoder`` lacks a member of :class:`ImageTextEncoder`, or one is of another type.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        encoder: ImageTextEncoder,
        texts: Tensor,
        *,
        normalization: Literal["encoder", "imagenet"] = "encoder",
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        check_choice("normalization", normalization, ("encoder", "imagenet"))
        if isinstance(encoder, nn.Module):
            encoder.requires_grad_(False).eval()
        self._encoder = (encoder,)  # in a tuple, so that it is no submodule
        self.num_classes, self.width = len(texts), texts.shape[-1]
        mean, std = statistics_of(encoder) if normalization == "encoder" else (IMAGENET_MEAN, IMAGENET_STD)
        for name, buffer in zip(("_scale", "_shift"), renormalisation(mean, std, texts.device), strict=True):
            self.register_buffer(name, buffer, persistent=False)

    @property
    def encoder(self) -> ImageTextEncoder:
        return self._encoder[0]

    def forward(self, images: Tensor, cams: Tensor, labels: Tensor) -> EncodedRegions:
        """Arguments and errors are those of :meth:`CACLLoss.forward`."""
        check_tensor("images", images, "(B, 3, H, W)")
        if images.shape[1] != 3:
            raise expected("images", "a tensor (B, 3, H, W)", shape(images))
        if images.device != self._scale.device:
            raise expected("images", f"on {self._scale.device}, as the loss is, which .to() moves", images.device)
        check_labels(labels, self.num_classes)
        size = side_of(self.encoder)
        small = resize(images, size) * self._scale + self._shift
        foreground_image, background_image, _, classes = split_regions(small, cams, labels, size=size)
        pairs = len(classes)
        if pairs:
            both = torch.cat((foreground_image, background_image))
            answer: object = self.encoder.encode_image(both)
            features = check_image_features(answer, both, self.width)
        else:  # without a pair there is nothing to encode; the sums over nothing have a graph still
            features = full(cams).sum() * torch.zeros(0, self.width, device=images.device)
        return EncodedRegions(features[:pairs], features[pairs:], classes)

    def _apply(self, fn: Any, recurse: bool = True) -> RegionEncoder:
        if isinstance(self.encoder, nn.Module):
            self.encoder._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class CACLLoss(nn.Module):
    """The whole CA-CL loss on images, CAMs and labels (CA-CL, eq. 2-14).

    Texts are encoded here, once; the encoder runs once a call, on foregrounds and backgrounds together. The encoder
    is frozen and follows ``.to()``, but is no part of ``state_dict()`` or ``parameters()``.

    In training mode, where ``torch.distributed`` has a default group, the images of all its processes are one batch, as
    ``across`` of :func:`itc_loss` says: the mean over the processes of each term, and of the gradients, is that of the
    whole batch, and θ and the template counts are the same everywhere. Every process calls it as often as the others.

    Args:
        encoder: the image-text encoder.
        names: the K class names.
        prompts: context templates; the paper's four by default.
        backgrounds: background words; the built-in ones by default, if VOC's or COCO's list has each of ``names``.
        alpha: weight of the image-text contrastive loss.
        beta: weight of the background suppression loss; 0 leaves it out.
        gamma: weight of the region loss.
        margin: of :class:`ITCLoss`.
        suppression: a :class:`BGSuppressionLoss` with its threshold mode; θ fixed at 0.26 by default.
        template: always use this template instead of choosing one for each pair.
        normalization: ``"encoder"`` re-normalises the images to the encoder's statistics, ``"imagenet"`` leaves them.

    Raises:
        ValueError: if a setting is out of range, or shapes do not go together.
        TypeError: if ``encoder`` lacks a member of :class:`ImageTextEncoder`, or one is of another type.
    """

    _background_text: Tensor

    def __init__(
        self,
        encoder: ImageTextEncoder,
        names: Sequence[str],
        *,
        prompts: PromptSet | None = None,
        backgrounds: BackgroundSet | None = None,
        alpha: float = 40.0,
        beta: float = 1.0,
        gamma: float = 0.4,
        margin: float = 0.5,
        suppression: BGSuppressionLoss | None = None,
        template: int | None = None,
        normalization: Literal["encoder", "imagenet"] = "encoder",
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        for argument, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            check_range(argument, weight, 0, float("inf"))
        check_choice("normalization", normalization, ("encoder", "imagenet"))
        check_texts(prompts, backgrounds)
        if suppression is not None and not isinstance(suppression, BGSuppressionLoss):
            raise InputTypeError(
                f"Expected argument `suppression` to be a BGSuppressionLoss, but got {type(suppression).__name__}."
            )
        if suppression is not None and suppression.reduction == "none":
            raise expected("suppression", 'of reduction "sum" or "mean"', "none")
        prompts = PromptSet() if prompts is None else prompts
        self.names = check_words("names", names)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.itc = ITCLoss(margin)
        self.bgs = BGSuppressionLoss() if suppression is None else suppression
        self.region = RegionLoss()
        mode: Literal["dynamic", "fixed"] = "dynamic" if template is None else "fixed"
        self.selector = ContextSelector(prompts.encode(encoder, self.names), mode=mode, template=template or 0)
        if beta > 0:
            backgrounds = BackgroundSet.built_in(self.names) if backgrounds is None else backgrounds
            background_text = backgrounds.encode(encoder, self.names, prompts)
        else:
            background_text = self.selector.prompt_features[:, :0]
        self.register_buffer("_background_text", background_text, persistent=False)
        self.bgs.to(background_text.device)
        self.regions = RegionEncoder(encoder, self.selector.prompt_features, normalization=normalization)

    @property
    def encoder(self) -> ImageTextEncoder:
        return self.regions.encoder

    def forward(self, images: Tensor, cams: Tensor, labels: Tensor) -> CACLTerms:
        """The loss of a batch.

        Args:
            images: ``(B, 3, H, W)``, normalised with ImageNet's statistics.
            cams: ``(B, K, h, w)`` in [0, 1].
            labels: ``(B, K)``, 0 or 1. On the CPU, so that no step waits for the device.

        Raises:
            ValueError: if shapes or devices do not go together, a label is neither 0 nor 1, or what the encoder gives
                is not ``(N, D)``, finite and differentiable. Values are looked at on the CPU only.
            TypeError: if an argument, or what the encoder gives, is of another type.
        """
        across = self.training and world_size() > 1
        foreground, background, classes = self.regions(images, cams, labels)
        region = self.region(cams, across=across)
        text, _, s_ff = self.selector(foreground, classes, across=across)
        itc = self.itc(foreground, background, text, across=across)
        bgs = foreground.sum() * 0
        if self.beta > 0:
            bgs = self.bgs(foreground, self._background_text[classes], classes, across=across)
        total = self.alpha * itc + self.beta * bgs + self.gamma * region
        similarities = (s_ff.detach(), cosine(background.detach(), text))
        s_ff, s_bf = (reduced(similarity, "mean", across) for similarity in similarities)
        return CACLTerms(total, itc, bgs, region, s_ff, s_bf, self.bgs.pass_rate)

    def record(self) -> dict[str, Tensor]:
        """What is logged of a step beside the terms: θ, and how often each template was chosen, as shares."""
        counts = self.selector.counts.sum(0)
        return {
            "threshold": self.bgs.threshold.mean(),
            "template_share": counts / counts.sum().clamp(min=1),
        }


def check_texts(prompts: object, backgrounds: object) -> None:
    """Require a :class:`PromptSet` and a :class:`BackgroundSet`, where they are given."""
    for argument, value, wanted in (("prompts", prompts, PromptSet), ("backgrounds", backgrounds, BackgroundSet)):
        if value is not None and not isinstance(value, wanted):
            name, kind = wanted.__name__, type(value).__name__
            raise InputTypeError(
                f"Expected argument `{argument}` to be a {name}, but got {kind}; cacl.{name}(…) makes one."
            )
