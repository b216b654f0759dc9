"""Texts for the encoder: context templates [CTX-Set] and background words of each class [BGD-Set] (CA-CL, eq. 3, 8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, overload

from cacl._support.names import plain
from cacl._support.values import check_positive, check_words
from cacl._support.word_lists import load_words
from cacl._support.words import read_words
from cacl.errors import InputError, InputTypeError, did_you_mean, expected

if TYPE_CHECKING:
    from torch import Tensor

    from cacl.encoders import ImageTextEncoder

DEFAULT_TEMPLATES = ("a photo of {}.", "an image of {}.", "a picture of {}.", "a snapshot of {}.")
"""The paper's four templates; the fifth candidate that it dropped is ``"a clean origami {}."``."""

ORIGAMI = "a clean origami {}."
"""The template of CLIP-ES; the fifth candidate of CA-CL, which it dropped."""
BACKGROUND_WORDS = (
    "tree", "river", "sea", "lake", "water", "railway", "railroad", "track", "stone", "rocks",
)  # fmt: skip
"""The background words of CLIMS for VOC, the same for all classes."""
ALIASES = {"person": "player"}
"""What CLIMS calls classes in texts."""
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "aeroplane": ("airplane", "plane", "jet"), "bicycle": ("bike", "cycle"), "bird": ("songbird", "waterfowl"),
    "boat": ("ship", "vessel", "yacht"), "bottle": ("flask", "jar"), "bus": ("coach", "minibus"),
    "car": ("automobile", "vehicle"), "cat": ("kitten", "house cat"), "chair": ("seat", "armchair"),
    "cow": ("cattle", "bull"), "diningtable": ("dining table", "table"), "dog": ("puppy", "hound"),
    "horse": ("pony", "racehorse"), "motorbike": ("motorcycle", "scooter"), "person": ("player", "people", "human"),
    "pottedplant": ("potted plant", "houseplant"), "sheep": ("lamb", "ram"), "sofa": ("couch", "settee"),
    "train": ("locomotive", "tram"), "tvmonitor": ("television", "computer monitor"),
}  # fmt: skip
"""Other words for the classes of VOC; our own list."""
_ASSETS = Path(__file__).with_name("assets")


class PromptSet(Sequence[str]):
    """An ordered set of m context templates, each with exactly one ``{}`` for the class name.

    Args:
        templates: the templates; the paper's four by default.

    Raises:
        ValueError: if there is none, one stands twice, or one has not exactly one ``{}``.

    Example:
        >>> PromptSet(["a photo of {}.", "a drawing of {}."]).texts("cat")
        ['a photo of cat.', 'a drawing of cat.']
    """

    def __init__(self, templates: Iterable[str] = DEFAULT_TEMPLATES) -> None:
        self._templates = check_words("templates", templates)
        for template in self._templates:
            if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
                raise InputError(f"Expected each of `templates` to have exactly one {{}}, but got {template!r}.")

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> str | PromptSet:
        return PromptSet(self._templates[index]) if isinstance(index, slice) else self._templates[index]

    def __len__(self) -> int:
        return len(self._templates)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptSet) and self._templates == other._templates

    def __hash__(self) -> int:
        return hash(self._templates)

    def __repr__(self) -> str:
        return f"PromptSet({list(self._templates)!r})"

    def texts(self, name: str) -> list[str]:
        """The m prompts of one class name."""
        return [template.replace("{}", name) for template in self._templates]

    def encode(self, encoder: ImageTextEncoder, names: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Text features of every class under every template (CA-CL, eq. 3).

        Args:
            encoder: the image-text encoder.
            names: K class names.
            batch_size: texts encoded at once.

        Returns:
            ``(K, m, D)``, unit length, float32.
        """
        return _encode(encoder, [self.texts(name) for name in check_words("names", names)], batch_size)


class BackgroundSet(Mapping[str, tuple[str, ...]]):
    """Background words of each class: what tends to be seen with it and is not it (CA-CL, eq. 8).

    Names are looked up without regard to case, spaces, hyphens and underscores: ``"dining table"`` finds
    ``"diningtable"``.

    Args:
        words: class name -> its background words, best first.

    Raises:
        ValueError: if a list is empty, a word stands twice in it, or a word is the name of a class.

    Example:
        >>> backgrounds = BackgroundSet({"boat": ["water", "pier"]})
        >>> backgrounds.texts("boat", PromptSet(["a photo of {}."]))
        ['a photo of water.', 'a photo of pier.']
        >>> BackgroundSet.voc()["train"][0]
        'railroad track'
    """

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        if not isinstance(words, Mapping):
            raise InputTypeError(f"Expected argument `words` to be a mapping, but got {type(words).__name__}.")
        if not words:
            raise expected("words", "a mapping with at least one class", "an empty one")
        for name in words:
            if not isinstance(name, str) or not name.strip():
                raise InputTypeError(f"Expected argument `words` to have class names for keys, but got {name!r}.")
        self._words = {name: check_words(f"words[{name!r}]", list_) for name, list_ in words.items()}
        self._names = {plain(name): name for name in self._words}
        if len(self._names) < len(self._words):
            twice = next(name for name in self._words if self._names[plain(name)] != name)
            raise InputError(f"{twice!r} and {self._names[plain(twice)]!r} in `words` are the same class.")
        for name, list_ in self._words.items():
            for word in list_:
                if plain(word) in self._names:
                    raise InputError(
                        f"Background word {word!r} of class {name!r} is the class {self._names[plain(word)]!r}: "
                        "it would suppress that class."
                    )

    @classmethod
    def voc(cls, n: int = 5) -> BackgroundSet:
        """This package's words for the 20 classes of PASCAL VOC, the first ``n`` (1 to 7) of each."""
        return cls.from_json(_ASSETS / "backgrounds_voc.json", n)

    @classmethod
    def coco(cls, n: int = 5) -> BackgroundSet:
        """This package's words for the 80 classes of COCO, the first ``n`` (1 to 7) of each."""
        return cls.from_json(_ASSETS / "backgrounds_coco.json", n)

    @classmethod
    def from_json(cls, path: str | PathLike[str], n: int | None = None) -> BackgroundSet:
        """Read a JSON object ``{"class": ["word", ...], ...}``, the first ``n`` words a class (all by default)."""
        words = load_words(Path(path))
        if n is not None:
            check_positive("n", n)
            for name, list_ in words.items():
                if len(list_) < n:
                    raise expected("n", f"at most {len(list_)}, the number of words for {name!r} in {path}", n)
            words = {name: list_[:n] for name, list_ in words.items()}
        try:
            return cls(words)
        except InputError as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def built_in(cls, names: Sequence[str], n: int = 5) -> BackgroundSet:
        """This package's words for ``names``: VOC's or COCO's list where one knows all of them, else of each its own.

        Where both lists are needed, a word that is one of ``names`` is left out, and another takes its place.

        Raises:
            ValueError: if neither list knows a name; says which, and what it may have meant.
        """
        names = check_words("names", names)
        lists = cls.coco(n), cls.voc(n)
        for known in reversed(lists):
            if all(name in known for name in names):
                return known
        unknown = [name for name in names if not any(name in known for known in lists)]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            hint = did_you_mean(unknown[0].lower(), {name for known in lists for name in known})
            raise InputError(
                f"There are no built-in background words for {unknown[0]!r}{more}{hint}{' Or' if hint else ':'} give "
                "`backgrounds` (in a configuration [backgrounds] file) with words for every class."
            )
        whole, taken = (cls.coco(7), cls.voc(7)), {plain(name) for name in names}
        found = {name: next(known[name] for known in whole if name in known) for name in names}
        return cls({name: [word for word in words if plain(word) not in taken][:n] for name, words in found.items()})

    def __getitem__(self, name: str) -> tuple[str, ...]:
        if not isinstance(name, str) or plain(name) not in self._names:
            hint = did_you_mean(name, self._words) if isinstance(name, str) else ""
            raise KeyError(f"no background words for class {name!r}{hint}")
        return self._words[self._names[plain(name)]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def __repr__(self) -> str:
        return f"BackgroundSet({len(self)} classes)"

    def texts(self, name: str, prompts: PromptSet) -> list[str]:
        """The m·n background prompts of one class: every word under every template."""
        return [text for word in self[name] for text in prompts.texts(word)]

    def encode(
        self, encoder: ImageTextEncoder, names: Sequence[str], prompts: PromptSet, *, batch_size: int = 256
    ) -> Tensor:
        """Text features of every class's background prompts (CA-CL, eq. 8).

        Args:
            encoder: the image-text encoder.
            names: K class names.
            prompts: the templates.
            batch_size: texts encoded at once.

        Returns:
            ``(K, Q, D)``, unit length, float32; Q is the largest m·n of a class, and shorter lists are padded with
            zero vectors, which are neutral in eq. 12.

        Raises:
            ValueError: if a class has no words.
        """
        names = check_words("names", names)
        for name in names:
            if name not in self:
                raise InputError(
                    f"no background words for class {name!r}{did_you_mean(name, self)}; give `backgrounds` (in a "
                    "configuration [backgrounds] file) with words for every class"
                )
        return _encode(encoder, [self.texts(name, prompts) for name in names], batch_size)

    @staticmethod
    def query(name: str, n: int) -> str:
        """What to ask a large language model for ``n`` background words of a class; :meth:`parse` reads the answer."""
        return (
            f"Name {n} things or surfaces that are often seen around or behind a {name} in photos and are neither "
            f"a {name} nor a part of one. Answer with {n} English words, one a line, the most frequent first."
        )

    @staticmethod
    def parse(answer: str) -> tuple[str, ...]:
        """Read the words out of an answer to :meth:`query`: one a line or with commas, numbered, bulleted or quoted.

        Explanations after a word, sentences before and after the list, code blocks, tables, JSON and what a model
        thought before are understood too.

        Returns:
            The words in lower case, each once.

        Raises:
            ValueError: if no word is found, or a line could be a word or something else; shows the line.

        Example:
            >>> BackgroundSet.parse('1. Water\\n2. "pier"\\n- water')
            ('water', 'pier')
        """
        return read_words(answer)


def words_for(names: Iterable[str], path: Path, n: int | None = None) -> BackgroundSet:
    """:meth:`BackgroundSet.from_json`, and an error where one of the classes ``names`` has no words."""
    words = BackgroundSet.from_json(path, n)
    for name in names:
        if name not in words:
            raise InputError(f"{path}: no background words for class {name!r}{did_you_mean(name, words)}")
    return words


def _encode(encoder: ImageTextEncoder, texts: Sequence[Sequence[str]], batch_size: int) -> Tensor:
    """K lists of texts -> (K, Q, D) unit length, padded with zeros; a text that stands twice is encoded once."""
    import torch

    from cacl._support.answers import check_callable, check_text_features
    from cacl._support.features import unit

    check_positive("batch_size", batch_size)
    check_callable("encoder.encode_text", getattr(encoder, "encode_text", None))
    unique = list(dict.fromkeys(text for list_ in texts for text in list_))
    with torch.no_grad():
        parts = (unique[i : i + batch_size] for i in range(0, len(unique), batch_size))
        chunks = [check_text_features(encoder.encode_text(part), len(part)).float() for part in parts]
        if len(widths := {chunk.shape[1] for chunk in chunks}) > 1:
            raise InputError(
                f"Expected `encoder.encode_text` to return features of one length, but got {sorted(widths)}."
            )
        features = unit(torch.cat(chunks))
        row = {text: i for i, text in enumerate(unique)}
        result = features.new_zeros(len(texts), max(map(len, texts)), features.shape[1])
        for k, list_ in enumerate(texts):
            result[k, : len(list_)] = features[[row[text] for text in list_]]
    return result
