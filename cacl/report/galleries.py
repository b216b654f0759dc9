"""Photos with their CAMs and masks, computed from what a run folder holds: the rows of the report's pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cacl.artifacts import ImageCAMs, cams_of, made_mask
from cacl.config import Config
from cacl.constants import BACKGROUND_SCORE
from cacl.datasets import Dataset
from cacl.errors import InputError
from cacl.images import Mask, Pixels, read_mask
from cacl.metrics import ConfusionMatrix
from cacl.paper_tables import folders, variants
from cacl.pictures import heatmap, threshold
from cacl.report.gallery import Gallery
from cacl.runs.session import Session
from cacl.settings import Prompts
from cacl.stages.cams import camnet, predict_cams
from cacl.stages.levels import own_scores
from cacl.stages.predict import prediction_folder
from cacl.stages.refined import refine_cams
from cacl.stages.stage import Judged
from cacl.tables import CACL, IRN, METHODS, CAMs, Report

logger = logging.getLogger("cacl")


def cam_gallery(session: Session) -> Gallery | None:
    """CAMs after the warm-up beside those after CA-CL (the paper's figure 4), of images that were not trained on if
    there are any."""
    stages = {"CAM after the warm-up": "warmup", f"CAM after {method(session)}": "cacl"}
    return _compared(session, {title: (session, stage) for title, stage in stages.items() if finished(session, stage)})


def step_gallery(session: Session) -> Gallery | None:
    """The steps from CAM to pseudo mask, of training images."""
    dataset = session.train
    if not finished(session, "cams"):
        return None
    cams = session.folder("cams") / "train"
    chosen = [i for i in _chosen(session, dataset) if (cams / f"{dataset.entries[i].id}.npz").is_file()]
    if not chosen:
        return None
    places = {"mined labels": ("irn", "labels"), "pseudo mask": ("masks", "train")}
    kept = {
        title: folder
        for title, (stage, name) in places.items()
        if finished(session, stage) and (folder := session.folder(stage) / name).is_dir()
    }
    score, lower = _score(session, "cams"), own_scores(dataset, cams).low
    titles = ["photo", "CAM", f"CAM at {score:g}", f"CAM + CRF at {lower:g}", *kept]
    gallery = Gallery(dataset, [*titles, *truth_title(dataset, chosen)])
    refining = refine_cams(
        dataset, cams, chosen, session.table(IRN), background_score=lower, machine=session.machine
    )  # fmt: skip
    for i, refined in refining:
        photo, id = photo_of(dataset, i), dataset.entries[i].id
        found = cams_of(dataset, cams, i)
        maps = found.resized(photo.shape[:2])
        masks = (_mask(folder / f"{id}.png", photo) for folder in kept.values())
        own = [photo, heatmap(photo, maps), threshold(found.classes, maps, score), refined, *masks]
        gallery.add(i, [*own, *truth(gallery, i)])
    return gallery


def segmentation_gallery(session: Session) -> Gallery | None:
    """CAM, its mask and the segmenter's prediction (the paper's figure 5), of the images that it was applied to."""
    dataset = predicted(session)
    if dataset is None:
        return None
    folder = _predictions(session)
    chosen = [i for i in _chosen(session, dataset) if (folder / f"{dataset.entries[i].id}.png").is_file()]
    labelled = finished(session, "cacl") and any(dataset.entries[i].labels for i in chosen)
    found = _cams(session, "cacl", dataset, chosen) if labelled else {}
    score = _score(session, "cacl")
    titles = ["photo", *([f"CAM after {method(session)}", f"its mask at {score:g}"] if labelled else [])]
    gallery = Gallery(dataset, [*titles, prediction_title(session), *truth_title(dataset, chosen)])
    for i in chosen:
        photo = photo_of(dataset, i)
        own: list[Pixels | Mask | None] = [photo]
        if labelled:
            maps = found[i].resized(photo.shape[:2])
            own += [heatmap(photo, maps), threshold(found[i].classes, maps, score)]
        own.append(_mask(folder / f"{dataset.entries[i].id}.png", photo))
        gallery.add(i, [*own, *truth(gallery, i)])
    return gallery if chosen else None


def ranked_galleries(session: Session) -> tuple[Gallery, Gallery] | None:
    """The images that the segmenter does best and worst, by the mean IoU over what occurs in each; best and worst
    come first."""
    dataset = predicted(session)
    if dataset is None:
        return None
    folder = _predictions(session)
    scores: list[tuple[float, int]] = []
    for i, entry in enumerate(dataset.entries):
        path = folder / f"{entry.id}.png"
        if entry.mask is not None and path.is_file():
            matrix = ConfusionMatrix(len(dataset.classes))
            matrix.update(dataset.mask(i).numpy(), read_mask(path).numpy())
            if (score := matrix.miou) == score:  # NaN where all is ignored
                scores.append((score, i))
    count = min(session.table(Report).images, len(scores) // 2, 4)
    if not count:
        return None
    scores.sort()
    best, worst = (Gallery(dataset, ["photo", "prediction", "ground truth"]) for _ in range(2))
    for gallery, some in ((best, scores[: -count - 1 : -1]), (worst, scores[:count])):
        for score, i in some:
            photo = photo_of(dataset, i)
            mask = _mask(folder / f"{dataset.entries[i].id}.png", photo)
            gallery.add(i, [photo, mask, *truth(gallery, i)], f"{100 * score:.1f} %")
    return best, worst


def agreement_galleries(session: Session) -> Iterator[tuple[str, Gallery, Gallery]]:
    """Of every stage that was judged on images without a mask: what it is called, and the images whose masks agree
    least and most with the encoder and their photos; least and most come first."""
    for stage in session.config.chain:
        dataset = session.datasets.get(stage.scored_on or "")
        photos = session.files.photos(stage.name) if finished(session, stage.name) else []
        if stage.judged is None or dataset is None or dataset.masked or not photos:
            continue
        with session.at(stage):
            score = session.files.scores()[stage.name].background_score
            given = stage.judged(session, session.settings(stage), dataset, score)
        indices = {entry.id: i for i, entry in enumerate(dataset.entries)}
        known = [(indices[id], agreement) for id, agreement in photos if id in indices]
        count = min(session.table(Report).images, len(known) // 2, 4)
        least, most = (Gallery(dataset, ["photo", given.what]) for _ in range(2))
        for gallery, some in ((least, known[:count]), (most, known[: -count - 1 : -1])):
            for i, agreement in some:
                photo = photo_of(dataset, i)
                gallery.add(i, [photo, _judged_mask(given, dataset, i, photo)], f"{agreement:.3f}")
        if count:
            yield given.what[:1].upper() + given.what[1:], least, most


def _judged_mask(given: Judged, dataset: Dataset, index: int, photo: Pixels) -> Mask | None:
    """A mask that was judged, at the photo's size, or None where its file is missing."""
    try:
        mask = made_mask(dataset, given.masks, index)
    except InputError:
        return None
    height, width = photo.shape[:2]
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


@dataclass(frozen=True)
class Ablation:
    """The trainings of an ablation's first seed that the paper's figures compare."""

    seed: int
    templates: Mapping[str, Session]
    """Each template alone, and last ``"DCPS"``."""
    suppression: Mapping[str, Session]
    """Without and with CSBS."""

    def iou(self) -> dict[str, dict[str, float]]:
        """Template -> class -> IoU."""
        known = {name: session.files.scores().get("cacl") for name, session in self.templates.items()}
        return {name: dict(score.iou) for name, score in known.items() if score}


def open_ablation(session: Session, folder: Path) -> Ablation | None:
    """What :func:`cacl.ablate.run` left in a folder, as far as its trainings are finished; None for nothing."""
    for seed in sorted(folder.glob("seed-*"), key=lambda path: (len(path.name), path.name)):
        try:
            config = Config.of_run(seed / "start", chain=session.config.chain)
            names = folders(config)
            tables = {table: variants(config, table) for table in ("4", "5")}
        except InputError as error:
            logger.info("report: without %s: %s", seed, error)
            continue
        known = {"background", *session.train.classes}
        found: dict[str, dict[str, Session]] = {table: {} for table in tables}
        for table, rows in tables.items():
            for variant in rows:
                out = seed / names[repr(variant.changes)]
                changed = config.changed(variant.changes).changed({"run": {"out": out}})
                own = Session(changed, session.given_encoder, session.given_backbone)
                score = own.files.scores().get("cacl")
                if finished(own, "cacl") and set(score.iou if score else ()) <= known:
                    own.train = session.train  # the same classes, or the weights do not fit
                    single = changed.table(Prompts).templates if variant.name.startswith("only") else ()
                    found[table][single[0] if single else "DCPS" if table == "4" else variant.name] = own
        if any(found.values()):
            return Ablation(config.run.seed, found["4"], found["5"])
    return None


def ablation_galleries(session: Session, ablation: Ablation) -> tuple[Gallery | None, Gallery | None]:
    """CAMs under each template and DCPS (the paper's figures 3 and 6), and without and with CSBS (its figure 7)."""
    galleries = []
    for sessions in (ablation.templates, ablation.suppression):
        networks = {name: (own, "cacl") for name, own in sessions.items()}
        galleries.append(_compared(session, networks, masks=False) if len(networks) > 1 else None)
    return galleries[0], galleries[1]


def finished(session: Session, stage: str) -> bool:
    """Whether a stage has finished."""
    return _has(session, stage) and session.files.finished(session.stage(stage).name)


def _has(session: Session, stage: str) -> bool:
    """Whether the chain has a stage, or one that stands for it."""
    return any(stage in (each.name, *each.stands_for) for each in session.chain)


def predicted(session: Session) -> Dataset | None:
    """The images that the stage ``predict`` made masks for, if it has."""
    return session.segmented if finished(session, "predict") else None


def _predictions(session: Session) -> Path:
    """The folder of the predicted masks; runs of before had one of this name only."""
    folder = prediction_folder(session)
    return folder if folder.is_dir() else folder.with_name("eval")


def method(session: Session) -> str:
    """What the method is called whose loss CAMs were trained with."""
    return METHODS[session.table(CACL).method]


def prediction_title(session: Session) -> str:
    """What the masks of the stage ``predict`` are."""
    score = session.files.scores().get("predict")
    return f"{score.what}{' + CRF' * score.crf}" if score else "segmentation"


def _compared(session: Session, networks: Mapping[str, tuple[Session, str]], *, masks: bool = True) -> Gallery | None:
    """CAMs of several networks, title -> (its run, its stage), and the mask of the last ones."""
    dataset = session.eval or session.train
    chosen = _chosen(session, dataset)
    if not networks or not chosen:
        return None
    cams = [_cams(run, stage, dataset, chosen) for run, stage in networks.values()]
    score = _score(*list(networks.values())[-1])
    mask = [f"its mask at {score:g}"] if masks else []
    gallery = Gallery(dataset, ["photo", *networks, *mask, *truth_title(dataset, chosen)])
    for i in chosen:
        photo = photo_of(dataset, i)
        maps = [of[i].resized(photo.shape[:2]) for of in cams]
        own: list[Pixels | Mask | None] = [photo, *(heatmap(photo, each) for each in maps)]
        if masks:
            own.append(threshold(cams[-1][i].classes, maps[-1], score))
        gallery.add(i, [*own, *truth(gallery, i)])
    return gallery


def _score(session: Session, stage: str) -> float:
    """The background score that the CAMs of a stage were scored at."""
    known = session.files.scores().get(stage) or session.files.scores().get("cams")
    return BACKGROUND_SCORE if known is None or known.background_score is None else known.background_score


def _cams(session: Session, stage: str, dataset: Dataset, chosen: Sequence[int]) -> dict[int, ImageCAMs]:
    return dict(predict_cams(camnet(session, stage), dataset, chosen, session.table(CAMs), machine=session.machine))


def _chosen(session: Session, dataset: Dataset) -> list[int]:
    count = min(session.table(Report).images, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def photo_of(dataset: Dataset, index: int) -> Pixels:
    photo: Pixels = dataset.image(index).permute(1, 2, 0).numpy()
    return photo


def _mask(path: Path, photo: Pixels) -> Mask | None:
    """A mask of the photo's size, or None where there is no such file."""
    mask = read_mask(path).numpy() if path.is_file() else None
    return mask if mask is not None and mask.shape == photo.shape[:2] else None


def truth_title(dataset: Dataset, chosen: Iterable[int]) -> list[str]:
    return ["ground truth"] if any(dataset.entries[i].mask for i in chosen) else []


def truth(gallery: Gallery, index: int) -> list[Mask | None]:
    """The ground truth of an image, where the gallery has a column for it."""
    if gallery.titles[-1] != "ground truth":
        return []
    dataset = gallery.dataset
    return [dataset.mask(index).numpy() if dataset.entries[index].mask else None]
