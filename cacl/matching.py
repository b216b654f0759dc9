"""The losses of CLIMS and QA-CLIMS on features, and POLE's adapter of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacl._support.checks import check_same_shape, check_tensor, shape
from cacl._support.features import cosine, reduced
from cacl._support.values import check_choice, check_range
from cacl.constants import REDUCTIONS, Reduction
from cacl.errors import expected

_SMALLEST, _LARGEST = 1e-4, 0.9999
"""What cosines are held between before their logarithm is taken."""


def matching_loss(
    foreground: Tensor,
    background: Tensor,
    text: Tensor,
    *,
    weights: tuple[float, float] = (10.0, 24.0),
    reduction: Reduction = "mean",
    across: bool = False,
) -> Tensor:
    r"""Object region and background region matching (CLIMS, Xie et al. 2022; POLE weighs 10 and 25).

    .. math:: \frac{1}{N} \sum_i -w_1 \ln \cos(f_i, t_i) - w_2 \ln (1 - \cos(b_i, t_i))

    The cosines are held in [0.0001, 0.9999]; beyond there is no gradient.

    Args:
        foreground: features of the foreground regions, ``(N, D)``.
        background: features of the background regions, ``(N, D)``.
        text: features of each pair's text, ``(N, D)``.
        weights: of foreground and background, at least 0.
        reduction: ``"mean"`` over the pairs, ``"sum"``, or ``"none"`` for ``(N,)``.
        across: as for :func:`cacl.itc_loss`.

    Returns:
        A scalar, or ``(N,)``; float32, or float64 for float64 input. 0 with a graph when N is 0.

    Raises:
        ValueError: if the shapes differ or a setting is out of range.

    Example:
        >>> text = torch.tensor([[1.0, 0.0]])
        >>> half = torch.tensor([[0.5, 0.75**0.5]])
        >>> matching_loss(half, half, text, weights=(1.0, 1.0))  # 2 ln 2
        tensor(1.3863)
    """
    check_same_shape("(N, D)", foreground=foreground, background=background, text=text)
    _check_weights(weights)
    s_ff, s_bf = (cosine(features, text).clamp(_SMALLEST, _LARGEST) for features in (foreground, background))
    return reduced(-weights[0] * s_ff.log() - weights[1] * torch.log1p(-s_bf), reduction, across)


class MatchingLoss(nn.Module):
    """Module form of :func:`matching_loss`."""

    def __init__(self, weights: tuple[float, float] = (10.0, 24.0), *, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_weights(weights)
        check_choice("reduction", reduction, REDUCTIONS)
        self.weights, self.reduction = weights, reduction

    def forward(self, foreground: Tensor, background: Tensor, text: Tensor, *, across: bool = False) -> Tensor:
        return matching_loss(
            foreground, background, text, weights=self.weights, reduction=self.reduction, across=across
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"weights={self.weights}, reduction={self.reduction!r}"


def contrast_loss(
    foreground: Tensor,
    background: Tensor,
    text: Tensor,
    words: Tensor,
    *,
    temperature: float = 0.7,
    weights: tuple[float, float] = (10.0, 8.0),
    reduction: Reduction = "sum",
    across: bool = False,
) -> Tensor:
    r"""Region-text contrast with background words (QA-CLIMS, Deng et al. 2023).

    .. math:: \sum_i -w_1 \ln \frac{e^{\cos(f_i, t_i) / T}}{e^{\cos(f_i, t_i) / T} + \sum_l e^{\cos(f_i, d_{il}) / T}}
              - w_2 \ln \frac{m_i}{m_i + e^{\cos(b_i, t_i) / T}}, \quad
              m_i = \frac{1}{|L_i|} \sum_l e^{\cos(b_i, d_{il}) / T}

    A pair without words adds 0.

    Args:
        foreground: features of the foreground regions, ``(N, D)``.
        background: features of the background regions, ``(N, D)``.
        text: features of each pair's text, ``(N, D)``.
        words: features d of each pair's background words, ``(N, Q, D)``; rows of zeros are padding.
        temperature: T > 0.
        weights: of foreground and background, at least 0.
        reduction: ``"sum"`` over the pairs as in the paper's code, ``"mean"`` over those that have words, or ``"none"``
            for ``(N,)``.
        across: as for :func:`cacl.itc_loss`.

    Returns:
        A scalar, or ``(N,)``; float32, or float64 for float64 input. 0 with a graph when N is 0.

    Raises:
        ValueError: if the shapes do not go together or a setting is out of range.

    Example:
        >>> same = torch.tensor([[1.0, 0.0]])
        >>> contrast_loss(same, same, same, same[None], weights=(1.0, 1.0))  # 2 ln 2
        tensor(1.3863)
    """
    check_same_shape("(N, D)", foreground=foreground, background=background, text=text)
    check_tensor("words", words, "(N, Q, D)")
    pairs, width = foreground.shape
    if words.shape[0] != pairs or words.shape[2] != width:
        raise expected("words", f"a tensor ({pairs}, Q, {width})", shape(words))
    check_range("temperature", temperature, 1e-6, float("inf"))
    _check_weights(weights)
    check_choice("reduction", reduction, REDUCTIONS)
    given = words.ne(0).any(-1)
    own = given.any(-1)
    # Padding has no part in a sum of exponentials; a pair of padding alone is put back to a finite value first.
    hidden = ~given & own[:, None]

    def similarity(features: Tensor) -> tuple[Tensor, Tensor]:
        others = cosine(features[:, None], words) / temperature
        return cosine(features, text) / temperature, others.masked_fill(hidden, -torch.inf)

    (s_ff, s_fl), (s_bf, s_bl) = similarity(foreground), similarity(background)
    first = torch.cat((s_ff[:, None], s_fl), 1).logsumexp(1) - s_ff
    if words.shape[1]:
        mean = s_bl.logsumexp(1) - given.sum(1).clamp(min=1).to(s_bl.dtype).log()
        second = F.softplus(s_bf - mean)
    else:
        second = s_bf * 0
    loss = (weights[0] * first + weights[1] * second) * own
    return reduced(loss, reduction, across, count=own.sum())


class ContrastLoss(nn.Module):
    """Module form of :func:`contrast_loss`."""

    def __init__(
        self,
        temperature: float = 0.7,
        *,
        weights: tuple[float, float] = (10.0, 8.0),
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        check_range("temperature", temperature, 1e-6, float("inf"))
        _check_weights(weights)
        check_choice("reduction", reduction, REDUCTIONS)
        self.temperature, self.weights, self.reduction = temperature, weights, reduction

    def forward(
        self, foreground: Tensor, background: Tensor, text: Tensor, words: Tensor, *, across: bool = False
    ) -> Tensor:
        return contrast_loss(
            foreground, background, text, words, temperature=self.temperature, weights=self.weights,
            reduction=self.reduction, across=across,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, weights={self.weights}, reduction={self.reduction!r}"


class Adapter(nn.Module):
    r"""Features with a learned part (POLE): :math:`v' = r \odot A(v) + (1 - r) \odot v`.

    Args:
        width: D; between its two layers, each without a bias and followed by a ReLU, A has a quarter of that.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 4)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.ReLU()
        )
        self.ratio = nn.Parameter(torch.full((width,), 0.2))

    def forward(self, features: Tensor) -> Tensor:
        """``(N, D)`` -> ``(N, D)``."""
        features = features.to(self.ratio.dtype)
        adapted: Tensor = self.ratio * self.layers(features) + (1 - self.ratio) * features
        return adapted


def _check_weights(weights: tuple[float, float]) -> None:
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise expected("weights", "two numbers", repr(weights))
    for i, weight in enumerate(weights):
        check_range(f"weights[{i}]", weight, 0, float("inf"))
