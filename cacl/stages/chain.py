"""The chain: CAM → CRF → IRNet → pseudo masks → DeepLabV2 → masks. A new stage is a word here.

One between two others takes the place of the first of them by ``stands_for``: whoever comes later gets its results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cacl._support.values import check_choice
from cacl.errors import InputError
from cacl.settings import Table
from cacl.stages import cams, contrast, irn, masks, predict, segment, tags, warmup
from cacl.stages.stage import Stage

Chain = tuple[Stage[Any], ...]

CHAIN: Chain = (
    warmup.STAGE, contrast.STAGE, cams.STAGE, irn.STAGE, masks.STAGE, segment.STAGE, tags.STAGE, predict.STAGE,
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
        if not (stage.name.isidentifier() and stage.name.isascii()):
            raise InputError(f"Expected argument `chain` to hold stages with plain names, but got {stage.name!r}.")
        if not (isinstance(stage.settings, type) and issubclass(stage.settings, Table)):
            raise InputError(
                f"Expected argument `chain` to hold stages with a table, but that of {stage.name!r} is none."
            )
        if (stage.score is None and stage.judged is None) != (stage.scored_on is None):
            raise InputError(
                f"Expected argument `chain`: {stage.name!r} to have `scored_on` with `score` or `judged`, or none."
            )
        for need in stage.needs:
            if need not in known:
                raise InputError(
                    f"Expected argument `chain` to have {need!r}, or a stage that stands for it, before {stage.name!r}."
                )
        known.update((stage.name, *stage.stands_for))
    if again := [name for name, count in Counter(stage.name for stage in chain).items() if count > 1]:
        raise InputError(f"Expected argument `chain` to hold stages of different names, but {again[0]!r} stands twice.")
    return tuple(chain)


def needed(chain: Sequence[Stage[Any]], settings: Callable[[Stage[Any]], Any]) -> Chain:
    """The stages of a chain without those on demand that no other needs.

    Args:
        chain: the stages.
        settings: stage -> its table.
    """
    spared = {name for stage in chain for name in stage.spares(settings(stage))}
    kept: list[Stage[Any]] = []
    asked: set[str] = set()
    for stage in reversed(chain):
        names = {stage.name, *stage.stands_for}
        if asked & names or not (stage.on_demand or spared & names):
            kept.append(stage)
            asked |= {*stage.needs, *stage.also_needs(settings(stage))}
    return tuple(reversed(kept))


def stage_of(chain: Sequence[Stage[Any]], name: str, at: Stage[Any] | None = None) -> Stage[Any]:
    """The stage that a name means: the last one that is called so or stands for it.

    Args:
        chain: the stages.
        name: of the stage.
        at: who asks: itself by its own name, and of the others those before it.

    Raises:
        ValueError: if there is none.
    """
    if at is not None and at.name == name:
        return at
    before = chain if at is None or at not in chain else chain[: list(chain).index(at)]
    found = [stage for stage in before if name in (stage.name, *stage.stands_for)]
    if not found:
        check_choice("stages", name, [stage.name for stage in before])
    return found[-1]
