"""The backbones that have a name; each gives its last features, or those of all its levels."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cacl._checks import InputError, did_you_mean, expected
from cacl._converted import load_converted
from cacl._small import Trunk, load_trunk


def named_backbone(name: str, weights: str | None, *, stride: Literal[8, 16] = 16) -> ResNet | Trunk:
    """A torchvision ResNet of that output stride, or ``"scenes"``; ``weights`` as for :class:`cacl.CAMNet`."""
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
            hint = did_you_mean(name, known)
            raise InputError(
                f"Expected argument `backbone` to be one of {', '.join(known)}, scenes, but got {name!r}{hint}"
            )
        available = [w.name for w in models.get_model_weights(name)]
        file = Path(weights) if weights is not None and Path(weights).is_file() else None
        if weights is not None and file is None and weights not in (*available, "DEFAULT"):
            choices = ", ".join((*available, "DEFAULT"))
            raise expected("weights", f"None, a file, or one of {choices} for {name}", repr(weights))
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
        return torch.tensor(self.caffe)

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
