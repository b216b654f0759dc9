"""What a GPU must not change, and that a step never waits for it. Run with ``-m cuda``."""

from __future__ import annotations

import pytest
import torch

from cacl import BackgroundSet, BGSuppressionLoss, CACLLoss, bg_suppression_loss, itc_loss, region_loss

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
