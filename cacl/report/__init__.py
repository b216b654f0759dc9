"""The report of a run: one HTML file with its numbers, curves and pictures, which needs nothing but a browser."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from cacl import __version__
from cacl._support.files import replacing, write_text
from cacl._support.values import check_positive
from cacl.config import Config
from cacl.encoders import ImageTextEncoder
from cacl.errors import InputError
from cacl.figures.style import check_report
from cacl.methods import TEMPLATE
from cacl.prompts import BACKGROUND_WORDS
from cacl.report import sections, seeds
from cacl.report.galleries import cam_gallery, open_ablation, segmentation_gallery, step_gallery
from cacl.report.gallery import Gallery
from cacl.report.page import Page, render
from cacl.runs.session import Session
from cacl.stages.chain import Chain
from cacl.tables import CACL, METHODS, CAMs

logger = logging.getLogger("cacl")

_MAKERS: Mapping[str, Callable[[Session], Gallery | None]] = {
    "cams": cam_gallery,
    "masks": step_gallery,
    "segmentation": segmentation_gallery,
}
"""The tables of photos, each also a picture of that name."""


def report(
    run: Path | str,
    out: Path | str | None = None,
    *,
    ablation: Path | str | None = None,
    images: int | None = None,
    encoder: ImageTextEncoder | None = None,
    backbone: nn.Module | None = None,
    device: str | None = None,
    progress: bool = True,
    chain: Chain | None = None,
) -> Path:
    """Write the report of a run folder, as far as the run has come.

    Args:
        run: the run folder, which may have been moved.
        out: the HTML file, or a folder that gets ``index.html`` and the pictures; by default ``report`` in ``run``.
        ablation: folder of :func:`cacl.ablate.run`; by default ``<run>-ablation`` beside the run folder.
        images: how many photos are shown in each table of photos; by default what ``[report]`` says.
        encoder: what was given to :func:`cacl.pipeline.run`.
        backbone: what was given to :func:`cacl.pipeline.run`.
        device: a torch device; by default the run's own.
        progress: show progress bars where there is a terminal or a notebook.
        chain: that of the run, CA-CL's by default.

    Returns:
        The HTML file.

    Raises:
        ValueError: if ``run`` is no run folder, or its data cannot be read.
        ImportError: if the extra for it is missing.
    """
    check_report()
    config = Config.of_run(Path(run), chain=chain)
    if images is not None:
        check_positive("images", images)
        config = config.changed({"report": {"images": images}})
    if device is not None:
        config = config.changed({"run": {"device": device}})
    if not progress:
        config = config.changed({"run": {"progress": False}})
    session = Session(config, encoder, backbone, drawing=False)
    target = Path(out) if out is not None else session.out / "report"
    if target.suffix == ".html":
        return _write(session, target, _galleries(session), ablation)
    galleries = _galleries(session)
    _write_pictures(target, galleries)
    return _write(session, target / "index.html", galleries, ablation)


def write_report(session: Session, folder: Path) -> Path:
    """Write ``index.html`` and the pictures of a run into a folder; only the pictures where the extra is missing.

    Returns:
        The HTML file, or else the folder.
    """
    galleries = _galleries(session)
    _write_pictures(folder, galleries)
    try:
        check_report()
    except ImportError as error:
        logger.info("report: pictures only. %s", error)
        return folder
    return _write(session, folder / "index.html", galleries, None)


def _galleries(session: Session) -> dict[str, Gallery]:
    galleries = {name: make(session) for name, make in _MAKERS.items()}
    return {name: gallery for name, gallery in galleries.items() if gallery is not None}


def _write_pictures(folder: Path, galleries: Mapping[str, Gallery]) -> None:
    for name in {*_MAKERS, "index"} - set(galleries):  # of an earlier time, when there was more to show
        (folder / name).with_suffix(".html" if name == "index" else ".png").unlink(missing_ok=True)
    for name, gallery in galleries.items():
        with replacing(folder / f"{name}.png") as file:
            gallery.sheet().save(file, "PNG")


def _write(session: Session, path: Path, galleries: Mapping[str, Gallery], ablation: Path | str | None) -> Path:
    beside = session.out.with_name(f"{session.out.name}-ablation")
    compared = open_ablation(session, Path(ablation) if ablation is not None else beside)
    if ablation is not None and compared is None:
        raise InputError(f"{ablation}: expected the folder of an ablation with a finished training of table 4 or 5")
    scores = sections.scores(session)
    parts = [
        sections.training(session),
        sections.classes(session, compared),
        sections.cams(session, galleries.get("cams"), compared),
        seeds.section(session),
        sections.steps(session, galleries.get("masks")),
        sections.segmentation(session, galleries.get("segmentation")),
        sections.agreement(session),
        sections.costs(session),
    ]
    page = Page(
        title=session.out.name,
        facts=_facts(session),
        scores=scores,
        judged=sections.judged(session),
        tiles=sections.tiles(scores),
        chain=sections.chain(scores),
        sections=[section for section in parts if section.blocks],
        settings=session.config.to_toml(session.out),
    )
    write_text(path, render(page))
    return path


def _facts(session: Session) -> list[tuple[str, str]]:
    config = session.config
    data, words, templates = config.data, config.backgrounds, len(config.prompts.templates)
    encoder, backbone = (
        type(own).__name__ if own is not None else "" for own in (session.given_encoder, session.given_backbone)
    )
    method = session.table(CACL)
    if method.method in ("clims", "pole"):
        shared = len(BACKGROUND_WORDS if method.words is None else method.words)
        suppressed = f"the same {shared} background words for all classes"
    elif method.method == "cacl" and method.beta == 0:
        suppressed = "no background words"
    else:
        count = f"{words.n}" if words.n else "the default"
        suppressed = f"{count} background words a class" + (f", from {words.file.name}" if words.file else "")
    if method.method != "cacl":
        templates = len(TEMPLATE)
    return [
        *([("Method", METHODS[method.method])] if method.method != "cacl" else []),
        *([("Seeds", f"{source}")] if (source := session.table(CAMs).source) != "cacl" else []),
        ("Data", f"{data.format}, {data.root}"),
        ("Classes", f"{len(session.train.classes)}"),
        ("Training", f"{len(session.train)} images of the split {data.train}: labels only, no masks"),
        ("Evaluation", "no split with masks" if session.eval is None else f"{len(session.eval)} images of {data.eval}"),
        ("Encoder", encoder or config.encoder.name),
        ("Backbone", backbone or config.camnet.backbone),
        ("Prompts", f"{templates} template{'s' if templates > 1 else ''}, {suppressed}"),
        ("Seed", f"{config.run.seed}"),
        ("Made with", f"cacl {__version__}"),
    ]
