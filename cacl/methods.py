"""The losses of other methods as criteria, ``(images, cams, labels)`` -> terms: CLIMS, QA-CLIMS, POLE.

Each trains the same network from the same warm-up as :class:`cacl.CACLLoss` does, in its place. What of a method is
left out stands with its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cacl._support.answers import check_encoder
from cacl._support.distributed import world_size
from cacl._support.features import cosine, reduced
from cacl._support.names import plain
from cacl._support.surroundings import building
from cacl._support.values import check_range, check_words
from cacl.criterion import EncodedRegions, RegionEncoder, check_texts
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputError
from cacl.losses import BGSuppressionLoss, RegionLoss
from cacl.matching import Adapter, ContrastLoss, MatchingLoss
from cacl.prompts import ALIASES, BACKGROUND_WORDS, SYNONYMS, BackgroundSet, PromptSet
from cacl.selector import ContextSelector

TEMPLATE = PromptSet(["a photo of {}."])
"""The one template of these methods."""


class CLIMSTerms(NamedTuple):
    """The loss of CLIMS or POLE and what it is made of; scalars, only ``total`` … ``region`` with a graph."""

    total: Tensor
    matching: Tensor
    bgs: Tensor
    region: Tensor
    foreground_similarity: Tensor
    """Mean cosine of foreground and text."""
    background_similarity: Tensor
    """Mean cosine of background and text."""
    pass_rate: Tensor
    """Share of the background words with a similarity of at least the threshold."""


class QACLIMSTerms(NamedTuple):
    """The loss of QA-CLIMS and what it is made of; scalars, only ``total`` … ``region`` with a graph."""

    total: Tensor
    contrast: Tensor
    region: Tensor
    foreground_similarity: Tensor
    background_similarity: Tensor


class CLIMSLoss(nn.Module):
    r"""CLIMS (Xie et al., CVPR 2022): matching of regions and text, background suppression, area.

    .. math:: L = L_{\text{matching}} + \beta L_{\text{BGS}} + \gamma\, \overline{P}

    with :func:`cacl.matching_loss`, :func:`cacl.bg_suppression_loss` of ten words for all classes, and the mean of all
    CAMs. On COCO: weights (2, 14), β 1.25, γ 0.2, threshold 0.285. Left out: an encoder in half precision whose weights
    are not frozen; ImageNet's statistics in front of it are ``normalization="imagenet"``.

    Args:
        encoder: the image-text encoder.
        names: the K class names.
        words: background words, the same for all classes.
        aliases: name -> what it is called in texts.
        weights: of foreground and background matching.
        beta: weight of the background suppression.
        gamma: weight of the mean CAM.
        threshold: θ of the background suppression.
        normalization: as for :class:`cacl.CACLLoss`.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if ``encoder`` lacks a member of :class:`ImageTextEncoder`, or one is of another type.
    """

    _text: Tensor
    _words: Tensor

    def __init__(
        self,
        encoder: ImageTextEncoder,
        names: Sequence[str],
        *,
        words: Sequence[str] = BACKGROUND_WORDS,
        aliases: Mapping[str, str] = ALIASES,
        weights: tuple[float, float] = (10.0, 24.0),
        beta: float = 1.0,
        gamma: float = 0.2,
        threshold: float = 0.26,
        normalization: Literal["encoder", "imagenet"] = "encoder",
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        _check_weights(beta=beta, gamma=gamma)
        self.names = check_words("names", names)
        self.beta, self.gamma = beta, gamma
        self.matching, self.bgs, self.region = MatchingLoss(weights), BGSuppressionLoss(threshold), RegionLoss()
        others = {name: alias for name, alias in aliases.items() if alias not in self.names}
        called = [others.get(name, name) for name in self.names]
        text = TEMPLATE.encode(encoder, called)[:, 0]
        suppressed = TEMPLATE.encode(encoder, _shared(words, self.names))[:, 0]
        self.register_buffer("_text", text, persistent=False)
        self.register_buffer("_words", suppressed, persistent=False)
        self.bgs.to(text.device)
        self.regions = RegionEncoder(encoder, text, normalization=normalization)

    def forward(self, images: Tensor, cams: Tensor, labels: Tensor) -> CLIMSTerms:
        """The loss of a batch; arguments and errors as for :meth:`cacl.CACLLoss.forward`."""
        across = self.training and world_size() > 1
        seen = self.regions(images, cams, labels)
        region = self.region(cams, across=across)
        text = self._text[seen.class_index]
        matching = self.matching(seen.foreground, seen.background, text, across=across)
        words = self._words.expand(len(text), -1, -1)
        bgs = self.bgs(seen.foreground, words, across=across)
        total = matching + self.beta * bgs + self.gamma * region
        return CLIMSTerms(total, matching, bgs, region, *_similarities(seen, text, across), self.bgs.pass_rate)


class QACLIMSLoss(nn.Module):
    r"""QA-CLIMS (Deng et al., ACM MM 2023): contrast of regions and texts, area.

    .. math:: L = L_{\text{contrast}} + \gamma\, \overline{P}

    with :func:`cacl.contrast_loss`, a sum over the pairs. On COCO: weights (30, 24). Left out: the answers of a
    question-answering model about each photo, in whose place each class has its background words; and the encoder that
    was adapted to masks, which sees only what is above a tenth of a CAM's maximum.

    Args:
        encoder: the image-text encoder.
        names: the K class names.
        backgrounds: background words; the built-in ones by default, if VOC's or COCO's list has each of ``names``.
        temperature: of the contrast.
        weights: of foreground and background contrast.
        gamma: weight of the mean CAM.
        normalization: as for :class:`cacl.CACLLoss`.

    Raises:
        ValueError: if a setting is out of range, or a class has no background words.
        TypeError: if ``encoder`` lacks a member of :class:`ImageTextEncoder`, or one is of another type.
    """

    _text: Tensor
    _words: Tensor

    def __init__(
        self,
        encoder: ImageTextEncoder,
        names: Sequence[str],
        *,
        backgrounds: BackgroundSet | None = None,
        temperature: float = 0.7,
        weights: tuple[float, float] = (10.0, 8.0),
        gamma: float = 0.2,
        normalization: Literal["encoder", "imagenet"] = "encoder",
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        check_texts(None, backgrounds)
        _check_weights(gamma=gamma)
        self.names, self.gamma = check_words("names", names), gamma
        self.contrast, self.region = ContrastLoss(temperature, weights=weights), RegionLoss()
        backgrounds = BackgroundSet.built_in(self.names) if backgrounds is None else backgrounds
        text = TEMPLATE.encode(encoder, self.names)[:, 0]
        self.register_buffer("_text", text, persistent=False)
        self.register_buffer("_words", backgrounds.encode(encoder, self.names, TEMPLATE), persistent=False)
        self.regions = RegionEncoder(encoder, text, normalization=normalization)

    def forward(self, images: Tensor, cams: Tensor, labels: Tensor) -> QACLIMSTerms:
        """The loss of a batch; arguments and errors as for :meth:`cacl.CACLLoss.forward`."""
        across = self.training and world_size() > 1
        seen = self.regions(images, cams, labels)
        region = self.region(cams, across=across)
        text, words = self._text[seen.class_index], self._words[seen.class_index]
        contrast = self.contrast(seen.foreground, seen.background, text, words, across=across)
        return QACLIMSTerms(contrast + self.gamma * region, contrast, region, *_similarities(seen, text, across))


class POLELoss(nn.Module):
    r"""POLE (Murugesan et al., WACV 2024): CLIMS with the best word for each class and adapted features, no area.

    .. math:: L = L_{\text{matching}} + \beta L_{\text{BGS}}

    The text of a pair is the class's name or one of its synonyms, whichever is nearest to the foreground. Features of
    regions and texts go through an :class:`Adapter` each before they are matched, not before the suppression. Left out:
    the word is chosen in every step, not once from the CAMs of the warm-up, and the lists of synonyms are our own.

    Args:
        encoder: the image-text encoder.
        names: the K class names.
        synonyms: name -> other words for it; classes that are not in it have their name only.
        words: background words, the same for all classes.
        weights: of foreground and background matching.
        beta: weight of the background suppression.
        threshold: θ of the background suppression.
        seed: of the adapters' first weights.
        normalization: as for :class:`cacl.CACLLoss`.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if ``encoder`` lacks a member of :class:`ImageTextEncoder`, or one is of another type.
    """

    _words: Tensor

    def __init__(
        self,
        encoder: ImageTextEncoder,
        names: Sequence[str],
        *,
        synonyms: Mapping[str, Sequence[str]] = SYNONYMS,
        words: Sequence[str] = BACKGROUND_WORDS,
        weights: tuple[float, float] = (10.0, 25.0),
        beta: float = 1.0,
        threshold: float = 0.26,
        seed: int = 0,
        normalization: Literal["encoder", "imagenet"] = "encoder",
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        _check_weights(beta=beta)
        self.names, self.beta = check_words("names", names), beta
        self.matching, self.bgs = MatchingLoss(weights), BGSuppressionLoss(threshold)
        known = [(name, *_synonyms(name, synonyms, self.names)) for name in self.names]
        texts: dict[str, str] = {}
        for word in (word for own in known for word in own):
            texts.setdefault(word.lower(), word)
        encoded = dict(zip(texts, TEMPLATE.encode(encoder, list(texts.values()))[:, 0], strict=True))
        most = max(map(len, known))
        # A class with fewer words has its first one again: a maximum does not mind.
        padded = [[*own, *own[:1] * (most - len(own))] for own in known]
        self.selector = ContextSelector(
            torch.stack([torch.stack([encoded[word.lower()] for word in own]) for own in padded])
        )
        suppressed = TEMPLATE.encode(encoder, _shared(words, self.names))[:, 0]
        self.register_buffer("_words", suppressed, persistent=False)
        width = suppressed.shape[1]
        with building():
            torch.default_generator.manual_seed(seed)
            self.image_adapter, self.text_adapter = Adapter(width), Adapter(width)
        for module in (self.bgs, self.image_adapter, self.text_adapter):
            module.to(suppressed.device)
        self.regions = RegionEncoder(encoder, self.selector.prompt_features, normalization=normalization)

    def forward(self, images: Tensor, cams: Tensor, labels: Tensor) -> CLIMSTerms:
        """The loss of a batch; arguments and errors as for :meth:`cacl.CACLLoss.forward`."""
        across = self.training and world_size() > 1
        seen = self.regions(images, cams, labels)
        text = self.selector(seen.foreground, seen.class_index, across=across).text
        foreground, background = (self.image_adapter(each) for each in (seen.foreground, seen.background))
        matching = self.matching(foreground, background, self.text_adapter(text), across=across)
        words = self._words.expand(len(text), -1, -1)
        bgs = self.bgs(seen.foreground, words, across=across)
        total, none = matching + self.beta * bgs, matching.detach() * 0
        return CLIMSTerms(total, matching, bgs, none, *_similarities(seen, text, across), self.bgs.pass_rate)


def _similarities(seen: EncodedRegions, text: Tensor, across: bool) -> tuple[Tensor, Tensor]:
    """Mean cosines of foreground and background with the texts, without a graph."""
    s_ff, s_bf = (
        reduced(cosine(features.detach(), text), "mean", across) for features in (seen.foreground, seen.background)
    )  # fmt: skip
    return s_ff, s_bf


def _shared(words: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The background words of all classes, none of which they may be."""
    words, own = check_words("words", words), {plain(name) for name in names}
    if same := [word for word in words if plain(word) in own]:
        raise InputError(f"Background word {same[0]!r} is one of the classes: it would suppress that class.")
    return words


def _synonyms(name: str, synonyms: Mapping[str, Sequence[str]], names: Sequence[str]) -> tuple[str, ...]:
    """Other words for a class, without those that are classes themselves."""
    found = next((own for other, own in synonyms.items() if plain(other) == plain(name)), ())
    if isinstance(found, str):
        raise InputError(f"Expected argument `synonyms` to have a list of words for {name!r}, but got one text.")
    others = {plain(other) for other in names} - {plain(name)}
    return tuple(word for word in found if word != name and plain(word) not in others)


def _check_weights(**weights: float) -> None:
    for argument, weight in weights.items():
        check_range(argument, weight, 0, float("inf"))
