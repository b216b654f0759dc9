"""OpenAI's CLIP library: its import, its downloads, its model of a state dict. The only module that imports clip."""

from __future__ import annotations

import http.client
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from cacl._support.clip_checkpoint import read_clip
from cacl._support.files import home
from cacl._support.surroundings import building
from cacl.errors import InputError, did_you_mean


def import_clip() -> ModuleType:
    """Import clip; clip-anytorch 2.6.0 asks for ``pkg_resources``, which current setuptools no longer has."""
    try:
        with _pkg_resources():
            return importlib.import_module("clip")
    except ImportError as error:
        also = f" {error.name}" if error.name and not error.name.startswith("clip") else ""  # which clip itself imports
        raise ImportError(
            f"CLIP models need the package clip-anytorch: pip install clip-anytorch{also} ({error})"
        ) from None


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """Let ``from pkg_resources import packaging`` work while it is needed, without importing setuptools."""
    before = sys.modules.get("pkg_resources")
    if "clip" in sys.modules or getattr(before, "packaging", None):
        yield
        return
    import packaging.version

    stand_in = ModuleType("pkg_resources")
    stand_in.packaging = packaging  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        if before is None:
            del sys.modules["pkg_resources"]
        else:
            sys.modules["pkg_resources"] = before


def download_clip(name: str, root: str | PathLike[str] | None) -> Mapping[str, Tensor]:
    clip = import_clip()
    models: dict[str, str] = clip.clip._MODELS
    if name not in models:
        raise InputError(
            f"Expected an encoder name (one of {', '.join(models)}, or open_clip:MODEL/PRETRAINED) or the path of a "
            f"checkpoint, but got {name!r}{did_you_mean(name, models)}"
        )
    folder = Path(root) if root is not None else home(f"CLIP {name}") / ".cache" / "clip"
    try:
        return read_clip(Path(clip.clip._download(models[name], str(folder))), clip_hashes)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise InputError(
            f"CLIP {name} is not in {folder} and could not be downloaded ({error}); "
            "give the path of its checkpoint instead."
        ) from None


def clip_hashes() -> set[str]:
    """SHA-256 of the files that the library clip downloads, which stand in their addresses."""
    models: dict[str, str] = import_clip().clip._MODELS
    return {url.split("/")[-2] for url in models.values()}


def build_clip(state: Mapping[str, Tensor], name: str) -> nn.Module:
    clip = import_clip()
    text_tower = ("positional_embedding", "text_projection", "token_embedding.weight", "ln_final.weight")
    needed = (*text_tower, "visual.conv1.weight")  # which either kind of image tower has
    missing = [key for key in needed if key not in state]
    # Of the loss that CLIP was trained with: they encode nothing, and one may be missing, the other too many.
    state = {
        "logit_scale": torch.zeros((), device="cpu"),
        **{name: value for name, value in state.items() if name != "logit_bias"},
    }
    if missing:
        raise InputError(f"{name}: expected the state dict of a CLIP model, but it has no {missing[0]!r}.")
    if rounded := [key for key in needed if not state[key].is_floating_point()]:  # as quantisation leaves them
        came = state[rounded[0]].dtype
        raise InputError(f"{name}: {rounded[0]!r}: expected weights of a floating point type, but got {came}.")
    context, vocabulary = (
        next(iter(state[key].shape), 0) for key in ("positional_embedding", "token_embedding.weight")
    )
    if vocabulary < (tokens := 49408):
        raise InputError(f"{name}: CLIP's tokenizer has {tokens} tokens, but the checkpoint knows {vocabulary}.")
    if context > (longest := 4096):
        raise InputError(f"{name}: expected texts of at most {longest} tokens, but the checkpoint is for {context}.")
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes the parameters ask for
            clip.model.build_model({key: value.to("meta") for key, value in state.items()})
        with building():
            network: nn.Module = clip.model.build_model(dict(state))
    except InputError:
        raise
    except Exception as error:  # whatever a state dict of other sizes makes it raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name}: its parameters do not make a CLIP model: {reason}") from None
    return network
