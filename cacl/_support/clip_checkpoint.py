"""Checkpoints of CLIP: OpenAI's archives, state dicts, and what trainings make of these."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cacl._support.torchscript import is_torchscript, read_torchscript
from cacl._support.unwrapped import one_state, tensor_names
from cacl._support.weights import check_inflated, check_weights, load_state
from cacl.errors import InputError, first_line

logger = logging.getLogger("cacl")


def read_clip(path: Path, trusted: Callable[[], set[str]]) -> Mapping[str, Tensor]:
    """The state dict of the CLIP model in a checkpoint, read without running code.

    Args:
        path: OpenAI's TorchScript archive, or a state dict, also as a training leaves it.
        trusted: gives the SHA-256 of OpenAI's own files: if one of these cannot be read otherwise, its code is run.

    Raises:
        ValueError: if it is something else; says what, and what to do.
    """
    content = _read_archive(path, trusted) if is_torchscript(path) else load_state(path, kind="CLIP", foreign=True)
    names = tensor_names(content)
    if content and not names:
        raise InputError(f"{path}: expected a state dict (name -> tensor) of a CLIP model, but got something else.")
    for part, what in _OTHERS.items():
        if any(name.startswith(part) or f".{part}" in name for name in names):
            raise InputError(f"{path}: {what.format(path=path)}.")
    if {"epoch", "name", "state_dict"} <= content.keys():
        raise InputError(
            f"{path}: is of a training by open_clip ('epoch', 'name', 'state_dict'), and does not say which activation "
            f"the model has: load it with its name there, such as open_clip:ViT-B-32/{path}, or, for OpenAI's "
            "activation, save its 'state_dict' alone."
        )
    state = one_state(content, "token_embedding.weight", path, "CLIP model")
    if state is None:
        state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    check_weights(path, state)
    return state


_OTHERS = {
    "visual.trunk.": "is of a model whose image tower is timm's ('visual.trunk.'): load it with its name in open_clip, "
    "open_clip:MODEL/{path}",
    "text.token_embedding.": "is of a model of open_clip with a text tower of its own ('text.'): load it with its name "
    "there, open_clip:MODEL/{path}",
    "text.transformer.": "is of a model of open_clip with a text tower of its own ('text.'): load it with its name "
    "there, open_clip:MODEL/{path}",
    "text_model.embeddings.": "has the names of the library transformers ('text_model.'): give its model as an encoder "
    "of your own, or OpenAI's checkpoint of it",
}
"""Names of parameters in checkpoints of other models, and what to do with these."""


def _read_archive(path: Path, trusted: Callable[[], set[str]]) -> Mapping[str, Tensor]:
    """The state dict in a TorchScript archive; no code in it is run unless it is OpenAI's, by its hash."""
    try:
        check_inflated(path)
        return read_torchscript(path)
    except Exception as error:  # of many kinds; each means that the file is something else
        reason = first_line(error)
    content = path.read_bytes() if path.stat().st_size < 2**31 else b""  # the largest has 1.3 GB
    if hashlib.sha256(content).hexdigest() not in trusted():
        raise InputError(f"{path}: not a CLIP checkpoint (nothing in it was run): {reason}")
    logger.info("%s: read by torch.jit.load, as it is OpenAI's own by its hash (%s)", path, reason)
    state: Mapping[str, Tensor] = torch.jit.load(  # type: ignore[no-untyped-call]
        io.BytesIO(content), map_location="cpu"
    ).state_dict()
    return state
