"""What a CA-CL step costs from the CAMs on. Three claims:

1. at most 1.10 times the encoder passes that it cannot do without (``cacl/encoder``);
2. at most a quarter of a plain port of the paper (``naive/cacl``, at least 4);
3. as much with many templates m and background words n as with few.

Timed in turn, in one process, on the same random images, CAMs and labels with N (image, class) pairs:

- ``encoder``: the frozen encoder forward on 2N masked images, two a pair, and backward to these images;
- ``cacl``: :class:`cacl.CACLLoss` forward, and backward to the CAMs;
- ``naive``: :func:`naive` below forward, and backward to the CAMs and to the encoder's weights.

The CAM network's own pass is the same for all and left out. Nothing is timed unless ``cacl`` and ``naive`` agree in
loss and gradient. The encoder has CLIP's shape and random weights, which cost what trained ones cost.

    python benchmarks/step.py                                 # ViT-B/32; ten minutes or so on a CPU
    python benchmarks/step.py --device cuda --json step.json
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cacl import DEFAULT_TEMPLATES, BackgroundSet, BGSuppressionLoss, CACLLoss, PromptSet, split_regions
from cacl._support.clip_library import import_clip
from cacl.constants import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from cacl.encoders import CLIPEncoder

NAMES = tuple(BackgroundSet.voc())
TEMPLATES = (*DEFAULT_TEMPLATES, "a clean origami {}.", "a drawing of {}.", "a painting of {}.", "a close-up of {}.")
CROP, STRIDE = 512, 16
THRESHOLD = 0.0  # cosines of random features lie around 0: at the paper's 0.26 no background word would take part
TOLERANCE = 1e-3  # relative, of float32
NOISY = 1.3  # slowest over fastest run of one step; a ratio of 1.10 drowns in more
MODELS = {  # arguments of clip.model.CLIP; "tiny" is for tests, its times mean nothing
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "tiny": (64, 32, 2, 64, 16, 77, 49408, 64, 1, 2),
}


def naive(
    model: nn.Module, images: Tensor, cams: Tensor, labels: Tensor, prompts: PromptSet, backgrounds: BackgroundSet
) -> Tensor:
    """CA-CL (eq. 2-14) line by line from the paper, in the manner of CLIMS' training loop.

    Each part of the loss calls the encoder for what it needs, and the encoder's weights are not frozen. Kinder than
    CLIMS in one point: pairs of the same class share their texts.
    """
    size = model.visual.input_resolution
    constants = (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)
    old_mean, old_std, mean, std = (images.new_tensor(values).view(3, 1, 1) for values in constants)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = (images * old_std + old_mean - mean) / std

    # The foreground and the background of every present class (eq. 2)
    masks = F.interpolate(cams, size=(size, size), mode="bilinear", align_corners=False)
    pairs = labels.nonzero().tolist()
    classes = [k for _, k in pairs]
    foreground_images = torch.stack([images[b] * masks[b, k] for b, k in pairs])
    background_images = torch.stack([images[b] * (1 - masks[b, k]) for b, k in pairs])

    # The m prompts and the m·n background prompts of every present class (eq. 3, 8)
    texts = {k: prompts.texts(NAMES[k]) + backgrounds.texts(NAMES[k], prompts) for k in sorted(set(classes))}
    tokens = import_clip().tokenize([text for list_ in texts.values() for text in list_]).to(images.device)
    features = F.normalize(model.encode_text(tokens), dim=-1).split([len(list_) for list_ in texts.values()])
    features = dict(zip(texts, features, strict=True))

    # DCPS: the template that is most similar to the foreground (eq. 4-5)
    foreground = F.normalize(model.encode_image(foreground_images), dim=-1)
    best = [(features[k][: len(prompts)] @ foreground[i]).argmax() for i, k in enumerate(classes)]
    text = torch.stack([features[k][best[i]] for i, k in enumerate(classes)])

    # ITC: the foreground towards its prompt, the background away from it (eq. 6-7)
    foreground = F.normalize(model.encode_image(foreground_images), dim=-1)
    background = F.normalize(model.encode_image(background_images), dim=-1)
    itc = F.relu(0.5 - (foreground * text).sum(-1) + (background * text).sum(-1)).mean()

    # CSBS: the foreground away from the background words that it resembles (eq. 9-12)
    foreground = F.normalize(model.encode_image(foreground_images), dim=-1)
    bgs = torch.zeros((), device=images.device)
    for i, k in enumerate(classes):
        similarity = features[k][len(prompts) :] @ foreground[i]
        bgs = bgs - (torch.log(1 - similarity) * (similarity >= THRESHOLD)).sum()

    return 40 * itc + 1 * bgs + 0.4 * cams.mean()


def build_encoder(model: str) -> CLIPEncoder:
    import_clip()
    from clip.model import CLIP

    return CLIPEncoder(CLIP(*MODELS[model]))


def build_loss(encoder: CLIPEncoder, m: int, n: int) -> CACLLoss:
    prompts, backgrounds, suppression = PromptSet(TEMPLATES[:m]), BackgroundSet.voc(n), BGSuppressionLoss(THRESHOLD)
    return CACLLoss(encoder, NAMES, prompts=prompts, backgrounds=backgrounds, suppression=suppression)


def random_batch(batch: int, pairs: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, CAMs, and labels (on the CPU) of ``pairs`` classes in all, at least one an image."""
    images = torch.randn(batch, 3, CROP, CROP, device=device)
    cams = torch.rand(batch, len(NAMES), CROP // STRIDE, CROP // STRIDE, device=device, requires_grad=True)
    score = torch.rand(batch, len(NAMES))
    score += score == score.amax(1, keepdim=True)
    labels = torch.zeros(score.numel()).index_fill(0, score.flatten().topk(pairs).indices, 1)
    return images, cams, labels.view_as(score)


Steps = Mapping[Any, Callable[[], tuple[Tensor, Tensor]]]


def forward_backward(forward: Callable[[], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    leaf.grad = None
    loss = forward()
    loss.backward()
    return loss.detach(), leaf.grad


def build_steps(model: str, device: str, batch: int, pairs: int) -> Steps:
    """The three steps by name, and under ``(m, n)`` that of ``cacl`` with m templates and n background words."""
    encoder = build_encoder(model).to(device)
    unfrozen = copy.deepcopy(encoder.model).requires_grad_(True)
    losses = {"cacl": build_loss(encoder, 4, 5).to(device)}
    width = encoder.model.text_projection.shape[1]
    # Any features will do for the other nine: the cost of a step can depend on their number only.
    encoder.encode_text = lambda texts: torch.randn(len(texts), width, device=device)
    losses |= {(m, n): build_loss(encoder, m, n).to(device) for m in (1, 4, 8) for n in (3, 5, 7)}
    encoder.encode_text = None  # from here on a step that encodes a text fails

    images, cams, labels = random_batch(batch, pairs, device)
    regions = split_regions(images, cams.detach(), labels, size=encoder.image_size)
    masked = torch.cat((regions.foreground, regions.background)).requires_grad_()
    prompts, backgrounds = PromptSet(TEMPLATES[:4]), BackgroundSet.voc(5)
    forwards = {name: lambda loss=loss: loss(images, cams, labels).total for name, loss in losses.items()}
    forwards["naive"] = lambda: naive(unfrozen, images, cams, labels, prompts, backgrounds)
    steps = {name: partial(forward_backward, forward, cams) for name, forward in forwards.items()}
    return {"encoder": partial(forward_backward, lambda: encoder.encode_image(masked).sum(), masked), **steps}


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that go into operations or come out of them, views apart."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "view" not in str(func):
            tensors = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
            self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return result


def milliseconds(step: Callable[[], object], device: str) -> float:
    if device == "cpu":
        before = time.perf_counter()
        step()
        return (time.perf_counter() - before) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ceilings(device: str) -> dict[str, float]:
    """What the device can do: GFLOP/s of a float32 matmul, GB/s of a copy."""
    side, length = (2048, 2**25) if device == "cpu" else (8192, 2**28)
    matrix, source = torch.randn(side, side, device=device), torch.randn(length, device=device)
    target = torch.empty_like(source)
    matmul = min(milliseconds(lambda: matrix @ matrix, device) for _ in range(5))
    copying = min(milliseconds(lambda: target.copy_(source), device) for _ in range(5))
    return {"GFLOP/s": 2 * side**3 / matmul / 1e6, "GB/s": 2 * 4 * length / copying / 1e6}


def measure(steps: Steps, repeats: int, device: str) -> dict[str, Any]:
    rows, results = {}, {}
    for name in ("encoder", "cacl", "naive"):
        with FlopCounterMode(display=False) as operations, Traffic() as traffic:
            results[name] = steps[name]()
        rows[name] = {"GFLOP": operations.get_total_flops() / 1e9, "GB": traffic.bytes / 1e9}
    compared = zip(("loss", "gradient"), results["cacl"], results["naive"], strict=True)
    error = {what: float((ours - theirs).norm() / theirs.norm()) for what, ours, theirs in compared}
    if not max(error.values()) <= TOLERANCE:
        raise SystemExit(f"cacl and naive differ: relative errors {error}, allowed {TOLERANCE}")

    grid = [name for name in steps if name not in rows]
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for group in (list(rows), grid):  # what is compared runs close together: a busy machine slows all of it
        for _ in range(1 + repeats):  # the first round warms up
            for name in random.sample(group, len(group)):
                times[name].append(milliseconds(steps[name], device))
    times = {name: all_[1:] for name, all_ in times.items()}
    ms = {name: median(all_) for name, all_ in times.items()}
    for name, row in rows.items():
        rates = {f"{unit}/s": amount / ms[name] * 1e3 for unit, amount in row.items()}
        row |= {"ms": ms[name], "max/min": max(times[name]) / min(times[name]), **rates}
    return {
        "relative_error": error,
        "steps": rows,
        "ceilings": ceilings(device),
        "ratios": {"cacl/encoder": ms["cacl"] / ms["encoder"], "naive/cacl": ms["naive"] / ms["cacl"]},
        "grid": [{"m": name[0], "n": name[1], "ms": ms[name]} for name in grid],
        "all_ms": {str(name): all_ for name, all_ in times.items()},
    }


def show(result: dict[str, Any]) -> None:
    print("{model}, {batch} images, {pairs} pairs, {device}, torch {torch}, medians of {repeats}".format(**result))
    print("cacl and naive differ by {loss:.0e} in loss, {gradient:.0e} in gradient".format(**result["relative_error"]))
    columns = ("ms", "max/min", "GFLOP", "GB", "GFLOP/s", "GB/s")
    print(f"\n{'step':10}" + "".join(f"{column:>10}" for column in columns))
    for name, row in (*result["steps"].items(), ("ceiling", result["ceilings"])):
        print(f"{name:10}" + "".join(f"{row[c]:10.1f}" if c in row else " " * 10 for c in columns))
    print("\ncacl/encoder {cacl/encoder:.2f} (claim: at most 1.10)".format(**result["ratios"]))
    print("naive/cacl {naive/cacl:.1f} (claim: at least 4)".format(**result["ratios"]))
    if max(row["max/min"] for row in result["steps"].values()) > NOISY:
        print(f"The machine was busy (max/min above {NOISY}): these ratios prove nothing, neither way.")
    print(f"\n{'cacl, ms':10}" + "".join(f"{f'n = {n}':>10}" for n in (3, 5, 7)))
    for m in (1, 4, 8):
        print(f"m = {m:<6}" + "".join(f"{cell['ms']:10.1f}" for cell in result["grid"] if cell["m"] == m))


def main() -> None:
    parser = argparse.ArgumentParser(description="What a CA-CL step costs.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="ViT-B/32", choices=MODELS)
    parser.add_argument("--batch", type=int, help="images; by default 4 on the CPU, 16 on a GPU")
    parser.add_argument("--pairs", type=int, help="(image, class) pairs; by default 1.55 an image, as in VOC")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    args = parser.parse_args()
    batch = args.batch or (4 if args.device == "cpu" else 16)
    pairs = args.pairs or round(1.55 * batch)
    if not batch <= pairs <= batch * len(NAMES):
        parser.error(f"--pairs: expected {batch} to {batch * len(NAMES)} with {batch} images, but got {pairs}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)

    device = f"CPU with {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    result = {"model": args.model, "batch": batch, "pairs": pairs, "repeats": args.repeats}
    result |= {"device": device, "torch": torch.__version__}
    result |= measure(build_steps(args.model, args.device, batch, pairs), args.repeats, args.device)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
