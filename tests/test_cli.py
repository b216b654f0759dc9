"""The command line: exit codes, one line an error, and nothing lost."""

import subprocess
import sys

import pytest
from drawn import write_csv

from cacl.cli import main


@pytest.fixture
def config(tmp_path):
    write_csv(tmp_path / "data")
    path = tmp_path / "config.toml"
    path.write_text(
        'base = "voc"\n[run]\nout = "out"\n[data]\nformat = "csv"\nroot = "data"\ntrain = "train"\neval = "val"\n'
    )
    return path


def test_dry_run_prints_and_does_nothing(config, capsys):
    assert main(["run", str(config), "--dry-run", "--set", "cacl.epochs=3", "--stages", "warmup,cacl"]) == 0
    out = capsys.readouterr().out
    assert "epochs = 3.0" in out
    assert "warmup: new\ncacl: new" in out
    assert "cams: new" not in out
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "CONFIG", "--set", "cacl.epoch=3"], 'config.toml: [cacl] epoch: unknown key; did you mean "epochs"?'),
        (["run", "nowhere.toml"], "nowhere.toml: no such file"),
        (["run", "CONFIG", "--stages", "cam"], 'Expected argument `stages` to be one of "warmup", "cacl", "cams"'),
        (["run", "CONFIG", "--set", "data.root=elsewhere"], "classes.txt: no such file"),
        (["run", "CONFIG", "--set", "run.device=cuda:77"], "[run] device: expected a device of this machine"),
        (["check", "nowhere.toml"], "nowhere.toml: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(config, capsys, arguments, message):
    assert main([str(config) if a == "CONFIG" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cacl: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_check(config, capsys):
    assert main(["check", str(config)]) == 0
    assert main(["check", str(config.parent / "data")]) == 0
    assert capsys.readouterr().out == "no problems\nno problems\n"
    (config.parent / "data/images/2.png").write_text("broken")
    (config.parent / "data/masks/3.png").unlink()
    assert main(["check", str(config)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[-1] == "2 problems"


def test_a_loss_that_is_not_finite_is_exit_code_1(config, capsys):
    settings = [
        "camnet.backbone=resnet18",
        "camnet.weights=",
        "warmup.crop=32",
        "warmup.lr=1e30",
        "warmup.batch_size=2",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["run", str(config), "--stages", "warmup", *options, "--set", "run.workers=0"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("cacl: warmup: the loss is")
    assert (config.parent / "out/log.jsonl").is_file()


def test_a_disk_that_refuses_is_one_line(config, capsys):
    (config.parent / "out/warmup/stage.json.tmp").mkdir(parents=True)
    options = ["--set", "camnet.backbone=resnet18", "--set", "camnet.weights=", "--stages", "warmup"]
    assert main(["run", str(config), *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("warmup/stage.json.tmp: Is a directory")


def test_module_and_help():
    done = subprocess.run([sys.executable, "-m", "cacl", "--help"], capture_output=True, text=True, check=True)
    assert "run the stages of the chain" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "cacl", "run", "none.toml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "cacl: none.toml: no such file\n")
