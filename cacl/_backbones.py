"""The backbones that have a name; each gives its last features, or those of all its levels."""

from __future__ import annotations

import http.client

from torch import Tensor, nn

from cacl._checks import InputError, did_you_mean, expected
from cacl._small import Trunk, load_trunk


def named_backbone(name: str, weights: str | None) -> ResNet | Trunk:
    """A torchvision ResNet or ``"scenes"``; ``weights`` as for :class:`cacl.CAMNet`."""
    if name != "scenes":
        return ResNet(name, weights)
    if weights not in ("DEFAULT", None):
        raise expected("weights", "one of DEFAULT, None for scenes", repr(weights))
    return load_trunk() if weights is not None else Trunk()


class ResNet(nn.Module):
    """A torchvision ResNet without its head, at output stride 16, the first convolution and batch norm frozen."""

    def __init__(self, name: str, weights: str | None) -> None:
        super().__init__()
        from torchvision import models

        known = [model for model in models.list_models(module=models) if model.startswith(("res", "wide_res"))]
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(
                f"Expected argument `backbone` to be one of {', '.join(known)}, scenes, but got {name!r}{hint}"
            )
        available = [w.name for w in models.get_model_weights(name)]
        if weights is not None and weights not in (*available, "DEFAULT"):
            choices = ", ".join((*available, "DEFAULT"))
            raise expected("weights", f"None or one of {choices} for {name}", repr(weights))
        try:
            network = models.get_model(name, weights=weights)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, or another file than expected
            raise InputError(f"The weights {weights} of {name} could not be downloaded ({error}).") from None
        for module in network.layer4.modules():
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                module.stride = (1, 1)
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        self.layers = nn.Sequential(network.layer1, network.layer2, network.layer3, network.layer4)
        self.out_channels = int(network.fc.in_features)
        self.level_channels = (network.conv1.out_channels, *(self.out_channels >> shift for shift in (3, 2, 1, 0)))
        self.stem.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(self.stem(images))
        return features

    def levels(self, images: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` -> features of strides 4, 4, 8, 16, 16."""
        found = [self.stem(images)]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found
