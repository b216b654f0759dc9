"""The notebook is its page of the documentation, and runs in a kernel: bars, stops, second runs, classes in cells.

``python tests/test_notebook.py`` writes it.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import time
import tomllib
from pathlib import Path

import pytest
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from test_pipeline import SETTINGS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/how-to/notebook.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
SMALL = [
    "run.workers=0", "run.precision=fp32", "scenes.train=4", "scenes.val=2", "scenes.size=64", "cams.scales=[1.0]",
    "report.images=1", *(f"{stage}.{setting}" for stage in ("warmup", "cacl", "segment")
                         for setting in ("epochs=1", "batch_size=2", "crop=32")),
]  # fmt: skip


def notebook() -> dict:
    """The page's text in cells of Markdown, its snippets in cells of code; a shell's command is IPython's magic."""
    cells = []
    for text, language, code in re.findall(r"(.*?)(?:^```(\w+)\n(.*?)^```$|\Z)", PAGE.read_text("utf-8"), re.M | re.S):
        if text.strip():
            cells.append({"cell_type": "markdown", "source": text.strip()})
        if code:
            source = {"python": code, "bash": f"%{code}"}[language].strip()
            cells.append({"cell_type": "code", "source": source, "execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [{"id": f"cell-{i}", "metadata": {}, **cell} for i, cell in enumerate(cells)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def written() -> str:
    return json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"


def test_the_notebook_is_its_page():
    assert NOTEBOOK.read_text("utf-8") == written(), "write it: PYTHONPATH=tests python tests/test_notebook.py"


def test_it_is_valid_and_installs_from_a_checkout():
    pytest.importorskip("nbformat").validate(json.loads(NOTEBOOK.read_text("utf-8")))
    first = next(cell["source"] for cell in notebook()["cells"] if cell["cell_type"] == "code")
    path, extra = re.fullmatch(r'%pip install "(.+)\[(\w+)\]"', first).groups()
    project = tomllib.loads((NOTEBOOK.parent / path / "pyproject.toml").read_text())["project"]
    assert project["name"] == "cacl"
    assert extra in project["optional-dependencies"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def shown(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def bars(cell) -> list[str]:
    """What progress bars are called."""
    texts = (output.data["text/plain"] for output in cell.outputs if output.output_type == "display_data")
    return [text.partition(":")[0] for text in texts]


def test_it_runs_and_runs_again(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    book = nbformat.from_dict(notebook())
    code = [cell for cell in book.cells if cell.cell_type == "code"][1:]  # it is installed
    assert sum("settings = []" in cell.source for cell in code) == 1
    for cell in code:
        cell.source = cell.source.replace("settings = []", f"settings = {SMALL}")
    again = [nbformat.v4.new_code_cell(cell.source) for cell in code if "pipeline.run(" in cell.source]
    book.cells = [*code, *again]
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=300, resources=resources).execute(env=environment())

    results = [
        cell.outputs[-1].data for cell in code if cell.outputs and cell.outputs[-1].output_type == "execute_result"
    ]
    assert sum("image/png" in data for data in results) == 4  # scenes, CAMs, pseudo masks, the segmenter's masks
    (link,) = re.findall("href='(.+?)'", results[-1]["text/html"])
    assert (tmp_path / link).name == "index.html"
    assert (tmp_path / link).is_file()
    trained, rest = (cell for cell in code if "pipeline.run(" in cell.source)
    assert {"warmup", "cacl", "evaluate"} <= set(bars(trained))
    assert {"cams", "segment", "predict"} <= set(bars(rest))
    assert "cacl: CAM mIoU" in shown(trained)
    assert "predict: DeepLabV2" in shown(code[-2])

    steps = [json.loads(line) for line in (tmp_path / "cacl-scenes/log.jsonl").read_text().splitlines()]
    assert [step["stage"] for step in steps] == 2 * ["warmup"] + 2 * ["cacl"] + 2 * ["segment"]
    assert [bars(cell) for cell in again] == [[], []]
    assert shown(again[0]).splitlines()[:2] == ["warmup: finished before", "cacl: finished before"]
    assert shown(again[0]).splitlines()[2:] == shown(code[-2]).splitlines()  # the same scores


class Kernel:
    def __init__(self, folder: Path) -> None:
        manager = pytest.importorskip("jupyter_client.manager")
        pytest.importorskip("ipykernel")
        self.manager, self.client = manager.start_new_kernel(cwd=str(folder), env=environment(), startup_timeout=120)

    def run(self, code: str, *, interrupt_when: Path | None = None) -> tuple[str, str]:
        """What a cell shows, or the value of its last line, and its error; interrupted when a file is
        there, if one is given."""
        cell, text, error = self.client.execute(code), "", ""
        if interrupt_when is not None:
            deadline = time.monotonic() + 200
            while not interrupt_when.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.manager.interrupt_kernel()
        while True:
            message = self.client.get_iopub_msg(timeout=200)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            if kind == "stream":
                text += content["text"]
            elif kind == "execute_result":
                text += content["data"]["text/plain"]
            elif kind == "error":
                error = f"{content['ename']}: {content['evalue']}"
            elif kind == "status" and content["execution_state"] == "idle":
                return text, error


@pytest.fixture
def kernel(tmp_path):
    started = Kernel(tmp_path)
    yield started
    started.client.stop_channels()
    started.manager.shutdown_kernel(now=True)


OWN = f"""
import hashlib, logging, multiprocessing, sys, time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cacl import pipeline
from cacl.config import Config

{inspect.getsource(TinyEncoder)}
{inspect.getsource(TinyBackbone)}
class Terms(NamedTuple):
    total: Tensor

class Flat:
    def __call__(self, images, cams, labels):
        return Terms((cams.mean((2, 3)) - labels).square().mean())

def heard(record):
    if record["stage"] == "cacl":
        time.sleep(0.05)
        if record["step"] == 3:
            Path("third-step").touch()

def run(out, *stages):
    settings = {[*SETTINGS, "data.root=data", "run.workers=2", "run.precision=fp32", "cacl.epochs=20"]}
    config = Config.load("voc", [*settings, f"run.out={{out}}"])
    own = dict(encoder=TinyEncoder(), backbone=TinyBackbone(), criterion=Flat())
    return pipeline.run(config, stages=stages, callback=heard, **own)

logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("cacl").setLevel(logging.INFO)
"""
"""A cell with an encoder, a backbone and a criterion of its own, and a run with two workers."""


def test_a_cell_that_is_stopped_goes_on_when_it_is_run_again(tmp_path, kernel):
    write_csv(tmp_path / "data")
    assert kernel.run(OWN) == ("", "")
    cell, stage = 'run("stopped", "warmup", "cacl").metrics', tmp_path / "stopped/cacl"
    assert kernel.run(cell, interrupt_when=tmp_path / "third-step")[1] == "KeyboardInterrupt: "
    assert (stage / "checkpoint.pt").is_file()
    assert not (stage / "model.pt").exists()
    assert kernel.run("multiprocessing.active_children()") == ("[]", "")
    text, error = kernel.run(cell)
    assert not error
    assert re.search(r"going on from step \d+ of .*stopped/cacl/checkpoint.pt\n", text)
    again, error = kernel.run(cell)
    assert again.splitlines()[:2] == ["warmup: finished before", "cacl: finished before"]
    assert again.splitlines()[-1] == text.splitlines()[-1]  # the scores
    assert not kernel.run('run("whole", "warmup", "cacl")')[1]
    assert (stage / "model.pt").read_bytes() == (tmp_path / "whole/cacl/model.pt").read_bytes()


@pytest.mark.slow
def test_what_stands_in_cells_takes_part_in_every_stage(tmp_path, kernel):
    write_csv(tmp_path / "data")
    assert kernel.run(OWN) == ("", "")
    stages = ["warmup", "cacl", "cams", "irn", "masks", "segment", "predict"]
    text, error = kernel.run(f'print(list(run("out", *{stages}).metrics))')
    assert not error
    assert text.splitlines()[-1] == str(stages)
    assert "in one process, as others cannot be given the work" in text  # which needs the backbone; the CRFs do not


def test_bars_without_ipywidgets_are_text(tmp_path, kernel):
    text, error = kernel.run("""
import sys
sys.modules["ipywidgets"] = None
from cacl import scenes
scenes.generate("scenes", train=3, val=0, size=32)
""")
    assert not error
    assert re.search(r"scenes: +100%\|.*\| 3/3 ", text)
    assert "ipywidgets" not in text


if __name__ == "__main__":
    NOTEBOOK.write_text(written(), encoding="utf-8")
