"""DeepLabV2: atrous convolutions at four rates, summed, over an image at three scales (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacl._support.answers import channels_of, check_maps
from cacl._support.checks import check_tensor, kind_of, shape
from cacl._support.distributed import all_reduce_sum, world_size
from cacl._support.features import full
from cacl._support.precision import head_of
from cacl._support.values import check_positive
from cacl._support.weights import evaluating
from cacl.backbones import named_backbone
from cacl.constants import IGNORE
from cacl.errors import InputTypeError, expected
from cacl.pretrained import Pretrained

RATES = (6, 12, 18, 24)
"""Dilations of the four 3×3 convolutions on the trunk's features."""
SCALES = (1.0, 0.75, 0.5)
"""Factors of the image's size, the image itself first."""


class DeepLabV2(Pretrained):
    """Semantic segmentation by a dilated network and atrous spatial pyramid pooling (DeepLabV2, Chen et al. 2016).

    Args:
        num_classes: C, the background included.
        backbone: the name of a torchvision ResNet, or ``"timm:NAME"`` of a convolutional network, which get output
            stride 8; of a transformer of timm, whose stride is its patch; ``"scenes"``; or any module
            ``(B, 3, H, W) -> (B, D, h, w)`` with an attribute ``out_channels``, whose stride is then the network's.
        weights: as for :class:`cacl.CAMNet`.
        freeze_batch_norm: leave statistics and weights of batch norm as they are, as DeepLab does, whose batches are
            small and whose trunk was trained on a million images.
        multi_scale: train at every scale of :data:`SCALES` and their maximum, as DeepLab does; else at the images' own
            size alone, which costs a good half of the time and gives a loss of one term instead of four. In evaluation
            it is the maximum over the scales either way.

    :class:`cacl.pretrained.Pretrained` has ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Raises:
        ValueError: if the name or the weights are unknown, or ``out_channels`` does not fit.
        TypeError: if ``backbone`` is no name and has no ``out_channels``.
        ImportError: if timm is missing.

    Example:
        >>> net = DeepLabV2(21, backbone="resnet50", weights=None).eval()
        >>> net(torch.zeros(1, 3, 65, 50)).shape
        torch.Size([1, 21, 9, 7])
    """

    _head = "aspp.0.weight"
    _unnamed = 1
    _options = ("freeze_batch_norm", "multi_scale")

    def __init__(
        self,
        num_classes: int = 21,
        *,
        backbone: str | nn.Module = "resnet101",
        weights: str | None = "DEFAULT",
        freeze_batch_norm: bool = True,
        multi_scale: bool = True,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        self.num_classes, self.freeze_batch_norm, self.multi_scale = num_classes, freeze_batch_norm, multi_scale
        self.backbone_name = backbone if isinstance(backbone, str) else ""
        if isinstance(backbone, str):
            self.backbone: nn.Module = named_backbone(backbone, weights, stride=8).requires_grad_(True)
        else:
            self.backbone = backbone
        channels = channels_of(self.backbone)
        for norm in self._frozen():
            norm.requires_grad_(False)
        branches = [nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate) for rate in RATES]
        for branch in branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)  # type: ignore[arg-type]
        self.aspp = nn.ModuleList(branches)

    def train(self, mode: bool = True) -> DeepLabV2:
        super().train(mode)
        for norm in self._frozen():
            norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """``(B, 3, H, W)`` normalised images of any size -> logits at the trunk's stride.

        In training a list for :func:`segmentation_loss`: one a scale, each at its own size, and last their maximum, or
        without ``multi_scale`` that of the images as they are; in evaluation the maximum, ``(B, C, h, w)``.
        """
        check_tensor("images", images, "(B, 3, H, W)")
        if self.training and not self.multi_scale:
            return [self.logits(images)]
        logits = [self.logits(_scaled(images, scale)) for scale in SCALES]
        size = logits[0].shape[-2:]
        maximum = logits[0]
        for smaller in logits[1:]:
            maximum = torch.maximum(
                maximum, F.interpolate(smaller, size=size, mode="bilinear", align_corners=False)
            )  # fmt: skip
        return [*logits, maximum] if self.training else maximum

    def logits(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, C, h, w)`` at this one scale."""
        weight: Tensor = self.aspp[0].weight  # type: ignore[assignment]
        return head_of(
            check_maps(self.backbone(images), images, weight), weight, self._branched, training=self.training
        )

    def _branched(self, features: Tensor) -> Tensor:
        """``(B, D, h, w)`` -> ``(B, C, h, w)``: the sum of the branches."""
        branches: list[nn.Conv2d] = list(self.aspp)  # type: ignore[arg-type]
        small: list[nn.Conv2d] = []
        if self.training:  # in evaluation the size may be a symbol, as in an export
            small = [branch for branch in branches if max(features.shape[-2:]) <= branch.dilation[0] and _plain(branch)]
        parts = [branch(features) for branch in branches if branch not in small]
        total: Tensor = reduce(torch.add, [*parts, _middle(small, features)] if small else parts)
        return total

    @torch.no_grad()
    def predict(self, images: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """``(B, 3, H, W)`` -> probabilities ``(B, C, height, width)`` float32, of the maximum over the scales.

        Runs in evaluation mode and puts the mode back.

        Args:
            images: normalised.
            size: ``(height, width)`` of the result; the images' own by default.
        """
        check_tensor("images", images, "(B, 3, H, W)")
        with evaluating(self):
            return probabilities(self(images), size or (images.shape[2], images.shape[3]))

    def parameter_groups(self, lr: float, *, head_factor: float = 10.0) -> list[dict[str, object]]:
        """What is trained, for an optimiser: the trunk at ``lr``, the head's weights at ``head_factor · lr``, and its
        biases at twice that, without weight decay."""
        trunk = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        head = lr * head_factor
        return [
            {"params": trunk, "lr": lr},
            {"params": [branch.weight for branch in self.aspp], "lr": head},
            {"params": [branch.bias for branch in self.aspp], "lr": 2 * head, "weight_decay": 0.0},
        ]

    def _frozen(self) -> list[nn.Module]:
        if not self.freeze_batch_norm:
            return []
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        return [module for module in self.backbone.modules() if isinstance(module, kinds)]


def _middle(branches: Sequence[nn.Conv2d], features: Tensor) -> Tensor:
    """The sum of branches whose windows, but for their middle, lie outside of maps as small as these."""
    weight = torch.stack([branch.weight[:, :, 1:2, 1:2] for branch in branches]).sum(0)
    biases = [branch.bias for branch in branches if branch.bias is not None]
    return F.conv2d(features, weight, torch.stack(biases).sum(0) if biases else None)


def _plain(branch: nn.Module) -> bool:
    """Whether nobody has put something around a branch, such as another parametrisation of its weight."""
    return type(branch) is nn.Conv2d and not branch._forward_pre_hooks and not branch._forward_hooks


def segmentation_loss(logits: Sequence[Tensor], masks: Tensor, *, across: bool = False) -> Tensor:
    r"""Cross-entropy at every scale, added up (DeepLabV2, Chen et al. 2016, section 3).

    .. math:: \sum_s \frac{1}{|V_s|} \sum_{p \in V_s} -\log \mathrm{softmax}(z_s)_{p, y_p}

    The masks are resized to each scale's logits by nearest neighbour; V are the pixels that are not 255.

    Args:
        logits: of each scale, ``(B, C, h, w)``, as :class:`DeepLabV2` gives them in training.
        masks: ``(B, H, W)`` of an integer type: 0 … C − 1, or 255 for pixels to leave out.
        across: as for :func:`cacl.itc_loss`.

    Returns:
        A scalar; a scale without any valid pixel adds 0, with a graph.

    Raises:
        ValueError: if there are no logits, or the batch sizes differ.

    Example:
        >>> segmentation_loss([torch.zeros(1, 2, 3, 3)], torch.zeros(1, 6, 6, dtype=torch.uint8))
        tensor(0.6931)
    """
    masks = _check_masks(masks, logits)
    terms, counts = [], []
    for values in logits:
        check_tensor("logits", values, "(B, C, h, w)")
        if masks.ndim != 3 or len(masks) != len(values):
            raise expected("masks", f"a tensor ({len(values)}, H, W)", shape(masks))
        target = F.interpolate(masks[:, None].float(), size=values.shape[-2:], mode="nearest-exact")[:, 0].long()
        with torch.autocast(values.device.type, enabled=False):
            terms.append(F.cross_entropy(full(values), target, ignore_index=IGNORE, reduction="sum"))
        counts.append((target != IGNORE).sum())
    valid = torch.stack(counts)
    if across and world_size() > 1:
        valid = all_reduce_sum(valid) / world_size()
    return (torch.stack(terms) / valid.clamp(min=1 / world_size() if across else 1)).sum()


def _check_masks(masks: object, logits: object) -> Tensor:
    """Require masks of an integer type, one an image; on the CPU, where it costs no wait, of classes that there are."""
    if not isinstance(logits, list | tuple) or not logits:
        kind = "none" if isinstance(logits, list | tuple) else kind_of(logits)
        raise expected("logits", "at least one tensor (B, C, h, w), in a list", kind)
    check_tensor("logits", logits[0], "(B, C, h, w)")
    images, classes = logits[0].shape[:2]
    if not isinstance(masks, Tensor):
        raise InputTypeError(f"Expected argument `masks` to be a tensor ({images}, H, W), but got {kind_of(masks)}.")
    if masks.ndim != 3 or len(masks) != images:
        raise expected("masks", f"a tensor ({images}, H, W)", shape(masks))
    if masks.dtype == torch.bool or masks.is_floating_point() or masks.is_complex() or masks.layout != torch.strided:
        came = masks.layout if masks.layout != torch.strided else masks.dtype
        raise InputTypeError(f"Expected argument `masks` to be of an integer type, but got {came}.")
    masks = masks if masks.dtype == torch.uint8 else masks.long()  # torch compares no unsigned integers but bytes
    if masks.device.type == "cpu":
        wrong = masks[(masks < 0) | ((masks >= classes) & (masks != IGNORE))]
        if len(wrong):
            raise expected("masks", f"in [0, {classes - 1}] or {IGNORE} (ignored)", int(wrong[0]))
    return masks


def probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits ``(B, C, h, w)`` -> ``(B, C, *size)`` float32, bilinear, adding up to 1 over the classes."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).softmax(1)


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    # In whole numbers, so that a size which is a symbol stays one when the network is exported. Compared: `max` would
    # be part of that symbol, and torch could not tell that sizes which some backbones make of it are the same.
    size = [smaller if (smaller := side * round(100 * scale) // 100) > 1 else 1 for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
