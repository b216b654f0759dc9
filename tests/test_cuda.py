"""What a GPU must not change, and that a step never waits for it. Run with ``-m cuda``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TinyEncoder
from drawn import picture, write_csv
from test_pipeline import run
from torch import nn

from cacl import BackgroundSet, BGSuppressionLoss, CACLLoss, CAMNet, bg_suppression_loss, itc_loss, region_loss
from cacl.crf import dense_crf
from cacl.datasets import CSVDataset
from cacl.deeplab import DeepLabV2, segmentation_loss
from cacl.irn import IRNet, affinity_loss
from cacl.log import Journal
from cacl.photos import segment_photos
from cacl.random_walk import propagate, spread
from cacl.settings import Machine
from cacl.stages.contrast import train_cacl
from cacl.stages.irn import train_irnet
from cacl.stages.segment import train_segmenter
from cacl.stages.warmup import train_classifier
from cacl.tables import CACL, IRN, Segment, Warmup

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

N, Q, D = 5, 6, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses_equal_the_cpu_s(randn, dtype):
    inputs = [randn(*shape).to(dtype) for shape in ((N, D), (N, D), (N, D), (N, Q, D), (2, 3, 4, 4))]
    results = []
    for device in ("cpu", "cuda"):
        foreground, background, text, words, cams = (x.to(device).requires_grad_() for x in inputs)
        losses = (
            itc_loss(foreground, background, text),
            bg_suppression_loss(foreground, words, 0.1),
            region_loss(cams.sigmoid()),
        )
        sum(losses).backward()
        results.append([*losses, foreground.grad, background.grad, cams.grad])
    cpu, cuda = results
    rtol = 1e-4 if dtype == torch.float32 else 2e-2  # gradients in half precision may round the other way
    torch.testing.assert_close(cuda, cpu, check_device=False, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("mode", ["fixed", "soft", "quantile"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(encoder, randn, mode, precision):
    suppression = BGSuppressionLoss(0.2, mode=mode, num_classes=3 if mode == "quantile" else None)
    backgrounds = BackgroundSet({"cat": ["lawn", "wall"], "dog": ["leash"], "boat": ["water"]})
    criterion = CACLLoss(encoder, tuple(backgrounds), backgrounds=backgrounds, suppression=suppression).cuda()
    images = randn(3, 3, 48, 48).cuda()
    cams = randn(3, 3, 4, 4).sigmoid().cuda().requires_grad_()
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        criterion(images, cams, labels).total.backward()  # libraries may wait when they are first loaded
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step_labels in (labels, labels * 0):
                criterion(images, cams, step_labels).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cams.grad.isfinite().all()


def test_irnets_loss_equals_the_cpu_s_and_never_waits(randn):
    inputs = [randn(2, channels, 20, 24) for channels in (1, 2)]
    labels = torch.randint(0, 3, (2, 80, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        edges, displacements = (x.to(device).requires_grad_() for x in inputs)
        target = labels.to(device)
        affinity_loss(edges, displacements, target).total.backward()
        edges.grad = displacements.grad = None
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            terms = affinity_loss(edges, displacements, target)
            terms.total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([*terms, edges.grad, displacements.grad])
    torch.testing.assert_close(results[1], results[0], check_device=False, rtol=1e-4, atol=1e-5)


def test_random_walk_and_crf_equal_the_cpu_s(randn):
    cams, edges = randn(3, 30, 40).sigmoid(), randn(30, 40).sigmoid() ** 2
    walked = propagate(cams.cuda(), edges.cuda())
    assert walked.is_cuda
    torch.testing.assert_close(walked.cpu(), propagate(cams, edges), rtol=0, atol=1e-4)
    photo = randn(3, 30, 40).sigmoid() * 20
    walked = spread(cams.cuda(), photo.cuda())
    assert walked.is_cuda
    torch.testing.assert_close(walked.cpu(), spread(cams, photo), rtol=0, atol=1e-4)
    image = (randn(30, 40, 3).sigmoid() * 255).to(torch.uint8).numpy()
    probabilities = cams.softmax(0).numpy()
    one, two = (dense_crf(image, probabilities, backend="torch", device=device) for device in ("cpu", "cuda"))
    assert abs(one - two).max() < 1e-3


def test_the_segmenters_loss_equals_the_cpu_s_and_never_waits(randn):
    net = DeepLabV2(4, backbone="resnet18", weights=None)
    images = randn(2, 3, 64, 72)
    masks = torch.randint(0, 4, (2, 64, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        net.to(device).train()
        given, target = images.to(device), masks.to(device)
        segmentation_loss(net(given), target).backward()
        net.zero_grad()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            loss = segmentation_loss(net(given), target)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([loss.detach(), *(branch.weight.grad.clone() for branch in net.aspp)])
    torch.testing.assert_close(results[1], results[0], check_device=False, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_of_photos_equal_the_cpu_s(tmp_path, workers):
    torch.manual_seed(0)
    net = DeepLabV2(4, backbone="scenes")
    photos = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(photos[:4]):
        picture(i, (48 + i, 64))[0].save(path)
    masks = []
    for device in ("cpu", "cuda"):
        machine = Machine(device=device, workers=workers)
        masks.append([mask for _, mask in segment_photos(net.to(device), photos, _mask, machine=machine)])
    assert "4.png: no such file" in str(masks[0].pop()) == str(masks[1].pop())
    assert np.mean([np.mean(a == b) for a, b in zip(*masks, strict=True)]) > 0.99


def _mask(index, pixels, mask):
    return mask


STAGES = ("warmup", "cacl", "irn", "segment")


def few_steps(stage, root, device, callback, *, precision="fp32", steps=3, compiled=False):
    """Train a small network of a stage; the network."""
    torch.manual_seed(0)
    dataset = CSVDataset(root, "train")
    common = {"epochs": steps * 3 / len(dataset), "batch_size": 3, "crop": 64, "scale": (0.625, 1.25)}
    common |= {"schedule": "cosine", "momentum": 0.0, "weight_decay": 1e-4}
    where = {"machine": Machine(device=device, precision=precision, workers=1), "journal": Journal(callback=callback)}
    makers = {"irn": lambda: IRNet("scenes"), "segment": lambda: DeepLabV2(3, backbone="scenes")}
    net: nn.Module = makers.get(stage, lambda: CAMNet(2, backbone="scenes"))()
    net.to(device, memory_format=torch.channels_last)
    if compiled:
        net.compile()
    if stage == "warmup":
        train_classifier(net, dataset, Warmup(**common, lr=0.01), **where)
    elif stage == "cacl":
        words = BackgroundSet({"boat": ["lake"], "train": ["track"]})
        criterion = CACLLoss(TinyEncoder().to(device), ("boat", "train"), backgrounds=words).to(device)
        train_cacl(net, criterion, dataset, CACL(**common, lr=0.01), **where)
    else:
        trainer, table = (train_irnet, IRN) if stage == "irn" else (train_segmenter, Segment)
        trainer(net, dataset, root / "masks", table(**common, lr=1e-4), **where)
    return net


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_few_steps_of_every_stage_are_the_cpu_s(tmp_path, stage, precision):
    root = write_csv(tmp_path / "data", train=9)
    losses = {"cpu": [], "cuda": []}
    for device, seen in losses.items():
        exact = precision if device == "cuda" else "fp32"
        few_steps(stage, root, device, lambda record, seen=seen: seen.append(record["loss"]), precision=exact)
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    assert len(losses["cuda"]) == 3
    count = 1 if precision == "fp16" else 3  # gradient scaling leaves its first steps out
    assert losses["cuda"][:count] == pytest.approx(losses["cpu"][:count], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_of_the_loop_never_waits_and_memory_is_flat(tmp_path, stage, precision):
    root = write_csv(tmp_path / "data", train=9)
    held = {}

    def watch(record):
        held[record["step"]] = torch.cuda.memory_allocated()
        if record["step"] == 3:  # libraries may wait when they are first used
            torch.cuda.set_sync_debug_mode("error")

    try:
        few_steps(stage, root, "cuda", watch, precision=precision, steps=30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(held) == 30
    assert max(held[step] for step in range(20, 31)) <= max(held[step] for step in range(8, 20)) + 2**20


@pytest.mark.slow
def test_compiled_is_the_same(tmp_path):
    root = write_csv(tmp_path / "data", train=9)
    losses = {False: [], True: []}
    for compiled, seen in losses.items():
        few_steps("cacl", root, "cuda", lambda record, seen=seen: seen.append(record["loss"]), compiled=compiled)
    assert losses[True] == pytest.approx(losses[False], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_whole_chain(tmp_path, precision):
    root = write_csv(tmp_path / "data")
    result = run(root, tmp_path / "out", "run.device=cuda", f"run.precision={precision}", "run.workers=1")
    assert list(result.metrics) == ["warmup", "cacl", "cams", "irn", "masks", "segment", "predict"]
    assert len(list((result.out / "masks/train").glob("*.png"))) == 6
    assert len(list((result.out / "predict/eval").glob("*.png"))) == 3
