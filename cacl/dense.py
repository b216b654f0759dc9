"""What a vision transformer sees where, at any photo size: dense features, and how its places attend to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacl.errors import InputError


class DenseFeatures(NamedTuple):
    """What an encoder sees at each of the h · w places of N images."""

    features: Tensor
    """``(N, D, h, w)`` in the space of the texts, differentiable with respect to ``activations``; their mean over the
    places stands for the image."""
    activations: Tensor
    """``(N, C, h, w)``: what they are made of, where Grad-CAM looks. Of a transformer it is what its last attention
    sees."""
    attention: Tensor | None = None
    """``(N, T, T)``, T = h · w row by row: how much the place of a row looks at that of a column, mean over heads and
    the last blocks. None where the encoder has no attention."""


def dense_features(visual: Any, images: Tensor, *, layers: int = 8) -> DenseFeatures:
    """Dense features of CLIP's vision transformers, those of OpenAI's library and of open_clip.

    Every patch goes the way that the library sends the class token: last block, norm, projection. Position embeddings
    are resized to the photo bilinearly.

    Args:
        visual: the transformer, frozen.
        images: ``(N, 3, H, W)``, normalised for it; resized to whole patches, the next larger number of them.
        layers: the attention is the mean over so many of the last blocks.

    Returns:
        Features, activations that take a gradient, and attention.

    Raises:
        ValueError: if ``visual`` is no such transformer.
    """
    blocks = _blocks(visual)
    patch = visual.conv1.kernel_size
    grid = tuple(-(-side // p) for side, p in zip(images.shape[2:], patch, strict=True))
    whole = tuple(n * p for n, p in zip(grid, patch, strict=True))
    if tuple(images.shape[2:]) != whole:
        images = F.interpolate(images, size=whole, mode="bicubic", align_corners=False, antialias=True)
    seen = _Seen(grid, batch_first=blocks[-1].attn.batch_first)
    with seen.watching(blocks[-layers:]), torch.enable_grad():
        positions = _positions(visual.positional_embedding, grid)
        torch.func.functional_call(visual, {"positional_embedding": positions}, (images.detach(),))
        places = visual.ln_post(seen.in_order(seen.output)[:, 1:])
        features = places if visual.proj is None else places @ visual.proj
    assert seen.attention is not None
    return DenseFeatures(_at_places(features, grid), seen.activations, seen.attention / len(blocks[-layers:]))


def _blocks(visual: Any) -> list[Any]:
    """The blocks of a transformer, if it is of the kind whose parts are known."""
    blocks = list(getattr(getattr(visual, "transformer", None), "resblocks", ()))
    parts = ("conv1", "positional_embedding", "ln_post", "proj")
    known = blocks and all(hasattr(visual, part) for part in parts) and getattr(visual, "attn_pool", None) is None
    if not known or not all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks):
        raise InputError(
            f"Expected argument `encoder` to have dense features, but its image tower, {type(visual).__name__}, is no "
            "vision transformer of CLIP's kind, such as ViT-B/16."
        )
    return blocks


def _positions(embedding: Tensor, grid: tuple[int, ...]) -> Tensor:
    """``(1 + g², C)`` -> ``(1 + h · w, C)``: those of the class token and of another grid."""
    side = isqrt(len(embedding) - 1)
    if grid == (side, side):
        return embedding
    square = embedding[1:].T.reshape(1, -1, side, side)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return torch.cat((embedding[:1], resized.flatten(2)[0].T))


def _at_places(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """``(N, h · w, C)`` -> ``(N, C, h, w)``."""
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


class _Seen:
    """What goes by inside of a transformer while it looks at images."""

    output: Tensor
    """Of the last block."""
    activations: Tensor
    """``(N, C, h, w)``, what the last block's attention sees of the places: what follows has a gradient to it."""

    def __init__(self, grid: tuple[int, ...], *, batch_first: bool) -> None:
        self.grid, self.batch_first = grid, batch_first
        self.attention: Tensor | None = None

    def in_order(self, tokens: Tensor) -> Tensor:
        """``(N, 1 + T, C)`` from the library's order, or back."""
        return tokens if self.batch_first else tokens.transpose(0, 1)

    @contextmanager
    def watching(self, blocks: Sequence[Any]) -> Iterator[None]:
        last = blocks[-1]
        hooks = [last.ln_1.register_forward_hook(self._before), last.register_forward_hook(self._after)]
        for block in blocks:
            hooks.append(block.attn.register_forward_pre_hook(_with_weights, with_kwargs=True))
            hooks.append(block.attn.register_forward_hook(self._attended))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
        tokens = self.in_order(tokens)
        own, places = tokens[:, :1], tokens[:, 1:]
        self.activations = _at_places(places, self.grid).detach().requires_grad_()
        return self.in_order(torch.cat((own, self.activations.flatten(2).transpose(1, 2)), dim=1))

    def _after(self, module: nn.Module, inputs: Any, tokens: Tensor) -> None:
        self.output = tokens

    def _attended(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        seen = output[1].detach()[:, 1:, 1:]
        self.attention = seen if self.attention is None else self.attention + seen


def _with_weights(module: nn.Module, inputs: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return inputs, {**arguments, "need_weights": True, "average_attn_weights": True}
