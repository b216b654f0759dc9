"""Small stand-ins for the models, so that no test needs a download."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # each of several processes, and what it starts, keeps to its core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor, nn

from cacl._support.precision import _processor

# `precision = "auto"` is float32 here and in the scripts that import this, also on a processor that has bf16.
_processor.__defaults__ = (Path(os.devnull),)


class TinyEncoder(nn.Module):
    """An ImageTextEncoder of a few kilobytes; its texts' features are hashes, so equal texts have equal features."""

    image_size = 32
    mean = (0.5, 0.4, 0.3)
    std = (0.2, 0.3, 0.25)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 32)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).tanh().mean((2, 3)))

    def encode_text(self, texts: list[str]) -> Tensor:
        digests = torch.tensor([list(hashlib.sha256(text.encode()).digest()) for text in texts])
        return (digests / 127.5 - 1).to(self.head.weight)


class TinyBackbone(nn.Module):
    """A feature extractor of output stride 16, with a dropout to tell training from evaluation."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, stride=16)
        self.drop = nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.05, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.conv(images).relu())


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard():
    """Also where the tests are a background job, which starts with Ctrl-C ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def backbone() -> TinyBackbone:
    return TinyBackbone()


@pytest.fixture
def randn():
    """``torch.randn`` with a generator of its own: the same numbers in every run, the global seed untouched."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def clip_state() -> dict[str, Tensor]:
    """The state dict of a tiny random CLIP: 32 px, 64 features."""
    from cacl._support.clip_library import import_clip

    import_clip()
    from clip.model import CLIP

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(
            embed_dim=64,
            image_resolution=32,
            vision_layers=1,
            vision_width=64,
            vision_patch_size=16,
            context_length=77,
            vocab_size=49408,
            transformer_width=64,
            transformer_heads=1,
            transformer_layers=1,
        )
    return model.state_dict()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.name != "posix" and item.get_closest_marker("posix"):
        pytest.skip("links, signals and a shell as POSIX has them")
