"""CA-CL on PASCAL VOC 2012 with the paper's settings: warm-up, CA-CL training, CAMs, mean IoU.

    python examples/train_voc.py --data-root VOCdevkit/VOC2012

Stopped and started again with the same arguments, it goes on where it was.
"""

import argparse
from pathlib import Path

import torch

from cacl import (
    BackgroundSet,
    BGSuppressionLoss,
    CAMNet,
    ContextSelector,
    ITCLoss,
    PromptSet,
    RegionLoss,
    load_encoder,
    split_regions,
)
from cacl.constants import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from cacl.datasets import VOC
from cacl.loading import Batch
from cacl.log import Journal, Log
from cacl.settings import Machine
from cacl.stages.cams import evaluate_cams, make_cams
from cacl.stages.warmup import train_classifier
from cacl.tables import Warmup
from cacl.training import Loop, train
from cacl.transforms import RandomView


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="the folder with JPEGImages, such as VOCdevkit/VOC2012")
    parser.add_argument("--out", type=Path, default=Path("cacl-voc"))
    parser.add_argument("--train", default="train_aug", help="the split to train on")
    parser.add_argument("--eval", default="train", help="the split to score CAMs on")
    parser.add_argument("--encoder", default="ViT-B/32", help="a CLIP model's name, or a checkpoint's path")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--weights", default="IMAGENET1K_V1", help="of the backbone; empty for random ones")
    parser.add_argument("--warmup-epochs", type=float, default=5)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = Machine(device, args.workers)
    images = VOC(args.data_root, args.train)
    encoder = load_encoder(args.encoder, device=device)
    net = CAMNet(20, backbone=args.backbone, weights=args.weights or None).to(device)
    log = Log(args.out / "log.jsonl")
    key = str(vars(args))  # of the checkpoints: those of other arguments are not used

    # A multi-label classifier first: its CAMs are where CA-CL starts.
    warmup = Warmup(epochs=args.warmup_epochs, batch_size=args.batch_size, crop=args.crop)
    train_classifier(net, images, warmup, machine=machine, journal=Journal(args.out / "warmup.pt", key, log))

    # Texts are encoded once: K × m prompts (eq. 3) and K × m·n background prompts (eq. 8).
    prompts, backgrounds = PromptSet(), BackgroundSet.voc(5)
    select = ContextSelector(prompts.encode(encoder, images.classes))
    background_text = backgrounds.encode(encoder, images.classes, prompts)
    itc, bgs, region = ITCLoss(margin=0.5), BGSuppressionLoss(0.26).to(device), RegionLoss()
    # From ImageNet's statistics to the encoder's.
    scale = (torch.tensor(IMAGENET_STD) / torch.tensor(CLIP_STD)).view(3, 1, 1).to(device)
    shift = ((torch.tensor(IMAGENET_MEAN) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).view(3, 1, 1).to(device)

    def step(batch: Batch) -> dict[str, torch.Tensor]:
        cams = net(batch.images).cams  # eq. 1
        regions = split_regions(batch.images * scale + shift, cams, batch.labels, size=encoder.image_size)  # eq. 2
        features = encoder.encode_image(torch.cat((regions.foreground, regions.background)))
        foreground, background = features.chunk(2)
        text = select(foreground, regions.class_index).text  # eq. 3-5
        terms = {
            "itc": itc(foreground, background, text),  # eq. 6-7
            "bgs": bgs(foreground, background_text[regions.class_index]),  # eq. 9-12
            "region": region(cams),  # eq. 13
        }
        return {"loss": 40 * terms["itc"] + terms["bgs"] + 0.4 * terms["region"], **terms}  # eq. 14

    net.train()
    optimizer = torch.optim.SGD(net.parameter_groups(2.5e-4), weight_decay=1e-4)
    modules = {"net": net, "select": select}
    loop = Loop(args.epochs, args.batch_size, RandomView(args.crop), workers=args.workers, device=device)
    train(step, modules, optimizer, images, loop, name="cacl", log=log, checkpoint=args.out / "cacl.pt", key=key)

    make_cams(net, images, args.out / "cams", machine=machine)
    sweep = evaluate_cams(net, VOC(args.data_root, args.eval), machine=machine)
    miou, (score, best) = sweep.miou(0.15), sweep.oracle
    print(f"CAM mIoU {100 * miou:.1f} % ({args.eval}, {sweep.images} images, background score 0.15, no CRF)")
    print(f"oracle {100 * best:.1f} % at background score {score}")


if __name__ == "__main__":  # loader processes may import this file
    main()
