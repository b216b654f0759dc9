"""The paper's tables: its results (1 to 3) and how they are run, and which trainings its tables 4 to 8 compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cacl._support.toml import toml_value
from cacl._support.values import check_choice
from cacl.config import Config
from cacl.prompts import DEFAULT_TEMPLATES, ORIGAMI

if TYPE_CHECKING:
    from cacl.stages.chain import Chain


class Figure(NamedTuple):
    """A mean IoU of the paper."""

    what: str
    split: str
    crf: bool
    """Whether a CRF made the masks."""
    miou: float
    """In per cent."""
    table: int
    """Of the paper."""


class Experiment(NamedTuple):
    """How the paper's figures of a data set are run here."""

    overrides: tuple[str, ...]
    """Of the preset of the same name: where its default is another recipe than the paper's."""
    open: tuple[str, ...]
    """Settings whose value in the paper does not come with this package: whatever they are is no change."""
    note: str
    """What the paper has there."""
    images: Mapping[str, int]
    """Split -> its images, as the field counts them."""
    figures: Mapping[str, Figure]
    """Stage -> what the paper reports of it; ``"test"`` is no stage: only VOC's server can score it."""


EXPERIMENTS = {
    "voc": Experiment(
        overrides=("segment.preset=paper",),
        open=("segment.weights",),
        note="the paper's segmenter begins with weights of COCO, which do not come with this package",
        images={"train_aug": 10582, "train": 1464, "val": 1449},
        figures={
            "cacl": Figure("CAM", "train", False, 64.4, 1),
            "masks": Figure("pseudo masks", "train", True, 76.0, 1),
            "predict": Figure("DeepLabV2", "val", True, 71.8, 2),
            "test": Figure("DeepLabV2", "test", True, 71.9, 2),
        },
    ),
    "coco": Experiment(
        overrides=("segment.preset=paper",),
        open=(),
        note="",
        images={"train": 82783, "val": 40504},
        figures={"predict": Figure("DeepLabV2", "val", True, 43.9, 3)},
    ),
}
"""Preset -> the paper's results on its data (tables 1 to 3)."""


def experiment(
    name: str,
    root: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    chain: Chain | None = None,
) -> Config:
    """The configuration of one of :data:`EXPERIMENTS`.

    Args:
        name: the experiment.
        root: the folder of the data.
        out: the run folder; that of the preset if None.
        overrides: as of :meth:`cacl.config.Config.load`.
        chain: as there.

    Raises:
        ValueError: one line that names the key.
    """
    check_choice("name", name, EXPERIMENTS)
    places = {"data.root": root, **({} if out is None else {"run.out": out})}
    own = [f"{key}={toml_value(str(Path(path)))}" for key, path in places.items()]
    return Config.load(name, [*EXPERIMENTS[name].overrides, *own, *overrides], chain=chain)


TABLES = ("4", "5", "6", "7", "8", "theta")
"""The paper's tables 4 to 8, and the three modes of the threshold of eq. 10-11."""


Changes = Mapping[str, Mapping[str, Any]]


class Variant(NamedTuple):
    """A row of a table."""

    name: str
    changes: Changes
    """Table of the configuration -> key -> value."""
    paper: float | None
    """The paper's mean IoU of CAMs in per cent, on PASCAL VOC's split ``train``."""


def variants(config: Config, table: str) -> list[Variant]:
    """The rows of one of :data:`TABLES`."""
    templates, words = config.prompts.templates, config.backgrounds.n
    candidates = tuple(dict.fromkeys((*templates, ORIGAMI)))

    def variant(name: str, paper: float | None, **changes: dict[str, Any]) -> Variant:
        same = config.model_dump()
        kept = {t: {k: v for k, v in keys.items() if same[t][k] != v} for t, keys in changes.items()}
        return Variant(name, {t: keys for t, keys in kept.items() if keys}, paper)

    def prompts(some: tuple[str, ...]) -> dict[str, Any]:
        return {"prompts": {"templates": some}, "cacl": {"template": None}}

    if table == "4":
        single = [variant(f"only “{t}”", _PAPER_SINGLE.get(t), **prompts((t,))) for t in candidates]
        paper = 64.4 if templates == DEFAULT_TEMPLATES else None
        return [*single, variant(f"DCPS of {len(templates)}", paper)]
    if table == "5":
        return [variant("DCPS and ITC, without CSBS", 58.4, cacl={"beta": 0.0}), variant("with CSBS", 64.4)]
    if table == "6":
        return [
            variant("ITC", 57.9, cacl={"beta": 0.0, "gamma": 0.0}),
            variant("ITC + REG", 58.4, cacl={"beta": 0.0}),
            variant("ITC + BGS", 62.7, cacl={"gamma": 0.0}),
            variant("ITC + BGS + REG", 64.4),
        ]
    if table == "7":
        return [variant(f"m = {m}", _PAPER_M.get(m), **prompts(candidates[:m])) for m in range(1, len(candidates) + 1)]
    if table == "8":
        counts = sorted({*range(3, 8), *([words] if words else [])})
        return [variant(f"n = {n}", _PAPER_N.get(n), backgrounds={"n": n}) for n in counts]
    return [variant(mode, None, cacl={"threshold_mode": mode}) for mode in ("fixed", "soft", "quantile")]


_PAPER_SINGLE = dict(zip((*DEFAULT_TEMPLATES, ORIGAMI), (62.8, 62.7, 61.9, 60.3, 59.8), strict=True))


_PAPER_M = {1: 62.8, 2: 63.1, 3: 63.7, 4: 64.4, 5: 62.4}


_PAPER_N = {3: 59.7, 4: 61.5, 5: 64.4, 6: 63.6, 7: 63.7}


TITLES = {
    "4": "Table 4: a single template against dynamic context prompt selection",
    "5": "Table 5: without and with class-specific background suppression",
    "6": "Table 6: losses",
    "7": "Table 7: number m of templates (the first m; in the paper the best m)",
    "8": "Table 8: number n of background words (the first n)",
    "theta": "Modes of the threshold θ, eq. 10-11",
}


def folders(config: Config) -> dict[str, str]:
    """Changes -> name of the run folder: that of the first table and row in which they stand."""
    names: dict[str, str] = {}
    for table in TABLES:
        for i, variant in enumerate(variants(config, table), start=1):
            names.setdefault(repr(variant.changes), f"table-{table}-{i}")
    return names
