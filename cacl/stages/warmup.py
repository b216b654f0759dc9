"""The stage ``warmup``: a multi-label classifier, from which CA-CL starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from cacl._support.checks import check_labels
from cacl.camnet import CAMNet
from cacl.datasets import Dataset
from cacl.loading import Batch
from cacl.log import Journal
from cacl.settings import CAMNetwork, Machine
from cacl.stages.cams import cam_score, cam_score_depends, camnet, save_model
from cacl.stages.score import Score
from cacl.stages.shown import showing_cams
from cacl.stages.stage import Context, Stage
from cacl.tables import Warmup
from cacl.training import fit


def train_classifier(
    net: CAMNet,
    dataset: Dataset,
    settings: Warmup = Warmup(),
    *,
    seed: int = 0,
    machine: Machine = Machine(),
    journal: Journal = Journal(),
) -> None:
    """The warm-up: train ``net`` as a multi-label classifier by global average pooling.

    Args:
        net: trained in place; on the machine's device.
        dataset: images and labels; masks are not opened.
        settings: of the training.
        seed: of everything that is random.
        machine: where it is computed.
        journal: log and checkpoint.

    Raises:
        ValueError: as :func:`cacl.training.train` does.
    """
    net.train()

    def step(batch: Batch) -> Mapping[str, Tensor]:
        logits = net(batch.images).scores.mean((2, 3)).float()
        check_labels(batch.labels, net.num_classes)
        labels = batch.labels.to(logits.device, non_blocking=True)
        return {"loss": F.multilabel_soft_margin_loss(logits, labels) * batch.share}

    groups = net.parameter_groups(settings.lr)
    journal = showing_cams(journal, net, dataset, settings.batch_size, machine)
    fit(step, {"net": net}, groups, dataset, settings, name="warmup", seed=seed, machine=machine, journal=journal)


def _run(run: Context, settings: Warmup, folder: Path, journal: Journal) -> None:
    net = run.to_train(camnet(run))
    train_classifier(net, run.train, settings, seed=run.seed, machine=run.machine, journal=journal)
    save_model(folder, net)


def _score(run: Context, settings: Warmup, dataset: Dataset) -> Score:
    return cam_score(run, camnet(run, "warmup"), dataset)


STAGE = Stage(
    "warmup",
    Warmup,
    run=_run,
    title="warm-up",
    depends=lambda run, settings: (run.table(CAMNetwork), run.identity("backbone")),
    check=lambda run, settings: camnet(run),
    scored_on="eval",
    score=_score,
    score_depends=cam_score_depends,
    shown="CAM after the warm-up",
)
