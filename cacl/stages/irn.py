"""The stage ``irn``: labels mined from CAMs with CRFs, and IRNet trained on them (Ahn et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from cacl.crf import check_backend
from cacl.datasets import Dataset
from cacl.irn import IRNet, affinity_loss
from cacl.loading import Batch
from cacl.log import Journal
from cacl.mining import mine_labels
from cacl.settings import CAMNetwork, Machine
from cacl.stages.cams import save_model
from cacl.stages.levels import own_scores
from cacl.stages.refined import evaluate_refined, write_labels
from cacl.stages.score import Score
from cacl.stages.stage import Context, Stage
from cacl.tables import IRN, CAMs
from cacl.training import fit


def make_labels(
    dataset: Dataset,
    cams: Path,
    out: Path,
    settings: IRN = IRN(),
    *,
    machine: Machine = Machine(),
    keep: bool = False,
) -> None:
    """Write :func:`cacl.mining.mine_labels` of every image as ``<id>.png``, a palette image with VOC's colours.

    Shared out over processes as :func:`cacl.stages.cams.make_cams` is.

    Args:
        dataset: the images and their labels.
        cams: folder of :func:`cacl.stages.cams.make_cams`.
        out: folder of the files.
        settings: the two background scores, and the CRF.
        machine: where it is computed; each worker takes one image at a time.
        keep: leave out images that have a file already.

    Raises:
        ValueError: if a file of CAMs is missing or broken.
    """
    low, high = _scores_of(dataset, cams, settings)
    mine = partial(mine_labels, foreground_score=high, background_score=low)
    write_labels(dataset, cams, out, mine, settings, machine=machine, keep=keep, desc="label mining")


def _scores_of(dataset: Dataset, cams: Path, settings: IRN) -> tuple[float, float]:
    """The background scores of background and foreground; of two, what is given wins over what is not."""
    low, high = settings.background_score, settings.foreground_score
    if low != "auto" and high != "auto":
        return low, high
    own = own_scores(dataset, cams)
    if low == "auto":
        high = own.high if high == "auto" else high
        return min(own.low, high), high
    return low, max(own.high, low)


def train_irnet(
    net: IRNet,
    dataset: Dataset,
    labels: Path,
    settings: IRN = IRN(),
    *,
    seed: int = 0,
    machine: Machine = Machine(),
    journal: Journal = Journal(),
) -> None:
    """Train the branches of ``net`` on mined labels.

    Args:
        net: trained in place; its backbone stays as it is.
        dataset: the images; their masks are not opened.
        labels: folder of :func:`make_labels`.
        settings: of the training.
        seed: of everything that is random.
        machine: where it is computed.
        journal: log and checkpoint.

    Raises:
        ValueError: as :func:`cacl.training.train` does.
    """
    net.train()

    def step(batch: Batch) -> Mapping[str, Tensor]:
        assert batch.masks is not None
        edges, displacements = net(batch.images)
        target = batch.masks.to(edges.device, non_blocking=True)
        terms = affinity_loss(edges, displacements, target, radius=settings.radius, across=True)
        return {"loss": terms.total, **{name: value for name, value in terms._asdict().items() if name != "total"}}

    fit(
        step, {"net": net}, net.parameter_groups(settings.lr), dataset.with_masks(labels), settings, name="irn",
        masks=True, seed=seed, machine=machine, journal=journal,
    )  # fmt: skip


def irnet(run: Context, stage: str | None = None) -> IRNet:
    """The IRNet of a run, on the untrained backbone of ``[camnet]``; with the weights that a stage left, if any."""
    return run.network(IRNet, stage)


def _run(run: Context, settings: IRN, folder: Path, journal: Journal) -> None:
    make_labels(run.train, run.folder("cams") / "train", folder / "labels", settings, machine=run.machine, keep=True)
    net, labels = run.to_train(irnet(run)), folder / "labels"
    train_irnet(net, run.train, labels, settings, seed=run.seed, machine=run.machine, journal=journal)
    save_model(folder, net)


def _score(run: Context, settings: IRN, dataset: Dataset) -> Score:
    cams = run.folder("cams") / "train"
    chosen = run.table(CAMs).background_score
    score = own_scores(dataset, cams).low if chosen == "auto" else chosen
    matrix, images = evaluate_refined(dataset, cams, settings, background_score=score, machine=run.machine)
    what, crf, auto = "CAM + CRF" if settings.iterations else "CAM", settings.iterations > 0, chosen == "auto"
    return Score.of(what, matrix.iou, dataset.classes, images, crf=crf, background_score=score, auto=auto)


STAGE = Stage(
    "irn",
    IRN,
    run=_run,
    title="IRNet",
    needs=("cams",),
    on_demand=True,
    files=("labels",),
    depends=lambda run, settings: (check_backend(run.machine.crf), run.table(CAMNetwork), run.identity("backbone")),
    check=lambda run, settings: (check_backend(run.machine.crf), irnet(run)),
    version=3,
    scored_on="train",
    score=_score,
    score_depends=lambda run, settings: (run.table(CAMs).background_score,),
)
