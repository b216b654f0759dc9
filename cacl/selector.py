"""Dynamic context prompt selection (DCPS): every region picks the template that describes it best (CA-CL, eq. 3-5)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cacl._support.checks import check_classes, check_tensor, shape
from cacl._support.distributed import all_reduce_sum
from cacl._support.features import cosine, unit
from cacl._support.values import check_choice
from cacl.errors import InputTypeError, expected


class Selection(NamedTuple):
    """What :class:`ContextSelector` chose for N pairs."""

    text: Tensor
    """Features of the chosen prompts, ``(N, D)``, unit length, no gradient."""
    index: Tensor  # type: ignore[assignment]  # the field hides tuple.index
    """The chosen templates, ``(N,)`` int64."""
    similarity: Tensor
    """Cosine of foreground and chosen prompt, ``(N,)``."""


class ContextSelector(nn.Module):
    """Choose for every pair the template whose prompt is most similar to its foreground (CA-CL, eq. 3-5).

    The choice carries no gradient; ``similarity`` has one with respect to ``foreground``.

    Args:
        prompt_features: ``(K, m, D)``, from :meth:`cacl.PromptSet.encode`.
        mode: ``"dynamic"`` chooses; ``"fixed"`` always takes ``template`` (the paper's single-template rows).
        template: the template of ``"fixed"``.

    Attributes:
        counts: ``(K, m)`` int64, how often each template was chosen for each class while training.

    Raises:
        ValueError: if a shape, a class index or a setting is out of range.

    Example:
        >>> select = ContextSelector(torch.eye(3)[None])            # one class, three templates
        >>> select(torch.tensor([[0.1, 0.2, 0.9]]), torch.tensor([0])).index
        tensor([2])
    """

    counts: Tensor
    prompt_features: Tensor

    def __init__(
        self, prompt_features: Tensor, *, mode: Literal["dynamic", "fixed"] = "dynamic", template: int = 0
    ) -> None:
        super().__init__()
        check_tensor("prompt_features", prompt_features, "(K, m, D)")
        check_choice("mode", mode, ("dynamic", "fixed"))
        templates = prompt_features.shape[1]
        if isinstance(template, bool) or not isinstance(template, int):
            raise InputTypeError(f"Expected argument `template` to be an integer, but got {type(template).__name__}.")
        if not 0 <= template < templates:
            raise expected("template", f"in [0, {templates - 1}]", template)
        self.mode = mode
        self.template = template
        self.register_buffer("prompt_features", unit(prompt_features.detach()), persistent=False)
        self.register_buffer(
            "counts", torch.zeros(prompt_features.shape[:2], dtype=torch.int64, device=prompt_features.device)
        )

    def forward(self, foreground: Tensor, classes: Tensor, *, across: bool = False) -> Selection:
        """``(N, D)`` foreground features and ``(N,)`` classes -> :class:`Selection`.

        With ``across`` the choices of all processes are counted, as in :func:`cacl.itc_loss`.
        """
        check_tensor("foreground", foreground, "(N, D)")
        num_classes, _, features = self.prompt_features.shape
        if foreground.shape[1] != features:
            raise expected("foreground", f"a tensor (N, {features}), as the prompts", shape(foreground))
        check_classes(classes, len(foreground), num_classes)
        prompts = self.prompt_features[classes]
        similarity = cosine(foreground[:, None], prompts)
        if self.mode == "fixed":
            index = torch.full_like(classes, self.template, dtype=torch.int64)
        else:
            index = similarity.detach().argmax(1)
        if self.training:
            cell = classes * self.counts.shape[1] + index
            chosen = torch.zeros_like(self.counts).view(-1).scatter_add_(0, cell, torch.ones_like(index))
            self.counts += (all_reduce_sum(chosen) if across else chosen).view_as(self.counts)
        pair = torch.arange(len(index), device=index.device)
        return Selection(prompts[pair, index], index, similarity[pair, index])

    def extra_repr(self) -> str:
        classes, templates, features = self.prompt_features.shape
        return f"classes={classes}, templates={templates}, features={features}, mode={self.mode!r}"
