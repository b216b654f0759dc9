"""Files that are whole or not there: written to a temporary name and renamed; nothing in them is ever run."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import logging
import math
import os
import platform
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from cacl._checks import InputError, check_weights, first_line
from cacl._processes import once, rank

Network = TypeVar("Network", bound=nn.Module)

logger = logging.getLogger("cacl")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends without an error."""
    name = os.fsencode(path.name)  # one that is too long once it ends in .tmp has another
    temporary = path.with_name(f"{path.name if len(name) <= 250 else hashlib.sha256(name).hexdigest()}.tmp")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # left by a kill; through a link another file would be written
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # what went wrong before is what counts
                temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an :class:`OSError` say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder that no other run uses meanwhile; among the processes of one run, rank 0 sees to it.

    The lock is the system's on a file, so that it ends with the process that holds it, however that ends.

    Raises:
        ValueError: if another run is using the folder, or it cannot be written to.
    """
    file = once(lambda: _lock(folder))
    try:
        yield
    finally:
        if file is not None and rank() == 0:
            _held.discard(os.path.realpath(folder))
            with suppress(OSError):
                (folder / _LOCK).unlink()
            os.close(file)
            with suppress(OSError):  # of a run that was refused, nothing stays
                folder.rmdir()


_LOCK = ".lock"
_held: set[str] = set()
"""By this process, in which the system would give the lock again."""


def _lock(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    path, owner = folder / _LOCK, f"process {os.getpid()} on {platform.node()}"
    if os.path.realpath(folder) in _held:
        raise InputError(f"{folder}: another run is using this folder ({owner})")
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # the folder's last user ended just now and removed it
                continue
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process; not of those that it forks
                if os.path.samestat(os.stat(path), os.fstat(file)):
                    os.truncate(file, 0)
                    os.write(file, f"{owner}\n".encode())
                    _held.add(os.path.realpath(folder))
                    return file
                os.close(file)  # another file by now
            except FileNotFoundError:
                os.close(file)
            except (BlockingIOError, PermissionError):
                owner = os.read(file, 100).decode(errors="replace").strip()
                os.close(file)
                raise InputError(f"{folder}: another run is using this folder ({owner})") from None
            except OSError as error:
                os.close(file)
                path.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                logger.warning("%s: nothing keeps a second run out: the file system has no locks", folder)
                return None
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to, but {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity: ``null`` stands for them."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: object) -> None:
    write_text(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object, but {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, but got {type(value).__name__}")
    return value


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors, numbers and strings in dicts and lists; the same state gives the same bytes."""
    with replacing(path) as file:
        try:
            torch.save(_canonical(state), file)
        except RuntimeError as error:  # torch's own, of a file that could not be written
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU."""
    try:
        check_inflated(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds; each means that the file is something else
        raise InputError(f"{path}: not a checkpoint (nothing in it was run): {first_line(error)}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a checkpoint, but got {type(state).__name__}")
    return state


def check_inflated(path: Path) -> None:
    """Refuse an archive that unpacks to far more than its own size: torch does not compress tensors."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size + 2**28:
            raise ValueError(f"it would unpack to {size} bytes")


def load_weights(module: nn.Module, state: Mapping[str, Any], source: object) -> None:
    """Load a state dict that fits in every name and shape, or refuse and leave the module as it was."""
    if not isinstance(state, Mapping):
        raise InputError(f"{source}: expected weights, but got {type(state).__name__}")
    own = module.state_dict()
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
    check_weights(source, {name: value for name, value in state.items() if isinstance(value, Tensor)})
    module.load_state_dict(state)


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
