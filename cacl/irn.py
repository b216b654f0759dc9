"""Inter-pixel relations: a network for edges and displacements, and its loss (IRNet, Ahn et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacl._support.answers import check_levels, levels_of
from cacl._support.checks import check_tensor, shape
from cacl._support.distributed import all_reduce_sum, world_size
from cacl._support.values import check_positive
from cacl._support.weights import evaluating
from cacl.backbones import named_backbone
from cacl.constants import IGNORE
from cacl.errors import InputTypeError, expected
from cacl.mining import crf_labels as crf_labels
from cacl.mining import mine_labels as mine_labels
from cacl.random_walk import Offset, along_paths, ends


class IRNOutput(NamedTuple):
    """What :class:`IRNet` gives for B images, at stride 4: h = ⌈H/4⌉, w = ⌈W/4⌉."""

    edges: Tensor
    """Logits of class boundaries, ``(B, 1, h, w)``."""
    displacements: Tensor
    """``(B, 2, h, w)``: (dy, dx) in grid pixels towards the object's centre, up to a constant."""


class IRNTerms(NamedTuple):
    """The parts of :func:`affinity_loss`, each a mean over the pairs that it looks at."""

    total: Tensor
    background: Tensor
    """−log affinity of pairs inside the background."""
    foreground: Tensor
    """−log affinity of pairs inside one class."""
    negative: Tensor
    """−log(1 − affinity) of pairs of different labels."""
    displacement_background: Tensor
    """|difference of displacements| in grid pixels, of pairs inside the background."""
    displacement_foreground: Tensor
    """|difference of displacements − offset| in grid pixels, of pairs inside one class."""


class IRNet(nn.Module):
    """Class boundaries and displacements from the features of a frozen backbone (IRNet, Ahn et al. 2019, section 4).

    The backbone runs in evaluation mode and without gradient; two small branches on its features are trained.

    Args:
        backbone: the name of a torchvision ResNet, ``"timm:NAME"``, ``"scenes"``, or a module: either with a method
            ``levels(images)`` that gives features of several strides and ``level_channels``, their channels, or one
            ``(B, 3, H, W) -> (B, C, h, w)`` with ``out_channels``, whose only stride is then all there is. Edges want
            fine strides.
            A module is frozen in place.
        weights: as for :class:`cacl.CAMNet`.

    Raises:
        ValueError: if the name or the weights are unknown.
        TypeError: if ``backbone`` is none of these.
        ImportError: if timm is missing.

    Example:
        >>> IRNet("resnet18", weights=None).eval()(torch.zeros(1, 3, 70, 61)).edges.shape
        torch.Size([1, 1, 18, 16])
    """

    def __init__(self, backbone: str | nn.Module = "resnet50", *, weights: str | None = "DEFAULT") -> None:
        super().__init__()
        self.backbone = named_backbone(backbone, weights) if isinstance(backbone, str) else backbone
        channels = levels_of(self.backbone)
        self.backbone.requires_grad_(False)
        self.edge_levels = nn.ModuleList(_block(count, 32) for count in channels)
        # 3×3: an edge is a difference of neighbours, which shallow levels do not hold in one pixel
        self.edge_head = nn.Sequential(_block(32 * len(channels), 32, 3), nn.Conv2d(32, 1, 1))
        self.displacement_levels = nn.ModuleList(_block(count, 64) for count in channels)
        self.displacement_head = nn.Sequential(_block(64 * len(channels), 128), nn.Conv2d(128, 2, 1, bias=False))

    def train(self, mode: bool = True) -> IRNet:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> IRNOutput:
        """``(B, 3, H, W)`` normalised images of any size -> :class:`IRNOutput`."""
        check_tensor("images", images, "(B, 3, H, W)")
        size = (-(-images.shape[2] // 4), -(-images.shape[3] // 4))
        with torch.no_grad():
            levels = getattr(self.backbone, "levels", None)
            answer = [self.backbone(images)] if levels is None else levels(images)
        features = check_levels(answer, images, [next(block.parameters()) for block in self.edge_levels])
        edges = self.edge_head(_joined(self.edge_levels, features, size))
        displacements = self.displacement_head(_joined(self.displacement_levels, features, size))
        return IRNOutput(edges, displacements)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> edge probabilities ``(B, h, w)`` float32, of the mean with the mirror image."""
        check_tensor("images", images, "(B, 3, H, W)")
        with evaluating(self):
            straight, mirrored = self(torch.cat((images, images.flip(-1)))).edges[:, 0].float().chunk(2)
        edges: Tensor = ((straight + mirrored.flip(-1)) / 2).sigmoid()
        return edges

    def parameter_groups(self, lr: float, *, displacement_factor: float = 10.0) -> list[dict[str, object]]:
        """The branches for an optimiser: edges at ``lr``, displacements at ``displacement_factor · lr``."""
        edge = [*self.edge_levels.parameters(), *self.edge_head.parameters()]
        displacement = [*self.displacement_levels.parameters(), *self.displacement_head.parameters()]
        return [{"params": edge, "lr": lr}, {"params": displacement, "lr": lr * displacement_factor}]


def affinity_loss(
    edges: Tensor, displacements: Tensor, labels: Tensor, *, radius: int = 10, across: bool = False
) -> IRNTerms:
    r"""Loss of :class:`IRNet` (Ahn et al. 2019, section 4.2-4.3), from a label map: no affinity is ever stored.

    The affinity of two pixels less than ``radius`` apart is 1 − the largest edge on the path between them
    (:func:`cacl.random_walk.paths`). Pairs with an ignored end are left out.

    .. math:: \tfrac12 \left( \tfrac12 L_{bg} + \tfrac12 L_{fg} + L_{neg} + L_{d,bg} + L_{d,fg} \right)

    Args:
        edges: logits, ``(B, 1, h, w)``.
        displacements: ``(B, 2, h, w)``, (dy, dx) in grid pixels.
        labels: ``(B, H, W)`` integers, 0 background, from 1 classes, 255 ignored; another size than ``(h, w)`` is
            resized to it by the nearest pixel.
        radius: in grid pixels.
        across: as for :func:`cacl.itc_loss`.

    Returns:
        :class:`IRNTerms`; a kind of pair that does not occur gives 0, with a graph.

    Raises:
        ValueError: if a shape does not fit.
    """
    check_tensor("edges", edges, "(B, 1, h, w)")
    check_tensor("displacements", displacements, "(B, 2, h, w)")
    check_positive("radius", radius)
    batch, _, height, width = edges.shape
    if edges.shape[1] != 1:
        raise expected("edges", "a tensor (B, 1, h, w)", shape(edges))
    if tuple(displacements.shape) != (batch, 2, height, width):
        raise expected("displacements", f"of shape {(batch, 2, height, width)}, as `edges`", shape(displacements))
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputTypeError(f"Expected argument `labels` to be an integer tensor (B, H, W), but got {kind}.")
    if labels.ndim != 3 or len(labels) != batch:
        raise expected("labels", f"a tensor ({batch}, H, W)", shape(labels))
    labels = labels.to(edges.device)
    if labels.shape[1:] != edges.shape[2:]:
        labels = _nearest(labels, (height, width))
    with torch.autocast(edges.device.type, enabled=False):
        if edges.dtype != torch.float64:
            edges, displacements = edges.float(), displacements.float()
        sums = edges.new_zeros(5) + 0 * (edges.sum() + displacements.sum())  # a graph, where there is no pair at all
        counts = edges.new_zeros(3)
        for offset, largest in along_paths(edges[:, 0], radius):
            of_offset, seen = _PairTerms.apply(largest, displacements, labels, offset)
            sums, counts = sums + of_offset, counts + seen
        least = 1.0
        if across and world_size() > 1:
            counts, least = all_reduce_sum(counts) / world_size(), 1 / world_size()
        means = sums / torch.cat((counts, counts[:2])).clamp(min=least)
        background, foreground, negative, flat, pointed = means.unbind()
        whole = (background / 2 + foreground / 2 + negative) / 2 + (flat + pointed) / 2
    return IRNTerms(whole, background, foreground, negative, flat, pointed)


class _PairTerms(torch.autograd.Function):
    """Sums of the five terms over the pairs of one offset, and how many pairs of each kind there are.

    Keeps nothing but its inputs: what a graph of elementwise operations would keep, some 150 offsets times, is made
    again for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, largest: Tensor, displacements: Tensor, labels: Tensor, offset: Offset
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(largest, displacements, labels)
        ctx.offset = offset
        background, foreground, negative = kinds = _kinds(labels, offset)
        # softplus, whose log1p is slow on a CPU: −log affinity = −log sigmoid(−m), −log(1 − affinity) = −log sigmoid(m)
        apart = largest.relu() - largest.abs().sigmoid().log()
        together = apart - largest
        flat, pointed = (x.abs().mean(1) for x in _differences(displacements, offset))
        terms = (
            (apart, background),
            (apart, foreground),
            (together, negative),
            (flat, background),
            (pointed, foreground),
        )
        counts = torch.stack([kind.sum() for kind in kinds]).to(largest)
        ctx.mark_non_differentiable(counts)
        return torch.stack([(term * kind).sum() for term, kind in terms]), counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        largest, displacements, labels = ctx.saved_tensors
        background, foreground, negative = _kinds(labels, ctx.offset)
        apart = largest.sigmoid()
        edges = apart * (grad[0] * background + grad[1] * foreground) - (1 - apart) * (grad[2] * negative)
        flat, pointed = (x.sign() / 2 for x in _differences(displacements, ctx.offset))
        pull = flat * (grad[3] * background)[:, None] + pointed * (grad[4] * foreground)[:, None]
        first, second = ends(ctx.offset, labels.shape[-2:])
        moved = torch.zeros_like(displacements)
        moved[..., *first] += pull
        moved[..., *second] -= pull
        return edges, moved, None, None


def _kinds(labels: Tensor, offset: Offset) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs lie inside the background, inside one class, across two labels."""
    first, second = (labels[..., *end] for end in ends(offset, labels.shape[-2:]))
    sure = (first != IGNORE) & (second != IGNORE)
    same = (first == second) & sure
    background = same & (first == 0)
    return background, same & ~background, sure & ~same


def _differences(displacements: Tensor, offset: Offset) -> tuple[Tensor, Tensor]:
    """Of the displacements of each pair, and that without the offset: 0 where both point to one centre."""
    first, second = (displacements[..., *end] for end in ends(offset, displacements.shape[-2:]))
    difference = first - second
    dy, dx = difference.unbind(1)
    return difference, torch.stack((dy - offset[0], dx - offset[1]), 1)  # a tensor of the offset would wait for a GPU


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = (
        ((torch.arange(n, device=labels.device) + 0.5) * (old / n)).long()
        for n, old in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def _block(inputs: int, outputs: int, size: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(outputs // 8, outputs), nn.ReLU())


def _joined(blocks: nn.ModuleList, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    maps = (block(feature) for block, feature in zip(blocks, features, strict=True))
    return torch.cat([F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps], 1)
