"""The parts of the report: what is shown, under which heading, with which words; what is missing is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cacl import figures
from cacl._support.files import read_json
from cacl.errors import InputError
from cacl.figures.style import duration
from cacl.report.charts import chart
from cacl.report.galleries import (
    Ablation,
    ablation_galleries,
    agreement_galleries,
    prediction_title,
    ranked_galleries,
)
from cacl.report.gallery import Gallery
from cacl.report.page import Block, Section
from cacl.runs.session import Session
from cacl.settings import Prompts
from cacl.stages.score import Score
from cacl.tables import CACL

_ABLATE = "cacl ablate CONFIG --tables 4,5"


def scores(session: Session) -> list[Score]:
    """Every mean IoU of ``metrics.json``, under the name that a stage has for it."""
    found = []
    for score in _named(session):
        if score.miou is None:  # every pixel is ignored, or there are no masks
            continue
        if (walk := score.walk) is not None:
            found.append(replace(walk, what=walk.what[:1].upper() + walk.what[1:], stage=score.stage))
        found.append(score)
    return found


def judged(session: Session) -> list[Score]:
    """Every agreement of ``metrics.json``, under the name that a stage has for it."""
    return [score for score in _named(session) if score.judged is not None]


def _named(session: Session) -> Iterator[Score]:
    stages = {stage.name: stage for stage in session.chain}
    for name, score in session.files.scores().items():
        if name in stages:  # else it is of another chain
            given, settings = stages[name].shown, session.settings(stages[name])
            shown = (given(settings) if callable(given) else given) or "{what}"
            shown = shown.replace("{crf}", " + CRF" if score.crf else "").replace("{what}", score.what)
            yield replace(score, what=shown[:1].upper() + shown[1:])


def tiles(known: Sequence[Score]) -> list[tuple[Score, str]]:
    """The milestones of the chain; a gain is told only over what was measured in the same way."""
    last = {score.stage: score for score in known}
    shown = []
    for stage in ("warmup", "cacl", "masks", "predict" if "predict" in last else "segment"):
        if (score := last.get(stage)) is not None:
            before, gain = last.get("warmup"), ""
            if stage == "cacl" and before is not None and before.conditions == score.conditions:
                gain = (
                    f"{100 * ((score.miou or 0) - (before.miou or 0)):+.1f}".replace("-", "−")
                    + " points over the warm-up"
                )
            shown.append((score, gain))
    return shown


def chain(known: Sequence[Score]) -> str:
    """The chart of the scores."""
    if not known:
        return ""
    figure = figures.miou_bars(
        [score.what for score in known],
        [score.miou or 0.0 for score in known],
        groups=[score.split for score in known],
        notes=[score.conditions for score in known],
        oracles=[score.oracle.miou if score.oracle else None for score in known],
    )
    return chart(figure, "Mean IoU along the chain")


def training(session: Session) -> Section:
    """Curves."""
    section = Section("training", "Training", "Thin: the measured steps. Thick: their running mean.")
    records, table = session.files.log.records(), session.table(CACL)
    if any("loss" in record for record in records):
        weights = {"bgs": table.beta, "region": table.gamma}
        if table.method == "cacl":
            weights["itc"] = table.alpha
        drawn = chart(
            figures.loss_curves(records, weights=weights, titles=titles(session)), "Loss of each stage over the epochs"
        )
        about = "The loss of each stage that trains."
        if table.method == "cacl" and any(record.get("stage") == "cacl" for record in records):
            about += (
                " That of CA-CL is shown with its terms as they add up (eq. 14): contrast of foreground and background "
                "(ITC), background suppression (BGS), area (REG)."
            )
        section.blocks.append(Block(about, drawn))
    if table.method == "cacl" and any(record.get("stage") == "cacl" for record in records):
        figure = figures.selection_curves(records, templates=session.table(Prompts).templates)
        about = (
            "Left: cosine of foreground and background with the text of the class (eq. 7), and the threshold θ. "
            "Middle: the share of the background prompts that reach θ (eq. 10). Right: how often each template "
            "was the chosen one (eq. 4), counted from the start."
        )
        section.blocks.append(Block(about, chart(figure, "Similarities, θ, pass rate and template shares")))
    return section


def classes(session: Session, ablation: Ablation | None) -> Section:
    """IoU of every class."""
    section = Section("classes", "IoU per class", "Bars of one chart are measured on the same images.")
    known = [score for score in scores(session) if score.iou]
    for group in dict.fromkeys((score.split, score.images) for score in known):
        own = [score for score in known if (score.split, score.images) == group]
        drawn = chart(
            figures.iou_bars({score.what: score.iou for score in own}),
            f"IoU of each class by stage, split {group[0]}",
        )
        settings = "; ".join(f"{score.what}: {score.settings}" for score in own)
        about = f"By stage on the split {group[0]}, {group[1]} images. {settings}."
        section.blocks.append(Block(about, drawn))
    if not section.blocks:
        section.blocks.append(Block(note="No split has ground-truth masks to measure an IoU with."))
        return section
    if ablation and (templates := ablation.iou()):
        first = next(own for name, own in ablation.templates.items() if name in templates)
        about = (
            "By template: CAMs after CA-CL with one template alone, and with DCPS, which chooses one for every image "
            f"and class (the paper's figure 2). Scored on {scores(first)[-1].conditions}; seed {ablation.seed}."
        )
        figure = figures.iou_bars(templates, highlight="DCPS" if "DCPS" in templates else None)
        section.blocks.append(Block(about, chart(figure, "IoU of each class by template")))
    else:
        section.blocks.append(Block(note=f"IoU by template needs an ablation beside the run folder: {_ABLATE}"))
    return section


def cams(session: Session, gallery: Gallery | None, ablation: Ablation | None) -> Section:
    """CAMs beside CAMs."""
    section = Section("cams", "Class activation maps", "Red is where the network looks, blue where it does not.")
    if gallery is None:
        return section
    split = session.config.data.train if session.eval is None else session.config.data.eval
    about = (
        f"Photos of the split {split}. A mask shows where a CAM is above the background score that it is scored at "
        "(the paper's figure 4)."
    )
    section.blocks.append(Block(about, galleries=[("", gallery)]))
    if ablation is None:
        section.blocks.append(
            Block(note=f"CAMs by template, and without background suppression, need an ablation: {_ABLATE}")
        )
        return section
    try:
        templates, suppression = ablation_galleries(session, ablation)
    except InputError as error:
        section.blocks.append(Block(note=f"The ablation beside this run does not belong to it: {error}"))
        return section
    if templates is not None:
        about = (
            f"CAMs after CA-CL with one template alone, and with DCPS (the paper's figures 3 and 6); seed "
            f"{ablation.seed} of the ablation."
        )
        section.blocks.append(Block(about, galleries=[("By template", templates)]))
    if suppression is not None:
        about = (
            "CAMs without and with class-specific background suppression (the paper's figure 7): what is taken from "
            f"the background should fade; seed {ablation.seed} of the ablation."
        )
        section.blocks.append(Block(about, galleries=[("Background suppression", suppression)]))
    return section


def steps(session: Session, gallery: Gallery | None) -> Section:
    """From CAM to pseudo mask."""
    section = Section("masks", "From CAM to pseudo mask", "What each step makes of the one before it.")
    if gallery is not None:
        about = f"Photos of the split {session.config.data.train}. White is left open: no loss looks there."
        section.blocks.append(Block(about, galleries=[("", gallery)]))
    return section


def segmentation(session: Session, gallery: Gallery | None) -> Section:
    """What the segmenter makes of photos."""
    section = Section("segmentation", "Segmentation", "The network that is trained on the pseudo masks.")
    if gallery is None:
        section.blocks.append(Block(note="Not there yet: the stages segment and predict make it."))
        return section
    about = f"{prediction_title(session)} on the split {session.config.segmented_split} (the paper's figure 5)."
    section.blocks.append(Block(about, galleries=[("", gallery)]))
    if ranked := ranked_galleries(session):
        about = (
            "Mean IoU of the single image, over the background and the classes that occur in its ground truth or its "
            f"prediction; {prediction_title(session)}, split {session.config.segmented_split}."
        )
        section.blocks.append(Block(about, galleries=list(zip(("Best photos", "Hardest photos"), ranked, strict=True))))
    else:
        section.blocks.append(Block(note="Best and hardest photos by mean IoU need ground-truth masks."))
    return section


def agreement(session: Session) -> Section:
    """Photos by how far their masks agree with the encoder, where nobody has drawn the truth."""
    about = "How far masks agree with the encoder and with the colours of their photos: higher is better."
    section = Section("agreement", "Worst photos first", about)
    for what, least, most in agreement_galleries(session):
        pair = [(f"{what}: least agreement", least), (f"{what}: most agreement", most)]
        about = (
            "Beside the photo's name the agreement of its own mask; see the table of results for what it is made of."
        )
        section.blocks.append(Block(about, galleries=pair))
    return section


def costs(session: Session) -> Section:
    """Time and memory."""
    section = Section("costs", "Time and memory", "What each stage took in this run, evaluation left out.")
    times = {
        stage: {key: float(value) for key, value in cost.items() if isinstance(value, int | float)}
        for stage, cost in read_json(session.files.costs).items()
        if isinstance(cost, dict)
    }
    if any("seconds" in cost for cost in times.values()):
        total = duration(sum(cost.get("seconds", 0.0) for cost in times.values()))
        about = (
            f"{total} in all. Of work that several processes share, the time is what it took here. Where most of it is "
            "waiting for photos, more workers or a faster disk help; the network asks for a GPU, the CRF for more "
            "cores. Memory is the peak of the main process."
        )
        section.blocks.append(
            Block(about, chart(figures.stage_costs(times, titles=titles(session)), "Time and memory of each stage"))
        )
    return section


def titles(session: Session) -> dict[str, str]:
    """Stage -> what people call it."""
    return {stage.name: stage.titled(session.settings(stage)) for stage in session.chain}
