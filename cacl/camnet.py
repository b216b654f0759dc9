"""The class activation network: a backbone of output stride 16 and a 1×1 convolution (CA-CL, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacl._support.answers import channels_of, check_maps
from cacl._support.checks import as_array, as_indices, check_tensor
from cacl._support.precision import head_of
from cacl._support.values import check_choice, check_positive
from cacl._support.weights import evaluating
from cacl.backbones import named_backbone
from cacl.errors import expected
from cacl.pretrained import Pretrained


class CAMOutput(NamedTuple):
    """What :class:`CAMNet` gives for B images."""

    cams: Tensor
    """Class activation maps, ``(B, K, h, w)`` in [0, 1]."""
    scores: Tensor
    """The same before the sigmoid."""


class CAMNet(Pretrained):
    """Class activation maps by a backbone, a 1×1 convolution without bias and a sigmoid (CA-CL, eq. 1).

    Args:
        num_classes: K.
        backbone: the name of a torchvision ResNet, whose last stage is set to stride 1 (output stride 16) and whose
            first convolution and batch norm are frozen; ``"timm:NAME"`` for a network of timm, which needs the extra
            ``timm`` (see :class:`cacl.timm_backbones.TimmBackbone`); ``"scenes"`` for a small network of output stride
            8, made for :mod:`cacl.scenes`; or any module ``(B, 3, H, W) -> (B, C, h, w)`` with an attribute
            ``out_channels``, which is taken as it is.
        weights: torchvision's name of the pretrained weights (downloaded once), the path of a file with some, or None
            for random ones; for a named backbone only. Networks of timm have ``"DEFAULT"`` ones, and ``"scenes"``
            brings its own.

    :class:`cacl.pretrained.Pretrained` has ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Raises:
        ValueError: if the name or the weights are unknown, or ``out_channels`` does not fit.
        TypeError: if ``backbone`` is no name and has no ``out_channels``.
        ImportError: if timm is missing.

    Example:
        >>> net = CAMNet(20, backbone="resnet18", weights=None)
        >>> net(torch.zeros(1, 3, 64, 64)).cams.shape
        torch.Size([1, 20, 4, 4])
    """

    _head = "classifier.weight"

    def __init__(
        self, num_classes: int = 20, *, backbone: str | nn.Module = "resnet50", weights: str | None = "DEFAULT"
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        self.num_classes = num_classes
        self.backbone_name = backbone if isinstance(backbone, str) else ""
        self.backbone = named_backbone(backbone, weights) if isinstance(backbone, str) else backbone
        self.classifier = nn.Conv2d(channels_of(self.backbone), num_classes, 1, bias=False)

    def forward(self, images: Tensor) -> CAMOutput:
        """``(B, 3, H, W)`` normalised images -> :class:`CAMOutput` at the backbone's stride."""
        scores = self.scores(images)
        return CAMOutput(scores.sigmoid(), scores)

    def classify(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K)`` logits by global average pooling, for the warm-up."""
        return self.scores(images).mean((2, 3))

    def scores(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, K, h, w)`` before the sigmoid."""
        check_tensor("images", images, "(B, 3, H, W)")
        features = check_maps(self.backbone(images), images, self.classifier.weight)
        return head_of(features, self.classifier.weight, self.classifier, training=self.training)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        *,
        scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
        flip: bool = True,
        size: tuple[int, int] | None = None,
        classes: Tensor | None = None,
        activation: Literal["relu", "sigmoid"] = "relu",
    ) -> Tensor:
        """Multi-scale CAMs for inference: summed over scales and the mirror image, each divided by its maximum.

        Runs in evaluation mode and puts the mode back. The maps of absent classes are not zeroed: the network does
        not know the labels.

        Args:
            images: ``(B, 3, H, W)``, normalised.
            scales: factors of the image's size.
            flip: add the mirror image's maps.
            size: ``(height, width)`` of the result; the images' own by default.
            classes: ``(C,)`` class indices, whose maps are made instead of all K.
            activation: what turns scores to CAMs; ``"relu"`` as in the code that the paper builds on.

        Returns:
            ``(B, K or C, height, width)`` float32 in [0, 1]; a map without any positive score is 0.
        """
        check_tensor("images", images, "(B, 3, H, W)")
        check_choice("activation", activation, ("relu", "sigmoid"))
        scales = as_array("scales", scales, "(S,)", numbers=True).tolist()
        if not scales or not min(scales) > 0 or not sum(scales) < float("inf"):
            raise expected("scales", "positive factors, at least one", tuple(scales))
        if classes is not None:
            classes = torch.from_numpy(as_indices("classes", classes, self.num_classes - 1))
        height, width = images.shape[-2:]
        if classes is not None and not len(classes):
            return images.new_zeros(len(images), 0, *(size or (height, width)), dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=images.device)
        with evaluating(self):
            for scale in scales:
                target = (max(1, round(height * scale)), max(1, round(width * scale)))
                scaled = images
                if target != (height, width):
                    scaled = F.interpolate(images, size=target, mode="bilinear", align_corners=False)
                maps = self.scores(torch.cat((scaled, scaled.flip(-1))) if flip else scaled).float()
                maps = maps if classes is None else maps[:, classes]
                maps = maps.sigmoid() if activation == "sigmoid" else maps.relu()
                if flip:
                    straight, mirrored = maps.chunk(2)
                    maps = straight + mirrored.flip(-1)
                total = total + F.interpolate(maps, size=size or (height, width), mode="bilinear", align_corners=False)
        return total / total.amax((-2, -1), keepdim=True).clamp(min=1e-5)

    def parameter_groups(self, lr: float, *, head_factor: float = 10.0) -> list[dict[str, object]]:
        """The trainable parameters for an optimiser: the backbone at ``lr``, the classifier at ``head_factor · lr``."""
        trunk = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        head = list(self.classifier.parameters())
        return [{"params": trunk, "lr": lr}, {"params": head, "lr": lr * head_factor}]
