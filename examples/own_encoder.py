"""Any image-text model can guide CA-CL: five members make an encoder.

    python examples/own_encoder.py

This one has random weights, so that nothing is downloaded; put your own model in its place.
"""

import hashlib

import torch
from torch import nn

from cacl import BackgroundSet, CACLLoss, CAMNet, ImageTextEncoder, PromptSet


class OwnEncoder(nn.Module):
    image_size = 64  # side of its input in pixels
    mean = (0.5, 0.5, 0.5)  # its normalisation: images are re-normalised to it
    std = (0.5, 0.5, 0.5)

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 64, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Linear(64, features)
        self.words = nn.EmbeddingBag(1000, features)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) -> (N, 128); gradients flow to the images."""
        return self.project(self.image(images))

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """T texts -> (T, 128)."""
        numbers = [[int(hashlib.md5(word.encode()).hexdigest(), 16) % 1000 for word in text.split()] for text in texts]
        return torch.stack([self.words(torch.tensor([row]))[0] for row in numbers])


torch.manual_seed(0)
encoder = OwnEncoder()
assert isinstance(encoder, ImageTextEncoder)

net = CAMNet(2, backbone="resnet18", weights=None)
criterion = CACLLoss(
    encoder,
    ["boat", "train"],
    prompts=PromptSet(["a photo of a {}.", "a sketch of a {}."]),
    backgrounds=BackgroundSet({"boat": ["water", "pier"], "train": ["rails", "platform", "gravel"]}),
)
images, labels = torch.randn(4, 3, 128, 128), torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
terms = criterion(images, net(images).cams, labels)
terms.total.backward()
for name, value in terms._asdict().items():
    print(f"{name:22} {value.item():.4f}")

# In the pipeline: cacl.pipeline.run("config.toml", encoder=encoder). Similarities of another model lie elsewhere than
# CLIP's: look at foreground_similarity and pass_rate in log.jsonl, and set cacl.threshold between what your model gives
# for the right background words and for the rest.
