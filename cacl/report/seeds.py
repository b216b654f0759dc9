"""The report's part about seeds from elsewhere: what goes against the tags, and where trained CAMs disagree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacl._support.files import read_json
from cacl.artifacts import cams_of
from cacl.errors import InputError
from cacl.images import Mask
from cacl.pictures import threshold
from cacl.report.galleries import finished, method, photo_of, truth, truth_title
from cacl.report.gallery import Gallery
from cacl.report.page import Block, Section
from cacl.runs.session import Session
from cacl.seeds import SEEDS
from cacl.tables import CAMs, Report


def _columns(own: str) -> tuple[str, ...]:
    return ("Class", "Images", "without a pixel", "left out", f"IoU with {own} %", "seeds only %", f"{own} only %")


_ABOUT = (
    "Images that have the class as a tag; those among them whose seeds have no pixel of it; images that do not have it "
    "as a tag though their seeds have it, which is left out. Then, over all pixels, the IoU of the two regions, and "
    "the shares of either that the other has not."
)


def section(session: Session) -> Section:
    """By class, and the photos where the two disagree most; empty where the CAMs are CA-CL's own."""
    found = Section(
        "seeds", "Seeds from elsewhere", "What takes the place of trained CAMs, and how it goes with the photos' tags."
    )
    if session.table(CAMs).source == "cacl" or not finished(session, "cams"):
        return found
    record = read_json(session.folder("cams") / SEEDS)
    shown = {entry: sum(k in e.labels for e in session.train.entries) for k, entry in enumerate(session.train.classes)}
    rows = [_row(name, count, record) for name, count in shown.items() if count or name in record.get("dropped", {})]
    found.blocks.append(Block(_ABOUT, table=(_columns(method(session)), rows)))
    if "differences" not in record:
        found.blocks.append(
            Block(note="Where they disagree with CAMs of a trained network is shown with [cams] compare = true.")
        )
    elif (gallery := _apart(session, record)) is not None:
        about = "The photos whose two masks have the least in common."
        found.blocks.append(Block(about, galleries=[("", gallery)]))
    return found


def _row(name: str, images: int, record: Mapping[str, Any]) -> tuple[str, ...]:
    differs = record.get("differences", {}).get(name, {})
    shares = [differs.get(key) for key in ("iou", "seeds_only", "own_only")]
    counts = [record[key].get(name, 0) if key in record else "–" for key in ("empty", "dropped")]
    texts = ("–" if share is None else f"{100 * share:.1f}" for share in shares)
    return (name, f"{images}", *(f"{count}" for count in counts), *texts)


def _apart(session: Session, record: Mapping[str, Any]) -> Gallery | None:
    dataset, folder = session.train, session.folder("cams")
    indices = {entry.id: i for i, entry in enumerate(dataset.entries)}
    worst = [(indices[id], iou) for id, iou in record["photos"] if id in indices][: session.table(Report).images]
    gallery = Gallery(dataset, ["photo", "seeds", f"{method(session)}'s", *truth_title(dataset, [i for i, _ in worst])])
    scores = dict(zip(("train", "cacl"), record["scores"], strict=True))

    def mask(index: int, name: str, size: tuple[int, int]) -> Mask:
        cams = cams_of(dataset, Path(folder / name), index)
        return threshold(cams.classes, cams.resized(size), scores[name])

    for i, iou in worst:
        photo = photo_of(dataset, i)
        try:
            masks = [mask(i, name, (photo.shape[0], photo.shape[1])) for name in scores]
        except InputError:  # files that are gone
            continue
        gallery.add(i, [photo, *masks, *truth(gallery, i)], f"{100 * iou:.0f} %")
    return gallery if gallery.rows else None
