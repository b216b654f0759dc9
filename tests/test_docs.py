"""The documentation: every snippet runs as it stands, every message is a real one, every link holds, the site builds.

A page's snippets run in their order in one working folder, the Python ones in one namespace. A snippet with
``title="FILE"`` (or a first line ``# FILE``) is also written to that file, for those after it. So that this takes
seconds, the working folder holds small stand-ins (:func:`place`), and each configuration is small (:data:`SMALL`).
A snippet in an unknown language and an unknown command fail.
"""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import types
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from bad_files import png
from conftest import TinyBackbone, TinyEncoder
from drawn import picture, write_csv, write_voc
from PIL import Image

import cacl
from cacl import BackgroundSet, CACLLoss, CAMNet, ablate, cli, load_encoder, pipeline
from cacl._support import loaders, pool, waiting
from cacl._support.distributed import _reported
from cacl._support.surroundings import training_alone
from cacl._support.weights import check_takes_part
from cacl.config import Config, config_class
from cacl.crf import check_backend
from cacl.datasets import VOC, CSVDataset, check_folder
from cacl.deeplab import DeepLabV2
from cacl.figures.style import check_report
from cacl.images import VOC_COLOURS
from cacl.irn import IRNet
from cacl.loading import load_images
from cacl.methods import CLIMSLoss
from cacl.photos import load_segmenter, save_segmenter
from cacl.scenes import generate
from cacl.settings import Training
from cacl.stages.cams import evaluate_cams
from cacl.stages.chain import CHAIN
from cacl.trackers import check_trackers
from cacl.voc_archive import export_voc

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Commands of the documentation that `cacl` does not have yet; their snippets are not run.
COMMANDS_TO_COME: tuple[str, ...] = ()
SLOW = (
    "docs/how-to/clusters.md",
    "docs/how-to/labels.md",
    "docs/how-to/many-gpus.md",
    "docs/how-to/segmentation.md",
    "docs/how-to/sharing.md",
    "docs/results/ablations.md",
)

LOAD = Config.load
SMALL = [
    "run.device=cpu", "run.workers=0", "run.precision=fp32", "scenes.train=4", "scenes.val=2", "scenes.size=64",
    "camnet.backbone=scenes", "camnet.weights=", "segment.backbone=", "cams.scales=[1.0]", "cams.flip=false",
    *(f"{stage}.{setting}" for stage in ("warmup", "cacl", "irn", "segment")
      for setting in ("epochs=1", "batch_size=2", "crop=32")),
]  # fmt: skip
SMALL_EXAMPLE = {
    "examples/train_voc.py": "--backbone scenes --weights= --warmup-epochs 1 --epochs 1 --crop 32 --batch-size 2 "
    "--workers 0",
    "examples/custom_dataset.py": "",  # has a configuration
}


class Snippet(NamedTuple):
    language: str
    file: str | None
    code: str


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\S*)(?: title=\"([^\"\n]+)\")?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert 2 * len(found) == text.count("```"), f"{page}: a fence that this test does not understand"
    result = []
    for language, title, code in found:
        first = re.match(r"# ([\w./-]+\.(?:toml|py))\n", code)
        result.append(Snippet(language, title or (first and first[1]) or None, code))
    return result


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def clip_file(clip_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip_state, path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch, clip_file):
    """A working folder with what the snippets need, small; nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B").mkdir()
    shutil.copy(clip_file, tmp_path / "ViT-B/32")  # load_encoder("ViT-B/32") takes a file of that name first
    write_csv(tmp_path / "photos", train=4, val=2)
    for i, name in enumerate(("harbour", "station", "ferry-terminal", "river", "depot", "lake", "canal")):
        picture(i, (48, 64))[0].save(tmp_path / f"photos/images/{name}.jpg")
        picture(i, (48, 64))[1].save(tmp_path / f"photos/masks/{name}.png")
    Image.fromarray(VOC_COLOURS[np.array(picture(2, (48, 64))[1])]).save(tmp_path / "coloured.png")
    for i, name in enumerate(("boat/1", "train/1", "boat/2", "train/2")):
        (tmp_path / "photos-by-class" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i, (48, 64))[0].save(tmp_path / f"photos-by-class/{name}.jpg")
    for name in ("backgrounds.json", "words.json"):
        (tmp_path / name).write_text('{"boat": ["water", "pier"], "train": ["railroad track", "platform"]}')
    voc = write_voc(tmp_path / "VOCdevkit/VOC2012")
    shutil.copy(voc / "ImageSets/Segmentation/val.txt", voc / "ImageSets/Segmentation/test.txt")
    (tmp_path / "config.toml").write_text(
        'base = "voc"\n[run]\nout = "my-run"\n[data]\nformat = "csv"\nroot = "photos"\ntrain = "train"\neval = "val"\n'
    )
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None: get_model("resnet18"))

    def small(source, overrides=(), *, chain=None):
        LOAD(source, overrides, chain=chain)  # must be right as it stands
        names = {stage.name for stage in CHAIN} - {stage.name for stage in chain or CHAIN}
        return LOAD(source, [*overrides, *(s for s in SMALL if s.partition(".")[0] not in names)], chain=chain)

    monkeypatch.setattr(Config, "load", small)
    monkeypatch.setattr("cacl.report.write_report", lambda session, folder: None)  # it has tests of its own
    ablation = ablate.run
    monkeypatch.setattr(ablate, "run", lambda config, *, seeds=1, **rest: ablation(config, seeds=min(seeds, 1), **rest))
    with torch.random.fork_rng():
        yield tmp_path


def arrays() -> dict[str, object]:
    """What the pieces of the chain take."""
    photo = np.asarray(picture(2, (48, 64))[0])
    rng = np.random.default_rng(0)
    return {
        "photo": photo,
        "classes": np.array([0, 1]),
        "cams": rng.random((2, 12, 16), dtype=np.float32),
        "net": IRNet("resnet18", weights=None).eval(),
        "images": torch.randn(1, 3, 48, 64),
        "labels_of_the_batch": torch.randint(3, (1, 48, 64)),
        "seeds": torch.rand(2, 12, 16),
        "small": 255 * torch.rand(3, 12, 16),
        "probabilities": rng.dirichlet((1, 1, 1), (48, 64)).transpose(2, 0, 1),
    }


def a_run() -> dict[str, object]:
    pipeline.run("config.toml")
    return {}


def a_tool() -> dict[str, object]:
    """A tool that answers a text with masks, as far as colours tell."""

    def segment(photo, tag):
        own = photo[..., 0 if tag == "boat" else 1] > 200
        return [own], [0.9]

    return {"segment": segment}


def a_tracker() -> dict[str, object]:
    pytest.importorskip("tensorboard")
    return {}


def a_loader() -> dict[str, object]:
    """What a loop goes through, for three classes."""
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    return {"loader": [(images, labels)], "F": torch.nn.functional}


PREPARED = {
    "docs/concepts/chain.md": arrays,
    "docs/how-to/clusters.md": a_run,
    "docs/how-to/labels.md": a_run,
    "docs/how-to/losses.md": a_loader,
    "docs/how-to/segmentation.md": a_run,
    "docs/how-to/seeds.md": a_tool,
    "docs/how-to/trackers.md": a_tracker,
    "docs/how-to/sharing.md": a_run,
}


NEEDS = {"docs/how-to/backbones.md": "timm"}
"""Libraries without which a page's snippets are not run."""

WITH_SNIPPETS = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in SLOW))
    for page in PAGES
    if snippets(page) and name_of(page) != "docs/how-to/notebook.md"  # `tests/test_notebook.py` runs it in a kernel
]


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets(page, place, capsys, monkeypatch):
    pytest.importorskip(NEEDS.get(name_of(page), "cacl"))
    namespace = PREPARED.get(name_of(page), dict)()
    scripts = set()
    for snippet in snippets(page):
        if snippet.file:
            Path(snippet.file).write_text(snippet.code, encoding="utf-8")
        if snippet.language == "python" and snippet.file:
            scripts.add(snippet.file)  # for a command to run
        elif snippet.language == "python":
            exec(compile(snippet.code, f"a snippet of {name_of(page)}", "exec"), namespace)
        elif snippet.language == "bash" and snippet.file:
            pass  # of a scheduler: `tests/test_clusters.py` runs it
        elif snippet.language == "bash":
            for line in snippet.code.splitlines():
                for command in line.split(" && "):
                    scripts -= run(shlex.split(command, comments=True), monkeypatch)
        elif snippet.language == "toml":
            check_toml(snippet.code)
        elif snippet.language == "diff":
            for side in sides(snippet.code):
                exec(compile(side, f"a side of a diff of {name_of(page)}", "exec"), namespace)
        elif snippet.language == "json":
            assert BackgroundSet(json.loads(snippet.code))
        elif snippet.language == "csv":
            assert snippet.file  # which `cacl check` reads
        else:
            assert snippet.language == "text", f"no test knows {snippet.language!r}"
    assert not scripts, f"no command runs {scripts}"


def sides(diff: str) -> tuple[str, str]:
    """The lines before and after a unified diff of one part."""
    _, _, head, *lines = diff.splitlines()
    before, after = ([line[1:] for line in lines if line[:1] in (" ", sign)] for sign in "-+")
    assert head == f"@@ -1,{len(before)} +1,{len(after)} @@"
    return "\n".join(before), "\n".join(after)


def test_the_loop_before_ca_cl_is_that_of_clims():
    page = ROOT / "docs/how-to/losses.md"
    before, after = next(sides(snippet.code) for snippet in snippets(page) if snippet.language == "diff")
    encoder, names, net = TinyEncoder(), ["boat", "bird", "train"], CAMNet(3, backbone=TinyBackbone()).eval()
    given = {**a_loader(), "encoder": encoder, "names": names, "net": net, "CACLLoss": CACLLoss}
    ((images, labels),) = given["loader"]
    for code in (before, after):
        there = {**given, "optimizer": torch.optim.SGD(net.parameters(), lr=0)}
        exec(code, there)
        if code == before:
            criterion = CLIMSLoss(encoder, names, words=there["shared"], aliases={}, normalization="imagenet")
        else:
            criterion = CACLLoss(encoder, names)
        torch.testing.assert_close(there["loss"], criterion(images, net(images).cams, labels).total)


def run(words, monkeypatch) -> set[str]:
    """Run a command as it stands; the scripts that it ran."""
    program, *arguments = words
    if program == "pip":
        assert arguments[0] == "install"
        target = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", arguments[-1])  # a checkout, not the package index
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert target, words
        assert set(target[1].split(",") if target[1] else ()) <= set(extras)
    elif program == "cacl":
        if arguments[0] not in COMMANDS_TO_COME:
            assert cli.main(arguments) == 0, words
    elif words[:3] == ["python", "-m", "pytest"]:
        pass  # this
    elif program == "python":
        monkeypatch.setattr(sys, "argv", [*arguments, *shlex.split(SMALL_EXAMPLE[arguments[0]])])
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    elif program == "torchrun":
        small = [part for setting in SMALL for part in ("--set", setting)] if "run" in arguments else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, *small]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return {word for word in arguments if word.endswith(".py")}
    elif program == "docker":
        assert (ROOT / "Dockerfile").read_text(encoding="utf-8").count("\nFROM python:") == 2
    elif program == "sbatch":
        assert all(Path(argument).is_file() for argument in arguments)
    else:
        pytest.fail(f"no test knows the command {program!r}")
    return set()


def check_toml(code: str) -> None:
    """A whole configuration, or tables over a preset."""
    tables = tomllib.loads(code)
    whole = "base" in tables or "data" in tables
    Path("checked.toml").write_text(code if whole else f'base = "scenes"\n{code}', encoding="utf-8")
    Config.load("checked.toml")


def test_the_table_of_keys_is_complete():
    page = (ROOT / "docs/how-to/configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `\[(\w+)\]` \| (.+) \|$", page, re.MULTILINE))
    fields = config_class(CHAIN).model_fields
    assert set(rows) == set(fields)
    for table, row in rows.items():
        keys = set(fields[table].annotation.model_fields)
        if "those of a training" in row or "the same" in row:
            keys -= set(Training.model_fields)
        assert not [key for key in keys if f"`{key}`" not in row], table


def test_commands_to_come_have_not_come():
    known = cli._parser().format_help()
    assert not [name for name in COMMANDS_TO_COME if re.search(rf"^ +{name} ", known, re.MULTILINE)]


def test_commands_in_the_text_exist():
    commands = set(re.findall(r"^    ([\w-]+)(?: |$)", cli._parser().format_help(), re.MULTILINE)) | set(
        COMMANDS_TO_COME
    )
    for page in PAGES:
        for program, first, rest in re.findall(
            r"`(python|cacl) ([\w./-]+)([^`\n]*)`", page.read_text(encoding="utf-8")
        ):
            if program == "cacl":
                assert first in commands | {"COMMAND"}, f"{name_of(page)}: cacl {first}"
            elif not first.startswith("-"):
                source = (ROOT / first).read_text(encoding="utf-8")
                missing = [option for option in re.findall(r"--[\w-]+", rest) if f'"{option}"' not in source]
                assert not missing, f"{name_of(page)}: {first} has no {missing}"


def test_files_that_pages_show_are_run():
    tested = "".join((ROOT / f"tests/test_{name}.py").read_text(encoding="utf-8") for name in ("clusters", "examples"))
    shown = [name for page in PAGES for name in re.findall(r"<!-- file: (\S+) -->", page.read_text(encoding="utf-8"))]
    assert len(shown) == 7
    assert all((ROOT / name).is_file() and f'{Path(name).name}"' in tested for name in shown)


def test_quick_start_is_short():
    assert len(next(s for s in snippets(ROOT / "README.md") if s.language == "python").code.splitlines()) <= 12


class Deadly(CSVDataset):
    def image(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


# Each raises an error, or returns problems, that the page on troubleshooting has.
def mistakes(place: Path):
    def broken_data():
        folder = write_csv(place / "broken")
        rows = ["image,labels,mask,split", "images/0.png,baot,,train", "images/gone.png,boat,,train"]
        rows += [f"images/{i}.png,boat,masks/{i}.png,train" for i in (1, 2, 3, 4, 5, 6)]
        (folder / "dataset.csv").write_text("\n".join(rows))
        (folder / "images/1.png").write_bytes(b"")
        (folder / "images/5.png").write_bytes(png(60000, 60000))
        deep = np.linspace(0, 4010, 48 * 64).round().astype(np.uint16).reshape(48, 64)
        Image.fromarray(deep).save(folder / "images/6.png")
        Image.new("RGB", (64, 48), (128, 0, 0)).save(folder / "masks/2.png")
        Image.new("L", (64, 48), 200).save(folder / "masks/3.png")
        Image.new("L", (32, 24)).save(folder / "masks/4.png")
        return check_folder(folder)

    def contradictions():
        roots = [write_csv(place / f"contradiction-{i}") for i in range(5)]
        texts = [(root / "dataset.csv").read_text() for root in roots]
        (roots[0] / "classes.txt").write_text("_background_\nboat\ntrain\n")
        (roots[1] / "classes.txt").write_text("bird\nboat\ntrain\n")
        for path in (roots[2] / "masks").iterdir():
            Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
        (roots[2] / "classes.txt").write_text("boat\n")
        (roots[2] / "dataset.csv").write_text(re.sub(r",[a-z;]+,(?=masks)", ",boat,", texts[2]))
        (roots[3] / "dataset.csv").write_text(re.sub(r",[a-z;]+,(?=masks/[0-5])", ",,", texts[3]))
        (roots[4] / "dataset.csv").write_text(texts[4] + "images/0.png,boat,,val\n")
        lines = [line for root in roots for line in check_folder(root)]
        return [line for line in lines if not line.startswith("note: ")]

    def wrong_header():
        folder = write_csv(place / "header")
        (folder / "dataset.csv").write_text("image;labels;mask;split\n")
        return check_folder(folder)

    def without_masks():
        folder = write_csv(place / "maskless")
        text = (folder / "dataset.csv").read_text()
        (folder / "dataset.csv").write_text(re.sub(r"masks/\d+\.png", "", text))
        evaluate_cams(CAMNet(2, backbone="resnet18", weights=None), CSVDataset(folder))

    def void_for_the_server():
        root = place / "VOCdevkit/VOC2012"
        for path in (root / "SegmentationClass").glob("*.png"):
            mask = Image.fromarray(np.full((48, 64), 255, np.uint8))
            mask.putpalette(VOC_COLOURS.tobytes())
            mask.save(path)
        export_voc(root / "SegmentationClass", root, place / "results.tgz", split="val")

    def other_model():
        torch.save({"weights": {}}, place / "model.pt")
        load_segmenter(place / "model.pt")

    def own_backbone():
        save_segmenter(place / "own.pt", torch.nn.Conv2d(1, 1, 1), ["boat"], "")
        load_segmenter(place / "own.pt")

    def misfit():
        torch.save({"classes": ["boat"], "backbone": "resnet18", "weights": {}}, place / "misfit.pt")
        load_segmenter(place / "misfit.pt")

    def no_pretrained():
        DeepLabV2.from_pretrained(place / "photos")

    def unnamed_backbone():
        torch.save(CAMNet(2, backbone="scenes").state_dict(), place / "cams.pt")
        CAMNet.from_pretrained(place / "cams.pt")

    def no_network(*_, **__):
        raise OSError("no route to host")

    def weights_without_network():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torchvision.models, "get_model", no_network)
            CAMNet(2)

    def clip_without_network():
        from cacl._support.clip_library import import_clip

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_clip().clip, "_download", no_network)
            patch.chdir(place / "photos")
            load_encoder("ViT-B/32")

    def not_installed(name, call):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            call()

    def diverging():
        settings = [*SMALL, "camnet.backbone=resnet18", "warmup.lr=1e30", "warmup.epochs=5", "run.out=diverged"]
        pipeline.run(LOAD("config.toml", settings), stages=["warmup"])

    def dying():
        from cacl._support.pool import map_processes

        list(map_processes(os._exit, [1, 1], workers=2))

    def dying_loader():
        list(load_images(Deadly(write_csv(place / "deadly"), "train"), [0, 1], 1))

    def used_twice():
        hold = "import sys; from cacl._support.files import *\n"
        hold += "with locked(Path('run')): print(flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", hold]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=place) as other:
            other.stdout.readline()
            try:
                pipeline.run(LOAD("scenes", ["run.out=run"]))
            finally:
                other.stdin.close()

    def left_alone():
        with _reported():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    def heard(call):
        """What is logged."""
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logger = logging.getLogger("cacl")
        logger.addHandler(handler)
        level = logger.level
        logger.setLevel(logging.INFO)
        waiting.warn_once.cache_clear()
        try:
            call()
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        return lines

    def no_room():
        loaders._received(loaders._Piped(np.zeros(1)))

    def no_processes():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaders, "Lock", lambda: no_network())
            list(load_images(CSVDataset(write_csv(place / "alone"), "train"), [0], 1))

    def standing_still():
        patience = waiting.Patience([])
        patience._since -= waiting.PATIENCE + 1
        patience.check("load images")

    def of_a_notebook():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
            list(pool.map_processes(partial(getattr, "__main__"), ["upper", "lower"], workers=2))

    def two_threads():
        begun = threading.Event()

        def train():
            with training_alone():
                begun.set()
                time.sleep(0.2)

        threading.Thread(target=train).start()
        begun.wait()
        with training_alone():
            pass

    def other_dtype():
        torch.set_default_dtype(torch.float64)
        try:
            load_encoder("scenes")
        finally:
            torch.set_default_dtype(torch.float32)

    def made_for_inference():
        with torch.inference_mode():
            check_takes_part({"encoder": TinyEncoder()})

    def homeless():
        def nobody():
            raise RuntimeError("Could not determine home directory.")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "home", nobody)
            patch.chdir(place / "photos")
            load_encoder("ViT-B/32")

    def folder_gone():
        (place / "gone").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place / "gone")
            (place / "gone").rmdir()
            LOAD("scenes")

    criterion = CACLLoss(TinyEncoder(), ["boat", "bird", "train"])
    images, cams = torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 8, 8)
    (place / "tulips.pt").write_text("no checkpoint")
    torch.save({"weight": torch.tensor(float("nan"))}, place / "diverged.pt")
    return [
        broken_data, contradictions, wrong_header, without_masks, void_for_the_server, other_model, own_backbone,
        misfit, no_pretrained, unnamed_backbone,
        weights_without_network, clip_without_network, diverging, dying, dying_loader, used_twice, left_alone,
        standing_still, other_dtype, made_for_inference, homeless, folder_gone,
        lambda: heard(no_room), lambda: heard(no_processes), lambda: heard(of_a_notebook), lambda: heard(two_threads),
        lambda: not_installed("pydensecrf.densecrf", lambda: check_backend("pydensecrf")),
        lambda: not_installed("open_clip", lambda: load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")),
        lambda: not_installed("timm", lambda: CAMNet(backbone="timm:convnext_tiny")),
        lambda: not_installed("jinja2", check_report),
        lambda: not_installed("mlflow", lambda: check_trackers(["mlflow"])),
        lambda: not_installed("safetensors.torch", lambda: CAMNet(2, backbone="scenes").save_pretrained("net")),
        lambda: not_installed("huggingface_hub", lambda: CAMNet.from_pretrained("me/boats")),
        lambda: LOAD("tulips"),
        lambda: LOAD("config.toml", ["cacl.epoch=3"]),
        lambda: LOAD("config.toml", ["cacl.margin=3.0"]),
        lambda: (place / "config.toml").write_text('base = "voc"') and LOAD("config.toml"),
        lambda: LOAD("scenes", ["epochs=3"]),
        lambda: pipeline.run(LOAD("scenes", ["run.device=cuda:77"])),
        lambda: CAMNet(2, backbone="resnet5"),
        lambda: pipeline.run(LOAD("scenes"), stages=["cacl"]),
        lambda: check_folder(place),
        lambda: CSVDataset(write_csv(place / "fine"), "test"),
        lambda: VOC(shutil.copytree(place / "VOCdevkit/VOC2012", place / "voc",
                                    ignore=shutil.ignore_patterns("SegmentationClassAug")), "train_aug"),
        lambda: generate(place / "photos"),
        lambda: load_encoder(place / "tulips.pt"),
        lambda: load_encoder(place / "diverged.pt"),
        lambda: BackgroundSet.built_in(["tulip"]),
        lambda: BackgroundSet({"boat": ["Train"], "train": ["rails"]}),
        lambda: load_encoder("scenes").encode_text(["a photo of tulip."]),
        lambda: criterion(images, cams, torch.zeros(4, 2)),
        lambda: criterion(images, cams[:2], torch.zeros(4, 3)),
        lambda: ablate.run(LOAD("scenes", ["data.eval="])),
    ]  # fmt: skip


@pytest.mark.posix
def test_every_message_is_what_the_code_says(place):
    said: list[list[str]] = []
    for mistake in mistakes(place):
        try:
            said.append(mistake() or [])
        except (ValueError, ImportError, RuntimeError, OSError) as error:
            said.append(str(error).splitlines())
    documented = [s.code.strip() for s in snippets(ROOT / "docs/troubleshooting.md") if s.language == "text"]
    assert len(documented) >= 20
    patterns = {message: re.compile(".*".join(map(re.escape, message.split("…")))) for message in documented}
    for message, pattern in patterns.items():
        assert any(pattern.match(line) for lines in said for line in lines), f"nothing says {message!r}"
    for lines in said:
        assert any(pattern.match(line) for line in lines for pattern in patterns.values()), f"not documented: {lines}"


def test_links_of_the_readme_hold():
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", (ROOT / "README.md").read_text()):
        file = ROOT / (target or "README.md")
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_site_builds_strictly(tmp_path):
    """Every page is in the navigation, every link holds (mkdocs.yml); nothing is raw, fetched, or missing."""
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    assert {name_of(page).removeprefix("docs/").replace(".md", ".html") for page in PAGES[1:]} <= set(pages)
    for name, html in pages.items():
        assert not re.search(r":(class|func|meth|attr|data|mod|math):|\.\. math|\\\(|\\\[|<!-- (comm|file)", html), name
        assert not re.search(r'<(script|img|iframe)[^>]+src="?(https?:)?//|<link[^>]+(stylesheet|preload)[^>]+//', html)
    api = "".join(html for name, html in pages.items() if name.startswith("api/"))
    missing = [name for name in cacl.__all__ if not re.search(rf'id="cacl\.(\w+\.)?{name}"', api)]
    assert missing == ["pipeline"]
    assert 'id="cacl.pipeline.run"' in api
    assert pages["concepts/method.html"].count('<div class="equation">') == 14
