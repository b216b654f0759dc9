"""Image-text encoders behind one protocol: CLIP, OpenCLIP, or the user's own."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cacl._support.checks import kind_of
from cacl._support.clip_checkpoint import read_clip
from cacl._support.clip_library import build_clip, clip_hashes, download_clip, import_clip
from cacl._support.distributed import find_device
from cacl._support.files import hub_home
from cacl._support.surroundings import building
from cacl.constants import CLIP_MEAN, CLIP_STD
from cacl.dense import DenseFeatures, dense_features
from cacl.embedded import TwoTowers, load_towers
from cacl.errors import InputError, InputTypeError, did_you_mean, first_line


@runtime_checkable
class ImageTextEncoder(Protocol):
    """What every part of this package asks of an image-text model; any object with these five members will do."""

    image_size: int
    """Side S of its square input in pixels."""
    mean: Sequence[float]
    """Mean of its normalisation, a value a channel."""
    std: Sequence[float]
    """Standard deviation of its normalisation, a value a channel."""

    def encode_image(self, images: Tensor) -> Tensor:
        """``(N, 3, S, S)`` normalised images -> ``(N, D)``, differentiable with respect to the images."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """T texts -> ``(T, D)``, no gradient."""


@runtime_checkable
class DenseEncoder(ImageTextEncoder, Protocol):
    """An image-text model that also tells what it sees where (see :class:`cacl.clip_es.CLIPES`)."""

    def encode_dense(self, images: Tensor) -> DenseFeatures:
        """``(N, 3, H, W)`` normalised images of any size -> features, activations and attention of h · w places."""


def load_encoder(
    name: str | PathLike[str] = "ViT-B/32",
    *,
    device: torch.device | str | None = None,
    root: str | PathLike[str] | None = None,
) -> ImageTextEncoder:
    """A frozen image-text encoder in evaluation mode and float32.

    Args:
        name: a model of OpenAI's CLIP such as ``"ViT-B/32"`` (downloaded once, checked by its hash), the path of a
            CLIP checkpoint (OpenAI's TorchScript archive, or a state dict, also as a training leaves it: in another
            dict or under ``module.``; the activation is OpenAI's), ``"open_clip:MODEL/PRETRAINED"``, or
            ``"scenes"``, a small one that comes with the package and knows the world of :mod:`cacl.scenes` only.
        device: where it goes; the CPU by default.
        root: folder for downloads; the library's own default if not given.

    Raises:
        ValueError: if the name is unknown, or the file is not a CLIP checkpoint; nothing in such a file is run.
        ImportError: if the library for it is not installed.
    """
    if not isinstance(name, str | PathLike):
        raise InputTypeError(f"Expected argument `name` to be an encoder's name or a path, but got {kind_of(name)}.")
    name = str(name)
    if name.startswith("open_clip:"):
        encoder: _Frozen = OpenCLIPEncoder.load(name.removeprefix("open_clip:"), root=root)
    elif name == "scenes":
        with building():
            encoder = ScenesEncoder(load_towers())
    elif Path(name).is_file():
        encoder = CLIPEncoder(build_clip(read_clip(Path(name), clip_hashes), name))
    else:
        encoder = CLIPEncoder(build_clip(download_clip(name, root), name))
    return encoder if device is None else encoder.to(find_device(str(device), "device"))


class _Frozen(nn.Module, ABC):
    """A model in evaluation mode and float32 whose weights never take a gradient."""

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model.float().requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(images)
        return features

    def encode_dense(self, images: Tensor) -> DenseFeatures:
        """See :func:`cacl.dense.dense_features`; of vision transformers only."""
        return dense_features(self.model.visual, images)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        with torch.device("cpu"):
            tokens = self.tokenize(list(texts))
        features: Tensor = self.model.encode_text(tokens.to(next(self.parameters()).device))
        return features

    @abstractmethod
    def tokenize(self, texts: list[str]) -> Tensor:
        """T texts -> ``(T, L)`` tokens."""


class CLIPEncoder(_Frozen):
    """A ``clip.model.CLIP`` as an :class:`ImageTextEncoder`."""

    mean = CLIP_MEAN
    std = CLIP_STD

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.image_size = int(model.visual.input_resolution)
        self.context_length = int(model.context_length)

    def tokenize(self, texts: list[str]) -> Tensor:
        try:
            tokens: Tensor = import_clip().tokenize(texts, context_length=self.context_length)
        except RuntimeError as error:  # the text is too long; the message names it
            raise InputError(str(error)) from None
        return tokens


class OpenCLIPEncoder(_Frozen):
    """A model of the open_clip library as an :class:`ImageTextEncoder`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model)
        size = model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise InputError(f"Expected an open_clip model that sees squares, but this one sees {height} x {width}.")
        self.image_size = int(height)
        self.mean = tuple(getattr(model.visual, "image_mean", None) or CLIP_MEAN)
        self.std = tuple(getattr(model.visual, "image_std", None) or CLIP_STD)
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, *, root: str | PathLike[str] | None = None) -> OpenCLIPEncoder:
        """``"MODEL/PRETRAINED"``, where PRETRAINED is a tag of the library or the path of a checkpoint."""
        model, _, pretrained = name.partition("/")
        if not pretrained:
            raise InputError(f"Expected an encoder name like open_clip:ViT-B-32/laion2b_s34b_b79k, but got {name!r}.")
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(f"open_clip models need an extra: pip install 'cacl[open-clip]' ({error})") from None
        if root is None:
            hub_home(f"open_clip:{name}")
        if model not in open_clip.list_models():
            raise InputError(f"open_clip has no model {model!r}{did_you_mean(model, open_clip.list_models())}")
        try:  # the words first: what they need may be missing, and the weights are large
            tokenizer = open_clip.get_tokenizer(model)
            with building():
                network = open_clip.create_model(model, pretrained=pretrained, cache_dir=root and str(root))
        except InputError:
            raise
        except Exception as error:  # of many kinds, if PRETRAINED is no file of such weights
            if isinstance(error, ImportError) or re.search("pip install|need to have .* installed", str(error)):
                raise _lacking(name, error) from None
            raise InputError(f"open_clip:{name}: {first_line(error)}") from None
        return cls(network, tokenizer)

    def tokenize(self, texts: list[str]) -> Tensor:
        tokens: Tensor = self._tokenizer(texts)
        return tokens


_FOR_WORDS = ("transformers", "tokenizers", "sentencepiece", "protobuf", "tiktoken")
"""What models whose words are not CLIP's need: SigLIP, and those with a text tower of transformers."""


def _lacking(name: str, error: Exception) -> ImportError:
    """That an open_clip model needs a library which its extra does not bring, and what brings it."""
    text = f"{getattr(error, 'name', None) or ''} {error}".lower()
    needed = "transformers sentencepiece protobuf" if any(word in text for word in _FOR_WORDS) else ""
    missing = needed or getattr(error, "name", None) or "'cacl[open-clip]'"
    return ImportError(f"open_clip:{name} needs more than its extra: pip install {missing} ({first_line(error)})")


class ScenesEncoder(_Frozen):
    """The encoder of the drawn world, made by ``benchmarks/train_scenes.py``, as an :class:`ImageTextEncoder`."""

    image_size = 80
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self, model: TwoTowers) -> None:
        super().__init__(model)

    def encode_dense(self, images: Tensor) -> DenseFeatures:
        """Features of stride 8, made of the trunk's; it has no attention."""
        trunk, *rest = self.model.image
        activations = trunk(images).detach().requires_grad_()
        with torch.enable_grad():
            features = activations
            for layer in rest:
                features = layer(features)
        return DenseFeatures(features, activations)

    def tokenize(self, texts: list[str]) -> Tensor:
        tokens: Tensor = self.model.tokenize(texts)
        return tokens
