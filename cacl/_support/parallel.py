"""A step of a training over several processes: the mean of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _Whole(nn.Module):
    """A step and the parameters that it trains, as :class:`DistributedDataParallel` takes them.

    Buffers are none of its business: they follow from what all processes see, or are those of rank 0 in the end.
    """

    def __init__(self, step: Callable[[Any], Mapping[str, Tensor]], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.step = step
        self.trained = nn.ParameterList(p for module in modules.values() for p in module.parameters())

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return dict(self.step(batch))


def distributed(
    step: Callable[[Any], Mapping[str, Tensor]], modules: Mapping[str, nn.Module], device: torch.device
) -> nn.Module:
    """The step as all processes of the default group take it together, each on its part of the batch."""
    from torch.nn.parallel import DistributedDataParallel

    if device.type == "cuda":  # on CPUs there is no batch norm over processes
        for module in modules.values():
            nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    # The same parameters take part in every step, so that those which never do are found in the first one.
    return DistributedDataParallel(_Whole(step, modules), static_graph=True)
