"""Files of safetensors, which hold tensors and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacl._support.clock import timed
from cacl._support.files import replacing
from cacl._support.weights import other_file
from cacl.errors import InputError, first_line


@timed("files")
def save_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """Save a state dict as a safetensors file, which can hold nothing but tensors.

    Each name has values of its own, also where tensors share them.
    """
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"{path}: expected a state of tensors alone, but {others[0]!r} is {type(state[others[0]]).__name__}"
        )
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    content = _safetensors().save(tensors, {"format": "pt"})
    with replacing(path) as file:
        file.write(content)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, on the CPU."""
    library = _safetensors()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        tensors: dict[str, Tensor] = library.load_file(path)
    except Exception as error:  # of several kinds; each means that the file is something else, or not whole
        raise InputError(f"{path}: not a safetensors file: {other_file(path) or first_line(error)}") from None
    return tensors


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"Files of safetensors need an extra: pip install 'cacl[hub]' ({error})") from None
