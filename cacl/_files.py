"""Files that are whole or not there: written to a temporary name and renamed; nothing in them is ever run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cacl._checks import InputError, first_line


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a JSON object, but {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, but got {type(value).__name__}")
    return value


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors, numbers and strings in dicts and lists; the same state gives the same bytes."""
    with replacing(path) as file:
        torch.save(_canonical(state), file)


def load_state(path: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds; each means that the file is something else
        raise InputError(f"{path}: not a checkpoint (nothing in it was run): {first_line(error)}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a checkpoint, but got {type(state).__name__}")
    return state


def load_weights(module: nn.Module, state: Mapping[str, Any], source: object) -> None:
    """Load a state dict that fits in every name and shape, or refuse and leave the module as it was."""
    own = module.state_dict()
    state = {**{name: value for name, value in own.items() if name.endswith("_extra_state")}, **state}
    fitting = [k for k, v in own.items() if isinstance(state.get(k), Tensor) and state[k].shape == v.shape]
    wrong = [name for name in (*own, *state) if name not in fitting]
    if wrong:
        name = wrong[0]
        sizes = [tuple(x[name].shape) if isinstance(x.get(name), Tensor) else "nothing" for x in (own, state)]
        raise InputError(
            f"{source}: does not fit: {len(fitting)} of {len(own)} parameters match; "
            f"{name!r}: expected {sizes[0]}, but got {sizes[1]}"
        )
    module.load_state_dict(state)


def _canonical(value: Any) -> Any:
    """Copies in which equal strings are one object: pickle writes what it has seen as a reference."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {_canonical(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return sys.intern(value) if type(value) is str else value
