"""Train the encoder and the backbone `scenes` on captions of drawn scenes; no mask is opened.

    python benchmarks/train_scenes.py --out scenes.npz

What they understand of unseen scenes is measured by tests/test_scenes.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cacl import CAMNet, scenes
from cacl.embedded import Trunk, TwoTowers, save
from cacl.encoders import ScenesEncoder
from cacl.transforms import normalize

SIZE = ScenesEncoder.image_size
TEXTS = [*scenes.CLASSES, *scenes.WORDS]
LOOKS = list(scenes.LOOKS)
# A text fits, as far as the loss is concerned, where its cosine with the image is above OFFSET. The smaller SCALE, the
# further apart the loss wants the cosines, so that an object alone fits its text better than the whole scene does.
SCALE, OFFSET = 5.0, 0.25


class Captions(Dataset):
    """Scenes, and what their captions say: the names of what can be seen, and the look by its wording.

    Args:
        draw: draws a scene.
        seed: of the scenes.
        count: how many.
    """

    def __init__(self, draw: Callable[[np.random.Generator], scenes.Scene], seed: tuple[int, int], count: int) -> None:
        self.draw, self.seed, self.count = draw, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        scene = self.draw(np.random.default_rng((*self.seed, index)))
        named = torch.zeros(len(TEXTS), dtype=torch.bool)
        named[[TEXTS.index(name) for name in (*scene.classes, *scene.backgrounds)]] = True
        return torch.from_numpy(np.array(scene.image)).permute(2, 0, 1), named, LOOKS.index(scene.look)

    def load(self) -> list[Tensor]:
        """Images ``(N, 3, H, W)``, names ``(N, texts)``, looks ``(N,)``."""
        loader = DataLoader(self, batch_size=256, num_workers=2)
        return [torch.cat(x) for x in zip(*tqdm(loader, desc="draw", disable=None), strict=True)]


def open_world(rng: np.random.Generator) -> scenes.Scene:
    """Any background with any object, some objects without telling colours, some scenes without an object."""
    return scenes.draw(rng, 96, looks=5, strange=1.0, plain=0.15, empty=0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scenes.npz"))
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trunk-scenes", type=int, default=10_000)
    parser.add_argument("--trunk-epochs", type=int, default=5)
    parser.add_argument("--only", choices=("towers", "trunk"), help="train one of the two")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.monotonic()
    words = sorted({w for text in (*scenes.LOOKS.values(), *TEXTS) for w in text.replace("{}", "").strip(". ").split()})
    towers = TwoTowers(words).to(memory_format=torch.channels_last)
    if args.only != "trunk":
        train_towers(towers, args)
    trunk = Trunk()
    if args.only != "towers":
        train_trunk(trunk, args)
    save(args.out, towers, trunk)
    print(f"trained in {time.monotonic() - start:.0f} s")


def train_towers(towers: TwoTowers, args: argparse.Namespace) -> None:
    """Pairs of images and texts: does the text fit? Of a text of some words all must be in the image's caption."""
    images, named, looks = Captions(open_world, (args.seed, 7), args.scenes).load()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=args.lr, weight_decay=0.02)
    total = args.epochs * (len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    bar = tqdm(total=total, desc="encoder", disable=None)
    running = None
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(args.batch_size)[: len(images) // args.batch_size]:
            texts, needed = describe(named[batch], looks[batch], generator)
            fits = (needed[None] & ~named[batch][:, None]).sum(-1) == 0
            same = looks[batch][:, None] == looks[batch][None]
            target = fits.float() * torch.where(same, 1.0, 0.6)
            views = see(images[batch], generator)
            seen = F.normalize(towers.encode_image(views), dim=1)
            cosine = seen @ F.normalize(towers.encode_text(towers.tokenize(texts)), dim=1).T
            logits = SCALE * (cosine - OFFSET)
            weight = torch.where(target > 0, 0.5 / target.gt(0).float().mean(), 0.5 / target.eq(0).float().mean())
            loss = F.binary_cross_entropy_with_logits(logits, target, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{running:.4f}")
        print(f"epoch {epoch + 1}: loss {running:.4f}", flush=True)


def train_trunk(trunk: Trunk, args: argparse.Namespace) -> None:
    """A classifier of the names by global average pooling, whose classifier is thrown away."""
    images, named, _ = Captions(scenes.draw, (args.seed, 8), args.trunk_scenes).load()
    net = CAMNet(len(TEXTS), backbone=trunk).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.02)
    generator = torch.Generator().manual_seed(args.seed)
    batches = len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.trunk_epochs * batches)
    for epoch in range(args.trunk_epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64)[:batches]:
            top, left = torch.randint(0, 33, (2,), generator=generator).tolist()
            views = images[batch, :, top : top + 128, left : left + 128]
            views = torch.stack([normalize(view) for view in views])
            loss = F.multilabel_soft_margin_loss(net.classify(views), named[batch].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"trunk, epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)


def describe(named: Tensor, looks: Tensor, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """A text for each image, in the wording of its look: one thing that its caption names, sometimes two."""
    scores = torch.rand(named.shape, generator=generator) * named
    scores[:, : len(scenes.CLASSES)] *= 2  # captions name objects rather than surroundings
    first = scores.topk(2).indices
    two = torch.rand(len(named), generator=generator) < 0.25
    needed = torch.zeros_like(named)
    needed[torch.arange(len(named)), first[:, 0]] = True
    needed[torch.arange(len(named))[two], first[two, 1]] = True
    needed &= named
    texts = [
        scenes.LOOKS[LOOKS[look]].format(", ".join(TEXTS[i] for i in row.nonzero().flatten().tolist()))
        for row, look in zip(needed, looks.tolist(), strict=True)
    ]
    return texts, needed


def see(images: Tensor, generator: torch.Generator) -> Tensor:
    """Views as an encoder of regions meets them: a random window, and parts that fade into the mean colour.

    What fades is random and knows nothing of the objects.
    """
    count = len(images)
    x = images.float() / 255
    x = (x - torch.tensor(ScenesEncoder.mean).view(3, 1, 1)) / torch.tensor(ScenesEncoder.std).view(3, 1, 1)
    scale = 0.75 + 0.25 * torch.rand(count, generator=generator)
    shift = (1 - scale)[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, -1.0)
    zero = torch.zeros(count)
    theta = torch.stack(
        (torch.stack((scale * mirror, zero, shift[:, 0]), 1), torch.stack((zero, scale, shift[:, 1]), 1)), 1
    )
    x = F.grid_sample(x, F.affine_grid(theta, [count, 3, SIZE, SIZE], align_corners=False), align_corners=False)
    grid = int(torch.randint(2, 7, (), generator=generator))
    field = F.interpolate(
        torch.randn(count, 1, grid, grid, generator=generator), size=(SIZE, SIZE), mode="bicubic", align_corners=False
    )
    sharp = 1 + 9 * torch.rand(count, 1, 1, 1, generator=generator)
    open_ = torch.randn(count, 1, 1, 1, generator=generator) * 0.7 + 0.2
    visible = torch.sigmoid(sharp * (field + open_))
    whole = torch.rand(count, 1, 1, 1, generator=generator) < 0.3
    return torch.where(whole, x, x * visible).to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
