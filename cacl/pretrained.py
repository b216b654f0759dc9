"""Networks that travel: a folder with weights, what builds the network, and a model card; the Hugging Face hub.

The folder has the hub's names of files, ``model.safetensors``, ``config.json`` and ``README.md``. Nothing in it is run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from cacl import __version__
from cacl._support.card import model_card
from cacl._support.distributed import rank
from cacl._support.files import read_json, require_no_file, write_json, write_text
from cacl._support.hub import hub_library, located
from cacl._support.safetensors import load_tensors, save_tensors
from cacl._support.surroundings import building
from cacl._support.unwrapped import one_state
from cacl._support.values import check_span, check_words
from cacl._support.weights import check_weights, load_state, load_weights
from cacl.constants import IMAGENET_MEAN, IMAGENET_STD, Range
from cacl.errors import InputError, did_you_mean, expected, quoted, shown

FORMAT = 1
"""Version of what stands in ``config.json``."""
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class Pretrained(nn.Module):
    """What :class:`cacl.CAMNet` and :class:`cacl.deeplab.DeepLabV2` have to be saved, shared and loaded.

    Files need the extra ``hub``: safetensors for folders, huggingface_hub for the hub.
    """

    num_classes: int
    backbone_name: str
    """What the backbone is called; empty for a module that was passed in."""
    classes: tuple[str, ...] = ()
    """The names of the classes, without the background; empty where nobody has said them."""
    range: Range | None = None
    """What the values of the deep images spanned that it was trained on; by their type if None."""

    _head: ClassVar[str]
    """The parameter whose first dimension is the number of classes."""
    _unnamed: ClassVar[int] = 0
    """How many of the classes have no name: the background."""
    _options: ClassVar[tuple[str, ...]] = ()
    """Switches that it is built with."""

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        license: str = "",
        about: str = "",
    ) -> Path:
        """Write a folder that :meth:`from_pretrained` reads: weights of their own types, and what builds the network.

        A model card is written where there is none; where there is one of an earlier save, ``license`` or ``about``
        make a new one. In several processes rank 0 writes, and nobody waits for it.

        Args:
            folder: a new one, or one of an earlier save; other files in it stay as they are.
            classes: the names of the classes, without the background; those of :attr:`classes` by default.
            license: the hub's name of one, such as ``"cc-by-4.0"``, for the card; empty for none.
            about: Markdown for the card: what the network was trained on, and how good it is.

        Returns:
            The folder.

        Raises:
            ValueError: if it holds another model, the names are not as many as the classes, or the weights are not
                finite or no tensors; nothing is written then.
            ImportError: if the extra is missing.
        """
        folder = Path(folder)
        names = self.classes if classes is None else check_words("classes", classes)
        if names and len(names) != self.num_classes - self._unnamed:
            raise expected("classes", f"{self.num_classes - self._unnamed} names, without the background", len(names))
        if license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
            raise expected("license", 'the name of one on the hub, such as "mit" or "cc-by-4.0"', repr(license))
        kind, state = type(self).__name__, self.state_dict()
        check_weights(kind, {name: value for name, value in state.items() if isinstance(value, Tensor)})
        config = {"format": FORMAT, "network": kind, "num_classes": self.num_classes, "classes": list(names)}
        config |= {"backbone": self.backbone_name, **{name: getattr(self, name) for name in self._options}}
        if self.range is not None:
            config["range"] = list(self.range)
        if rank() == 0:
            new_card = bool(license or about)
            _check_room(folder, [CONFIG, WEIGHTS, *([CARD] if new_card else [])])
            save_tensors(folder / WEIGHTS, state)
            if new_card or not (folder / CARD).exists():
                write_text(folder / CARD, self._card(names, license, about))
            write_json(folder / CONFIG, config)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        backbone: str | nn.Module | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a network, in evaluation mode on the CPU, its weights of the types that they were saved in.

        Args:
            source: a folder of :meth:`save_pretrained`; a model of the hub, ``"owner/name"``, where there is no such
                path; or a file of :func:`torch.save` with a state dict, such as the ``model.pt`` of a run's stage.
            backbone: where ``source`` does not name it: its name, or for a module of one's own one such, which is
                changed in place.
            revision: of the hub: a branch, a tag or a commit.

        Raises:
            ValueError: if something is missing, is something else, does not fit, or needs a backbone; names the file.
            ImportError: if the extra is missing.
        """
        path = located(source, revision, (CONFIG, WEIGHTS))
        saved = cls._folder(path) if path.is_dir() else cls._file(path)
        given, classes, span = backbone or saved.backbone, saved.classes(cls._unnamed), saved.range
        if not given:
            raise InputError(
                f"{saved.path}: the backbone of this network is not named in it; pass its name, or a module such as "
                "the one that it was trained with, as `backbone`"
            )
        make: Any = cls
        with building():
            try:
                net: Self = make(len(saved.head), backbone=given, weights=None, **saved.options)
            except InputError as error:
                raise error if backbone else InputError(f"{saved.path}: {error}") from None
        load_weights(net, saved.weights, saved.source, as_stored=True)
        net.classes, net.range = classes, span
        return net.eval()

    def push_to_hub(
        self,
        name: str,
        *,
        classes: Sequence[str] | None = None,
        license: str = "",
        about: str = "",
        private: bool | None = None,
        message: str = "Upload a network of cacl",
    ) -> str:
        """Make a model of the Hugging Face hub, ``"owner/name"``, or a new commit of it; a card that it has stays.

        Who may write is huggingface_hub's business: ``hf auth login``, or the variable HF_TOKEN.

        Args:
            name: of the model.
            classes: as for :meth:`save_pretrained`, as ``license`` and ``about``, which are for a new card.
            private: whether only its owner sees a new one; the hub's default if None.
            message: of the commit.

        Returns:
            The commit's address; empty on other ranks than 0, which do nothing.

        Raises:
            ValueError: as for :meth:`save_pretrained`.
            ImportError: if the extra is missing; errors of the hub come as huggingface_hub raises them.
        """
        if rank() != 0:
            return ""
        api = hub_library(name).HfApi()
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, classes=classes, license=license, about=about)
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            ignored = [CARD] if api.file_exists(name, CARD) else None
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=ignored
            )  # fmt: skip
        return str(commit.commit_url)

    @classmethod
    def _folder(cls, folder: Path) -> _Saved:
        path = folder / CONFIG
        if not path.is_file():
            raise InputError(
                f"{folder}: expected a folder of `save_pretrained`, but it has no {CONFIG}; of a run folder, "
                "`cacl export` makes one"
            )
        config = read_json(path)
        cls._check(config, path)
        weights = load_tensors(folder / WEIGHTS)
        head = weights.get(cls._head)
        if head is None or head.ndim == 0 or len(head) != config["num_classes"]:
            came = "none" if head is None else f"shape {tuple(head.shape)}"
            raise InputError(
                f"{folder / WEIGHTS}: {cls._head!r}: expected weights of {config['num_classes']} classes, as {CONFIG} "
                f"says, but got {came}"
            )
        options = {name: config[name] for name in cls._options}
        return _Saved(path, folder / WEIGHTS, weights, head, config, options)

    @classmethod
    def _check(cls, config: Mapping[str, Any], path: Path) -> None:
        """Require what ``config.json`` says to be of this version, of this network, and right."""
        known = {"format": int, "network": str, "num_classes": int, "classes": list, "backbone": str}
        known |= dict.fromkeys(cls._options, bool)
        if config.get("format", FORMAT) != FORMAT:
            raise InputError(
                f"{path}: format: expected {FORMAT}, but got {quoted(config['format'])}; another version of cacl has "
                "written it"
            )
        if config.get("network", cls.__name__) != cls.__name__:
            raise InputError(f"{path}: network: expected {cls.__name__!r}, but got {quoted(config['network'])}")
        for key, kind in known.items():
            if key not in config:
                raise InputError(f"{path}: {key}: missing")
            if type(config[key]) is not kind:
                raise InputError(f"{path}: {key}: expected {kind.__name__}, but got {quoted(config[key])}")
        if unknown := sorted(config.keys() - known.keys() - {"range"}):
            raise InputError(f"{path}: {shown(unknown[0])}: unknown key{did_you_mean(unknown[0], known)}")

    @classmethod
    def _file(cls, path: Path) -> _Saved:
        """A state dict, alone or as :func:`cacl.photos.save_segmenter` writes it."""
        state = load_state(path, foreign=True)
        head = (one_state(state, cls._head, path, cls.__name__) or {}).get(cls._head)
        if head is None or head.ndim == 0:
            raise InputError(f"{path}: expected weights of {cls.__name__}, but got a checkpoint of something else")
        described = isinstance(state.get("weights"), Mapping) and isinstance(state.get("classes"), list)
        return _Saved(path, path, state["weights"], head, state) if described else _Saved(path, path, state, head)

    def _card(self, names: Sequence[str], license: str, about: str) -> str:
        kind, module = type(self).__name__, type(self).__module__
        code = [f"from {module} import {kind}", "", f'net = {kind}.from_pretrained(".")  # or its name on the hub']
        span = "" if self.range is None else f" Values of deep images are mapped from {list(self.range)}."
        built = (
            f"Backbone: {self.backbone_name or 'a module that is passed as `backbone`'}. Photos are RGB of 0 to 1 less "
            f"{IMAGENET_MEAN}, over {IMAGENET_STD}, as by `cacl.transforms.normalize`.{span} Written by cacl "
            f"{__version__}."
        )
        summary = (inspect.getdoc(type(self)) or kind).partition("\n")[0]
        values = [*["background"] * self._unnamed, *names] if names else []
        title = f"{kind} of {self.num_classes} classes"
        return model_card(title, summary, code, built, values, license=license, about=about)


@dataclass(frozen=True)
class _Saved:
    """What was read of a network."""

    path: Path
    """What says how it is built."""
    source: Path
    """What has the weights."""
    weights: Mapping[str, Any]
    head: Tensor
    known: Mapping[str, Any] = field(default_factory=dict)
    """``classes``, ``backbone`` and ``range``."""
    options: Mapping[str, bool] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        name = self.known.get("backbone")
        return name if isinstance(name, str) else ""

    def classes(self, unnamed: int) -> tuple[str, ...]:
        """Their names, as many as there are with ``unnamed`` that have none; or nothing."""
        if not (names := self.known.get("classes")):
            return ()
        names = check_words(f"{self.path}: classes", names)
        if len(names) != len(self.head) - unnamed:
            raise InputError(
                f"{self.path}: classes: expected {len(self.head) - unnamed} names or none, for weights of "
                f"{len(self.head)} classes, but got {len(names)}"
            )
        return names

    @property
    def range(self) -> Range | None:
        span = self.known.get("range")
        return None if span is None else check_span(span, f"{self.path}: range: ")


def _check_room(folder: Path, names: Sequence[str]) -> None:
    """Require files that will be written to be new, or of an earlier save."""
    require_no_file(folder)
    try:
        ours = {"format", "network"} <= read_json(folder / CONFIG).keys()
    except InputError:
        ours = False
    taken = [name for name in names if (folder / name).exists()]
    if taken and not ours:
        raise InputError(
            f"{folder / taken[0]}: is there already, and is not of an earlier `save_pretrained`; take another folder"
        )
