"""The losses of CA-CL inside a plain PyTorch loop: no download, no GPU, some seconds.

Coloured squares on sand; the only labels are the colours' names. A stand-in for CLIP knows colours, and the CAMs
learn where they are.

    python examples/drop_in.py
"""

import torch
from torch import nn

from cacl import BackgroundSet, CACLLoss, CAMNet, PromptSet

NAMES = ["red", "green", "blue"]
RGB = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.8, 0.0], [0.0, 0.1, 0.9], [0.9, 0.8, 0.5]])
COLOURS = dict(zip([*NAMES, "sand"], RGB, strict=True))


class ColourEncoder(nn.Module):
    """An image-text encoder is five members: this one compares how far colours are from grey."""

    image_size, mean, std = 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat((images.relu(), (-images).relu()), dim=1).mean((2, 3))

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        colours = torch.stack([next(rgb for name, rgb in COLOURS.items() if name in text) for text in texts])
        return self.encode_image((colours[:, :, None, None] - 0.5) / 0.25)


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = COLOURS["sand"][:, None, None] + 0.05 * torch.randn(count, 3, 64, 64)
    masks = torch.zeros(count, 64, 64, dtype=torch.bool)
    kinds = torch.randint(3, (count,))
    for i, (top, left) in enumerate(torch.randint(40, (count, 2)).tolist()):
        masks[i, top : top + 24, left : left + 24] = True
        images[i, :, masks[i]] = COLOURS[NAMES[kinds[i]]][:, None]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std, nn.functional.one_hot(kinds, 3), masks


torch.manual_seed(0)
backbone = nn.Sequential(nn.Conv2d(3, 32, 5, 4, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
backbone.out_channels = 32
net = CAMNet(3, backbone=backbone)
prompts, backgrounds = PromptSet(["a {} square.", "{}."]), BackgroundSet({name: ["sand"] for name in NAMES})
criterion = CACLLoss(ColourEncoder(), NAMES, prompts=prompts, backgrounds=backgrounds)
optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
for step in range(101):
    images, labels, masks = pictures(16)
    cams = net(images).cams
    loss = criterion(images, cams, labels).total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        found = nn.functional.interpolate(cams, size=(64, 64))[labels.bool()] > 0.5
        iou = (found & masks).sum() / (found | masks).sum()
        print(f"step {step:3}  loss {loss.item():6.2f}  IoU of CAMs and squares {iou.item():.2f}")
