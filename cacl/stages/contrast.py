"""The stage ``cacl``: CA-CL training (CA-CL, eq. 1-14), or that of another criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacl._support.answers import check_callable, check_terms
from cacl._support.surroundings import building
from cacl._support.weights import check_can_be_saved, evaluating, put_back
from cacl._support.word_lists import load_words
from cacl.camnet import CAMNet
from cacl.criterion import CACLLoss
from cacl.datasets import Dataset
from cacl.errors import InputError, first_line
from cacl.loading import Batch
from cacl.log import Journal
from cacl.losses import BGSuppressionLoss
from cacl.methods import CLIMSLoss, POLELoss, QACLIMSLoss
from cacl.prompts import BACKGROUND_WORDS, SYNONYMS, BackgroundSet, PromptSet
from cacl.settings import Encoder, Machine, Prompts
from cacl.stages.cams import cam_score, cam_score_depends, camnet, save_model
from cacl.stages.score import Score
from cacl.stages.shown import showing_cams
from cacl.stages.stage import Context, Stage
from cacl.stages.words import known_words
from cacl.tables import CACL, METHODS
from cacl.training import RESERVED, fit

Criterion = Callable[[Tensor, Tensor, Tensor], Any]
"""``(images, cams, labels)`` -> a NamedTuple with a ``total``, as :meth:`cacl.CACLLoss.forward`; what it wants logged
besides comes from an optional ``record() -> dict`` of tensors."""


def train_cacl(
    net: CAMNet,
    criterion: Criterion,
    dataset: Dataset,
    settings: CACL = CACL(),
    *,
    seed: int = 0,
    machine: Machine = Machine(),
    journal: Journal = Journal(),
) -> None:
    """CA-CL training (CA-CL, eq. 1-14): ``net`` learns CAMs from the frozen encoder of ``criterion``.

    Any other criterion on images, CAMs and labels trains as well. Where it is a module, its parameters are trained and
    its state is part of the checkpoint: θ and the template counts of :class:`cacl.CACLLoss`. In several processes each
    calls it with its part of the batch, and the mean of ``total`` over them is what is minimised.

    Args:
        net: trained in place; on the machine's device.
        criterion: ``(images, cams, labels)`` -> a NamedTuple with a ``total``, whose other fields are logged; with an
            optional ``record() -> dict`` of tensors that are logged too.
        dataset: images and labels; masks are not opened.
        settings: of the training; those of the loss are the criterion's own business.
        seed: of everything that is random.
        machine: where it is computed.
        journal: log and checkpoint.

    Raises:
        ValueError: if what the criterion gives has no ``total`` that is a scalar with a gradient, and as
            :func:`cacl.training.train` does.
    """
    net.train()
    modules: dict[str, nn.Module] = {"net": net}
    groups = net.parameter_groups(settings.lr)
    if isinstance(criterion, nn.Module):
        criterion.train()
        modules["criterion"] = criterion
        if own := [parameter for parameter in criterion.parameters() if parameter.requires_grad]:
            lr = settings.lr if settings.threshold_lr is None else settings.threshold_lr
            groups.append({"params": own, "lr": lr, "weight_decay": 0.0})
    record: Callable[[], Mapping[str, Any]] = getattr(criterion, "record", dict)

    def step(batch: Batch) -> Mapping[str, Tensor]:
        terms = criterion(batch.images, net(batch.images).cams, batch.labels)
        check_terms(terms)
        others = {name: value for name, value in terms._asdict().items() if name != "total"}
        return {"loss": terms.total, **_logged({**others, **record()}, terms.total.device)}

    journal = showing_cams(journal, net, dataset, settings.batch_size, machine)
    fit(step, modules, groups, dataset, settings, name="cacl", seed=seed, machine=machine, journal=journal)


def _logged(values: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What a criterion wants logged, as tensors; refused where the log has another use for the name."""
    if taken := [name for name in values if name in RESERVED]:
        raise InputError(f"Expected argument `criterion` to log under other names than {taken[0]!r}.")
    try:
        return {name: torch.as_tensor(value, device=device) for name, value in values.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"Expected argument `criterion` to log tensors and numbers, but {first_line(error)}") from None


def backgrounds(run: Context, settings: CACL) -> BackgroundSet | None:
    """The background words of a run's classes; None where its loss takes none."""
    taken = settings.beta > 0 if settings.method == "cacl" else settings.method == "qa-clims"
    return known_words(run) if taken and run.given_criterion is None else None


def criterion_of(run: Context, settings: CACL) -> Criterion:
    """The loss of a run, on its device."""

    def make() -> Criterion:
        given: object = run.given_criterion
        if isinstance(given, nn.Module):
            check_can_be_saved("criterion", given)
        if run.given_criterion is not None:
            check_callable("criterion", given)
            return run.given_criterion
        if settings.method != "cacl":
            return _rival(run, settings)
        with building():
            suppression = BGSuppressionLoss(
                settings.threshold,
                mode=settings.threshold_mode,
                bounds=settings.threshold_bounds,
                quantile=settings.threshold_quantile,
                momentum=settings.threshold_momentum,
            )
        return CACLLoss(
            run.encoder,
            run.train.classes,
            prompts=PromptSet(run.table(Prompts).templates),
            backgrounds=backgrounds(run, settings),
            alpha=settings.alpha,
            beta=settings.beta,
            gamma=settings.gamma,
            margin=settings.margin,
            suppression=suppression,
            template=settings.template,
        )

    return run.shared("criterion", make)


def _rival(run: Context, settings: CACL) -> nn.Module:
    """The loss of another method."""
    encoder, names, weights = run.encoder, run.train.classes, (settings.alpha, settings.background_weight)
    if settings.method == "qa-clims":
        return QACLIMSLoss(
            encoder, names, backgrounds=backgrounds(run, settings), temperature=settings.contrast_temperature,
            weights=weights, gamma=settings.gamma,
        )  # fmt: skip
    words = BACKGROUND_WORDS if settings.words is None else settings.words
    if settings.method == "clims":
        return CLIMSLoss(
            encoder, names, words=words, weights=weights, beta=settings.beta, gamma=settings.gamma,
            threshold=settings.threshold,
        )  # fmt: skip
    synonyms = {"voc": SYNONYMS, "": {}}.get(settings.synonyms)
    return POLELoss(
        encoder, names, synonyms=load_words(Path(settings.synonyms)) if synonyms is None else synonyms,
        words=words, weights=weights, beta=settings.beta, threshold=settings.threshold, seed=run.seed,
    )  # fmt: skip


def _check(run: Context, settings: CACL) -> None:
    """Whether the loss can be computed: an encoder's first answer comes here, not after the warm-up."""
    criterion = criterion_of(run, settings)
    if run.given_criterion is not None:
        return
    assert isinstance(criterion, CACLLoss | CLIMSLoss | QACLIMSLoss | POLELoss)
    device, classes = run.machine.device, len(criterion.names)
    images = torch.linspace(-1, 1, 3 * 8 * 8, device=device).view(1, 3, 8, 8)
    cams = torch.full((1, classes, 2, 2), 0.5, device=device, requires_grad=True)
    with evaluating(criterion), torch.random.fork_rng(devices=[]), torch.enable_grad():
        criterion(images, cams, torch.eye(1, classes, device="cpu"))


def _run(run: Context, settings: CACL, folder: Path, journal: Journal) -> None:
    net, criterion = run.to_train(camnet(run, "warmup")), criterion_of(run, settings)
    with put_back(run.given_criterion):
        train_cacl(net, criterion, run.train, settings, seed=run.seed, machine=run.machine, journal=journal)
    save_model(folder, net)


def _depends(run: Context, settings: CACL) -> tuple[object, ...]:
    if run.given_criterion is not None:
        return (run.identity("criterion"),)
    words = backgrounds(run, settings)
    known = words and {name: words.get(name) for name in run.train.classes}
    return (run.table(Encoder), run.identity("encoder"), run.table(Prompts), known)


def _score(run: Context, settings: CACL, dataset: Dataset) -> Score:
    return cam_score(run, camnet(run, "cacl"), dataset)


STAGE = Stage(
    "cacl",
    CACL,
    run=_run,
    title=lambda settings: METHODS[settings.method],
    needs=("warmup",),
    uses=("encoder", "criterion"),
    depends=_depends,
    check=_check,
    scored_on="eval",
    score=_score,
    score_depends=cam_score_depends,
    shown=lambda settings: f"CAM after {METHODS[settings.method]}",
)
