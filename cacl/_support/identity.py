"""What tells one object from another that was given in its place: its own key, or its class and all that is in it."""

from __future__ import annotations

import enum
import functools
import hashlib
import re
import threading
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, PurePath, enum.Enum, np.generic, torch.dtype, torch.Size)
_OF_ALL = {*vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile"}
"""What modules have in their ``__dict__``: mode, hooks, tensors (which are looked at by name), marks of compilers."""
_OF_PYTHON = 1 << 9
"""Flag of classes that are no part of an interpreter or library written in C, whose state is nowhere to be seen."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NO_STATE = (torch.device, torch.Generator, type(threading.Lock()), type(threading.RLock()))


class UnknownError(Exception):
    """Something in an object cannot be looked into; the message says what."""


def identity(thing: object) -> str:
    """A hash that is another one for an object with other results, the same for an equal object in another process.

    An object with a text ``key`` brings its own, and is not looked into. Of others its class counts, and everything in
    it: tensors and arrays by their values, numbers and texts, and objects in it likewise. The mode of modules, the
    device of tensors and code do not count.

    Raises:
        UnknownError: if something in it cannot be looked into.
    """
    thing = _uncompiled(thing)
    key = getattr(thing, "key", None)
    digest = hashlib.sha256(_name(type(thing)).encode())
    if isinstance(key, str):
        digest.update(key.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()
    seen: dict[int, tuple[int, object]] = {}
    for part in _parts(thing, "", seen):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any, place: str, seen: dict[int, tuple[int, object]]) -> Iterator[bytes | memoryview]:
    """What a value is made of, in a fixed order; ``seen`` keeps objects alive, so that no two have one id."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")
        return
    if isinstance(value, _NO_STATE):
        return
    if isinstance(value, type | types.BuiltinFunctionType):
        yield _name(value).encode()
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}".encode()
        return
    seen[id(value)] = (len(seen), value)
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise UnknownError(f"`{place}` is a tensor without values of its own")
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"array {value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for name, each in value.items():
            yield from _parts(name, place, seen)
            yield from _parts(each, f"{place}[{name!r}]", seen)
    elif isinstance(value, Set):
        yield f"set {len(value)}".encode()
        yield from sorted(b"".join(_parts(each, place, {})) for each in value)
    elif isinstance(value, Sequence | np.ndarray):
        yield f"sequence {len(value)}".encode()
        for i, each in enumerate(value):
            yield from _parts(each, f"{place}[{i}]", seen)
    elif isinstance(value, re.Pattern):
        yield f"pattern {value.pattern!r} {value.flags}".encode()
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), place, seen)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), place, seen)
    elif isinstance(value, types.FunctionType):
        yield _name(value).encode()
        if value.__name__ == "<lambda>":
            yield value.__code__.co_code
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        yield from _parts((value.__defaults__, value.__kwdefaults__, cells), place, seen)
    else:
        value = _uncompiled(value)
        yield _name(type(value)).encode()
        for name, each in _attributes(value, place):
            yield name.encode("utf-8", "surrogatepass")
            yield from _parts(each, f"{place}.{name}".lstrip("."), seen)


def _uncompiled(value: Any) -> Any:
    """What :func:`torch.compile` was given."""
    return value._orig_mod if isinstance(getattr(value, "_orig_mod", None), nn.Module) else value


def _attributes(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """An object's own, and the data of its classes."""
    own: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__):
        if kind is not nn.Module and kind is not object:
            own |= {name: each for name, each in vars(kind).items() if not name.startswith("__") and _is_data(each)}
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    hidden = any(not kind.__flags__ & _OF_PYTHON for kind in type(value).__mro__ if kind is not object)
    if hidden or (not hasattr(value, "__dict__") and not slots):
        raise UnknownError(f"{f'`{place}`' if place else 'it'} is of the type {_name(type(value))}")
    own |= {name: getattr(value, name) for name in slots}
    if isinstance(value, nn.Module):
        own |= {name: each for name, each in vars(value).items() if name not in _OF_ALL}
        own |= {**value._parameters, **value._buffers, **value._modules}
        own |= {name: [type(hook) for hook in vars(value)[name].values()] for name in _HOOKS if vars(value)[name]}
        if type(value).get_extra_state is not nn.Module.get_extra_state:
            own["_extra_state"] = value.get_extra_state()
    else:
        own |= getattr(value, "__dict__", {})
    yield from sorted(own.items())


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _is_data(value: object) -> bool:
    """Of what stands in a class."""
    if isinstance(value, list | tuple | set | frozenset | dict):
        return all(map(_is_data, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (*_PLAIN, Tensor, np.ndarray))


def _name(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
