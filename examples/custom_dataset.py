"""Own photos with image-level tags: describe them, check them, choose background words, train.

    python examples/custom_dataset.py PHOTOS --out my-run

PHOTOS is a folder with one folder a class (PHOTOS/boat/1.jpg, PHOTOS/train/2.jpg, …). For photos that show several
classes, write dataset.csv yourself: its labels column takes "boat;train".
"""

import argparse
import csv
import json
from pathlib import Path

from cacl import BackgroundSet, pipeline
from cacl.config import Config
from cacl.datasets import CSVDataset, check_folder
from cacl.folders import find_photos, is_litter


def describe(root: Path) -> list[Path]:
    """Write the tables of a folder with one folder a class; what systems leave in folders is no class and no photo."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_litter(path.name, folder=True)]
    found = {folder: find_photos(folder) for folder in folders}
    problems = [line for each in found.values() for line in each.problems]
    problems += [f"{folder}: no photos here" for folder, each in found.items() if not each.photos]
    classes, rows = root / "classes.txt", root / "dataset.csv"
    if classes.exists():
        problems.append(f"{classes}: expected dataset.csv beside it; write that too, or remove this")
    if problems or not folders:
        raise SystemExit("\n".join(problems) or f"{root}: expected one folder a class")
    for file in (file for each in found.values() for file in each.others):
        print(f"{file}: left out")
    classes.write_text("\n".join(folder.name for folder in folders) + "\n", encoding="utf-8")
    with open(rows, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "labels", "mask", "split"])
        for folder, each in found.items():
            table.writerows([photo.relative_to(root).as_posix(), folder.name, "", "train"] for photo in each.photos)
    return [classes, rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", default="my-run")
    parser.add_argument("--words", type=Path, help="JSON {class: [background words]}; asked for if it is not there")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    args = parser.parse_args()

    # 1. classes.txt and dataset.csv, unless you wrote them. Masks are optional, and only ever looked at to evaluate.
    tables = [] if (args.photos / "dataset.csv").exists() else describe(args.photos)

    # 2. Every file is opened once, and every problem listed; what only a note says, the run says too.
    if problems := [line for line in check_folder(args.photos, progress=True) if not line.startswith("note: ")]:
        for table in tables:  # the next call looks at the folder anew
            table.unlink()
        raise SystemExit("\n".join(problems))
    classes = CSVDataset(args.photos).classes

    # 3. Background words: what tends to be seen with a class and is not it. Ask a language model, read its answer.
    words = args.words or args.photos / "backgrounds.json"
    if not words.is_file():
        answers = {}
        for name in classes:
            print(BackgroundSet.query(name, 5))
            answers[name] = BackgroundSet.parse(input("answer, with commas: "))
        BackgroundSet(answers)  # refuses words that are classes
        words.write_text(json.dumps(answers, indent=2), encoding="utf-8")

    # 4. The settings for one's own photos: without a mask there is nothing to tune, and nothing that has to be.
    settings = {"run.out": args.out, "data.root": args.photos, "backgrounds.file": words}
    config = Config.load("own", [*(f"{key}={value}" for key, value in settings.items()), *args.set])
    result = pipeline.run(config)
    print(result.summary())
    print(f"masks of the photos: {result.out / 'predict'}")
    print(f"a segmenter for others: cacl predict {result.out} MORE_PHOTOS --out MASKS")


if __name__ == "__main__":  # loader processes may import this file
    main()
