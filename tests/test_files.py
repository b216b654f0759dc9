"""What is looked at of a data set's files before anything is learned from them, and what tells data that changed."""

import logging
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv

from cacl import pipeline
from cacl.artifacts import to_make
from cacl.cli import main
from cacl.config import Config
from cacl.datasets import CSVDataset, Dataset, check_folder, open_dataset
from cacl.datasets.files import fingerprint, missing, spread
from cacl.runs import checking
from cacl.runs.session import Session


@pytest.fixture
def root(tmp_path):
    return write_csv(tmp_path / "data", train=10, val=2)


@pytest.fixture
def asked(monkeypatch):
    """The photos and masks that were asked for their size and time."""
    paths, stat = [], Path.stat

    def look(path, **options):
        if path.suffix == ".png":
            paths.append(path.name)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", look)
    return paths


def touched(path):
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def test_a_sample_is_spread_evenly():
    assert list(spread(10, 3)) == [0, 3, 6]
    assert list(spread(3, 10)) == list(spread(3, 3)) == list(spread(3, None)) == [0, 1, 2]
    assert len(set(spread(1000, 999))) == 999


def test_what_is_as_it_was_is_looked_at_in_a_sample(root, asked):
    """Photos 0, 3 and 6, each with its mask; then all of them, as soon as one of those is another."""

    def look(known=None, sample=3):
        asked.clear()
        return fingerprint(CSVDataset(root, "train"), sample=sample, known=known)

    first = look()
    asked.clear()
    assert fingerprint(data := open_dataset("csv", root, "train", look=False), sample=3) == first
    assert len(asked) == 20
    assert (first.images, first.masks) == (data.fingerprint(), data.fingerprint(masks=True))

    def again(known=first):
        data = open_dataset("csv", root, "train", look=False)
        asked.clear()
        return fingerprint(data, sample=3, known=known._asdict())

    assert again() == first
    assert sorted(asked) == sorted(2 * ["0.png", "3.png", "6.png"])
    touched(root / "images/1.png")  # not one of those
    assert again() == first
    assert again(first._replace(listed="")).images != first.images
    touched(root / "masks/3.png")
    second = again()
    assert len(asked) == 6 + 20
    assert all(one != other for one, other in zip(first[1:], second[1:], strict=True))
    assert second.listed == first.listed
    (root / "dataset.csv").write_text((root / "dataset.csv").read_text().replace("0.png,boat,", "0.png,train,"))
    assert again(second).images != second.images
    assert len(asked) == 20


def test_a_fingerprint_of_a_list_of_ones_own(root):
    """Entries need not be in the memory of this package, nor what was written down be sound."""
    data = CSVDataset(root, "train")
    own = Dataset(data.classes, data.entries)
    own.entries = list(data.entries)
    known = fingerprint(own, sample=2)
    assert known == fingerprint(data, sample=2)
    assert fingerprint(own, sample=2, known={"listed": known.listed}) == known
    assert fingerprint(own, sample=2, known=known._asdict()) == known


def test_what_is_missing_is_named_once(root):
    data = open_dataset("csv", root, "train", look=False)
    assert missing(data.entries) == []
    (root / "images/4.png").unlink()
    (root / "images/4.png").mkdir()
    (root / "masks").rename(root / "moved")
    lines = [f"{root / 'masks'}: no such folder", f"{root / 'images/4.png'}: no such file"]
    assert missing(data.entries) == lines
    for use in (data.fingerprint, lambda: fingerprint(data, sample=2), lambda: CSVDataset(root, "train")):
        with pytest.raises(ValueError, match="no such") as error:
            use()
        assert str(error.value).splitlines() == lines
    assert set(check_folder(root)) == set(lines)
    assert len(open_dataset("csv", root, "train", look=False)) == 10


def config(root, *more):
    settings = ["data.format=csv", f"data.root={root}", f"run.out={root.parent / 'run'}", "run.workers=0"]
    settings += ["run.device=cpu", "data.train=train", "data.eval=val", "segment.backbone=", "data.sample=4"]
    return Config.load("voc", [*settings, *more])


def start(config):
    pipeline.run(config, encoder=TinyEncoder(), backbone=TinyBackbone(), stages=())


def test_a_run_looks_at_every_file_once(root, asked, monkeypatch, caplog):
    """It opens a sample, says so, and is content with that sample's sizes and times from then on."""
    opened, image = [], Dataset.image
    monkeypatch.setattr(Dataset, "image", lambda data, i: [opened.append(data.entries[i].id), image(data, i)][1])
    caplog.set_level(logging.WARNING, "cacl")
    start(config(root))
    assert sorted(opened) == sorted(["0", "2", "5", "7", "10", "11"])
    assert "split 'train': 4 of 10 photos were opened" in caplog.text
    assert len(asked) == 2 * 12
    asked.clear()
    opened.clear()
    caplog.clear()
    start(config(root))
    assert (len(asked), opened, caplog.text) == (2 * 6, [], "")
    touched(root / "images/5.png")
    start(config(root))
    assert len(opened) == 6
    (root / "images/3.png").unlink()
    start(config(root))  # as it is not in the sample
    with pytest.raises(ValueError, match=r"images/3.png: no such file$"):
        start(config(root, "data.sample=5"))


def test_files_are_not_asked_for_where_there_is_none(root, tmp_path, monkeypatch):
    data, out = CSVDataset(root, "train"), tmp_path / "out"
    asked, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: [asked.append(path), is_file(path)][1])
    assert to_make(data, out, ".png", keep=True) == list(range(10))
    out.mkdir()
    assert to_make(data, out, ".png", keep=True) == list(range(10))
    assert asked == []
    (out / "3.png").touch()
    assert to_make(data, out, ".png", keep=True) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert to_make(data, out, ".png", keep=False) == list(range(10))


def test_check_opens_a_sample(root, tmp_path, monkeypatch, capsys):
    opened, image = [], Dataset.image
    monkeypatch.setattr(Dataset, "image", lambda data, i: [opened.append(data.entries[i].id), image(data, i)][1])
    path = tmp_path / "config.toml"
    path.write_text(config(root).to_toml(tmp_path))
    for what in (root, path):
        opened.clear()
        assert main(["check", str(what), "--sample", "3"]) == 0
        assert sorted(opened) == sorted(["0", "3", "6", "10", "11"])
        said = capsys.readouterr().out
        assert re.search(r"^note: .*split 'train': 3 of 10 photos were opened$", said, re.MULTILINE)
        assert said.endswith("no problems\n")
    (root / "images/9.png").unlink()
    assert main(["check", str(root), "--sample", "3"]) == 2
    assert "images/9.png: no such file\n" in capsys.readouterr().out
    assert main(["check", str(root), "--sample", "0"]) == 2
    assert capsys.readouterr().err == "cacl: --sample: expected at least 1 image, but got 0\n"


def test_a_class_that_a_sample_does_not_show_is_a_note(root):
    """It may be in the photos that were not opened."""
    rows = (root / "dataset.csv").read_text().replace("images/0.png,boat", "images/0.png,boat;train")
    (root / "dataset.csv").write_text(rows)
    assert check_folder(root, splits=["train"]) == []
    lines = check_folder(root, sample=3, splits=["train"])
    assert all(line.startswith("note: ") for line in lines)
    assert any("none of the 3 masks shows 'train' (a label of 1 photo), of those that were opened" in e for e in lines)


def test_a_list_of_other_folders_is_another_one(root, tmp_path):
    """Though files have the same names, sizes and times; where all of it lies does not count."""
    first = fingerprint(open_dataset("csv", root, "train"), sample=3)
    moved = root.rename(tmp_path / "elsewhere")
    assert fingerprint(open_dataset("csv", moved, "train"), sample=3) == first
    shutil.copytree(moved / "masks", moved / "others")
    table = moved / "dataset.csv"
    table.write_text(table.read_text().replace("masks/", "others/"))
    assert fingerprint(open_dataset("csv", moved, "train"), sample=3).listed != first.listed


def test_a_restart_looks_at_all_again(root):
    def again(*more):
        pipeline.run(config(root, *more), encoder=TinyEncoder(), backbone=TinyBackbone(), stages=(), resume=False)

    start(config(root))
    path = root / "images/1.png"
    path.write_bytes(b"no photo")
    start(config(root))  # it is not in the sample
    again()
    with pytest.raises(ValueError, match=r"images/1.png: not an image that decodes"):
        again("data.sample=20")
    (root / "images/3.png").unlink()
    start(config(root))
    with pytest.raises(ValueError, match=r"images/3.png: no such file"):
        again()


def test_lists_of_splits_without_masks_count_too(root):
    table = root / "dataset.csv"
    rows = [re.sub(r"masks/[0-9]+.png,val$", ",val", line) for line in table.read_text().splitlines()]
    table.write_text("\n".join(rows))
    start(config(root, "predict.split=train"))
    table.write_text("\n".join([*rows, "images/0.png,boat,,val"]))
    with pytest.raises(ValueError, match="expected each photo in one split"):
        start(config(root, "predict.split=train"))


def test_each_machine_looks_for_its_files(root, monkeypatch):
    """Rank 0 looks itself; of the others the first on a machine, at all files or, where the data are known, at some."""

    def look(rank, local):
        session = Session(config(root))
        _ = session.fingerprints
        path = root / "images/3.png"
        path.rename(root / "gone")
        monkeypatch.setattr(checking, "rank", lambda: rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        try:
            checking.check_elsewhere(session, known=checking.are_known(session))
        finally:
            (root / "gone").rename(path)

    look(0, "0")
    look(3, "1")
    with pytest.raises(ValueError, match=r"images/3.png: no such file$"):
        look(2, "0")
    start(config(root))
    look(2, "0")  # it is not in the sample
