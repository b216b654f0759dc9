"""The backbones that have a name; each gives its last features, or those of all its levels."""

from __future__ import annotations

import http.client
import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cacl._support.files import home
from cacl._support.unwrapped import one_state
from cacl._support.weights import fitting_weights, load_state
from cacl.constants import IMAGENET_MEAN, IMAGENET_STD
from cacl.embedded import Trunk, load_trunk
from cacl.errors import InputError, did_you_mean, expected
from cacl.timm_backbones import PREFIX, TimmBackbone


def named_backbone(name: str, weights: str | None, *, stride: Literal[8, 16] = 16) -> ResNet | TimmBackbone | Trunk:
    """A torchvision ResNet of that output stride, ``"timm:NAME"``, or ``"scenes"``; ``weights`` as for
    :class:`cacl.CAMNet`."""
    if name.startswith(PREFIX):
        return TimmBackbone(name.removeprefix(PREFIX), weights, stride=stride)
    if name != "scenes":
        return ResNet(name, weights, stride=stride)
    if weights not in ("DEFAULT", None):
        raise expected("weights", "one of DEFAULT, None for scenes", repr(weights))
    return load_trunk() if weights is not None else Trunk()


class ResNet(nn.Module):
    """A torchvision ResNet without its head, the first convolution and batch norm frozen.

    Args:
        name: torchvision's.
        weights: torchvision's name of them, ``"DEFAULT"``, the path of a file with some, or None for random ones.
        stride: the output stride; at 8, the 3×3 convolutions of the last two layers are dilated by 2 and by 4.
    """

    def __init__(self, name: str, weights: str | None, *, stride: Literal[8, 16] = 16) -> None:
        super().__init__()
        from torchvision import models

        known = [model for model in models.list_models(module=models) if model.startswith(("res", "wide_res"))]
        if name not in known:
            choices = ", ".join((*known, "scenes", "timm:NAME"))
            hint = did_you_mean(name, known)
            raise InputError(f"Expected argument `backbone` to be one of {choices}, but got {name!r}{hint}")
        available = [w.name for w in models.get_model_weights(name)]
        file = Path(weights) if weights is not None and Path(weights).is_file() else None
        if weights is not None and file is None and weights not in (*available, "DEFAULT"):
            choices = ", ".join((*available, "DEFAULT"))
            raise expected("weights", f"None, a file, or one of {choices} for {name}", repr(weights))
        if weights is not None and file is None and torch.hub.get_dir().startswith("~"):
            home(f"The weights {weights} of {name}")
        try:
            network = models.get_model(name, weights=None if file else weights)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, or another file than expected
            raise InputError(f"The weights {weights} of {name} could not be downloaded ({error}).") from None
        for layer, dilation in {8: ((network.layer3, 2), (network.layer4, 4)), 16: ((network.layer4, 1),)}[stride]:
            for module in layer.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if module.kernel_size == (3, 3):
                        module.dilation = module.padding = (dilation, dilation)
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        self.layers = nn.Sequential(network.layer1, network.layer2, network.layer3, network.layer4)
        self.out_channels = int(network.fc.in_features)
        self.level_channels = (network.conv1.out_channels, *(self.out_channels >> shift for shift in (3, 2, 1, 0)))
        self.stem.requires_grad_(False)
        self.caffe: bool = False
        if file is not None:
            self._lay_out(caffe=load_converted(self, file))

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        self.stem.eval()
        return self

    def _lay_out(self, *, caffe: bool) -> None:
        """Strides and pooling as in Caffe's ResNets; without them its weights see an image that is a pixel off."""
        if caffe == self.caffe:
            return
        self.caffe = caffe
        for module in self.stem.children():
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = caffe
        for block in self.layers.modules():
            first, second = getattr(block, "conv1", None), getattr(block, "conv2", None)
            if hasattr(block, "conv3") and isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):
                first.stride, second.stride = second.stride, first.stride

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.caffe, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._lay_out(caffe=bool(state))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(self.stem(images))
        return features

    def levels(self, images: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` -> features of strides 4, 4, 8, 16, 16 (or 4, 4, 8, 8, 8)."""
        found = [self.stem(images)]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found


_CAFFE_MEAN = (122.675, 116.669, 104.008)  # of red, green, blue, in 0 … 255


_CAFFE_BLOCK = "layer2.block1.reduce.conv.weight"


_PARTS = {"reduce": ("conv1", "bn1"), "conv3x3": ("conv2", "bn2"), "increase": ("conv3", "bn3")}


def load_converted(backbone: nn.Module, path: Path) -> bool:
    """Load the weights of a ResNet into one of :class:`cacl.backbones.ResNet`.

    Known are torchvision's names, with anything before them (``backbone.layer1.0.conv1.weight``) and in other dicts
    (``{"state_dict": …}``), and those of the
    DeepLab weights that were converted from Caffe (``layer2.block1.reduce.conv.weight``). The latter are for images in
    blue, green, red of 0 … 255 less a mean, which the first convolution takes over here.

    Returns:
        Whether they are from Caffe, where strides lie on the 1×1 convolutions.

    Raises:
        ValueError: if the file is no checkpoint, has the weights of several, or not all of the backbone is in it; says
            how much is.
    """
    content = load_state(path, foreign=True)
    inside = one_state(content, _CAFFE_BLOCK, path, "ResNet")
    caffe = inside is not None
    if inside is None:
        inside = one_state(content, "layer1.0.conv1.weight", path, "ResNet") or {}
    translate = _caffe_name if caffe else _torchvision_name
    state = {own: value for name, value in inside.items() if (own := translate(name)) is not None}
    found = fitting_weights(backbone, state, path)
    if caffe:
        _take_over_input(found)
    backbone.load_state_dict({**backbone.state_dict(), **found})
    return caffe


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
    mean, std = (
        255 * torch.tensor(x, dtype=torch.float64, device="cpu").view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD)
    )
    shift = (weight * (mean - torch.tensor(_CAFFE_MEAN, dtype=torch.float64, device="cpu").view(1, 3, 1, 1))).sum(
        (1, 2, 3)
    )
    state["stem.0.weight"] = (weight * std).float()
    state["stem.1.running_mean"] = (state["stem.1.running_mean"].double() - shift).float()
