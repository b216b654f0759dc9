"""What tells one object from another that was given in its place: its own key, or its class and all that is in it."""

from __future__ import annotations

import copyreg
import enum
import hashlib
import logging
import re
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import PurePath
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from cacl.errors import first_line

logger = logging.getLogger("cacl")

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, bytearray, slice, range, type(...), PurePath, enum.Enum,
    np.generic, np.dtype, torch.dtype, torch.Size,
)  # fmt: skip
_NAMED = (type, types.ModuleType, logging.Logger, np.ufunc)
"""What its name is enough for."""
_NO_STATE = (torch.device, type(threading.Lock()), type(threading.RLock()))
_CONTAINERS = (dict, list, tuple, set, frozenset, OrderedDict, deque)
_OF_ALL = {*vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile", "_compile_kwargs"}
"""What modules have in their ``__dict__``: mode, hooks, tensors (which are looked at by name), marks of compilers."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnknownError(Exception):
    """Something in an object cannot be looked into; the message says what."""


def identity(thing: object, *, trained: bool = False) -> str:
    """A hash that is another one for an object with other results, the same for an equal object in another process.

    An object with a text ``key`` brings its own, and is not looked into. Of others its class counts, and everything in
    it: tensors and arrays by their values, numbers and texts, and objects in it likewise. The mode of modules, the
    device of tensors, and the code of classes and of functions that a module defines do not count.

    Args:
        thing: the object.
        trained: whether it makes a difference which of its parameters take a gradient.

    Raises:
        UnknownError: if something in it cannot be looked into.
    """
    digest = hashlib.sha256()
    try:
        for part in _Looking(trained).parts(thing, ""):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    except UnknownError:
        raise
    except Exception as error:  # of whatever the object's own methods raise
        raise UnknownError(f"{type(error).__name__}: {first_line(error)}") from None
    return digest.hexdigest()


class _Looking:
    """A look into an object: each part of it once, in a fixed order."""

    def __init__(self, trained: bool) -> None:
        self.trained = trained
        self.seen: dict[int, tuple[int, object]] = {}
        """Objects stay alive in it, so that no two have one id."""

    def parts(self, value: Any, place: str) -> Iterator[bytes | memoryview]:
        value = _uncompiled(value)
        if isinstance(value, _PLAIN):
            yield f"{_name(type(value))} {value!r}".encode("utf-8", "surrogatepass")
            return
        if isinstance(value, _NO_STATE):
            return
        if isinstance(value, _NAMED):
            yield _name(value).encode()
            return
        if id(value) in self.seen:
            yield f"again {self.seen[id(value)][0]}".encode()
            return
        self.seen[id(value)] = (len(self.seen), value)
        yield _name(type(value)).encode()
        key = getattr(value, "key", None)
        if isinstance(key, str):
            yield key.encode("utf-8", "surrogatepass")
        elif isinstance(value, Tensor):
            yield from self._tensor(value, place)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject and type(value) is np.ndarray:
            yield f"array {value.dtype} {value.shape}".encode()
            yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        elif isinstance(value, torch.Generator):
            yield from self._tensor(value.get_state(), place)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, place)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodType):
            owner = value.__self__ if not isinstance(value.__self__, types.ModuleType) else None
            yield from self.parts((_name(value), getattr(value, "__func__", None), owner), place)
        elif isinstance(value, Mapping) and _is_container(value):
            for name, each in value.items():
                yield from self.parts(name, place)
                yield from self.parts(each, f"{place}[{name!r}]")
        elif isinstance(value, Set) and _is_container(value):
            yield from sorted(identity(each, trained=self.trained).encode() for each in value)
        elif isinstance(value, Sequence) and _is_container(value):
            for number, each in enumerate(value):
                yield from self.parts(each, f"{place}[{number}]")
        else:
            scripted = isinstance(value, torch.jit.ScriptModule)
            own = _scripted(value) if scripted else _attributes(value)
            if own is None:
                own = self._reduced(value, place)
            for name, each in own.items():
                yield name.encode("utf-8", "surrogatepass")
                yield from self.parts(each, f"{place}.{name}".lstrip("."))

    def _tensor(self, value: Tensor, place: str) -> Iterator[bytes | memoryview]:
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise UnknownError(f"`{place}` is a tensor without values of its own")
        learns = self.trained and value.requires_grad and value.is_leaf
        yield f"tensor {value.dtype} {tuple(value.shape)} {learns}".encode()
        plain = torch.empty(value.shape, dtype=value.dtype, device="cpu").copy_(value.detach())  # no view of anything
        yield plain.reshape(-1).view(torch.uint8).numpy().data

    def _function(self, value: types.FunctionType, place: str) -> Iterator[bytes | memoryview]:
        yield _name(value).encode()
        if "<" in value.__qualname__ or value.__module__ == "__main__":  # of a function, a script, a notebook
            yield from _code(value.__code__)
        cells = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                cells.append(cell.cell_contents)
        yield from self.parts((value.__defaults__, value.__kwdefaults__, cells, value.__dict__), place)

    def _reduced(self, value: Any, place: str) -> dict[str, Any]:
        """What pickle would keep of an object whose state is not in Python."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(2) if reduce is None else reduce(value)
        except Exception:  # of many kinds
            raise UnknownError(f"{f'`{place}`' if place else 'it'} is of the type {_name(type(value))}") from None
        return {"reduced": list(reduced) if isinstance(reduced, tuple) else reduced}


def _code(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()


def _is_container(value: object) -> bool:
    return type(value) in _CONTAINERS or isinstance(value, types.MappingProxyType)


def _uncompiled(value: Any) -> Any:
    """What :func:`torch.compile` was given."""
    if isinstance(value, nn.Module):
        return value._modules["_orig_mod"] if "_orig_mod" in value._modules else value  # noqa: SIM401, no dict in TorchScript
    return value


def _attributes(value: Any) -> dict[str, Any] | None:
    """An object's own attributes and the data of its classes; None where some of its state is hidden."""
    kinds = [kind for kind in type(value).__mro__ if kind is not object]
    if any(map(_hides, kinds)):
        return None
    own: dict[str, Any] = {}
    for kind in reversed(kinds):
        if kind is not nn.Module:
            own |= {name: each for name, each in vars(kind).items() if not name.startswith("__") and _is_data(each)}
    own |= {name: getattr(value, name) for kind in kinds for name in _slots(kind) if hasattr(value, name)}
    if isinstance(value, nn.Module):
        own |= {name: each for name, each in vars(value).items() if name not in _OF_ALL}
        own |= {**value._parameters, **value._buffers, **value._modules}
        own |= {name: list(vars(value)[name].values()) for name in _HOOKS if vars(value).get(name)}
        if type(value).get_extra_state is not nn.Module.get_extra_state:
            own["_extra_state"] = value.get_extra_state()
    else:
        own |= getattr(value, "__dict__", {})
    return dict(sorted(own.items()))


def _scripted(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """TorchScript is its graph and its tensors; the names that torch makes up for its classes are its own."""
    return {"graph": re.sub(r"\.___torch_mangle_\d+", "", str(module.inlined_graph)), **module.state_dict()}


def _hides(kind: type) -> bool:
    """Whether objects of a class hold more than Python shows: they are larger than their attributes make them."""
    base = kind.__base__ or object
    shown = len(_slots(kind)) + ("__dict__" in vars(kind)) + ("__weakref__" in vars(kind))
    return kind.__basicsize__ - base.__basicsize__ > 8 * shown or kind.__itemsize__ > 0


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    mangled = f"_{kind.__name__.lstrip('_')}"
    private = [f"{mangled}{name}" if name.startswith("__") and not name.endswith("__") else name for name in names]
    return [name for name in private if name not in ("__dict__", "__weakref__")]


def _is_data(value: object) -> bool:
    """Of what stands in a class."""
    if isinstance(value, list | tuple | set | frozenset | dict):
        return all(map(_is_data, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (*_PLAIN, Tensor, np.ndarray))


def _name(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def identity_or_new(given: object, argument: str, *, trained: bool) -> str:
    """:func:`identity` of what was given as an argument; where that cannot be known, it is another in every process."""
    try:
        return identity(given, trained=trained)
    except UnknownError as error:
        logger.warning(
            "%s: what it gives is done again in every process, since a %s cannot be told from another one: %s. "
            "Give it an attribute `key`, a text that changes whenever its results do.", argument,
            type(given).__name__, error,
        )  # fmt: skip
        return _new(given)


_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Of objects that nothing tells apart; in this process they are themselves."""


def _new(thing: object) -> str:
    try:
        return _names.setdefault(thing, uuid4().hex)
    except TypeError:  # no hash, or nothing can refer to it weakly
        return uuid4().hex
