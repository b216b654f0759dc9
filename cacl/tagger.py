"""Which classes an image shows: a linear classifier on the features of an image-text encoder, learned from tags.

A segmenter that saw a few hundred images draws outlines better than it tells classes apart; an encoder that saw
millions tells classes apart. :func:`cacl.photos.segment_photos` puts both together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacl._support.checks import check_labels, check_tensor, shape
from cacl._support.features import full, unit
from cacl.constants import STRENGTHS
from cacl.errors import InputError, expected

FOLDS = 5
_STEPS = 500


class Tagger(nn.Module):
    r"""Probability of each class, from an image's features.

    .. math:: p_k = \sigma\left(w_k^\top \frac{f}{\lVert f \rVert} + b_k\right)

    Args:
        weight: ``(K, D)``.
        bias: ``(K,)``.

    Raises:
        ValueError: if the shapes do not go together.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        check_tensor("weight", weight, "(K, D)")
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            raise expected("bias", f"a tensor ({len(weight)},)", shape(bias) if isinstance(bias, Tensor) else bias)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, D)`` -> ``(B, K)`` in [0, 1].

        Raises:
            ValueError: if the features are not as long as those that it has learned from.
        """
        check_tensor("features", features, "(B, D)")
        if features.shape[1] != self.weight.shape[1]:
            raise expected("features", f"a tensor (B, {self.weight.shape[1]})", shape(features))
        return F.linear(unit(features).to(self.weight.dtype), self.weight, self.bias).sigmoid()

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, texts: Tensor, *, strengths: Sequence[float] = STRENGTHS) -> Tagger:
        r"""Learn from images whose tags are known.

        A logistic regression that begins at what the encoder knows: the score of a class is a multiple of the cosine of
        its text, the same multiple for all, and what the tags add to that is what costs,

        .. math:: z_k = s\, t_k^\top f + v_k^\top f + b_k, \qquad
                  \min_{s, v, b} \frac{1}{N} \sum_{n, k} \mathrm{BCE}(\sigma(z_{nk}), y_{nk})
                  + λ \sum_k \lVert v_k \rVert^2

        λ is the one of ``strengths`` with the least cross-entropy in a cross-validation of five folds (every fifth
        image). The targets are those of Platt (1999), (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2), so that a class which no
        image shows, or all do, has a finite bias. It is computed in float64, on the CPU.

        Args:
            features: ``(N, D)`` of the images, of any length.
            labels: ``(N, K)``, 0 or 1.
            texts: ``(K, D)``, or ``(K, m, D)`` as :meth:`cacl.PromptSet.encode` gives them, whose mean is taken.
            strengths: the candidates for λ.

        Returns:
            A float32 module on the CPU.

        Raises:
            ValueError: if there is no image or no strength, or shapes do not go together.

        Example:
            >>> from cacl.tagger import Tagger
            >>> features, texts = torch.eye(2).repeat(8, 1), torch.eye(2)
            >>> tagger = Tagger.fit(features, features, texts)
            >>> (tagger(torch.eye(2)) > 0.5).long()
            tensor([[1, 0],
                    [0, 1]])
        """
        features, labels, texts = _checked(features, labels, texts)
        if not strengths or not all(strength > 0 for strength in strengths):
            raise expected("strengths", "at least one number above 0, and no other", str(tuple(strengths)))
        ordered = sorted(strengths, reverse=True)
        with torch.inference_mode(False), torch.enable_grad():
            return cls(*_fitted(features.clone(), labels.clone(), texts.clone(), ordered))


def _fitted(features: Tensor, labels: Tensor, texts: Tensor, strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Weight and bias, float32, at the best of the strengths, which are in falling order."""
    if len(strengths) > 1 and len(features) > 1:
        losses = torch.zeros(len(strengths), dtype=torch.float64, device="cpu")
        for fold in range(min(FOLDS, len(features))):
            left_out = torch.arange(len(features), device="cpu") % FOLDS == fold
            x, y = features[left_out], labels[left_out]
            path = _path(features[~left_out], labels[~left_out], texts, strengths)
            losses += torch.stack([_entropy(x @ w.T + b, y) * len(x) for w, b in path])
        strengths = strengths[: 1 + int(losses.argmin())]
    weight, bias = _path(features, labels, texts, strengths)[-1]
    return weight.float(), bias.float()


def _checked(features: Tensor, labels: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, in float64; features and texts of unit length."""
    check_tensor("features", features, "(N, D)")
    if isinstance(texts, Tensor) and texts.ndim == 3:
        texts = unit(texts).mean(1)
    check_tensor("texts", texts, "(K, D)")
    check_labels(labels, len(texts))
    if not len(features):
        raise expected("features", "of at least one image", shape(features))
    if len(labels) != len(features):
        raise expected("labels", f"of {len(features)} images, as `features`", shape(labels))
    if texts.shape[1] != features.shape[1]:
        raise expected("texts", f"as long as `features`, {features.shape[1]}", shape(texts))
    if not features.isfinite().all():
        raise InputError("Expected argument `features` to be finite, but got NaN or infinity.")
    features, texts = (unit(values.detach().to("cpu", torch.float64)) for values in (features, texts))
    return features, labels.to("cpu", torch.float64), texts


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over the classes, mean over the images."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / max(len(logits), 1)


def _path(features: Tensor, labels: Tensor, texts: Tensor, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) at each strength, the strongest first, each from the one before."""
    shown = labels.sum(0)
    targets = torch.where(labels > 0, (shown + 1) / (shown + 2), 1 / (len(labels) - shown + 2))
    similar = features @ texts.T
    added, bias, factor = torch.zeros_like(texts), torch.zeros_like(texts[:, 0]), torch.zeros_like(texts[0, 0])
    for variable in (added, bias, factor):
        variable.requires_grad_(True)
    found = []
    for strength in strengths:
        search = torch.optim.LBFGS(
            [added, bias, factor], max_iter=_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def objective(strength: float = strength, search: torch.optim.LBFGS = search) -> Tensor:
            search.zero_grad()
            # The factor is counted in tens, which is about what it is, so that all steps are of one size.
            logits = 10 * factor * similar + features @ added.T + bias
            loss: Tensor = _entropy(logits, targets) + strength * added.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        search.step(objective)  # type: ignore[no-untyped-call]
        found.append(((10 * factor * texts + added).detach().clone(), bias.detach().clone()))
    return found


def weights_of(probabilities: Tensor) -> Tensor:
    """``(…, K)`` -> the same over the largest of each image, in [0, 1]; zeros stay zeros.

    What a segmenter's probabilities of the classes are multiplied with, the background's with 1: what is the most
    probable class of an image keeps all of its pixels, even where nothing is certain.
    """
    probabilities = full(probabilities)
    largest = probabilities.amax(-1, keepdim=True)
    return probabilities / largest.masked_fill(largest <= 0, 1)
