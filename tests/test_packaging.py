"""What is built of the sources: a wheel and a source archive that hold what they must, used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import sys
import cacl
from cacl.backbones import named_backbone
from cacl.encoders import load_encoder
assert cacl.__file__.startswith(sys.argv[1]), cacl.__file__
texts = load_encoder("scenes").encode_text(["a photo of a boat."])
print(texts.shape, named_backbone("scenes", "DEFAULT").out_channels)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with what ``python -m build`` makes of a copy of the sources."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("sources") / "cacl"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__", "cacl-*")
    shutil.copytree(ROOT, copy, ignore=left_out)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."], copy)
    return copy / "dist"


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cacl").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources()


def test_the_source_archive_holds_what_its_tests_need(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert sources() <= names
    for wanted in ("tests/conftest.py", "tests/defaults.json", "examples/drop_in.py", "docs/index.md", "CHANGELOG.md"):
        assert wanted in names


def test_the_wheel_is_used_from_another_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    where = tmp_path / "site"
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(where), str(wheel)], tmp_path)
    found = run([sys.executable, "-c", USE, str(where)], tmp_path, PYTHONPATH=str(where))
    assert found.split() == ["torch.Size([1,", "128])", "160"]
    version = run([sys.executable, "-m", "cacl", "--version"], tmp_path, PYTHONPATH=str(where))
    assert version.split()[-1] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
