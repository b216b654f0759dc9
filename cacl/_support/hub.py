"""The Hugging Face hub, by its own library, which is imported when somebody asks for a model of it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from cacl.errors import InputError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hub_library(name: str) -> Any:
    """The module huggingface_hub; ``name`` is the model that it is wanted for."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(f"{name}: models of the hub need an extra: pip install 'cacl[hub]' ({error})") from None


def located(source: str | PathLike[str], revision: str | None, files: Sequence[str]) -> Path:
    """A path as it is; of a text ``"owner/name"`` that is none, the folder that these files were downloaded to."""
    path = Path(source)
    if not isinstance(source, str) or path.exists() or not _NAME.fullmatch(source):
        return path
    try:
        library = hub_library(source)
    except ImportError as error:
        raise ImportError(f"{error}, and there is no such file or folder") from None
    try:
        return Path(library.snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of many kinds: no network, no such model, no right to see it
        said = " ".join(str(error).split())
        raise InputError(f"{source}: no such file or folder, and none of the hub: {said}") from None
