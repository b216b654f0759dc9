"""A U-Net of segmentation_models.pytorch on the pseudo masks of a run; pixels that are 255 teach it nothing."""

import argparse
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from cacl.config import Config
from cacl.datasets import open_dataset
from cacl.transforms import normalize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--encoder", default="resnet50")
parser.add_argument("--weights", default="imagenet")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--crop", type=int, default=320)
options = parser.parse_args()
data = Config.of_run(options.run).data
photos = open_dataset(data.format, data.root, data.train, range=data.range).with_masks(options.run / "masks/train")
net = smp.Unet(options.encoder, encoder_weights=options.weights or None, classes=len(photos.classes) + 1)
view = v2.Compose([v2.RandomResizedCrop(options.crop, scale=(0.25, 1.0)), v2.RandomHorizontalFlip()])
device = "cuda" if torch.cuda.is_available() else "cpu"
optimizer = torch.optim.AdamW(net.to(device).parameters(), lr=3e-4)
for epoch in range(options.epochs):
    for some in torch.randperm(len(photos)).split(options.batch_size):
        pairs = [view(sample.image, sample.mask) for sample in (photos[i] for i in some.tolist())]
        images = torch.stack([normalize(image) for image, _ in pairs]).to(device)
        target = torch.stack([mask for _, mask in pairs]).to(device)
        loss = F.cross_entropy(net(images), target.long(), ignore_index=255, reduction="sum")
        optimizer.zero_grad()
        (loss / (target != 255).sum().clamp(min=1)).backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item() / target.numel():.3f}")
torch.save({"weights": net.state_dict(), "classes": photos.classes}, options.out)
