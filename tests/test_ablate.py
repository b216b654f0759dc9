"""The ablation tables: which trainings they are made of, what they say, and that nothing is trained twice."""

import csv
import json
import statistics
import sys

import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv

from cacl import ablate, methods_table, pipeline
from cacl.cli import main
from cacl.config import Config, split_overrides
from cacl.dense import DenseFeatures
from cacl.prompts import DEFAULT_TEMPLATES
from cacl.tables import CACL

SETTINGS = [
    "data.format=csv", "run.device=cpu", "run.workers=0", "warmup.epochs=1", "warmup.batch_size=3", "warmup.crop=32",
    "warmup.lr=0.01", "cacl.epochs=1", "cacl.batch_size=3", "cacl.crop=32", "cacl.lr=0.01", "cams.scales=[1.0]",
    "data.eval=val", "data.train=train", "backgrounds.n=5", "segment.backbone=", "segment.epochs=1",
    "segment.batch_size=3", "segment.crop=32", "segment.lr=0.001",
]  # fmt: skip


def configure(tmp_path, *more):
    if not (tmp_path / "data").is_dir():
        write_csv(tmp_path / "data")
    return Config.load("voc", [*SETTINGS, f"data.root={tmp_path / 'data'}", f"run.out={tmp_path / 'out'}", *more])


def run(config, **arguments):
    return ablate.run(config, encoder=TinyEncoder(), backbone=TinyBackbone(), **arguments)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.pt")}


def test_the_variants_are_the_paper_s(tmp_path):
    config = configure(tmp_path)
    table = {name: ablate.variants(config, name) for name in ablate.TABLES}
    origami = "a clean origami {}."
    assert [dict(v.changes) for v in table["4"]] == [
        *({"prompts": {"templates": (t,)}} for t in (*DEFAULT_TEMPLATES, origami)),
        {},
    ]
    assert [v.paper for v in table["4"]] == [62.8, 62.7, 61.9, 60.3, 59.8, 64.4]
    assert [v.changes for v in table["5"]] == [{"cacl": {"beta": 0.0}}, {}]
    assert [v.changes for v in table["6"]] == [
        {"cacl": {"beta": 0.0, "gamma": 0.0}}, {"cacl": {"beta": 0.0}}, {"cacl": {"gamma": 0.0}}, {},
    ]  # fmt: skip
    assert [len(v.changes.get("prompts", {}).get("templates", DEFAULT_TEMPLATES)) for v in table["7"]] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert [v.changes for v in table["8"]] == [*({"backgrounds": {"n": n}} for n in (3, 4)), {},
                                               *({"backgrounds": {"n": n}} for n in (6, 7))]  # fmt: skip
    assert [v.name for v in table["theta"]] == ["fixed", "soft", "quantile"]


def test_tables_say_what_the_runs_measured_and_share_their_warm_up(tmp_path):
    config = configure(tmp_path)
    paths = run(config, tables=["5", "6"], seeds=2)
    out = tmp_path / "out"
    assert paths == [out / "table-5.md", out / "table-6.md"]
    for seed in (0, 1):  # four trainings, of which two stand in both tables
        folder = out / f"seed-{seed}"
        assert {path.name for path in folder.iterdir()} == {"start", "table-4-6", "table-5-1", "table-6-1", "table-6-3"}
        models = {path.read_bytes() for path in folder.glob("*/warmup/model.pt")}
        assert len(models) == 1
    table = {row["variant"]: row for row in rows(out / "table-6.csv")}
    assert list(table) == ["warm-up", "ITC", "ITC + REG", "ITC + BGS", "ITC + BGS + REG"]
    without = [json.loads((out / f"seed-{s}/table-5-1/metrics.json").read_text())["cacl"] for s in (0, 1)]
    miou = [100 * metrics["miou"] for metrics in without]
    assert float(table["ITC + REG"]["miou_mean"]) == pytest.approx(sum(miou) / 2, abs=0.006)
    assert float(table["ITC + REG"]["miou_std"]) == pytest.approx(statistics.stdev(miou), abs=0.006)
    assert (table["ITC + REG"]["paper"], table["ITC + REG"]["seeds"]) == ("58.4", "2")
    assert float(table["ITC + REG"]["seconds_per_step"]) > 0
    text = paths[1].read_text()
    assert f"| ITC + REG | {sum(miou) / 2:.1f} ± {statistics.stdev(miou):.1f} |" in text
    assert "Split val, 3 images, background score 0.15, no CRF; 2 seeds" in text
    # A variant is what a run with its settings gives.
    alone = pipeline.run(
        configure(tmp_path, "cacl.beta=0.0", f"run.out={tmp_path / 'alone'}"),
        encoder=TinyEncoder(), backbone=TinyBackbone(),
    )  # fmt: skip
    assert alone.metrics["cacl"]["miou"] == without[0]["miou"]
    assert (tmp_path / "alone/cacl/model.pt").read_bytes() == (out / "seed-0/table-5-1/cacl/model.pt").read_bytes()


def test_stopped_and_started_again_it_goes_on(tmp_path):
    seen = []
    unbroken = configure(tmp_path, f"run.out={tmp_path / 'unbroken'}")
    run(unbroken, tables=["5"], seeds=1, callback=lambda record: seen.append(record["stage"]))
    steps = len(seen)

    def stop(record):
        seen.append(record["stage"])
        if len(seen) == steps - 1:
            raise KeyboardInterrupt

    seen.clear()
    config = configure(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(config, tables=["5"], seeds=1, callback=stop)
    seen.clear()
    run(config, tables=["5"], seeds=1, callback=lambda record: seen.append(record["stage"]))
    assert 0 < len(seen) < steps
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")
    seen.clear()
    run(config, tables=["5"], seeds=1, callback=lambda record: seen.append(record["stage"]))
    assert seen == []
    run(config, tables=["5"], seeds=2, callback=lambda record: seen.append(record["stage"]))
    assert len(seen) == steps


def test_what_does_not_allow_a_table_shows_before_anything_is_trained(tmp_path):
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"boat": ["water", "sky", "pier", "beach", "sand"], "train": list("abcdefg")}))
    with pytest.raises(ValueError, match="at most 5, the number of words for 'boat'"):
        run(configure(tmp_path, f"backgrounds.file={words}"), tables=["8"])
    with pytest.raises(ValueError, match=r"\[data\] eval: expected a split with masks"):
        run(configure(tmp_path, "data.eval="), tables=["5"])
    with pytest.raises(ValueError, match="`tables` to be one of"):
        run(configure(tmp_path), tables=["9"])
    with pytest.raises(ValueError, match="`seeds`"):
        run(configure(tmp_path), seeds=0)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        "scenes.train=4", "scenes.val=2", "scenes.size=64", "warmup.epochs=1", "cacl.epochs=1", "warmup.batch_size=4",
        "cacl.batch_size=4", "run.workers=0", "warmup.crop=64", "cacl.crop=64",
    ]  # fmt: skip
    options = [part for setting in small for part in ("--set", setting)]
    assert main(["ablate", "scenes", "--tables", "5,theta", "--seeds", "1", *options]) == 0
    out = capsys.readouterr().out
    assert "# Table 5: without and with class-specific background suppression" in out
    assert "| quantile |" in out
    assert (tmp_path / "cacl-scenes-ablation/table-theta.csv").is_file()
    assert main(["ablate", "scenes", "--tables", "12"]) == 2
    assert "expected" in capsys.readouterr().err.lower()


# The table of methods

QUICK = ("masks.affinity=none", "masks.iterations=0", "irn.batch_size=3")


class Dense(TinyEncoder):
    """Sees everywhere what it sees of the whole."""

    def encode_dense(self, images):
        activations = torch.nn.functional.avg_pool2d(images, 16).detach().requires_grad_()
        with torch.enable_grad():
            squares = activations.movedim(1, -1).reshape(-1, 3, 1, 1).expand(-1, 3, self.image_size, self.image_size)
            features = self.encode_image(squares).view(len(images), *activations.shape[2:], -1).movedim(-1, 1)
        return DenseFeatures(features, activations)


def test_rows_of_methods_have_their_authors_weights_and_the_configurations_training(tmp_path):
    config = configure(tmp_path, "cacl.gamma=15.0", "cacl.alpha=3.0", "cacl.lr=0.02")
    given = {"pole": {"lr": 0.5}, "cacl": {"margin": 1.0}}
    rows = {v.name: config.changed(v.changes).table(CACL) for v in methods_table.variants(config, given)}
    assert list(rows) == ["warm-up", "CLIP-ES", "CLIMS", "QA-CLIMS", "POLE", "CA-CL"]
    weights = {name: (row.alpha, row.background_weight, row.beta, row.gamma) for name, row in rows.items()}
    assert weights["CLIMS"] == (10.0, 24.0, 1.0, 0.2)
    assert weights["QA-CLIMS"][::3] == (10.0, 0.2)
    assert weights["QA-CLIMS"][1] == 8.0
    assert weights["POLE"][:3] == (10.0, 25.0, 1.0)
    assert weights["CA-CL"][::3] == (3.0, 15.0)
    assert {name: row.lr for name, row in rows.items()} == {**dict.fromkeys(rows, 0.02), "POLE": 0.5}
    assert {row.epochs for name, row in rows.items() if name != "warm-up"} == {1.0}
    assert rows["CA-CL"].margin == 1.0
    with pytest.raises(ValueError, match="Expected settings of cacl, clims, qa-clims, pole, but got some of 'clip'"):
        methods_table.variants(config, {"clip": {}})


def test_methods_start_from_one_warm_up_and_are_measured_alike(tmp_path):
    config = configure(tmp_path, *QUICK)
    seen = []
    arguments = {"encoder": Dense(), "backbone": TinyBackbone(), "callback": lambda r: seen.append(r["stage"])}
    assert ablate.run(config, tables=["methods"], seeds=2, **arguments) == [tmp_path / "out/table-methods.md"]
    table = {row["method"]: row for row in rows(tmp_path / "out/table-methods.csv")}
    assert list(table) == ["warm-up", "CLIP-ES", "CLIMS", "QA-CLIMS", "POLE", "CA-CL"]
    for name, row in table.items():
        folders = [tmp_path / f"out/seed-{seed}/methods-{name.lower()}" for seed in (0, 1)]
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
        for key, stage in (("cam", "cams"), ("masks", "masks")):
            known = [each[stage]["miou"] for each in metrics]
            assert float(row[f"{key}_mean"]) == pytest.approx(statistics.fmean(known), abs=1e-4)
            assert float(row[f"{key}_std"]) == pytest.approx(statistics.stdev(known), abs=1e-4)
        assert float(row["oracle_mean"]) >= float(row["cam_mean"]) - 1e-4
        assert (row["seconds_per_step"] == "") == (name in ("warm-up", "CLIP-ES"))
        assert row["seeds"] == "2"
    for seed in (0, 1):
        models = {path.read_bytes() for path in (tmp_path / f"out/seed-{seed}").glob("*/warmup/model.pt")}
        assert len(models) == 1
        trained = torch.load(tmp_path / f"out/seed-{seed}/methods-warm-up/cacl/model.pt", weights_only=True)
        start = torch.load(tmp_path / f"out/seed-{seed}/start/warmup/model.pt", weights_only=True)
        torch.testing.assert_close(trained, start)  # the row of the warm-up is the warm-up
    text = (tmp_path / "out/table-methods.md").read_text()
    assert "| QA-CLIMS |" in text
    assert "the encoder that is adapted to masks" in text
    assert (tmp_path / "out/table-methods.png").read_bytes().startswith(b"\x89PNG")
    before = len(seen)
    ablate.run(config, tables=["methods"], seeds=2, **arguments)
    assert len(seen) == before


def test_methods_without_a_dense_encoder_and_by_the_command_line(tmp_path, clip_state, capsys):
    config = configure(tmp_path, *QUICK, f"run.out={tmp_path / 'given'}")
    run(config, tables=["methods"], seeds=1)
    text = (tmp_path / "given/table-methods.md").read_text()
    assert "| CLIP-ES |" not in text
    assert "CLIP-ES is missing: Expected argument `encoder` to have `encode_dense`, but TinyEncoder lacks it." in text
    torch.save(clip_state, tmp_path / "clip.pt")
    (tmp_path / "config.toml").write_text(config.to_toml())
    settings = [f"encoder.name={tmp_path / 'clip.pt'}", "camnet.backbone=resnet18", "camnet.weights=", "clims.lr=0.005"]
    settings.append(f"run.out={tmp_path / 'out'}")
    command = ["ablate", f"{tmp_path / 'config.toml'}", "--tables", "methods", "--seeds", "1"]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
    assert "| CLIP-ES |" in capsys.readouterr().out
    made = tmp_path / "out-ablation/seed-0"
    assert "lr = 0.005\n" in (made / "methods-clims/config.toml").read_text()
    assert "lr = 0.01\n" in (made / "methods-pole/config.toml").read_text()


def test_methods_without_the_extra_have_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trial = {"cams": {"split": "train", "images": 6, "miou": 0.4}, "masks": {"miou": 0.5}}
    with caplog.at_level("INFO"):
        methods_table.write(tmp_path / "table-methods", {"CLIMS": [methods_table.Trial(trial, 0.1)]}, "")
    assert "ablate: no picture." in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table-methods.csv", "table-methods.md"]


def test_settings_of_a_method_without_its_table_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`tables` to have 'methods', as settings of 'clims' are given"):
        run(configure(tmp_path), tables=["5"], methods={"clims": {"lr": 1.0}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.json").write_text("{}")
    others, own = split_overrides(["cacl.lr=0.1", "pole.synonyms=words.json", "qa-clims.lr=0.5"])
    assert others == ["cacl.lr=0.1"]
    assert own == {"pole": {"synonyms": str(tmp_path / "words.json")}, "qa-clims": {"lr": 0.5}}


def test_methods_beside_others_seeds_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match=r"\[cams\] source: expected 'cacl', beside which the table has CLIP-ES, but"):
        run(configure(tmp_path, "cams.source=clip"), tables=["methods"])
