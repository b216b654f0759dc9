"""The three losses of CA-CL (eq. 6-13): image-text contrast, background suppression, region size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cacl._support.checks import check_classes, check_same_shape, check_tensor, shape
from cacl._support.distributed import all_reduce_sum, gather_rows, world_size
from cacl._support.features import cosine, full, reduced
from cacl._support.values import check_choice, check_range
from cacl.constants import REDUCTIONS, Reduction
from cacl.errors import InputTypeError, expected

ThresholdMode = Literal["soft", "quantile", "fixed"]


def itc_loss(
    foreground: Tensor,
    background: Tensor,
    text: Tensor,
    *,
    margin: float = 0.5,
    reduction: Reduction = "mean",
    across: bool = False,
) -> Tensor:
    r"""Image-text contrastive loss (CA-CL, eq. 6-7).

    .. math:: \frac{1}{N} \sum_i \max(0, \text{margin} - \cos(f_i, t_i) + \cos(b_i, t_i))

    Args:
        foreground: features of the foreground regions, ``(N, D)``.
        background: features of the background regions, ``(N, D)``.
        text: features of the chosen prompts, ``(N, D)``.
        margin: smallest wanted gap between the two cosines, in [0, 2]. CLIP's image-text cosines lie at 0.15-0.35,
            so at the paper's 0.5 the hinge is always active and the loss is linear in the gap.
        reduction: ``"mean"`` over the pairs, ``"sum"``, or ``"none"`` for ``(N,)``.
        across: the pairs of all processes of ``torch.distributed``'s default group are one batch: the mean over the
            processes of what each returns, and so of their gradients, which is what ``DistributedDataParallel`` takes,
            is that of the whole batch. Every process must call it, also one without a pair.

    Returns:
        A scalar, or ``(N,)``; float32, or float64 for float64 input. 0 with a graph when N is 0.

    Raises:
        ValueError: if the shapes differ or a setting is out of range.

    Example:
        >>> feature = torch.eye(2)
        >>> itc_loss(feature, -feature, feature)
        tensor(0.)
    """
    check_same_shape("(N, D)", foreground=foreground, background=background, text=text)
    check_range("margin", margin, 0, 2)
    gap = cosine(foreground, text) - cosine(background, text)
    return reduced((margin - gap).clamp(min=0), reduction, across)


class ITCLoss(nn.Module):
    """Module form of :func:`itc_loss`."""

    def __init__(self, margin: float = 0.5, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_range("margin", margin, 0, 2)
        check_choice("reduction", reduction, REDUCTIONS)
        self.margin = margin
        self.reduction = reduction

    def forward(self, foreground: Tensor, background: Tensor, text: Tensor, *, across: bool = False) -> Tensor:
        return itc_loss(foreground, background, text, margin=self.margin, reduction=self.reduction, across=across)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"


def bg_suppression_loss(
    foreground: Tensor,
    background_text: Tensor,
    threshold: Tensor | float = 0.26,
    *,
    temperature: float | None = None,
    reduction: Reduction = "sum",
    across: bool = False,
) -> Tensor:
    r"""Class-specific background suppression (CSBS) loss (CA-CL, eq. 9, 10, 12).

    .. math:: -\sum_i \sum_l \log(1 - s_{il} t_{il}), \quad s_{il} = \cos(f_i, b_{il}), \quad t_{il} = [s_{il} \ge θ]

    Args:
        foreground: features of the foreground regions, ``(N, D)``.
        background_text: features of each pair's Q background prompts, ``(N, Q, D)``; rows of zeros are padding.
        threshold: θ, a number or a tensor that broadcasts to ``(N, 1)``.
        temperature: τ > 0 gives a threshold that is a tensor the gradient of the soft mask
            ``sigmoid((s - θ) / τ)``, as the mean over the prompts; the value of the loss stays that of the hard mask.
            Without it θ has no gradient: that of eq. 10 is zero.
        reduction: ``"sum"`` over pairs and prompts as in the paper, ``"mean"`` over both, or ``"none"`` for ``(N,)``.
        across: as for :func:`itc_loss`.

    Returns:
        A scalar, or ``(N,)``; float32, or float64 for float64 input. 0 with a graph when N is 0.

    Raises:
        ValueError: if the shapes do not go together or a setting is out of range.

    Example:
        >>> foreground = torch.tensor([[1.0, 0.0]])
        >>> words = torch.tensor([[[0.6, 0.8], [0.1, 0.995]]])      # cosines 0.6 and 0.1
        >>> bg_suppression_loss(foreground, words, 0.26)            # -log(1 - 0.6)
        tensor(0.9163)
    """
    return _suppress(foreground, background_text, threshold, temperature, reduction, across)[0]


class BGSuppressionLoss(nn.Module):
    """CSBS loss with a threshold θ that can adapt (CA-CL, eq. 9-12); :func:`bg_suppression_loss` for a given θ.

    The gradient of eq. 10's hard mask with respect to θ is zero, so eq. 11 needs a reading:

    - ``"fixed"``: θ stays, which is eq. 11 to the letter.
    - ``"soft"``: θ is a parameter; give ``parameters()`` to an optimiser without weight decay. It gets the gradient
      of a sigmoid mask, which only ever points up, so θ is held in ``bounds``.
    - ``"quantile"``: θ follows the ``quantile`` of the similarities seen while training with ``momentum``.

    Args:
        threshold: θ at the start. CLIP ViT-B/32: 0.26 on VOC.
        mode: how θ adapts.
        bounds: range of θ in ``"soft"``.
        temperature: τ of the sigmoid in ``"soft"``.
        quantile: share of the similarities below θ in ``"quantile"``.
        momentum: of the running quantile, in [0, 1].
        num_classes: in ``"quantile"``, a θ a class; then ``forward`` needs ``classes``.
        reduction: ``"sum"`` over pairs and prompts as in the paper, ``"mean"``, or ``"none"`` for ``(N,)``.

    Attributes:
        threshold: θ, a scalar, or ``(K,)`` with ``num_classes``.
        pass_rate: share of the last call's prompts with a similarity of at least θ.

    Raises:
        ValueError: if a setting is out of range, or shapes do not go together.
    """

    theta: Tensor
    pass_rate: Tensor

    def __init__(
        self,
        threshold: float = 0.26,
        *,
        mode: ThresholdMode = "fixed",
        bounds: tuple[float, float] = (0.2, 0.3),
        temperature: float = 0.01,
        quantile: float = 0.8,
        momentum: float = 0.99,
        num_classes: int | None = None,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("soft", "quantile", "fixed"))
        check_choice("reduction", reduction, REDUCTIONS)
        check_range("threshold", threshold, -1, 1)
        check_range("bounds[0]", bounds[0], -1, 1)
        check_range("bounds[1]", bounds[1], bounds[0], 1)
        if mode == "soft":
            check_range("threshold", threshold, *bounds)
            check_range("temperature", temperature, 1e-6, float("inf"))
        check_range("quantile", quantile, 0, 1)
        check_range("momentum", momentum, 0, 1)
        if num_classes is not None and (mode != "quantile" or num_classes < 1):
            raise expected("num_classes", 'None, or a positive integer in mode "quantile"', num_classes)
        self.mode = mode
        self.bounds = bounds
        self.temperature = temperature
        self.quantile = quantile
        self.momentum = momentum
        self.num_classes = num_classes
        self.reduction = reduction
        theta = torch.full(() if num_classes is None else (num_classes,), float(threshold))
        if mode == "soft":
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta, persistent=mode == "quantile")
        self.register_buffer("pass_rate", torch.zeros(()), persistent=False)

    @property
    def threshold(self) -> Tensor:
        theta = self.theta.detach()
        return theta.clamp(*self.bounds) if self.mode == "soft" else theta

    def forward(
        self,
        foreground: Tensor,
        background_text: Tensor,
        classes: Tensor | None = None,
        *,
        across: bool = False,
    ) -> Tensor:
        """``(N, D)`` foreground features, ``(N, Q, D)`` background prompts, ``(N,)`` classes -> loss.

        With ``across``, as in :func:`itc_loss`, θ is the same in all processes.
        """
        _check_background(foreground, background_text)
        if self.num_classes is not None:
            if classes is None:
                raise InputTypeError("Expected argument `classes` to be a tensor (N,), but got None.")
            check_classes(classes, len(foreground), self.num_classes)
        if self.mode == "quantile" and self.training:
            self._follow(foreground.detach(), background_text, classes, across)
        if self.mode == "soft":
            with torch.no_grad():
                self.theta.clamp_(*self.bounds)
            # A copy: the next call may clamp θ before this one's graph has run backward.
            theta = self.theta.clone()
        else:
            theta = self.theta if self.num_classes is None else self.theta[classes][:, None]
        temperature = self.temperature if self.mode == "soft" else None
        loss, self.pass_rate = _suppress(foreground, background_text, theta, temperature, self.reduction, across)
        return loss

    @torch.no_grad()
    def _follow(self, foreground: Tensor, background_text: Tensor, classes: Tensor | None, across: bool) -> None:
        """θ ← momentum θ + (1 − momentum) quantile, for each θ that has similarities in this batch."""
        similarity, real = _similarity(foreground, background_text)
        similarity = similarity.masked_fill(~real, float("nan"))
        if across:
            similarity = gather_rows(similarity)
            if classes is not None and self.num_classes is not None:
                classes = gather_rows(classes)
        if similarity.numel() == 0:
            return
        seen = similarity[None]  # (1, N, Q)
        if self.num_classes is not None:
            assert classes is not None
            mine = classes == torch.arange(self.num_classes, device=classes.device)[:, None]
            seen = seen.masked_fill(~mine[:, :, None], float("nan"))  # (K, N, Q)
        now = seen.flatten(1).nanquantile(self.quantile, dim=1).view_as(self.theta).to(self.theta.dtype)
        self.theta.lerp_(now.where(~now.isnan(), self.theta), 1 - self.momentum)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, reduction={self.reduction!r}"


def region_loss(cams: Tensor, *, across: bool = False) -> Tensor:
    r"""Region regularisation (CA-CL, eq. 13): the mean of all CAMs, those of absent classes included.

    Args:
        cams: ``(B, K, h, w)`` in [0, 1].
        across: as for :func:`itc_loss`.

    Returns:
        A scalar; float32, or float64 for float64 input. 0 with a graph when B is 0.

    Raises:
        ValueError: if the shape is another.

    Example:
        >>> region_loss(torch.full((1, 2, 4, 4), 0.25))
        tensor(0.2500)
    """
    check_tensor("cams", cams, "(B, K, h, w)")
    return reduced(full(cams), "mean", across)


class RegionLoss(nn.Module):
    """Module form of :func:`region_loss`."""

    def forward(self, cams: Tensor, *, across: bool = False) -> Tensor:
        return region_loss(cams, across=across)


def _check_background(foreground: Tensor, background_text: Tensor) -> None:
    check_tensor("foreground", foreground, "(N, D)")
    check_tensor("background_text", background_text, "(N, Q, D)")
    pairs, features = foreground.shape
    if background_text.shape[0] != pairs or background_text.shape[2] != features:
        raise expected("background_text", f"a tensor ({pairs}, Q, {features})", shape(background_text))


def _similarity(foreground: Tensor, background_text: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines ``(N, Q)`` of eq. 9, and which prompts are no padding."""
    return cosine(foreground[:, None], background_text), background_text.ne(0).any(-1)


def _suppress(
    foreground: Tensor,
    background_text: Tensor,
    threshold: Tensor | float,
    temperature: float | None,
    reduction: Reduction,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss and pass rate of eq. 9-12; ``across`` as for :func:`itc_loss`."""
    _check_background(foreground, background_text)
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(threshold, Tensor) and threshold.shape not in ((), (1,), (1, 1), (len(foreground), 1)):
        raise expected("threshold", f"a number or a tensor ({len(foreground)}, 1)", shape(threshold))
    similarity, real = _similarity(foreground, background_text)
    passing = (similarity >= threshold) & real
    passed, prompts = passing.sum(), real.sum()
    processes = world_size() if across else 1
    if processes > 1:
        passed, prompts = all_reduce_sum(torch.stack((passed, prompts)).to(similarity.dtype)) / processes
    prompts = prompts.clamp(min=1 / processes)
    loss = -torch.log1p(-_below_one(similarity) * passing).sum(-1)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / prompts
    elif reduction == "sum":
        loss = loss * processes
    if temperature is not None:
        check_range("temperature", temperature, 1e-6, float("inf"))
        constant = _below_one(similarity.detach())
        soft = -torch.log1p(-constant * torch.sigmoid((constant - threshold) / temperature)) * real / prompts
        soft = soft.sum(-1) if reduction == "none" else soft.sum()
        loss = loss + soft - soft.detach()
    return loss, (passed / prompts).detach()


def _below_one(similarity: Tensor) -> Tensor:
    return similarity.clamp(max=1 - 1e-6)
