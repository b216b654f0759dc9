"""Labels and masks that contradict each other, and names in two forms: `check` and a run say the same of them."""

import json
import logging
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv, write_voc
from PIL import Image

from cacl import BackgroundSet, pipeline
from cacl._support.names import existing, without_ending
from cacl.cli import main
from cacl.config import Config
from cacl.datasets import VOC, CSVDataset, Dataset, check, check_folder

NFC, NFD = (unicodedata.normalize(form, "für") for form in ("NFC", "NFD"))


@pytest.fixture
def root(tmp_path):
    return write_csv(tmp_path / "data")


def prepared(root, *settings, stages=()):
    """What a run says before its first step: of none of its stages, unless it is refused."""
    config = Config.load(
        "voc",
        ["data.format=csv", f"data.root={root}", f"run.out={root.parent / 'run'}", "run.workers=0", "run.device=cpu",
         "data.train=train", "data.eval=val", "segment.backbone=", *settings],
    )  # fmt: skip
    try:
        pipeline.run(config, encoder=TinyEncoder(), backbone=TinyBackbone(), stages=stages)
    except ValueError as error:
        return str(error).splitlines()
    return []


def rows(root, edit):
    """Change the cells of every row of dataset.csv, by their number."""
    path = root / "dataset.csv"
    head, *lines = path.read_text().splitlines()
    cells = [edit(i, line.split(",")) for i, line in enumerate(lines)]
    path.write_text("\n".join([head, *map(",".join, cells)]))


def masks(root, edit):
    """Change the values of every mask, by its number."""
    for i in range(9):
        path = root / f"masks/{i}.png"
        Image.fromarray(edit(i, np.array(Image.open(path))).astype(np.uint8)).save(path)


def classes(root, *names):
    (root / "classes.txt").write_text("\n".join(names))


def one_class(root):
    classes(root, "boat")
    rows(root, lambda i, row: [row[0], "boat", *row[2:]])
    masks(root, lambda i, mask: np.where(mask > 0, 255, 0))


def other_list(root):
    """Four classes, and masks of the same names in another order."""
    classes(root, "boat", "train", "cat", "dog")
    rows(root, lambda i, row: [row[0], ("boat", "train", "cat", "dog")[i % 4], *row[2:]])
    masks(root, lambda i, mask: (mask > 0) * (3, 4, 1, 2)[i % 4])


def in_both(root):
    with open(root / "dataset.csv", "a") as file:
        file.write("images/0.png,boat,masks/0.png,val\n")


REFUSED = {
    "one class too many in front": (
        lambda root: classes(root, "bird", "boat", "train"),
        r"split 'train': .* none of the 6 masks shows 'train' \(a label of 4 photos\); .* too small, .* 'bird'",
        2,
    ),
    "values one too large": (
        lambda root: [classes(root, "boat", "train", "cat"), masks(root, lambda i, mask: mask + (mask > 0))],
        r"split 'val': .* shows 'boat' \(a label of 2 photos\); all values .* one too large, .* 'boat'",
        2,
    ),
    "the background drawn as a class": (
        lambda root: [classes(root, "boat", "train", "cat"), masks(root, lambda i, mask: mask + 1)],
        r"split 'train': expected .* but 6 of 6 show other classes; all values seem to be one too large",
        2,
    ),
    "masks of another list": (other_list, r"expected .* but 6 of 6 show other classes; are the masks made for", 2),
    "all objects are 1": (
        lambda root: masks(root, lambda i, mask: mask > 0),
        r"'train' \(a label of 4 photos\); every object has the value 1: write that of its class",
        2,
    ),
    "masks without an object": (
        lambda root: masks(root, lambda i, mask: mask * 0),
        r"'boat' \(a label of 4 photos\), 'train' \(a label of 4 photos\); the masks are all background",
        2,
    ),
    "0 and 255 of one class": (
        one_class,
        r"split 'val': expected masks of 0 .* and 1 for objects, but the 3 masks .* only 0 and 255, .* write 1 in",
        2,
    ),
    "0 and 255 of two classes": (
        lambda root: masks(root, lambda i, mask: np.where(mask > 0, 255, 0)),
        r"split 'train': expected masks of 0 .* write the classes' values, 1 to 2 in place of 255",
        2,
    ),
    "0 and 255 in most masks": (
        lambda root: [one_class(root), masks(root, lambda i, mask: np.where(mask > 0, 1, 0) if i in (0, 7) else mask)],
        "split 'train': expected masks of 0 .* but 5 of the 6 masks hold only 0 and 255, which is void: write 1 in",
        2,
    ),
    "a label of what is void": (  # in photo 2, which shows a boat too
        lambda root: [
            classes(root, "boat", "train", "cat"),
            rows(root, lambda i, row: [row[0], row[1] + ";cat" * (i == 2), *row[2:]]),
            masks(root, lambda i, mask: np.vstack([mask[:-1], mask[-1:] * 0 + 255 * (i == 2)])),
        ],
        r"none of the 6 masks shows 'cat' \(a label of 1 photo\); if its objects are void \(255\) there, take",
        1,
    ),
    "a mask of a photo that its camera turned": (
        lambda root: Image.fromarray(np.array(Image.open(root / "masks/0.png")).T).save(root / "masks/0.png"),
        "0.png: expected 64×48 pixels as the image, but got 48×64; is one of them turned by its EXIF data[?]$",
        1,
    ),
    "no label in the split that is trained on": (
        lambda root: rows(root, lambda i, row: [row[0], row[1] * (i > 5), *row[2:]]),
        r"split 'train': expected photos with labels, .* none of the 6 photos has one",
        1,
    ),
    "names that differ by a capital": (lambda root: classes(root, "boat", "train", "Boat"), "'boat' and 'Boat'$", 1),
    "names that differ by a space": (
        lambda root: classes(root, "boat", "train", "tv set", "tv-set"), "'tv set' and 'tv-set'$", 1,
    ),
    "a photo in two splits": (in_both, r"1 photo is in 'train' and 'val', such as .*images/0.png$", 1),
    "a class without words": (
        lambda root: (root / "backgrounds.json").write_text('{"boat": ["water"]}'),
        r"backgrounds.json: no background words for class 'train'$",
        1,
    ),
    "a broken photo to score": (lambda root: (root / "images/7.png").write_text("x"), "7.png: not an image", 1),
    "a broken photo of a split without masks": (
        lambda root: [rows(root, lambda i, row: [*row[:2], "", row[3]]), (root / "images/7.png").write_text("x")],
        "7.png: not an image",
        1,
    ),
}  # fmt: skip
NAMES = (
    "background", "_background_", "__Background__", "BACKGROUND", "bg", "__ignore__", "void", "unlabeled",
    "ignore_index", "No class", "背景", "Hintergrund",
)  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_check_and_run_refuse_the_same(root, case, capsys):
    edit, message, count = REFUSED[case]
    edit(root)
    problems = [line for line in check_folder(root) if not line.startswith("note: ")]
    assert len(problems) == count
    assert all(line.startswith(str(root)) for line in problems)
    assert any(re.search(message, line) for line in problems), problems
    said = prepared(root, stages=["warmup", "cacl"])
    assert set(said) == set(problems)
    assert not (root.parent / "run/config.toml").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_background_is_no_class(root, name):
    classes(root, name, "boat", "train")
    (line,) = check_folder(root)
    assert line.startswith(f"{root}/classes.txt: expected the names of classes, ")
    assert f"but got {name!r}: the background is 0 and void is 255" in line
    assert prepared(root) == [line]
    assert check(CSVDataset(root, "val")) == [line]


def test_names_that_only_begin_so_are_classes(root):
    classes(root, "boat", "train", "background singer", "avoid", "foreground")
    assert check_folder(root) == []


def test_a_configuration_is_checked_as_it_runs(root, tmp_path, capsys):
    """Words in another place, and other splits, as only it knows."""
    config = tmp_path / "config.toml"
    config.write_text('base = "voc"\n[run]\nout = "run"\n[data]\nformat = "csv"\nroot = "data"\n[cacl]\nbeta = 1.0\n')
    command = ["check", str(config), "--set", "data.train=train", "--set", "data.eval=val"]
    assert main(command) == 0
    (tmp_path / "words.json").write_text('{"train": ["rails"]}')
    assert main([*command, "--set", f"backgrounds.file={tmp_path}/words.json"]) == 2
    assert main([*command, "--set", f"backgrounds.file={tmp_path}/words.json", "--set", "cacl.beta=0.0"]) == 0
    assert main(["check", str(config), "--set", "data.train=test"]) == 2
    classes(root, "boat", "train", "quokka")
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out.count("no problems\n") == 2
    assert f"{tmp_path}/words.json: no background words for class 'boat'\n1 problem\n" in said.out
    assert "no built-in background words for 'quokka'" in said.out
    assert "expected rows of split 'test', but there is train, val" in said.err


NOTED = {
    "masks to score and no labels": (
        lambda root: rows(root, lambda i, row: [row[0], row[1] * (i < 6), *row[2:]]),
        "split 'val': the masks of 3 of 3 photos show classes, but the photos have no labels",
    ),
    "one photo without labels": (
        lambda root: rows(root, lambda i, row: [row[0], row[1] * (i != 4), *row[2:]]),
        "split 'train': the masks of 1 of 6 photos show classes, but the photos have no labels",
    ),
    "one label of several": (  # photos 2 and 5 show both
        lambda root: rows(root, lambda i, row: [row[0], row[1].split(";")[0], *row[2:]]),
        "split 'train': the masks of 2 of 6 photos show other classes than the labels say",
    ),
    "masks of void": (
        lambda root: masks(root, lambda i, mask: mask * 0 + 255 if i > 5 else mask),
        r"split 'val': the 3 masks are void \(255\) everywhere, so nothing is scored",
    ),
    "masks of 0 and 255 of photos without labels": (
        lambda root: [
            rows(root, lambda i, row: [row[0], row[1] * (i < 6), *row[2:]]),
            masks(root, lambda i, mask: np.where(mask > 0, 255, 0) if i > 5 else mask),
        ],
        "split 'val': the 3 masks hold only 0 and 255, which is void, so no class is scored: if 255 is the object, wri",
    ),
}


@pytest.mark.parametrize("case", NOTED)
def test_check_and_run_say_what_may_be_meant(root, case, capsys, caplog):
    edit, message = NOTED[case]
    edit(root)
    notes = check_folder(root)
    assert all(line.startswith(f"note: {root}/dataset.csv: ") for line in notes)
    assert any(re.search(message, line) for line in notes), notes
    assert main(["check", str(root)]) == 0
    assert capsys.readouterr().out.splitlines() == [*notes, "no problems"]
    with caplog.at_level(logging.WARNING, logger="cacl"):
        assert prepared(root) == []
    assert [f"note: {record.message}" for record in caplog.records] == notes
    caplog.clear()
    assert prepared(root) == []  # the same data, once more
    assert not caplog.records


def test_a_few_contradictions_are_real_data(tmp_path):
    """Up to a quarter: objects that are void, too small or behind others; pixels of void tell nothing."""
    root = write_csv(tmp_path, train=8, val=1)
    first = np.array(Image.open(root / "masks/2.png"))
    Image.fromarray(np.where(first == 2, 255, first).astype(np.uint8)).save(root / "masks/2.png")
    Image.fromarray(np.where(first == 1, 0, first).astype(np.uint8)).save(root / "masks/5.png")
    assert check_folder(root) == []
    rows(root, lambda i, row: [row[0], "boat;train" if i in (0, 2, 5) else row[1], *row[2:]])
    assert len(check_folder(root)) == 1  # three of eight


@pytest.mark.parametrize(("name", "refused"), [("Training", 1), ("train_unlabeled", 0), ("untrained", 0)])
def test_splits_that_are_trained_on_by_their_names(root, name, refused):
    rows(root, lambda i, row: [row[0], row[1], "", "train"] if i < 6 else [row[0], "", "", name])
    assert len(check_folder(root)) == refused


def test_labels_and_masks_of_a_split_of_voc(tmp_path):
    write_voc(tmp_path)
    assert check_folder(tmp_path) == []
    for name in ("000004", "000005"):  # val: a train, and both
        path = tmp_path / f"SegmentationClass/2007_{name}.png"
        values = np.array(Image.open(path))
        Image.fromarray(np.where(values > 0, values - 1, 0).astype(np.uint8)).save(path)
    (line,) = check_folder(tmp_path)
    assert line.startswith(f"{tmp_path}/ImageSets/Segmentation/val.txt: split 'val': expected the masks")
    assert "'boat' (a label of 1 photo), 'train' (a label of 2 photos); all values seem to be one too small" in line
    assert check_folder(tmp_path, splits=["train"]) == []
    assert check(VOC(tmp_path, "val")) == [line.replace("split 'val': ", "")]


def test_images_that_are_in_several_splits_are_opened_once(tmp_path, monkeypatch):
    """And count in each."""
    root = write_voc(tmp_path)
    (root / "ImageSets/Segmentation/trainval.txt").write_text("\n".join(f"2007_{i:06}" for i in range(6)))
    for path in (root / "SegmentationClass").iterdir():
        Image.fromarray(np.minimum(np.array(Image.open(path)), 4)).save(path)  # no train anywhere
    opened, image = [], Dataset.image
    monkeypatch.setattr(Dataset, "image", lambda data, i: [opened.append(data.entries[i].id), image(data, i)][1])
    lines = check_folder(root, splits=["train", "val", "trainval"])
    assert len(opened) == 6
    assert [
        "'train' (a label of 2" in lines[0],
        "'train' (a label of 2" in lines[1],
        "'train' (a label of 4" in lines[2],
    ] == [True] * 3


def test_a_table_of_odd_splits(root):
    """Rows without one, and more than anybody has: all are checked at once."""
    rows(root, lambda i, row: [*row[:3], ""])
    assert check_folder(root) == []
    rows(root, lambda i, row: [row[0], "", "", ""])
    assert len(check_folder(root)) == 1
    rows(root, lambda i, row: [row[0], "boat", row[2], f"split {i}"])
    (root / "dataset.csv").write_text(
        "image,labels,mask,split\n" + "\n".join(f"images/0.png,boat,,split {i}" for i in range(21))
    )
    assert {line.rpartition(": ")[2] for line in check_folder(root)} == {"duplicate id images/0"}


def test_only_endings_of_photos_are_endings():
    for name in ("a.jpg", "a.JPEG", "a.tif", "a.webp", "a.avif", "a.jp2", "a.jfif", "a.ppm"):
        assert without_ending(Path("x.1", name)) == Path("x.1/a")
    for name in ("frame.0001", "Dr. Who", "v1.2", ".png", "..png", "2024.01.31"):
        assert without_ending(Path("x.1", name)) == Path("x.1", name)
    Image.init()
    photos = {e for e, kind in Image.registered_extensions().items() if kind in ("JPEG", "PNG", "TIFF", "JPEG2000")}
    assert len(photos) > 10
    assert {without_ending(Path(f"a{ending}")).name for ending in photos} == {"a"}


def test_frames_without_an_ending(root):
    for i in range(9):
        (root / f"images/{i}.png").rename(root / f"images/frame.{i:04}")
    rows(root, lambda i, row: [f"images/frame.{i:04}", *row[1:]])
    assert [entry.id for entry in CSVDataset(root).entries] == [f"frame.{i:04}" for i in range(9)]
    assert check_folder(root) == []


@pytest.mark.parametrize(("written", "there"), [(NFC, NFD), (NFD, NFC)])
def test_one_name_in_two_forms(root, written, there):
    """Photos, their folders, masks, labels, splits and background words."""
    (root / there).mkdir()
    (root / "images/0.png").rename(root / f"{there}/{there}.png")
    (root / "masks/0.png").rename(root / f"masks/{there}.png")
    classes(root, there, "train")

    def edit(i, row):
        own = [f"{written}/{written}.png", f"masks/{written}.png"] if i == 0 else [row[0], row[2]]
        return [own[0], row[1].replace("boat", written), own[1], row[3].replace("train", written)]

    rows(root, edit)
    (root / "backgrounds.json").write_text(json.dumps({written: ["water"], "train": ["rails"]}))
    assert check_folder(root) == []
    assert prepared(root, f"data.train={there}") == []
    data = CSVDataset(root, there)
    assert data.classes == (NFC, "train")
    assert len(data) == 6
    assert data.entries[0].id == f"{NFC}/{NFC}"
    assert data[0].mask.unique().tolist() == [0, 1]
    other = data.with_masks(root / "made").entries[0].mask
    assert other == root / f"made/{NFC}/{NFC}.png"


def test_one_name_in_two_forms_is_there_twice(root):
    (root / "classes.txt").write_text(f"{NFC}\ntrain\n{NFD}\n")
    (root / "images/0.png").rename(root / f"images/{NFC}.png")
    (root / "images/1.png").rename(root / f"images/{NFD}.png")
    rows(root, lambda i, row: [f"images/{(NFC, NFD)[i]}.png" if i < 2 else row[0], "train", *row[2:]])
    with pytest.raises(ValueError, match=f"duplicate class '{NFC}'\n.*: duplicate id images/{NFC}$"):
        CSVDataset(root)
    with pytest.raises(ValueError, match="same class"):
        BackgroundSet({NFC: ["water"], NFD: ["pier"]})
    with pytest.raises(ValueError, match="stands twice"):
        BackgroundSet({"boat": [NFC, NFD]})


def test_ids_of_voc_in_two_forms(tmp_path):
    write_voc(tmp_path)
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
        (tmp_path / f"{folder}/2007_000000.{ending}").rename(tmp_path / f"{folder}/{NFC}.{ending}")
    path = tmp_path / "ImageSets/Segmentation/train.txt"
    path.write_text(path.read_text().replace("2007_000000", NFD))
    data = VOC(tmp_path, "train")
    assert data.entries[0].id == NFC
    assert data[0].mask.unique().tolist() == [0, 4]


def test_a_path_that_is_nowhere_stays(tmp_path):
    assert existing(tmp_path / NFD / NFD) == tmp_path / NFD / NFD
    (tmp_path / NFC).mkdir()
    assert existing(tmp_path / NFD) == tmp_path / NFC
    assert existing(tmp_path / "x") == tmp_path / "x"
