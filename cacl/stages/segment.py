"""The stage ``segment``: DeepLabV2 trained on the pseudo masks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from cacl._support.distributed import rank
from cacl._support.weights import load_weights
from cacl.constants import IGNORE
from cacl.datasets import Dataset
from cacl.deeplab import DeepLabV2, segmentation_loss
from cacl.errors import InputError
from cacl.loading import Batch
from cacl.log import Journal
from cacl.photos import save_segmenter
from cacl.settings import CAMNetwork, Machine
from cacl.stages.cams import camnet
from cacl.stages.predict import evaluate_segmenter, trained_segmenter
from cacl.stages.score import Score
from cacl.stages.stage import Context, Stage
from cacl.tables import Predict, Segment
from cacl.training import fit


def train_segmenter(
    net: DeepLabV2,
    dataset: Dataset,
    masks: Path,
    settings: Segment = Segment(),
    *,
    seed: int = 0,
    machine: Machine = Machine(),
    journal: Journal = Journal(),
) -> None:
    """Train DeepLabV2 on pseudo masks.

    Args:
        net: trained in place; on the machine's device.
        dataset: the images; their own masks are not opened.
        masks: folder of :func:`cacl.stages.masks.make_masks`, or of other masks ``<id>.png``.
        settings: of the training; those of the network are its own business.
        seed: of everything that is random.
        machine: where it is computed.
        journal: log and checkpoint.

    Raises:
        ValueError: if a mask is missing, or has a value that is no class of ``net``.
    """
    net.train()

    def step(batch: Batch) -> Mapping[str, Tensor]:
        assert batch.masks is not None
        wrong = batch.masks[(batch.masks >= net.num_classes) & (batch.masks != IGNORE)]
        if len(wrong):
            raise InputError(
                f"{masks}: expected values 0 to {net.num_classes - 1} or {IGNORE}, but got {int(wrong[0])} in one of "
                f"{', '.join(batch.ids)}"
            )
        logits = net(batch.images)
        target = batch.masks.to(batch.images.device, non_blocking=True)
        return {"loss": segmentation_loss(logits, target, across=True)}

    groups = net.parameter_groups(settings.lr, head_factor=settings.head_factor)
    fit(
        step, {"net": net}, groups, dataset.with_masks(masks), settings, name="segment", masks=True, seed=seed,
        machine=machine, journal=journal,
    )  # fmt: skip


def new_segmenter(run: Context, settings: Segment, *, finished: bool = True) -> DeepLabV2:
    """DeepLabV2 with the weights that it starts from.

    Args:
        run: the run.
        settings: of the network.
        finished: whether CA-CL has finished, if its backbone is wanted; else an untrained one shows whether it fits.
    """
    of_cacl = settings.weights == "cacl"
    if not settings.backbone and not of_cacl and settings.weights != "DEFAULT":
        raise InputError(
            f'[segment] weights: expected "DEFAULT" or "cacl" where no backbone is named, but got {settings.weights!r}'
        )
    make = partial(
        DeepLabV2,
        len(run.train.classes) + 1,
        freeze_batch_norm=settings.freeze_batch_norm,
        multi_scale=settings.multi_scale,
    )
    if settings.backbone:
        net = run.own_network(make, settings.backbone, "" if of_cacl else settings.weights)
    else:
        net = run.network(make)
    if of_cacl:
        trunk = camnet(run, "cacl" if finished else None).backbone
        load_weights(net.backbone, trunk.state_dict(), "[segment] weights: the backbone of [camnet]")
    return net


def _run(run: Context, settings: Segment, folder: Path, journal: Journal) -> None:
    net = run.to_train(new_segmenter(run, settings))
    masks = run.folder("masks") / "train"
    train_segmenter(net, run.train, masks, settings, seed=run.seed, machine=run.machine, journal=journal)
    of_camnet = "" if run.identity("backbone") else run.table(CAMNetwork).backbone
    if rank() == 0:
        save_segmenter(folder / "model.pt", net, run.train.classes, settings.backbone or of_camnet, run.train.range)


def _score(run: Context, settings: Segment, dataset: Dataset) -> Score:
    net = trained_segmenter(run)
    matrix, images = evaluate_segmenter(net, dataset, run.table(Predict), machine=run.machine, crf=False)
    return Score.of("DeepLabV2", matrix.iou, dataset.classes, images)


STAGE = Stage(
    "segment",
    Segment,
    run=_run,
    title="segmentation",
    needs=("masks",),
    also_needs=lambda settings: ("cacl",) if settings.weights == "cacl" else (),
    depends=lambda run, settings: () if settings.backbone else (run.table(CAMNetwork), run.identity("backbone")),
    check=lambda run, settings: new_segmenter(
        run, settings, finished=settings.weights == "cacl" and run.finished("cacl")
    ),
    scored_on="segmented",
    score=_score,
    score_depends=lambda run, settings: (run.table(Predict).longest,),
)
