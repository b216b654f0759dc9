"""Small networks for the world of :mod:`cacl.scenes`: an image-text encoder and a backbone, with their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cacl._support.weights import load_weights
from cacl.errors import InputError, did_you_mean

ASSET = Path(__file__).with_name("assets") / "scenes.npz"
"""The weights in float16, and the words that the encoder knows; ``benchmarks/train_scenes.py`` makes it."""


class Trunk(nn.Sequential):
    """``(B, 3, H, W)`` -> ``(B, out_channels, H/8, W/8)``."""

    def __init__(self, width: int = 40, blocks: int = 1) -> None:
        super().__init__(
            *_convolution(3, width, 2),
            *_convolution(width, 2 * width, 2),
            _Residual(2 * width),
            *_convolution(2 * width, 4 * width, 2),
            *(_Residual(4 * width) for _ in range(blocks)),
        )
        self.out_channels = 4 * width
        self.level_channels = (width, 2 * width, 4 * width)

    def levels(self, images: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` -> features of strides 2, 4, 8."""
        found = [images]
        for layer in self:
            down = isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)
            found = [*found, layer(found[-1])] if down else [*found[:-1], layer(found[-1])]
        return found[1:]


class TwoTowers(nn.Module):
    """Images by what is seen where, averaged over the places; texts by their words without regard to their order.

    Args:
        words: the words that texts may have.
        features: D.
    """

    def __init__(self, words: Sequence[str], features: int = 128) -> None:
        super().__init__()
        trunk = Trunk()
        hidden = 2 * features
        self.image = nn.Sequential(
            trunk, nn.Conv2d(trunk.out_channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, features, 1)
        )
        self.index = {word: i for i, word in enumerate(words, start=1)}
        self.words = nn.EmbeddingBag(len(words) + 1, features, mode="sum", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def encode_image(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, D)``."""
        features: Tensor = self.image(images).mean((2, 3))
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """``(T, L)`` -> ``(T, D)``."""
        bag = self.words(tokens)
        features: Tensor = bag + self.text(bag)
        return features

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """T texts -> ``(T, L)``, short ones padded with 0.

        Raises:
            ValueError: if a word is not known.
        """
        rows = [re.findall(r"[^\W_]+", text.lower()) for text in texts]
        tokens = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64, device="cpu")
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            for j, word in enumerate(row):
                if word not in self.index:
                    raise InputError(
                        f"The encoder 'scenes' is made for drawn scenes and does not know the word {word!r} in {text!r}"
                        f"{did_you_mean(word, self.index)}"
                    )
                tokens[i, j] = self.index[word]
        return tokens


def save(path: Path, towers: TwoTowers, trunk: Trunk) -> None:
    """Write the weights of both."""
    arrays = {"words": np.array(list(towers.index))}
    for name, module in (("towers", towers), ("trunk", trunk)):
        for key, value in module.state_dict().items():
            arrays[f"{name}.{key}"] = (value.half() if value.is_floating_point() else value).numpy()
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_towers(path: Path = ASSET) -> TwoTowers:
    """The image-text encoder in a file of :func:`save`, in evaluation mode, with batch norm in its convolutions: it is
    frozen, and a step of CA-CL so takes a fifth less time."""
    with np.load(path, allow_pickle=False) as arrays:
        towers = TwoTowers(arrays["words"].tolist())
        load_weights(towers, _part(arrays, "towers"), path)
    towers.eval()
    towers.image[0] = _fused(towers.image[0])
    return towers


def _fused(layers: nn.Module) -> nn.Sequential:
    """Layers in evaluation mode, each batch norm in the convolution before it."""
    found: list[nn.Module] = []
    for layer in layers.children():
        if isinstance(layer, nn.BatchNorm2d):
            found[-1] = fuse_conv_bn_eval(found[-1], layer)  # type: ignore[type-var]
        else:
            found.append(layer)
        if isinstance(layer, _Residual):
            layer.body = _fused(layer.body)
    return nn.Sequential(*found)


def load_trunk(path: Path = ASSET) -> Trunk:
    """The backbone in a file of :func:`save`."""
    trunk = Trunk()
    with np.load(path, allow_pickle=False) as arrays:
        load_weights(trunk, _part(arrays, "trunk"), path)
    return trunk


def _part(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, Tensor]:
    keys = [key for key in arrays if key.startswith(f"{name}.")]
    return {key.removeprefix(f"{name}."): torch.from_numpy(arrays[key]) for key in keys}


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(channels, channels), *_convolution(channels, channels)[:2])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (x + self.body(x)).relu()
        return result


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
