"""Photos by the million: folders, files and lists, gone through without being held; parts of them; what is kept."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cacl import CAMNet
from cacl._support.loaders import load
from cacl.cli import main
from cacl.deeplab import DeepLabV2
from cacl.inputs import Inputs, Shard
from cacl.photos import save_segmenter
from cacl.predict import predict, predict_each


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    all_ = ("a.png", "b.png", "sub/a.png", "sub/deep/c.png", "d.jpg", "e.png", "f.png", "g.png")
    for i, name in enumerate(all_):  # of different sizes, so that each has another mask
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (33 + i, 40, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_segmenter(path, DeepLabV2(3, backbone="scenes", weights=None), ("boat", "cat"), "scenes")
    return path


def names(inputs):
    return [each if isinstance(each, str) else each.name.as_posix() for each in inputs]


def test_a_list_says_what_its_photos_are_called(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    lines = ["a.png", "sub/a.png", "", "./sub/../b.png", str(photos / "d.jpg"), "../photos/e.png"]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    inside = photos.relative_to(photos.anchor).as_posix()
    wanted = ["a", "sub/a", "b", f"{inside}/d", f"{inside}/e"]
    assert names(Inputs([], tmp_path / "out", listed=tmp_path / "list.txt")) == wanted
    given = io.BytesIO((tmp_path / "list.txt").read_bytes())  # as standard input: it is gone through twice
    inputs = Inputs([], tmp_path / "out", listed=given)
    assert inputs.survey.photos == 5
    assert names(inputs) == names(inputs) == wanted
    both = Inputs(["sub"], tmp_path / "out", listed=io.BytesIO(b"g.png\n"))
    assert names(both) == ["a", "deep/c", "g"]


def test_names_that_are_not_a_photos_own(photos, tmp_path):
    listed = io.BytesIO("\n".join(["x/a.jpg", "x/a.png", "y/a.jpg", "x/a.jpg"]).encode())
    assert names(Inputs([], tmp_path / "out", listed=listed)) == [
        "x/a.jpg",
        "x/a.png",
        "y/a",
    ]  # the last was there before
    assert names(Inputs([photos, photos / "sub"], tmp_path / "out")) == [
        "a",
        "b",
        "d",
        "e",
        "f",
        "g",
        "sub/a",
        "sub/deep/c",
    ]
    with pytest.raises(ValueError, match=r"sub/a.png and .*photos/a.png: expected photos of different names"):
        _ = Inputs([photos / "sub/a.png", photos / "a.png"], tmp_path / "out").survey
    listed = io.BytesIO(b"a.jpg.png\na.jpg\na.png\n")  # a.jpg and a.png keep their endings, and so do those of a.jpg
    with pytest.raises(ValueError, match=r"a.jpg.png and .*a.jpg: expected photos of different names"):
        _ = Inputs([], tmp_path / "out", listed=listed).survey


@pytest.mark.posix
def test_a_link_is_a_photo_of_its_own(photos, tmp_path):
    os.symlink(photos / "a.png", photos / "link.png")
    assert names(Inputs([photos], tmp_path / "out"))[-3:] == ["link", "sub/a", "sub/deep/c"]
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "out/kept.png", photos / "kept.png")  # its mask would be written over what it leads to
    with pytest.raises(ValueError, match=r"photos/kept.png: expected another folder `out`"):
        _ = Inputs([photos], tmp_path / "out").survey
    other = tmp_path / "out/overlays/b.jpg"
    with pytest.raises(ValueError, match=r"overlays/b.jpg: expected another folder `out`"):
        _ = Inputs([other.parent.parent], tmp_path / "out", listed=io.BytesIO(f"{other}\nb.png".encode())).survey


@pytest.mark.parametrize("of", [1, 2, 5])
def test_parts_have_each_photo_once_in_any_order(tmp_path, of):
    lines = [f"folder/{i}.jpg" for i in range(200)]
    found = Counter()
    for number in range(1, of + 1):
        random.Random(number).shuffle(lines)  # each process may see another order, and what came meanwhile
        more = [*lines, *(f"new/{i}.jpg" for i in range(number))]
        inputs = Inputs([], tmp_path, listed=io.BytesIO("\n".join(more).encode()), shard=Shard(number, of))
        mine = names(inputs)
        assert len(mine) == inputs.survey.photos > 200 / of / 2
        found.update(name for name in mine if name.startswith("folder"))
    assert found == dict.fromkeys((f"folder/{i}" for i in range(200)), 1)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (1, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (4, 4)),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}, (1, 8)),
        ({"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}, (8, 8)),
        (
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
             "SLURM_ARRAY_TASK_STEP": "4"},
            (3, 3),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4",
          "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}, (6, 8)),
    ],
)  # fmt: skip
def test_the_part_of_a_process(environment, wanted):
    assert tuple(Shard.of_process(environment)) == wanted


@pytest.mark.parametrize("id", ["3", "5"])
def test_an_array_with_gaps_has_no_parts(id):
    array = {"SLURM_ARRAY_TASK_ID": id, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3",
             "SLURM_ARRAY_TASK_MAX": "5"}  # fmt: skip
    with pytest.raises(ValueError, match=r"an array with gaps has no 2 parts .* say the part by --shard"):
        Shard.of_process(array)


def test_a_photo_that_is_named_twice_is_of_one_part(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = b"photos/a.png\nphotos/b.png\nphotos/sub/a.png\n"
    found = [
        name for number in (1, 2, 3)
        for name in names(Inputs(["photos"], tmp_path / "out", listed=io.BytesIO(listed), shard=Shard(number, 3)))
    ]  # fmt: skip
    assert sorted(found) == ["a", "b", "d", "e", "f", "g", "sub/a", "sub/deep/c"]


@pytest.mark.posix
def test_a_list_that_can_be_read_once(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"a.png\nb.png\n")
    os.close(writing)
    inputs = Inputs([], tmp_path, listed=f"/dev/fd/{reading}")
    os.close(reading)
    assert inputs.survey.photos == 2
    assert names(inputs) == ["a", "b"]


def test_odd_lines_of_a_list(model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    long = "x" * 300
    made = predict_each(model, [], tmp_path / "out", listed=io.BytesIO(f"a.png\n{long}\n".encode()), workers=0)
    outcomes = list(made)
    assert [outcome.mask is not None for outcome in outcomes] == [True, False]
    with pytest.raises(ValueError, match=r"^line 2 of the list: .* zero byte$"):
        predict_each(model, [], tmp_path / "out", listed=io.BytesIO(b"a.png\nb.png\0c.png"))
    name = "y" * 252 + ".im"  # a mask's would be longer
    (photos / name).write_bytes((photos / "a.png").read_bytes())
    (outcome,) = predict_each(model, [name], tmp_path / "out", crf=False, workers=0)
    assert outcome.problem.endswith("the name of its mask would be too long")


def test_photos_may_come_after_an_option(model, photos, tmp_path, capsys):
    assert main(["predict", str(model), "--workers=0", "--no-crf", "--out", str(tmp_path / "o"), str(photos)]) == 0
    assert len(made(tmp_path / "o")) == 8
    with pytest.raises(SystemExit):
        main(["predict", str(model), str(photos), "--out", str(tmp_path / "o"), "--nothing"])
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err
    failures = tmp_path / "o/failures.txt"
    failures.write_text("a.png")
    assert main(["predict", str(model), "--list", str(failures), "--out", str(tmp_path / "o")]) == 2
    assert failures.read_text() == "a.png"


def test_an_error_of_the_keys_is_not_one_of_processes():
    def keys():
        yield from range(3)
        raise OSError("of the keys")

    loaded = load(list(range(10)), workers=2, keys=keys())
    with pytest.raises(OSError, match="of the keys"):
        list(loaded)


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_parts_that_are_none(text):
    with pytest.raises(ValueError, match=r"Expected argument `shard` to be a part such as 2/8"):
        Shard.parse(text)


def test_photos_are_not_held(tmp_path):
    """Some 100 bytes a photo for a moment, where its path alone takes 200."""
    folder = "a folder with a long name/" * 6
    used = []
    for count in (500, 5_000):
        (tmp_path / "list").write_text("".join(f"{folder}{i:08}.jpg\n" for i in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in Inputs([], tmp_path, listed=tmp_path / "list", shard=Shard(1, 2))) > 0.4 * count
        used.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (used[1] - used[0]) / 4_500 < 120


def test_lists_that_are_none(model, photos, tmp_path, capsys):
    assert main(["predict", str(model), "--list", str(tmp_path / "gone"), "--out", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == f"cacl: {tmp_path / 'gone'}: expected a list of photos, but No such file or directory\n"
    )
    (tmp_path / "empty").write_text("\n\n")
    assert main(["predict", str(model), "--list", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "cacl: Expected photos, but none was named.\n"
    assert main(["predict", str(model), str(photos), "--shard", "3/2", "--out", str(tmp_path / "out")]) == 2
    assert "to be a part such as 2/8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def made(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_what_is_there_is_kept(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["predict", str(model), str(photos), "--out", str(out), "--no-crf", "--workers=0"]
    assert main(command) == 0
    whole = made(out)
    (out / "sub/a.png").unlink()
    (out / "b.png").write_bytes(b"mine")
    assert main([*command, "--keep"]) == 0
    assert "1 mask in" in (said := capsys.readouterr().out)
    assert "7 kept, 0 left out" in said
    assert made(out) == {**whole, "b.png": b"mine"}
    assert main([*command, "--keep", "--overlay"]) == 0  # no overlay is there yet
    assert "8 masks in" in capsys.readouterr().out
    assert made(out) == whole
    found = predict(model, [photos], out, crf=False, workers=0, keep=True)
    assert (found.masks, found.kept) == ([], 8)


@pytest.mark.posix
@pytest.mark.slow
def test_parts_make_the_files_of_one_process(model, photos, tmp_path, monkeypatch):
    """A list of links, in parts, one of which is killed and started again; one photo is broken."""
    (tmp_path / "links").mkdir()
    pictures = sorted(photos.rglob("*.png"))
    for i in range(60):
        os.symlink(pictures[i % len(pictures)], tmp_path / f"links/{i:03}.png")
    (tmp_path / "links/061.png").write_text("broken")
    monkeypatch.chdir(tmp_path)
    Path("list").write_text("".join(f"{path}\n" for path in sorted(Path("links").iterdir())))
    command = [
        sys.executable,
        "-m",
        "cacl",
        "predict",
        str(model),
        "--list",
        "list",
        "--no-crf",
        "--workers=0",
        "--out",
    ]
    assert subprocess.run([*command, "whole"], capture_output=True, check=False).returncode == 2
    part = [*command, "parts", "--shard", "1/3", "--keep"]
    process = subprocess.Popen(part, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not made(Path("parts")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in Path("parts").rglob("*.png")}
    codes = []
    for number in (1, 2, 3):
        part[-2] = f"{number}/3"
        codes.append(subprocess.run(part, capture_output=True, check=False).returncode)
    assert sorted(codes) == [0, 0, 2]
    assert made(Path("parts")) == made(Path("whole"))
    assert len(made(Path("whole"))) == 60
    assert len(set(made(Path("whole")).values())) == len(pictures)
    assert before
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    (failed,) = Path("parts").glob("failures-?-of-3.txt")
    assert failed.read_text() == Path("whole/failures.txt").read_text()
    assert failed.read_text().startswith("links/061.png: not an image")


@pytest.mark.slow
def test_processes_of_torchrun_take_their_parts(model, photos, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cacl", "predict",
        str(model), str(photos), "--out", str(tmp_path / "out"), "--no-crf",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "part 1 of 2: " in found.stdout
    assert "part 2 of 2: " in found.stdout
    predict(model, [photos], tmp_path / "one", crf=False, workers=0)
    assert made(tmp_path / "out") == made(tmp_path / "one")


def test_nothing_is_made_before_it_is_asked_for(model, photos, tmp_path):
    making = predict_each(model, [photos], tmp_path / "out", crf=False, workers=0, shard=Shard(1, 1))
    assert not (tmp_path / "out").exists()
    assert making.survey.photos == 8
    first = next(iter(making))
    assert first.mask == tmp_path / "out/a.png"
    assert len(made(tmp_path / "out")) == 1


def test_a_network_for_cams_is_no_segmenter(photos, tmp_path):
    torch.save(CAMNet(2, backbone="scenes", weights=None).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt"):
        predict_each(tmp_path / "net.pt", [photos], tmp_path / "out")
