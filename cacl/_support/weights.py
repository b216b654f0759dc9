"""Weights and other states: into modules and files, out of them, and whether they fit."""

from __future__ import annotations

import copy
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cacl._support.clock import timed
from cacl._support.files import replacing
from cacl._support.unwrapped import one_state
from cacl.errors import InputError, first_line

Network = TypeVar("Network", bound=nn.Module)


@timed("files")
def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors, numbers and strings in dicts and lists; the same state gives the same bytes."""
    with replacing(path) as file:
        try:
            torch.save(_canonical(state), file)
        except RuntimeError as error:  # torch's own, of a file that could not be written
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path, *, kind: str = "", foreign: bool = False) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU; with ``foreign``, what another program did, which may hold more.

    ``kind`` is what the network is called, where it is a certain one.
    """
    try:
        check_inflated(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds; each means that the file is something else
        other = other_file(path) if foreign else ""
        more = foreign and isinstance(error, UnpicklingError) and not other
        remedy = "; a file of torch.save(model.state_dict(), …), which holds nothing else, is read" if more else ""
        raise InputError(
            f"{path}: not a {f'{kind} ' if kind else ''}checkpoint (nothing in it was run): "
            f"{other or first_line(error)}{remedy}"
        ) from None
    if not isinstance(state, dict):
        wanted = f"a state dict (name -> tensor) of a {kind} model" if kind else "a checkpoint"
        raise InputError(f"{path}: expected {wanted}, but got {type(state).__name__}")
    return state


_OTHERS = {
    b"": "it is an empty file: copy or download it again",
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself: git lfs pull fetches it",
    b"<": "it is a web page: the download gave another file",
}
"""Beginnings of what downloads leave in the place of a checkpoint, and what to do."""


def other_file(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(100).lstrip()
    return next((said for begin, said in _OTHERS.items() if start.startswith(begin) and (begin or not start)), "")


def check_inflated(path: Path) -> None:
    """Refuse an archive that unpacks to far more than its own size: torch does not compress tensors."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size + 2**28:
            raise ValueError(f"it would unpack to {size} bytes")


def load_weights(module: nn.Module, state: Mapping[str, Any], source: object, *, as_stored: bool = False) -> None:
    """Load a state dict that fits in every name and shape, or refuse and leave the module as it was.

    It may be as a training left it: in another dict, or under what DDP, torch.compile and others put before names.
    With ``as_stored`` the module takes over the floating point types too, else it keeps its own.
    """
    if not isinstance(state, Mapping):
        raise InputError(f"{source}: expected weights, but got {type(state).__name__}")
    own = module.state_dict()
    marker = next((name for name, value in own.items() if isinstance(value, Tensor)), "")
    if marker not in state:
        state = one_state(state, marker, source, "network") or state
    extra = {name: value for name, value in own.items() if name.endswith("_extra_state")}
    state = {**extra, **state}
    fitting = [k for k, v in own.items() if _fits(v, state.get(k, extra))]
    wrong = [name for name in (*own, *state) if name not in fitting]
    if wrong:
        name = wrong[0]
        sizes = [tuple(x[name].shape) if isinstance(x.get(name), Tensor) else "nothing" for x in (own, state)]
        raise InputError(
            f"{source}: does not fit: {len(fitting)} of {len(own)} parameters match; "
            f"{name!r}: expected {sizes[0]}, but got {sizes[1]}"
        )
    types = _types(module, state, source) if as_stored else []
    check_weights(source, {name: value for name, value in state.items() if isinstance(value, Tensor)})
    for tensor, kind in types:
        tensor.data = tensor.data.to(kind)
    module.load_state_dict(state)


_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _types(module: nn.Module, state: Mapping[str, Any], source: object) -> list[tuple[Tensor, torch.dtype]]:
    """The tensors of a module that are of another type in a state dict, and that type."""
    found = []
    for name, own in (*module.named_parameters(), *module.named_buffers()):
        stored = state[name].dtype if name in state else own.dtype
        if stored != own.dtype:
            if stored not in _FLOATING or not own.is_floating_point():
                wanted = "a floating point type" if own.is_floating_point() else own.dtype
                raise InputError(f"{source}: {name!r}: expected {wanted}, but got {stored}")
            found.append((own, stored))
    return found


def fitting_weights(module: nn.Module, state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Of weights from elsewhere those of each parameter of a module, or refuse if one is missing; says how many fit."""
    skipped = ("num_batches_tracked", "_extra_state")
    wanted = {name: value for name, value in module.state_dict().items() if not name.endswith(skipped)}
    fitting = [name for name, value in wanted.items() if name in state and state[name].shape == value.shape]
    if len(fitting) < len(wanted):
        first = next(name for name in wanted if name not in fitting)
        got = f"{tuple(state[first].shape)}" if first in state else "nothing"
        raise InputError(
            f"{source}: expected weights of the whole backbone, but {len(fitting)} of {len(wanted)} parameters match; "
            f"{first!r}: expected {tuple(wanted[first].shape)}, but got {got}"
        )
    found = {name: state[name] for name in wanted}
    check_weights(source, found)
    return found


def _fits(own: object, other: object) -> bool:
    """Whether a value of one state dict can take the place of another; what is no tensor is a module's extra state."""
    if not isinstance(own, Tensor) or not isinstance(other, Tensor):
        return isinstance(own, Tensor) == isinstance(other, Tensor)
    return own.shape == other.shape


def copied(argument: str, module: Network) -> Network:
    """A deep copy, also of a module with tensors that are computed from parameters, such as those of weight norm.

    Raises:
        ValueError: if it cannot be copied; names the argument.
    """
    # torch copies no tensor that has a history; these are made anew from the parameters whenever they are needed.
    values = (value for child in module.modules() for value in vars(child).values())
    computed = {id(v): v.detach().clone() for v in values if isinstance(v, Tensor) and not v.is_leaf}
    try:
        return copy.deepcopy(module, computed)
    except Exception as error:  # a module of one's own may hold anything
        raise InputError(
            f"Expected argument `{argument}` to be a module that can be copied, but {type(module).__name__} cannot: "
            f"{first_line(error)}"
        ) from None


def check_can_be_saved(argument: str, module: nn.Module) -> None:
    """Require what modules keep beside their tensors to be something that a checkpoint can hold."""
    for name, value in module.state_dict().items():
        if not _can_be_saved(value):
            raise InputError(
                f"Expected argument `{argument}` to be a module whose state can be saved, but its {name!r} holds "
                "something else than tensors, numbers, texts, and lists and dicts of them."
            )


def _can_be_saved(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_can_be_saved, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set):
        return all(map(_can_be_saved, value))
    return value is None or isinstance(value, Tensor | bool | int | float | complex | str | bytes)


def _canonical(value: Any) -> Any:
    """Copies in which equal strings are one object: pickle writes what it has seen as a reference."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {_canonical(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return sys.intern(value) if type(value) is str else value


def check_weights(source: object, weights: Mapping[str, Tensor]) -> None:
    """Require weights from a file to be plain tensors, no larger than what was stored of them, and finite."""
    for name, value in weights.items():
        plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"{source}: {name!r}: expected a tensor with all of its values")
        if not value.isfinite().all():
            raise InputError(f"{source}: {name!r}: expected finite weights, but got NaN or infinity")


def check_takes_part(modules: Mapping[str, nn.Module]) -> None:
    """Require tensors of modules that gradients can pass: not those that were made in ``torch.inference_mode()``."""
    for each, module in modules.items():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_inference():
                raise InputError(
                    f"Expected `{each}` to be made outside of torch.inference_mode(), but its {name!r} was made in it "
                    "and takes no part in a training; make it before, or in `with torch.inference_mode(False)`."
                )


def are_finite(modules: Mapping[str, nn.Module]) -> bool:
    """Whether all values in the states of some modules are finite."""
    values = (value for module in modules.values() for value in module.state_dict().values())
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, Tensor))


@contextmanager
def evaluating(thing: object) -> Iterator[None]:
    """Evaluation mode, and every submodule's own mode put back afterwards; nothing of what is no module."""
    modes: dict[nn.Module, bool] = {}
    if isinstance(thing, nn.Module):
        modes = {child: child.training for child in thing.modules()}
        thing.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def put_back(given: object) -> Iterator[None]:
    """Leave an object that was given as it was, in state and mode, if it is a module; else it would be another one the
    next time."""
    modules = list(given.modules()) if isinstance(given, nn.Module) else []
    before = [
        (module, dict(vars(module)), dict(module._modules), _copies(module._parameters), _copies(module._buffers))
        for module in modules
    ]
    try:
        yield
    finally:
        for module, attributes, children, parameters, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, value in parameters.items():
                if (own := module._parameters[name]) is not None and value is not None:
                    own.data = value


def _copies(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.detach().clone() for name, value in tensors.items()}
