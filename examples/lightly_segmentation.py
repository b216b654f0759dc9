"""A segmenter of LightlyTrain on the pseudo masks of a run, with the photos that `cacl labels --format coco` links."""

import argparse
from pathlib import Path

import lightly_train

from cacl.config import Config
from cacl.datasets import open_dataset

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="dinov2/vits14-eomt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    data = Config.of_run(options.run).data
    names = ["background", *open_dataset(data.format, data.root, data.train).classes]
    # It wants a split to look at its own progress; where nobody has masks, that is how far it follows these.
    split = {"images": str(options.labels / data.train), "masks": str(options.run / "masks/train")}
    lightly_train.train_semantic_segmentation(
        out=options.out,
        model=options.model,
        steps=options.steps,
        batch_size=options.batch_size,
        data={"train": split, "val": split, "classes": dict(enumerate(names))},
    )
