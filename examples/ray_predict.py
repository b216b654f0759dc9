"""Masks of any number of photos on any number of machines: Ray Data over the exported segmenter.

cacl export my-run --out segmenter.pt2
python examples/ray_predict.py segmenter.pt2 photos --out masks
"""

import argparse
from pathlib import Path

import ray
import torch
from PIL import Image


class Segmenter:
    def __init__(self, model: str, photos: str, out: str) -> None:
        self.photos, self.out, self.net = photos, Path(out), torch.export.load(model).module()

    def __call__(self, row: dict) -> dict:
        photo = torch.from_numpy(row["image"]).permute(2, 0, 1)[None]
        with torch.no_grad():
            mask = self.net(photo).argmax(1)[0].byte().numpy()
        path = self.out / Path(row["path"]).relative_to(self.photos).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
        return {"mask": str(path)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="copies of the network, on all machines together")
    options = parser.parse_args()
    places = [str(path.resolve()) for path in (options.model, options.photos, options.out)]  # all machines see them
    reading = {"ray_remote_args": {"num_cpus": 0.1}}  # beside networks on all cores it would wait for ever
    photos = ray.data.read_images(places[1], mode="RGB", include_paths=True, partitioning=None, **reading)
    masks = photos.map(Segmenter, fn_constructor_args=places, num_cpus=0.9, concurrency=options.workers)
    print(sum(1 for _ in masks.iter_rows()), "masks")
