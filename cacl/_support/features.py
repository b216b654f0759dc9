"""What the losses have in common: features of unit length in float32, and means and sums over pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cacl._support.distributed import all_reduce_sum, world_size
from cacl._support.values import check_choice
from cacl.constants import IMAGENET_MEAN, IMAGENET_STD, REDUCTIONS, Reduction


def full(x: Tensor) -> Tensor:
    """float32 arithmetic, whatever comes in; float64 stays, so that gradients can be checked."""
    return x if x.element_size() >= 8 else x.float()


def unit(x: Tensor) -> Tensor:
    """``(…, D)`` -> the same at length 1; zeros stay zeros."""
    x = full(x)
    # The length of zeros is taken as 1: 1 / eps as their gradient would be infinite in half precision.
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length < 1e-12, 1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the last dimension. A product and a sum: matmul would fall to half precision under autocast."""
    return (unit(x) * unit(y)).sum(-1)


def renormalisation(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, ``(3, 1, 1)``, that take images from ImageNet's statistics to others."""
    scale = [ours / theirs for ours, theirs in zip(IMAGENET_STD, std, strict=True)]
    shift = [(ours - theirs) / s for ours, theirs, s in zip(IMAGENET_MEAN, mean, std, strict=True)]
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (scale, shift))  # type: ignore[return-value]


def reduced(loss: Tensor, reduction: Reduction, across: bool = False, count: Tensor | None = None) -> Tensor:
    """Mean or sum of a loss's parts, 0 with a graph where there are none; ``across`` as for :func:`cacl.itc_loss`.

    ``count`` is how many parts a mean is over, where it is not over all of them.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return loss
    processes = world_size() if across else 1
    if reduction == "sum":
        return loss.sum() * processes if processes > 1 else loss.sum()
    if processes == 1:
        return loss.sum() / (max(loss.numel(), 1) if count is None else count.clamp(min=1))
    own = torch.full((), float(loss.numel()), device=loss.device) if count is None else count.float()
    everywhere = all_reduce_sum(own)
    return loss.sum() * (processes / everywhere.clamp(min=1)).to(loss.dtype)
