"""The segmenter of a run as a folder to share, with a model card that says what it was made from and how good it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacl._support.card import as_code
from cacl.config import Config
from cacl.errors import InputError
from cacl.predict import open_model
from cacl.runs.folder import RunFolder
from cacl.settings import Encoder, Mark
from cacl.stages.score import Score
from cacl.tables import CACL, METHODS, CAMs, Segment

if TYPE_CHECKING:
    from cacl.stages.chain import Chain


def export_pretrained(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, license: str = "", chain: Chain | None = None
) -> Path:
    """Write a folder that ``DeepLabV2.from_pretrained`` and ``cacl predict`` read.

    Args:
        model: a run folder, whose data, settings and figures the model card states; or a ``segment/model.pt``, or a
            folder of ``save_pretrained``, of which it states nothing.
        out: the folder, new or empty.
        license: as for :meth:`cacl.pretrained.Pretrained.save_pretrained`.
        chain: the stages of the run; CA-CL's by default.

    Returns:
        ``out``.

    Raises:
        ValueError: if there is no segmenter, or something is in the folder.
        ImportError: if the extra is missing.
    """
    model, out = Path(model), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: expected a new or an empty folder")
    segmenter, about = open_model(model)[0], ""
    net = segmenter.net
    net.range = segmenter.range
    if (model / "config.toml").is_file():
        table = Config.table_of_run(model, "segment", Segment)
        net.freeze_batch_norm, net.multi_scale = table.freeze_batch_norm, table.multi_scale
        about = about_run(model, chain=chain)
    return net.save_pretrained(out, classes=segmenter.classes, license=license, about=about)


def about_run(run: str | os.PathLike[str], *, chain: Chain | None = None) -> str:
    """What a model card says of a run, in Markdown: data, tags, each figure with its kind, settings without folders.

    Args:
        run: the run folder.
        chain: its stages; CA-CL's by default.

    Raises:
        ValueError: if it has no configuration.
    """
    run = Path(run)
    config, folder = Config.of_run(run, chain=chain), RunFolder(run)
    return "\n".join([*_data(config, folder), *_figures(config, folder), *_settings(config)])


def _data(config: Config, folder: RunFolder) -> list[str]:
    data, source, encoder = config.data, config.table(CAMs).source, as_code(config.table(Encoder).name)
    listed = str(folder.data.get("train", {}).get("listed", ""))[:16]
    given = f"format {as_code(data.format)}" + (f", its list's fingerprint {as_code(listed)}" if listed else "")
    if isinstance(source, Path):
        learned = (
            f"image-level tags, and seeds from elsewhere ({as_code(source.name)}), held to the tags; what these were "
        )
        learned += "made from is not known here"
    else:
        method = METHODS[config.table(CACL).method] if source == "cacl" else "CLIP-ES"
        learned = f"image-level tags, by {method} with the encoder {encoder}; no mask of these images was opened"
    return [
        "## Data and tags", "",
        f"Trained on the split {as_code(data.train)} of {as_code(data.root.name)} ({given}).",
        f"What it learned from, by its settings: {learned}.", "",
    ]  # fmt: skip


_HEAD = ("what", "split", "images", "mIoU %", "CRF", "tags of the image", "background score", "agreement")


def _figures(config: Config, folder: RunFolder) -> list[str]:
    rows = [row for score in folder.scores().values() for row in _rows(score, config.data.train)]
    if not rows:
        return ["## Figures", "", "None: nothing has been scored.", ""]
    table = [_HEAD, ("---",) * len(_HEAD), *rows]
    return ["## Figures", "", *(f"| {' | '.join(row)} |" for row in table), "", _KINDS, ""]


_KINDS = """\
`segment` and `predict` are figures of the segmenter, the others of what it learned from. Tags are *known* where the
mask of an image could hold nothing but its own tags. A background score is *auto* where the CAMs' values alone gave it,
*fixed* where a setting or the field's convention did, and *oracle* where it is the best one for the true masks of that
split, which is no result. A split of another name may share images with the one that was trained on. The agreement is
that of masks with the encoder and with the photos' colours, which needs no true mask."""


def _rows(score: Score, trained: str) -> Iterator[tuple[str, ...]]:
    """A score, what it was before its last step, and what other background scores give."""
    tags = {"segment": "unknown", "predict": "unknown"}.get(score.stage, "known")
    if score.stage == "predict":
        tags = "by the encoder" if score.what.endswith("+ tags") else tags
        tags = "known" if score.what.endswith("labels known") else tags
    split = as_code(score.split) + " (trained on)" * (score.split == trained)

    def row(each: Score, background: str, miou: float | None) -> tuple[str, ...]:
        percent = "–" if miou is None else f"{100 * miou:.1f}"
        judged = "–" if each.agreement is None else f"{each.agreement:.3f}"
        crf = "yes" if each.crf else "no"
        return score.stage + ": " + each.what, split, str(each.images), percent, crf, tags, background, judged

    for each in (score, *([score.walk] if score.walk else [])):
        used = each.background_score
        yield row(each, "–" if used is None else f"{used:g}, {'auto' if each.auto else 'fixed'}", each.miou)
        other = replace(each, judged=None)
        if each.fixed and each.fixed.background_score != used:
            yield row(other, f"{each.fixed.background_score:g}, fixed", each.fixed.miou)
        if each.oracle:
            yield row(other, f"{each.oracle.background_score:g}, oracle", each.oracle.miou)


def _settings(config: Config) -> list[str]:
    """The configuration; of files and folders their names alone, which say nothing about whose machine it was."""
    names: dict[str, dict[str, Any]] = {}
    for table in type(config).model_fields:
        settings = getattr(config, table)
        for key, field in type(settings).model_fields.items():
            value = getattr(settings, key)
            is_file = isinstance(value, Path) or (Mark.FILE in field.metadata and os.path.isabs(value))
            if is_file:
                names.setdefault(table, {})[key] = Path(value).name
    return [
        "## Settings", "",
        "An encoder, a backbone or a loss that were passed in from Python do not stand here.", "",
        "```toml", config.changed(names).to_toml().strip(), "```", "",
    ]  # fmt: skip
