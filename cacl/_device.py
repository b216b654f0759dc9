"""Where to compute."""

from __future__ import annotations

import torch

from cacl._checks import InputError, first_line


def find_device(name: str, setting: str) -> torch.device:
    """A device that is there; ``"auto"`` is a GPU if there is one.

    Args:
        name: torch's, or ``"auto"``.
        setting: what a user calls it, for the message.

    Raises:
        ValueError: if this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"{setting}: expected a device of this machine, but got {name!r}: {first_line(error)}"
        ) from None
    return device
