"""Backbones of timm (PyTorch Image Models): a network of many kinds by its name, as features of one output stride."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacl._support.features import renormalisation
from cacl._support.files import hub_home
from cacl._support.safetensors import load_tensors
from cacl._support.unwrapped import one_state
from cacl._support.weights import fitting_weights, load_state
from cacl.errors import InputError, did_you_mean, expected, first_line

PREFIX = "timm:"
"""What a backbone's name begins with."""
_COARSEST = 16
"""Largest patch of a transformer, in pixels."""
_LEVELS = 4
"""Depths of a transformer that :class:`cacl.IRNet` sees, the last one and others as far apart as they go."""


class TimmBackbone(nn.Module):
    """A network of timm without its head, nothing of it frozen.

    Convolutional networks get the output stride that is asked for, by timm's ``output_stride``: their last layers are
    dilated. Vision transformers that take images of any size give their grid of patches, after the last norm, whatever
    stride is asked for. Images are enlarged to whole cells, each of which is then where it should be, and get the
    statistics that the network expects.

    Args:
        name: timm's, with or without the tag of pretrained weights.
        weights: ``"DEFAULT"`` for timm's pretrained ones, the path of a file with some under timm's names, or None for
            random ones.
        stride: the output stride.

    Raises:
        ValueError: if the name or the weights are unknown, or if timm gives the network no such features.
        ImportError: if timm is missing.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, weights: str | None, *, stride: Literal[8, 16] = 16) -> None:
        super().__init__()
        timm = _timm()
        known = {*timm.list_models(), *timm.list_pretrained()}
        if name not in known:
            hint = did_you_mean(PREFIX + name, (PREFIX + each for each in sorted(known)))
            wanted = "Expected argument `backbone` to be timm: and a name of timm.list_models()"
            raise InputError(f"{wanted}, but got {PREFIX + name!r}{hint}")
        file = Path(weights) if weights is not None and Path(weights).is_file() else None
        pretrained = weights == "DEFAULT" and file is None
        if weights is not None and file is None:
            default = timm.is_model_pretrained(name)
            if not (pretrained and default):
                wanted = "None, a file, or DEFAULT" if default else "None or a file"
                raise expected("weights", f"{wanted} for {PREFIX}{name}", repr(weights))
        if pretrained:
            hub_home(f"The weights {weights} of {PREFIX}{name}")
        self.network, channels, self.stride = _built(timm, name, stride, pretrained=pretrained)
        self.level_channels = tuple(channels)
        self.out_channels = self.level_channels[-1]
        statistics: Any = self.network.pretrained_cfg
        scale, shift = renormalisation(statistics["mean"], statistics["std"], torch.get_default_device())
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        if file is not None:
            _load(self.network, file)

    def forward(self, images: Tensor) -> Tensor:
        return self.levels(images)[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` -> features of several strides, the last of them the output stride; of a transformer those
        of several depths, all of one stride."""
        size = [(side + self.stride - 1) // self.stride * self.stride for side in images.shape[-2:]]
        whole = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return list(self.network(whole * self.scale + self.shift))


class _Transformer(nn.Module):
    """``(B, 3, H, W)`` -> the patches after several blocks, each after the last norm, ``(B, C, H/p, W/p)``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        depth = len(model.feature_info)
        self.depths = sorted({max(1, depth * (i + 1) // _LEVELS) - 1 for i in range(_LEVELS)})
        model.prune_intermediate_layers(self.depths, prune_norm=False)
        self.model = model
        self.pretrained_cfg = model.pretrained_cfg

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self.model.forward_intermediates(
            images, indices=self.depths, norm=True, intermediates_only=True
        )
        return found


class _SameConvolution(nn.Conv2d):
    """A convolution of stride 1 that keeps the size."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_padded(input, self.kernel_size, self.dilation))


class _SameAverage(nn.AvgPool2d):
    """An average over windows in steps of 1 that keeps the size."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_padded(input, self.kernel_size, (1, 1)))


def _padded(x: Tensor, kernel: Any, dilation: tuple[int, ...]) -> Tensor:
    rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _pad_statically(timm: Any, network: nn.Module) -> None:
    """Keep sizes without looking at them: timm computes its padding from each size, though it is the same for all where
    the stride is 1, and no export could leave the size open."""
    kinds = {timm.layers.Conv2dSame: _SameConvolution, timm.layers.AvgPool2dSame: _SameAverage}
    for module in network.modules():
        if type(module) in kinds and module.stride == (1, 1):
            module.__class__ = kinds[type(module)]


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"Backbones of timm need an extra: pip install 'cacl[timm]' ({error})") from None


def _built(timm: Any, name: str, stride: int, *, pretrained: bool) -> tuple[nn.Module, list[int], int]:
    """A network that gives a list of features, their channels, and the stride of the last."""

    def made(**options: object) -> Any:
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except (TypeError, AssertionError):  # it does not know an option, or not such a stride
            return None
        except Exception as error:  # of many kinds, where there is no network or another file than expected
            what, why = f"{PREFIX}{name}", first_line(error)
            text = f"The weights DEFAULT of {what} could not be downloaded ({why})." if pretrained else f"{what}: {why}"
            raise InputError(text) from None

    model = made(features_only=True, output_stride=stride)
    if model is not None and not model.pretrained_cfg.get("fixed_input_size"):
        _pad_statically(timm, model)
        return model, model.feature_info.channels(), stride
    transformer = made(num_classes=0, dynamic_img_size=True) if model is None else None
    if transformer is not None:
        info = transformer.feature_info
        if max(each["reduction"] for each in info) <= _COARSEST:
            network = _Transformer(transformer)
            return network, [info[i]["num_chs"] for i in network.depths], info[-1]["reduction"]
    raise expected(
        "backbone",
        f"a model of timm that can have output stride {stride}, or a transformer of patches of at most {_COARSEST} "
        "pixels, for photos of any size",
        PREFIX + name + _described(timm, name),
    )


def _described(timm: Any, name: str) -> str:
    """What a model gives that is not what is asked for."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, features_only=True)
    except Exception:  # many kinds: not every model has features, nor can be made without values
        return ", which gives none"
    strides, config = model.feature_info.reduction(), model.pretrained_cfg
    if strides[-1] <= _COARSEST and config.get("fixed_input_size"):
        return f", which sees {' × '.join(map(str, config['input_size'][1:]))} pixels alone"
    return f", which has strides {', '.join(map(str, dict.fromkeys(strides)))}"


def _load(network: nn.Module, path: Path) -> None:
    """Load a file with the weights of a whole model under timm's names, with anything before them."""
    own = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    deepest = max(name.count(".") for name in own)
    content = load_tensors(path) if path.suffix == ".safetensors" else load_state(path, foreign=True)
    inside: dict[str, Tensor] | None = None
    for marker in (each for name in own if name.count(".") == deepest for each in _names(name)):
        if inside := one_state(content, marker, path, "network"):
            break
    state = {name: inside[each] for name in own for each in _names(name) if inside and each in inside}
    network.load_state_dict({**network.state_dict(), **fitting_weights(network, state, path)})


def _names(own: str) -> list[str]:
    """What a parameter may be called in a file: as in the features, or in the whole model, ``stages_0.`` as
    ``stages.0.``."""
    whole = own.removeprefix("model.").removeprefix("body.")
    return [own, whole, re.sub(r"^(\w+?)_(\d+)\.", r"\1.\2.", whole)]
