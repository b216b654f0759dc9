"""Where the time goes: blocks within blocks, threads, work of other processes, stages."""

from __future__ import annotations

import json
import threading
import time

import pytest

from cacl._support.clock import add, spent, timed
from cacl._support.pool import map_processes
from cacl.log import measured


def test_what_is_within_counts_once():
    before = spent()
    with timed("photos"):
        time.sleep(0.02)
        with timed("crf"):
            time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), timed("files"):
        time.sleep(0.01) or 1 / 0
    found = spent(before)
    assert found["photos"] >= 0.04
    assert found["crf"] == found["network"] == 0
    assert found["files"] >= 0.01


def test_threads_do_not_hide_each_other():
    before = spent()

    def work():
        with timed("crf"):
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    with timed("network"):
        thread.start()
        thread.join()
    found = spent(before)
    assert min(found["crf"], found["network"]) >= 0.05


@timed("walk")
def slow(item):
    time.sleep(0.1)
    return item


def test_work_of_other_processes_is_what_it_took_here():
    before, start = spent(), time.monotonic()
    assert list(map_processes(slow, range(8), workers=2)) == list(range(8))
    assert spent(before)["walk"] == pytest.approx(0.4, abs=0.1)  # 0.8 s in two processes
    assert spent(before)["walk"] < time.monotonic() - start
    before = spent()
    assert list(map_processes(slow, range(2), workers=0)) == [0, 1]
    assert spent(before)["walk"] == pytest.approx(0.2, abs=0.1)


def test_a_stage_adds_up_what_it_spends_over_its_stops(tmp_path):
    path = tmp_path / "times.json"
    for again in (True, False):
        with measured(path, "cams", again=again):
            add({"network": 2.5, "files": 0.001})
    cost = json.loads(path.read_text())["cams"]
    assert cost["network"] == 5.0
    assert "files" not in cost  # nothing that would be seen
    assert "photos" not in cost
    with measured(path, "cams", again=True):
        add({"crf": 1.0})
    assert "network" not in json.loads(path.read_text())["cams"]
