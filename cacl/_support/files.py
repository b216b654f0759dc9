"""Files that are whole or not there: written to a temporary name and renamed; nothing in them is ever run."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from cacl._support.distributed import rank, rank_zero
from cacl.errors import InputError, first_line, shown

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


def home(what: str) -> Path:
    """Where downloads are kept, unless somebody says where; ``what`` is to be kept.

    Raises:
        ValueError: if this process's user has no such folder.
    """
    try:
        return Path.home()
    except (RuntimeError, KeyError):
        raise InputError(
            f"{what}: expected a home folder to keep downloads in, but this user has none: set HOME to a folder that "
            "can be written to, or give the path of a file"
        ) from None


def hub_home(what: str) -> None:
    """As :func:`home`, for what comes from the Hugging Face hub, whose folder the environment may name."""
    if not {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"} & os.environ.keys():
        home(what)


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
    rank_zero(lambda: _lock(folder))
    try:
        yield
    finally:
        if rank() == 0:
            _unlock(folder)


_LOCK, _OWNER = ".lock", ".owner"
_TRIES = 100
_held: dict[str, FileLock] = {}
"""By this process: real path of the folder -> its lock."""


def _lock(folder: Path) -> None:
    owner = folder / _OWNER
    try:
        for more in reversed(range(_TRIES)):
            lock = FileLock(folder / _LOCK, timeout=0)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                break
            except (FileExistsError, FileNotFoundError):  # the folder's last user ended just now and removed it?
                if not more:
                    raise
            except Timeout:
                raise InputError(f"{folder}: another run is using this folder ({_read(owner)})") from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                logger.warning("%s: nothing keeps a second run out: the file system has no locks", folder)
                (folder / _LOCK).unlink(missing_ok=True)
                return
        _held[os.path.realpath(folder)] = lock
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to, but {error.strerror or error}") from None
    with suppress(OSError):  # a full disk shows by what has to be written
        write_text(owner, f"process {os.getpid()} on {platform.node()}\n")


def _read(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8", errors="replace")[:100].strip()
    except OSError:  # it begins or ends just now
        return "unknown"


def _unlock(folder: Path) -> None:
    if (lock := _held.pop(os.path.realpath(folder), None)) is None:
        return
    for name in (_OWNER, _LOCK):  # before the lock ends: a file that another run has locked must stay
        with suppress(OSError):
            (folder / name).unlink()
    lock.release()
    with suppress(OSError):  # of a run that was refused, nothing stays
        folder.rmdir()


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


def require_no_file(folder: Path) -> None:
    """Of what is to be a folder, or is one."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{shown(folder)}: expected a folder, but it is a file")


def write_json(path: Path, value: object) -> None:
    write_text(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object, but {first_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, but got {type(value).__name__}")
    return value
