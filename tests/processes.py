"""What tests run in several processes; started by torchrun, writes what came of it to a file.

python -m torch.distributed.run --nproc-per-node 2 processes.py DATA OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from conftest import TinyEncoder
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cacl import BackgroundSet, BGSuppressionLoss, CACLLoss, CAMNet
from cacl._support.distributed import process_group, rank, world_size
from cacl.datasets import CSVDataset
from cacl.deeplab import DeepLabV2
from cacl.irn import IRNet
from cacl.loading import order
from cacl.log import Journal
from cacl.methods import CLIMSLoss, POLELoss, QACLIMSLoss
from cacl.stages.contrast import train_cacl
from cacl.stages.irn import train_irnet
from cacl.stages.segment import train_segmenter
from cacl.stages.warmup import train_classifier
from cacl.tables import CACL, IRN, Segment, Warmup


class Backbone(nn.Module):
    """Stride 8, batch norm with frozen statistics, and a part that no step uses."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.norm = nn.BatchNorm2d(8)
        self.unused = nn.Linear(8, 3)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).relu()


def training(name: str, data: Path) -> dict[str, object]:
    """The gradients of each step, the weights at the end, the records of a short training, and this process's pairs."""
    torch.manual_seed(0)
    dataset = CSVDataset(data, "train")
    common = {
        "epochs": 3,
        "batch_size": 5,
        "crop": 32,
        "scale": (0.625, 1.25),
        "schedule": "cosine",
        "weight_decay": 1e-4,
    }
    journal = Journal(callback=lambda record: records.append(record))
    gradients: list[dict[int, Tensor]] = []
    records: list[dict[str, object]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append({i: p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None})

    pairs = [sum(len(dataset.entries[i].labels) for _, i in keys[rank() :: world_size()])
             for keys in order(len(dataset), 5, 0, range(-(-3 * len(dataset) // 5)))]  # fmt: skip
    hook = register_optimizer_step_pre_hook(keep)
    modules: list[nn.Module]
    if name == "warmup":
        net = CAMNet(2, backbone=Backbone())
        train_classifier(net, dataset, Warmup(**common, momentum=0.9), journal=journal)
        modules = [net]
    elif name.startswith("cacl"):
        mode = name.split("-")[1]
        settings = {"bounds": (-1.0, 1.0), "temperature": 0.1, "num_classes": 2 if mode == "quantile" else None}
        suppression = BGSuppressionLoss(-0.1, mode=mode, reduction="mean" if mode == "quantile" else "sum", **settings)
        words = BackgroundSet({"boat": ["lake", "pier"], "train": ["track"]})
        criterion = CACLLoss(TinyEncoder(), ("boat", "train"), backgrounds=words, suppression=suppression, beta=10.0)
        net = CAMNet(2, backbone=Backbone())
        train_cacl(net, criterion, dataset, CACL(**common, lr=0.01, momentum=0.9), journal=journal)
        modules = [net, criterion]
    elif name in METHODS:
        settings = (
            {"backgrounds": BackgroundSet({"boat": ["lake", "pier"], "train": ["track"]})} if name == "qa" else {}
        )
        rival = METHODS[name](TinyEncoder(), ("boat", "train"), **settings)
        net = CAMNet(2, backbone=Backbone())
        train_cacl(net, rival, dataset, CACL(**common, lr=0.001, momentum=0.9), journal=journal)
        modules = [net, rival]
    elif name == "irn":
        irnet = IRNet(Backbone())
        train_irnet(irnet, dataset, data / "masks", IRN(**common, radius=4, momentum=0.9), journal=journal)
        modules = [irnet]
    else:
        segmenter = DeepLabV2(3, backbone=Backbone())
        train_segmenter(segmenter, dataset, data / "masks", Segment(**common, lr=0.01), journal=journal)
        modules = [segmenter]
    hook.remove()
    return {
        "gradients": gradients,
        "weights": [module.state_dict() for module in modules],
        "pairs": pairs,
        "records": [{k: v for k, v in record.items() if k != "images_per_second"} for record in records],
    }


METHODS = {"clims": CLIMSLoss, "qa": QACLIMSLoss, "pole": POLELoss}
NAMES = ("warmup", "cacl-fixed", "cacl-soft", "cacl-quantile", *METHODS, "irn", "segment")

if __name__ == "__main__":
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    with process_group(torch.device("cpu"), 60):
        results = {name: training(name, data) for name in NAMES}
        torch.save(results, out / f"{world_size()}-{rank()}.pt")
