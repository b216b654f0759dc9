"""The weights of one network in a checkpoint of a training: in other dicts, and under what wraps the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cacl.errors import InputError

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpoints put into names, wherever they wrap something."""


class Found(NamedTuple):
    """Weights of one network."""

    place: str
    """Where they lie, as a user would say it: ``['state_dict'] module.``, or empty."""
    state: dict[str, Tensor]
    """Under the network's own names."""


def find_states(content: Mapping[Any, Any], marker: str) -> list[Found]:
    """The state dicts in a checkpoint that have a parameter ``marker``, at any depth and under any prefix."""
    found = []
    for place, tensors in _dicts(content, "", set()):
        names = sorted(name for name in tensors if name == marker or name.endswith(f".{marker}"))
        for prefix in (name.removesuffix(marker) for name in names[:9]):
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            found.append(Found(f"{place} {prefix}".strip(), inside))
    return found


def tensor_names(content: object) -> set[str]:
    """The names of all tensors in a checkpoint."""
    if not isinstance(content, Mapping):
        return set()
    return {name for _, tensors in _dicts(content, "", set()) for name in tensors}


def one_state(content: Mapping[Any, Any], marker: str, source: object, what: str) -> dict[str, Tensor] | None:
    """The one of :func:`find_states`, or None if there is none.

    Raises:
        ValueError: if there are several; names them.
    """
    found = find_states(content, marker)
    if len(found) > 1:
        places = ", ".join(repr(each.place) for each in found)
        raise InputError(
            f"{source}: expected the weights of one {what}, but it has {places}; save a file with one of them alone"
        )
    return found[0].state if found else None


def _dicts(content: Mapping[Any, Any], place: str, seen: set[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict in a checkpoint that holds tensors under names."""
    seen.add(id(content))
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    plain = {_plain(name): value for name, value in tensors.items()}
    if tensors:
        yield place, plain if len(plain) == len(tensors) else tensors
    for name, value in content.items():
        if isinstance(value, Mapping) and id(value) not in seen and len(seen) < 100:
            yield from _dicts(value, f"{place}[{name!r}]", seen)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
