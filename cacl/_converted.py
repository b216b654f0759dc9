"""Weights of ResNets from elsewhere: their names translated, what fits counted, and anything less than all refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacl._checks import InputError, check_weights
from cacl._files import load_state
from cacl.encoders import IMAGENET_MEAN, IMAGENET_STD

_CAFFE_MEAN = (122.675, 116.669, 104.008)  # of red, green, blue, in 0 … 255
_CAFFE_BLOCK = "layer2.block1.reduce.conv.weight"
_PARTS = {"reduce": ("conv1", "bn1"), "conv3x3": ("conv2", "bn2"), "increase": ("conv3", "bn3")}


def load_converted(backbone: nn.Module, path: Path) -> bool:
    """Load the weights of a ResNet into one of :class:`cacl._backbones.ResNet`.

    Known are torchvision's names, with anything before them (``backbone.layer1.0.conv1.weight``), and those of the
    DeepLab weights that were converted from Caffe (``layer2.block1.reduce.conv.weight``). The latter are for images in
    blue, green, red of 0 … 255 less a mean, which the first convolution takes over here.

    Returns:
        Whether they are from Caffe, where strides lie on the 1×1 convolutions.

    Raises:
        ValueError: if the file is no checkpoint, or not all of the backbone is in it; says how much is.
    """
    found = _flat(load_state(path))
    caffe = any(name.endswith(_CAFFE_BLOCK) for name in found)
    marker = _CAFFE_BLOCK if caffe else "layer1.0.conv1.weight"
    prefixes = [name.removesuffix(marker) for name in found if name.endswith(marker)]
    if len(prefixes) > 1:
        raise InputError(f"{path}: expected the weights of one ResNet, but it has {', '.join(map(repr, prefixes))}")
    translate, prefix = _caffe_name if caffe else _torchvision_name, "".join(prefixes)
    inside = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    state = {own: value for name, value in inside.items() if (own := translate(name)) is not None}
    wanted = {k: v for k, v in backbone.state_dict().items() if not k.endswith(("num_batches_tracked", "_extra_state"))}
    fitting = [k for k, v in wanted.items() if k in state and state[k].shape == v.shape]
    if len(fitting) < len(wanted):
        first = next(k for k in wanted if k not in fitting)
        got = f"{tuple(state[first].shape)}" if first in state else "nothing"
        raise InputError(
            f"{path}: expected weights of the whole backbone, but {len(fitting)} of {len(wanted)} parameters match; "
            f"{first!r}: expected {tuple(wanted[first].shape)}, but got {got}"
        )
    check_weights(path, {name: state[name] for name in wanted})
    if caffe:
        _take_over_input(state)
    backbone.load_state_dict({**backbone.state_dict(), **{name: state[name] for name in wanted}})
    return caffe


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie in another dict beside an optimiser's."""
    for name in ("state_dict", "model_state_dict", "model", "weights"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _torchvision_name(name: str) -> str | None:
    match = re.fullmatch(r"(conv1|bn1|layer[1-4]\.\d{1,4})\.([\w.]+)", name)
    return _own(match[1], match[2]) if match else None


def _caffe_name(name: str) -> str | None:
    if match := re.fullmatch(r"layer1\.conv1\.(conv|bn)\.(\w+)", name):
        return _own("conv1" if match[1] == "conv" else "bn1", match[2])
    match = re.fullmatch(r"layer([2-5])\.block(\d{1,4})\.(\w+)\.(conv|bn)\.(\w+)", name)
    if match is None or match[3] not in (*_PARTS, "shortcut"):
        return None
    norm = match[4] == "bn"
    part = f"downsample.{int(norm)}" if match[3] == "shortcut" else _PARTS[match[3]][norm]
    return _own(f"layer{int(match[1]) - 1}.{int(match[2]) - 1}", f"{part}.{match[5]}")


def _own(place: str, rest: str) -> str:
    """torchvision's place -> the backbone's."""
    if place in ("conv1", "bn1"):
        return f"stem.{int(place == 'bn1')}.{rest}"
    return f"layers.{int(place[5]) - 1}{place[6:]}.{rest}"


def _take_over_input(state: dict[str, Tensor]) -> None:
    """The first convolution of a blue, green, red image of 0 … 255 less a mean -> that of a normalised image."""
    weight = state["stem.0.weight"].double().flip(1)
    mean, std = (255 * torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    shift = (weight * (mean - torch.tensor(_CAFFE_MEAN, dtype=torch.float64).view(1, 3, 1, 1))).sum((1, 2, 3))
    state["stem.0.weight"] = (weight * std).float()
    state["stem.1.running_mean"] = (state["stem.1.running_mean"].double() - shift).float()
