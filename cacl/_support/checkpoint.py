"""The state of a training in a file: read where it is of this very run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cacl._support.weights import load_state, load_weights
from cacl.errors import InputError, first_line

logger = logging.getLogger("cacl")


def restore(
    path: Path | None,
    key: str,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> int:
    """Load a checkpoint of this run, if there is one; the number of steps done."""
    if path is None or not path.is_file():
        return 0
    state = load_state(path)
    if state.get("key") != key:
        return 0
    try:
        for name, module in modules.items():
            load_weights(module, state["modules"][name], path)
        fused = [group.get("fused") for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, fused, strict=True):
            group["fused"] = own  # the device may be another than before
        scaler.load_state_dict(state["scaler"])
        step = int(state["step"])
    except InputError:
        raise
    except Exception as error:  # torch raises many kinds
        raise InputError(f"{path}: not a checkpoint of this stage: {first_line(error)}") from None
    logger.info("going on from step %d of %s", step, path)
    return step
