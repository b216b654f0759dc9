"""The tensors in a TorchScript archive, read without its code: ``torch.jit.load`` runs some of it, and it can write."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip
_FIELDS = re.compile(r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.M)


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.endswith("/constants.pkl") for entry in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # whose list of files cannot be read
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of the module in an archive, as its ``state_dict``.

    Raises:
        Exception: of many kinds, if it is not like that.
    """
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        root = _Unpickler(archive, folder).load()
        return dict(_state(root, _fields(archive, f"{folder}/code/"), "", set()))


class _Module:
    """A module without its code; its attributes are those of the archive."""

    kind: str

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("only code could make the module of this")
        vars(self).update(state)


class _Unpickler(pickle._Unpickler):
    """Makes plain objects and tensors, and knows no function that does anything.

    It is the one in Python, as that in C takes as much memory as numbers in the file say.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type(name, (_Module,), {"kind": f"{module}.{name}"})
        if module == "torch.jit._pickle":  # what kind of list it is
            return lambda value, *_: value
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} is no tensor")

    def persistent_load(self, id: Any) -> Tensor:
        _, dtype, key, *_ = id
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=torch.uint8)
        return self.storages[key].view(dtype)


def _fields(archive: zipfile.ZipFile, code: str) -> dict[str, list[str]]:
    """Class -> the names of its parameters and buffers; it may have other tensors."""
    fields = {}
    for name in archive.namelist():
        if name.startswith(code) and name.endswith(".py"):
            module = name.removeprefix(code).removesuffix(".py").replace("/", ".")
            for kind, parameters, buffers in _FIELDS.findall(archive.read(name).decode()):
                fields[f"{module}.{kind}"] = re.findall(r'"([^"]*)"', parameters + buffers)
    return fields


def _state(
    module: _Module, fields: Mapping[str, list[str]], prefix: str, seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, _Module) and id(value) not in seen:
            yield from _state(value, fields, f"{prefix}{name}.", seen)
        elif isinstance(value, Tensor) and name in fields.get(module.kind, (name,)):
            yield f"{prefix}{name}", value
