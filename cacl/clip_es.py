"""CAMs without any training, from what a text-image model sees where: CLIP-ES (Lin et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cacl._support.answers import check_dense_features, check_encoder, statistics_of
from cacl._support.checks import check_tensor, shape
from cacl._support.features import cosine, full, renormalisation, unit
from cacl._support.names import plain
from cacl._support.values import check_positive, check_range, check_words
from cacl._support.weights import evaluating
from cacl.encoders import DenseEncoder
from cacl.errors import InputError, expected
from cacl.prompts import ORIGAMI, BackgroundSet, PromptSet

SHARED_WORDS = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley",
    "bridge", "sign",
)  # fmt: skip
"""The background words of CLIP-ES for VOC, the same for all classes."""


class CLIPES:
    r"""CAMs of a frozen image-text encoder with dense features, as CLIP-ES makes them.

    A class has the probability :math:`p_k = \operatorname{softmax}(\cos(v, t) / \tau)_k` among the classes that the
    photo shows and its background words, v being the mean of the dense features. Its CAM is Grad-CAM of :math:`p_k` at
    the activations, and where the encoder has attention, the CAM is carried along it: rows and columns of the attention
    are normalised in turn (:func:`affinity`), and columns count inside of the boxes around what is above ``box_score``
    of the CAM (:func:`boxes`).

    What CLIP-ES has besides is left out: other names for classes in texts ("person with clothes, people, human").

    Args:
        encoder: the encoder, with ``encode_dense``.
        names: the K class names.
        prompts: templates; texts are the mean of theirs. CLIP-ES has ``"a clean origami {}."`` alone.
        backgrounds: background words of all classes, :data:`SHARED_WORDS` by default, without those that are classes;
            or of each class its own.
        temperature: τ; that of CLIP is 0.01.
        box_score: of the CAM's largest value.
        longest: photos whose longer side has more pixels are scaled down to it, as the attention of n places has n²
            values.

    Raises:
        ValueError: if the encoder has no dense features, a class has no background words, or a number is out of range.
        TypeError: if ``encoder`` lacks a member.

    Example:
        >>> from cacl import load_encoder
        >>> backgrounds = BackgroundSet({"boat": ["water"], "sheep": ["grass"]})
        >>> prompts = PromptSet(["a photo of {}."])
        >>> seeds = CLIPES(load_encoder("scenes"), ["boat", "sheep"], prompts=prompts, backgrounds=backgrounds)
        >>> seeds(torch.rand(3, 60, 90), [0]).shape
        torch.Size([1, 8, 12])
    """

    def __init__(
        self,
        encoder: DenseEncoder,
        names: Sequence[str],
        *,
        prompts: PromptSet | None = None,
        backgrounds: Sequence[str] | Mapping[str, Sequence[str]] = SHARED_WORDS,
        temperature: float = 0.01,
        box_score: float = 0.4,
        longest: int = 1024,
    ) -> None:
        check_encoder(encoder, dense=True)
        check_range("box_score", box_score, 0, 1)
        check_positive("longest", longest)
        if not 0 < temperature < float("inf"):
            raise expected("temperature", "a positive number", temperature)
        self.encoder, self.names = encoder, check_words("names", names)
        self.temperature, self.box_score, self.longest = temperature, box_score, longest
        prompts = PromptSet([ORIGAMI]) if prompts is None else prompts
        own = _words(self.names, backgrounds)
        words = list(dict.fromkeys(word for list_ in own for word in list_))
        self._words = [[words.index(word) for word in list_] for list_ in own]
        self._class_text = unit(prompts.encode(encoder, self.names).mean(1))
        self._word_text = unit(prompts.encode(encoder, words).mean(1))

    def __call__(self, image: Tensor, classes: Sequence[int]) -> Tensor:
        """CAMs of the classes that a photo shows.

        Args:
            image: ``(3, H, W)``, normalised with ImageNet's statistics, on the encoder's device.
            classes: C indices from 0.

        Returns:
            ``(C, h, w)`` in [0, 1] at the encoder's places, each with minimum 0 and maximum 1, or all 0.

        Raises:
            ValueError: if a shape is wrong, a class is none, or the encoder answers something else.
        """
        check_tensor("image", image, "(3, H, W)")
        if len(image) != 3:
            raise expected("image", "a tensor (3, H, W)", shape(image))
        if wrong := [k for k in classes if not 0 <= k < len(self.names)]:
            raise expected("classes", f"indices of at most {len(self.names) - 1}", wrong[0])
        with torch.inference_mode(False), torch.autocast(image.device.type, enabled=False):
            return self._cams(image.clone(), list(classes))

    def _cams(self, image: Tensor, classes: list[int]) -> Tensor:
        photo = self._photo(image)
        with evaluating(self.encoder):
            answer: object = self.encoder.encode_dense(photo)
        seen = check_dense_features(answer, photo, self._class_text.shape[1])
        words = sorted({word for k in classes for word in self._words[k]})
        text = torch.cat((self._class_text[classes], self._word_text[words])).to(seen.features.device)
        with torch.enable_grad():
            similar = cosine(full(seen.features.mean((2, 3))), text)
            probabilities = (similar / self.temperature).softmax(0)
        cams = [self._grad_cam(probabilities[c], seen.activations) for c in range(len(classes))]
        if not cams:
            return torch.zeros(0, *seen.activations.shape[2:], device=image.device)
        found = torch.stack(cams)
        return found if seen.attention is None else self._carried(found, seen.attention[0])

    def _photo(self, image: Tensor) -> Tensor:
        """As the encoder sees it, ``(1, 3, h, w)``."""
        scale, shift = renormalisation(*statistics_of(self.encoder), image.device)
        photo = (full(image) * scale + shift)[None]
        height, width = image.shape[1:]
        if (longer := max(height, width)) <= self.longest:
            return photo
        size = tuple(max(1, round(side * self.longest / longer)) for side in (height, width))
        return F.interpolate(photo, size=size, mode="bilinear", align_corners=False, antialias=True)

    def _grad_cam(self, probability: Tensor, activations: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(probability, activations, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise InputError(
                "Expected argument `encoder.encode_dense` to be returning features that follow from its activations."
            )
        weights = full(gradient).mean((2, 3), keepdim=True)
        return _stretched((weights * full(activations.detach())).sum(1)[0].relu())

    def _carried(self, cams: Tensor, attention: Tensor) -> Tensor:
        ways = affinity(attention)
        inside = boxes(cams, self.box_score)
        carried = (cams * inside).flatten(1) @ ways.T
        return torch.stack([_stretched(cam) for cam in carried.view_as(cams)])


def affinity(attention: Tensor) -> Tensor:
    """How much belongs together what looks at each other (CLIP-ES, class-aware attention-based affinity).

    Args:
        attention: ``(T, T)``, of rows that look at columns, positive.

    Returns:
        ``(T, T)``: with columns and rows divided by their sums in turn, three times, made symmetric, and squared.
    """
    ways = full(attention)
    for _ in range(3):
        ways = ways / ways.sum(0, keepdim=True)
        ways = ways / ways.sum(1, keepdim=True)
    ways = (ways + ways.T) / 2
    return ways @ ways


def boxes(cams: Tensor, score: float) -> Tensor:
    """The boxes around each connected part of a CAM above ``score`` of its largest value, ``(C, h, w)`` of bool.

    Places that touch at a corner are connected. Where nothing is above it, as the CAM is 0, no place is in a box.
    """
    from scipy import ndimage  # which puts a filter among Python's warnings when it is imported

    inside = np.zeros(cams.shape, dtype=bool)
    for box, cam in zip(inside, cams.cpu().numpy(), strict=True):
        parts, _ = ndimage.label(cam > score * cam.max(), structure=np.ones((3, 3)))
        for part in ndimage.find_objects(parts):
            box[part] = True
    return torch.from_numpy(inside).to(cams.device)


def _stretched(cam: Tensor) -> Tensor:
    """To [0, 1]; all 0 where it is the same everywhere."""
    cam = cam - cam.min()
    largest = cam.max()
    return cam / largest if largest > 0 else cam


def _words(names: Sequence[str], backgrounds: Sequence[str] | Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """The background words of each class."""
    if isinstance(backgrounds, Mapping):
        known = backgrounds if isinstance(backgrounds, BackgroundSet) else BackgroundSet(backgrounds)
        for name in names:
            if name not in known:
                raise InputError(f"Expected argument `backgrounds` to have words for {name!r}, but it has none.")
        return [known[name] for name in names]
    taken = {plain(name) for name in names}
    words = tuple(word for word in check_words("backgrounds", backgrounds) if plain(word) not in taken)
    if not words:
        raise expected("backgrounds", "words that are no classes", "none")
    return [words] * len(names)
