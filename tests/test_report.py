"""The report: one file that needs no network, with every number and what belongs beside it, whatever is missing."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from PIL import Image

from cacl import ablate, pipeline
from cacl.artifacts import save_mask
from cacl.config import Config
from cacl.report import report, write_report
from cacl.runs.session import Session

SETTINGS = [
    "data.format=csv", "data.train=train", "data.eval=val", "run.device=cpu", "run.workers=0", "report.images=2",
    "warmup.epochs=1", "warmup.batch_size=3", "warmup.crop=32", "warmup.lr=0.01",
    "cacl.epochs=1", "cacl.batch_size=3", "cacl.crop=32", "cacl.lr=0.01", "cams.scales=[1.0]",
    "irn.epochs=1", "irn.batch_size=3", "irn.crop=32", "irn.lr=0.01", "irn.radius=4", "backgrounds.n=5",
]  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = ('<script>alert("1")</script>', 'a & b\'s "$c$"')


def configure(root, out, *more):
    return Config.load("voc", [*SETTINGS, f"data.root={root}", f"run.out={out}", *more])


def run(root, out, *more, stages=("warmup", "cacl", "cams", "irn", "masks")):
    config = configure(root, out, *more)
    return pipeline.run(config, encoder=TinyEncoder(), backbone=TinyBackbone(), stages=stages).out


def make(out, *arguments, **more):
    return report(out, *arguments, encoder=TinyEncoder(), backbone=TinyBackbone(), **more)


def predict(out, root, *, ids=(6, 7, 8), miou=0.5):
    """What the stages `segment` and `predict` leave, as far as a report looks at it."""
    for i in ids:
        mask = np.array(Image.open(root / f"masks/{i}.png"))
        mask[: 12 + 9 * (i - 6)] = 0  # the first is perfect, the last the worst
        save_mask(out / f"predict/eval/{i}.png", mask)
    (out / "predict/stage.json").write_text('{"finished": true}')
    known = json.loads((out / "metrics.json").read_text())
    own = {"split": "val", "images": 3, "iou": {"background": 0.9, "boat": 0.4, "train": 0.2}}
    known["segment"] = {"what": "DeepLabV2", "crf": False, "miou": miou - 0.0123, **own}
    known["predict"] = {"what": "DeepLabV2", "crf": True, "miou": miou, **own}
    (out / "metrics.json").write_text(json.dumps(known))
    times = {"warmup": {"seconds": 41.2, "memory_mb": 812.0}, "cacl": {"seconds": 100.0}}
    (out / "times.json").write_text(json.dumps(times))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set, a whole run, and an ablation beside it; tests read them and write elsewhere."""
    folder = tmp_path_factory.mktemp("world")
    root = write_csv(folder / "data")
    out = run(root, folder / "run <&>")
    predict(out, root)
    config = configure(root, folder / "run <&>-ablation")
    ablate.run(config, tables=["4", "5"], seeds=1, encoder=TinyEncoder(), backbone=TinyBackbone())
    return root, out


class Reader(HTMLParser):
    """Tags in their order, what is open, attributes, and text by the tag that it stands in."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data.strip())

    @property
    def text(self):
        return " ".join(" ".join(filter(None, self.words)).split())


def read(path) -> Reader:
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "<script" not in text
    reader = Reader(text)
    for tag, name, value in reader.attributes:
        if name in ("src", "srcset", "data", "action", "poster"):
            assert value.startswith("data:"), (tag, name, value[:50])
        if name in ("href", "xlink:href"):
            assert value.startswith(("#", "data:")), (tag, name, value[:50])
        assert not name.startswith("on")
    targets = [value[1:] for _, name, value in reader.attributes if name in ("href", "xlink:href") and value[0] == "#"]
    assert set(targets) <= set(reader.ids)
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(target in reader.ids for target in re.findall(r"url\(#([^)]*)\)", text))
    return reader


def lines(reader, number=0) -> list[list[str]]:
    """The table of results, or the one of what needs no masks."""
    table = re.findall(r'<table class="numbers">.*?<tbody>(.*?)</tbody>', reader, re.DOTALL)[number]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [html.unescape(re.sub("<[^>]*>", "", c)) for c in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)] for row in rows
    ]


def test_one_file_has_every_number_and_what_belongs_beside_it(world, tmp_path):
    _, out = world
    path = make(out, tmp_path / "there.html")
    assert [p.name for p in tmp_path.iterdir()] == ["there.html"]
    reader = read(path)
    metrics = json.loads((out / "metrics.json").read_text())
    rows = {row[-1] + (" alone" if "alone" in row[0] else ""): row for row in lines(path.read_text())}
    assert set(rows) == {*metrics, "masks alone"}
    for stage, own in metrics.items():
        score = f"{own['background_score']:.2f}" if "background_score" in own else "–"
        beside = [own["split"], str(own["images"]), score, "on" if own["crf"] else "off"]
        assert rows[stage][1:6] == [f"{100 * own['miou']:.1f}", *beside]
        oracle = own.get("oracle")
        wanted = [f"{100 * oracle['miou']:.1f}", f"{oracle['background_score']:.2f}"] if oracle else ["–", "–"]
        assert rows[stage][6:8] == wanted
    walk = metrics["masks"]["walk"]
    assert rows["masks alone"][1:7] == [
        f"{100 * walk['miou']:.1f}", "train", "6", "0.25", "off", f"{100 * walk['oracle']['miou']:.1f}",
    ]  # fmt: skip
    judged = {stage: own for stage, own in metrics.items() if "agreement" in own}
    assert {row[-1]: (float(row[1]), int(row[3])) for row in lines(path.read_text(), 1)} == {
        stage: (round(own["agreement"], 3), own["judged"]["images"]) for stage, own in judged.items()
    }
    assert set(judged) == {"cams", "masks"}
    assert "found by looking at the ground-truth masks: an upper bound, not a result" in reader.text
    assert "val, 3 images, background score 0.15, no CRF" in reader.text
    for text in ("6 images of the split train", "3 images of val", "TinyEncoder", "TinyBackbone", "Seed 0", "cacl 0."):
        assert text in reader.text
    assert reader.text.startswith("run <&> · cacl")
    settings = (out / "config.toml").read_text()
    assert " ".join(settings.split()) in reader.text


def test_it_has_a_section_and_pictures_of_everything(world, tmp_path):
    _, out = world
    path = make(out, tmp_path / "folder")
    assert path == tmp_path / "folder" / "index.html"
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "cams.png", "masks.png", "segmentation.png"}
    reader = read(path)
    sections = [value for tag, name, value in reader.attributes if (tag, name) == ("section", "id")]
    assert sections == ["results", "training", "classes", "cams", "masks", "segmentation", "costs", "settings"]
    labels = [value for tag, name, value in reader.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [
        "Mean IoU along the chain", "Loss of each stage over the epochs",
        "Similarities, θ, pass rate and template shares",
        "IoU of each class by stage, split val", "IoU of each class by stage, split train",
        "IoU of each class by template", "Time and memory of each stage",
    ]  # fmt: skip
    for text in ("CAM after the warm-up", "a clean origami {}.", "DCPS", "with CSBS", "mined labels", "pseudo mask",
                 "ground truth", "DeepLabV2 + CRF", "Best photos", "Hardest photos", "41 s", "812 MB", "40 · ITC",
                 "boat, train", "a photo of {}. (mean"):  # fmt: skip
        assert text in reader.text, text
    # 2 photos: 5 columns, templates 8, CSBS 4, steps 7, segmentation 5; the best and the hardest photo: 3 each.
    images = [value for tag, name, value in reader.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 2 * (5 + 8 + 4 + 7 + 5) + 2 * 3
    for uri in images:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            assert image.size == (64, 48)
    # The best photo is the one whose prediction is its mask.
    shown = re.findall(r"<b>([\d.]+) %</b> · (\d)", path.read_text())
    assert shown[0] == ("100.0", "6")
    assert shown[1][1] == "8"
    assert float(shown[1][0]) < 60
    assert len(re.findall("<img", make(out, tmp_path / "one.html", images=1).read_text())) == 5 + 8 + 4 + 7 + 5 + 6


def test_the_run_folder_may_have_moved_and_the_same_run_gives_the_same_file(world, tmp_path):
    _, out = world
    first = make(out, tmp_path / "1.html").read_bytes()
    assert make(out, tmp_path / "2.html").read_bytes() == first
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    path = make(moved)
    assert path == moved / "report" / "index.html"
    assert "cacl ablate CONFIG --tables 4,5" in read(path).text
    assert str(out) not in path.read_text()
    path = make(moved, tmp_path / "3.html", ablation=out.with_name("run <&>-ablation"))
    assert "a clean origami {}." in read(path).text
    with pytest.raises(ValueError, match="expected the folder of an ablation"):
        make(moved, ablation=tmp_path)
    with pytest.raises(ValueError, match=r"config.toml: no such file"):
        make(tmp_path / "nowhere")


def test_an_ablation_of_something_else_is_not_shown(world, tmp_path):
    _, out = world
    other = write_csv(tmp_path / "data")
    (other / "classes.txt").write_text("boat\nplane")
    (other / "dataset.csv").write_text((other / "dataset.csv").read_text().replace("train;", "").replace(
        "boat;train", "boat;plane").replace(",train,masks", ",plane,masks"))  # fmt: skip
    run(other, tmp_path / "run", stages=["warmup"])
    path = make(tmp_path / "run", tmp_path / "r.html")
    assert "plane" in read(path).text
    with pytest.raises(ValueError, match="expected the folder of an ablation"):
        make(tmp_path / "run", tmp_path / "r.html", ablation=out.with_name("run <&>-ablation"))


def test_a_run_that_has_only_begun_has_a_report(world, tmp_path):
    root, _ = world
    out = run(root, tmp_path / "out", stages=["warmup"])
    (out / "times.json").unlink(missing_ok=True)
    path = make(out)
    reader = read(path)
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "cams.png"}
    sections = [value for tag, name, value in reader.attributes if (tag, name) == ("section", "id")]
    assert sections == ["results", "training", "classes", "cams", "segmentation", "settings"]
    assert "the stages segment and predict make it" in reader.text
    assert "CAM after CA-CL" not in reader.text
    # Not even that: settings alone.
    pipeline.run(configure(root, tmp_path / "new"), encoder=TinyEncoder(), backbone=TinyBackbone(), stages=[])
    reader = read(make(tmp_path / "new"))
    assert "There is no mean IoU" in reader.text


def test_data_without_masks_has_a_report_without_a_mean_iou(tmp_path):
    root = write_csv(tmp_path / "data")
    (root / "dataset.csv").write_text(re.sub(r"masks/\d\.png", "", (root / "dataset.csv").read_text()))
    out = run(root, tmp_path / "out", "data.eval=")
    reader = read(make(out))
    assert "There is no mean IoU" in reader.text
    assert "No split has ground-truth masks" in reader.text
    assert "Evaluation no split with masks" in reader.text
    assert "ground truth" not in reader.text
    assert "mined labels" in reader.text
    assert {p.name for p in (out / "report").iterdir()} == {"index.html", "cams.png", "masks.png"}


def test_some_files_may_be_missing(world, tmp_path):
    root, whole = world
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "masks/train/0.png").unlink()
    (out / "predict/eval/6.png").unlink()
    shutil.rmtree(out / "irn")
    (out / "log.jsonl").unlink()
    reader = read(make(out))
    assert "none" in reader.words
    assert "mined labels" not in reader.text
    assert "Training 6 images" in reader.text
    assert "Thin: the measured steps" not in reader.text
    predict(out, root, ids=(6,))
    table = (root / "dataset.csv").read_text()
    assert "val" in table
    assert "Hardest photos" in read(make(out)).text


def test_hostile_names_are_text(tmp_path):
    root = write_csv(tmp_path / "data")
    names = "\n".join(HOSTILE)
    (root / "classes.txt").write_text(names)
    lines = (root / "dataset.csv").read_text().splitlines()
    kinds = {"boat": HOSTILE[0], "train": HOSTILE[1]}
    rows = []
    for line in lines[1:]:
        image, labels, mask, split = line.split(",")
        label = ";".join(kinds[name] for name in labels.split(";")).replace('"', '""')
        rows.append(f'{image},"{label}",{mask},{split}')
    (root / "dataset.csv").write_text("\n".join([lines[0], *rows]))
    words = {name: [f"word {i}" for i in range(5)] for name in HOSTILE}
    (root / "backgrounds.json").write_text(json.dumps(words))
    out = run(root, tmp_path / "<img src=x onerror=alert(1)>", 'prompts.templates=["<b>{}</b>"]')
    predict(out, root)
    known = json.loads((out / "metrics.json").read_text())
    assert set(HOSTILE) < set(known["cacl"]["iou"])
    known["predict"]["iou"] = known["segment"]["iou"] = known["cacl"]["iou"]
    (out / "metrics.json").write_text(json.dumps(known))
    path = make(out, tmp_path / "report.html")
    reader = read(path)
    assert all(name in reader.text for name in HOSTILE)
    assert reader.text.startswith("<img src=x onerror=alert(1)> · cacl")
    assert "<b>{}</b>" in reader.text
    assert "<b>{}" not in path.read_text()


def test_without_the_extra_there_are_pictures_and_one_line(world, tmp_path, monkeypatch, caplog):
    _, out = world
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    session = Session(Config.load(out / "config.toml"), TinyEncoder(), TinyBackbone())
    with caplog.at_level("INFO", logger="cacl"):
        assert write_report(session, tmp_path) == tmp_path
    assert {p.name for p in tmp_path.iterdir()} == {"cams.png", "masks.png", "segmentation.png"}
    (line,) = [r.message for r in caplog.records if r.message.startswith("report")]
    assert "pip install 'cacl[report]'" in line
    with pytest.raises(ImportError, match=r"pip install 'cacl\[report\]'"):
        make(out, tmp_path)


PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)), true);
addEventListener("load", () => {
  const page = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, nav, pre")
    && e.getBoundingClientRect().right > page.clientWidth + 0.5).map(e => e.tagName + "." + e.className);
  parent.document.getElementById("found").textContent += JSON.stringify({
    width: innerWidth, scroll: page.scrollWidth, images: document.images.length, errors, wide,
    broken: [...document.images].filter(i => !i.naturalWidth).length,
    charts: [...document.querySelectorAll("svg")].map(s => Math.round(s.getBoundingClientRect().height)),
    loaded: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
  }) + "\\n";
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_network(world, tmp_path, width):
    _, out = world
    page = make(out, tmp_path / "report.html").read_text()
    # In a frame, since a window cannot be as narrow as a telephone.
    frame = html.escape(page.replace("<style>", PROBE + "<style>", 1))
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0"><pre id="found" hidden></pre>'
        f'<iframe width="{width}" height="2400" style="border:0" srcdoc="{frame}"></iframe>'
    )
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},2400",
    ]  # fmt: skip
    shown = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120)
    assert not [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    found = json.loads(html.unescape(re.search(r'<pre id="found"[^>]*>(.*?)</pre>', shown.stdout, re.DOTALL).group(1)))
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["errors"] == []
    assert found["images"] > 50
    assert found["broken"] == found["loaded"] == 0
    assert len(found["charts"]) == 7
    assert min(found["charts"]) > 60
    picture = tmp_path / "screenshot.png"
    subprocess.run([*command, f"--screenshot={picture}", wrapper.as_uri()], capture_output=True, timeout=120)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (pixels[:, : min(width, 380)] != 255).any((1, 2)).mean() > 0.3
