"""The chain: CAM → CRF → IRNet → pseudo masks → DeepLabV2 → masks. A new stage is a word here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cacl._support.checks import check_choice
from cacl.errors import InputError
from cacl.stages import cams, contrast, irn, masks, predict, segment, warmup
from cacl.stages.stage import Stage

Chain = tuple[Stage[Any], ...]

CHAIN: Chain = (
    warmup.STAGE, contrast.STAGE, cams.STAGE, irn.STAGE, masks.STAGE, segment.STAGE, predict.STAGE,
)  # fmt: skip
"""The stages of CA-CL in their order."""


def check_chain(chain: Sequence[Stage[Any]]) -> Chain:
    """A chain in which every stage finds before it what it needs.

    Raises:
        ValueError: one line that names the stage.
    """
    known: set[str] = set()
    for stage in chain:
        if not isinstance(stage, Stage):
            raise InputError(f"Expected argument `chain` to hold stages, but got {type(stage).__name__}.")
        if not stage.name.isidentifier():
            raise InputError(f"Expected argument `chain` to hold stages with plain names, but got {stage.name!r}.")
        for need in stage.needs:
            if need not in known:
                raise InputError(
                    f"Expected argument `chain` to have {need!r}, or a stage that stands for it, before {stage.name!r}."
                )
        known.update((stage.name, *stage.stands_for))
    if again := [name for name, count in Counter(stage.name for stage in chain).items() if count > 1]:
        raise InputError(f"Expected argument `chain` to hold stages of different names, but {again[0]!r} stands twice.")
    return tuple(chain)


def stage_of(chain: Sequence[Stage[Any]], name: str) -> Stage[Any]:
    """The stage of a name, or else the last one that stands for it.

    Raises:
        ValueError: if there is none.
    """
    own = [stage for stage in chain if stage.name == name]
    others = [stage for stage in chain if name in stage.stands_for]
    if not own and not others:
        check_choice("stages", name, [stage.name for stage in chain])
    return (own or others)[-1]
