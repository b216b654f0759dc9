"""The configuration: the paper's settings, and one line for every mistake."""

import tomllib
from pathlib import Path

import pytest

from cacl import config
from cacl.config import PRESETS, Config
from cacl.stages.chain import CHAIN


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


BASE = 'base = "voc"\n[data]\nroot = "photos"\n'


def test_the_voc_preset_has_the_papers_settings():
    config = Config.load("voc", ["data.root=VOC2012"])
    table = config.cacl
    assert (table.epochs, table.batch_size, table.lr, table.weight_decay, table.crop) == (20, 16, 2.5e-4, 1e-4, 512)
    assert (table.margin, table.alpha, table.beta, table.gamma, table.schedule) == (0.5, 40, 1, 0.4, "cosine")
    assert config.prompts.templates == ("a photo of {}.", "an image of {}.", "a picture of {}.", "a snapshot of {}.")
    assert (config.backgrounds.n, config.backgrounds.file) == (None, None)  # 5 of the built-in words
    assert (config.camnet.backbone, config.encoder.name) == ("resnet50", "ViT-B/32")
    assert (config.data.format, config.data.train) == ("voc", "train_aug")
    assert config.warmup.epochs == 5
    assert config.cams.scales == (0.5, 1, 1.5, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_nothing_that_is_a_default(name):
    for table, keys in tomllib.loads(
        (Path(config.__file__).parent / f"assets/presets/{name}.toml").read_text()
    ).items():
        fields = config.config_class(CHAIN).model_fields[table].annotation.model_fields
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
        assert not [key for key, value in given.items() if fields[key].default == value], table


def test_coco_has_the_same_training_settings():
    voc, coco = (Config.load(name, ["data.root=x"]) for name in ("voc", "coco"))
    assert coco.cacl.model_copy(update={"threshold": voc.cacl.threshold}) == voc.cacl
    assert coco.warmup == voc.warmup


def test_a_file_builds_on_a_preset_and_overrides_win(tmp_path):
    path = write(tmp_path, BASE + "[cacl]\nepochs = 2\n")
    config = Config.load(path, ["cacl.lr=0.5", "run.device=cpu"])
    assert (config.cacl.epochs, config.cacl.lr, config.cacl.batch_size, config.run.device) == (2, 0.5, 16, "cpu")
    assert config.data.root == tmp_path / "photos"
    assert config.run.out == Path.cwd() / "cacl-voc"  # the preset's


def test_it_survives_toml(tmp_path):
    config = Config.load(write(tmp_path, BASE + '[cacl]\ntemplate = 1\n[prompts]\ntemplates = ["ein \\"{}\\" ü."]\n'))
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert Config.load(tmp_path / "again.toml") == config


def test_any_text_survives_toml(tmp_path):
    config = Config.load("voc", ["data.root=x", "run.out=/\U0001f600", "data.train=\x7f"])
    (tmp_path / "again.toml").write_text(config.to_toml(), encoding="utf-8")
    assert Config.load(tmp_path / "again.toml") == config


def test_a_checkpoint_beside_the_file_is_found(tmp_path):
    (tmp_path / "clip.pt").touch()
    path = write(tmp_path, BASE + '[encoder]\nname = "clip.pt"\n')
    assert Config.load(path).encoder.name == str(tmp_path / "clip.pt")
    assert Config.load(path, ["encoder.name=ViT-B/16"]).encoder.name == "ViT-B/16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "[cacl]\nepoch = 3", r'config.toml: \[cacl\] epoch: unknown key; did you mean "epochs"\?$'),
        (BASE + "[calc]\nepochs = 3", r'config.toml: \[calc\]: unknown table; did you mean "cacl"\?$'),
        (
            BASE + '[cacl]\nepochs = "three"',
            r"config.toml: \[cacl\] epochs: input should be a valid number.* got 'three'$",
        ),
        (BASE + "[cacl]\nalpha = -1", r"\[cacl\] alpha: input should be greater than or equal to 0, but got -1"),
        (BASE + '[cacl]\nbatch_size = "16"', r"\[cacl\] batch_size: input should be a valid integer, but got '16'"),
        (BASE + '[cams]\nflip = "no"', r"\[cams\] flip: input should be a valid boolean, but got 'no'"),
        (BASE + "[run]\nseed = 9223372036854775808", r"\[run\] seed: input should be less than 9223372036854775808"),
        (BASE + "[cacl]\nlr = nan", r"\[cacl\] lr: input should be"),
        (
            BASE + "[cacl]\nbatch_size = 0",
            r"\[cacl\] batch_size: input should be greater than or equal to 1, but got 0",
        ),
        (BASE + '[cacl]\nthreshold_mode = "softly"', r"\[cacl\] threshold_mode: input should be 'soft', 'quantile' or"),
        (BASE + "[cams]\nscales = []", r"\[cams\] scales: "),
        (BASE + '[run]\nout = "."', r"config.toml: \[run\] out: expected another folder"),
        ('base = "voc"', r"config.toml: \[data\] root: missing$"),
        ('base = "vok"', r"config.toml: base: expected a preset \(voc, coco, own, scenes\), but got 'vok'$"),
        ("[data\n", r"config.toml: expected a TOML file, but"),
        (BASE + "[run]\nseed = 1\nseed = 2\n", r"config.toml: expected a TOML file, but"),
        (BASE + '[run]\ndevices = "cpu"', r'\[run\] devices: unknown key; did you mean "device"\?'),
    ],
)
def test_mistakes(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        Config.load(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("vcc", [], r"vcc: no such file and no preset \(voc, coco, own, scenes\)"),
        ("none.toml", [], r"none.toml: no such file$"),
        ("voc", ["epochs=3"], "Expected an override like cacl.epochs=3, but got 'epochs=3'."),
        ("voc", ["data.root=x", "cacl.epoch=3"], r'voc: \[cacl\] epoch: unknown key; did you mean "epochs"'),
    ],
)
def test_bad_sources(source, overrides, message):
    with pytest.raises(ValueError, match=message):
        Config.load(source, overrides)


def test_a_configuration_moves_with_its_folder(tmp_path):
    out = tmp_path / "here/run"
    config = Config.load("scenes", [f"run.out={out}", f"data.root={out / 'data'}"])
    out.mkdir(parents=True)
    (out / "config.toml").write_text(config.to_toml(out))
    assert Config.load(out / "config.toml") == config
    (tmp_path / "here").rename(tmp_path / "there")
    moved = Config.load(tmp_path / "there/run/config.toml")
    assert moved.run.out == tmp_path / "there/run"
    assert moved.data.root == tmp_path / "there/run/data"
    assert str(config.run.out) in config.to_toml()  # without a folder, as it is


def test_another_preset_of_the_segmenter_brings_its_own_numbers(tmp_path):
    config = Config.load("voc", ["data.root=x"])
    assert (config.segment.epochs, config.segment.lr) == (18.9, 2.5e-4)
    changed = config.changed({"segment": {"preset": "paper"}})
    assert (changed.segment.epochs, changed.segment.lr) == (37.8, 0.005)
    assert changed == Config.load("voc", ["data.root=x", "segment.preset=paper"])
    given = config.changed({"segment": {"lr": 0.1}}).changed({"segment": {"preset": "paper"}})
    assert (given.segment.epochs, given.segment.lr) == (37.8, 0.1)
    # A written configuration too, and what was given in it stays.
    path = write(tmp_path, given.to_toml())
    assert Config.load(path) == given
    again = Config.load(path, ["segment.preset=deeplab"])
    assert (again.segment.epochs, again.segment.lr) == (18.9, 0.1)


def test_a_change_leaves_the_folder_where_it_was(tmp_path, monkeypatch):
    path = write(tmp_path, '[data]\nformat = "csv"\nroot = "photos"\n')
    config = Config.load(path)
    monkeypatch.chdir(tmp_path)
    assert config.changed({"run": {"seed": 1}}).run.out == config.run.out
