"""When a stage is done again: what its key follows from, and what it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
from conftest import TinyBackbone, TinyEncoder
from drawn import write_csv
from test_pipeline import configure

from cacl import pipeline
from cacl.config import Config
from cacl.runs.session import Session
from cacl.settings import CAMNetwork, Encoder, Mark, Prompts, Share
from cacl.stages.chain import CHAIN
from cacl.tables import IRN, CAMs


@pytest.fixture
def root(tmp_path):
    return write_csv(tmp_path / "data")


def keys(config: Config) -> dict[str, str]:
    session = Session(config, TinyEncoder(), TinyBackbone())
    return {stage.name: session.key_of(stage) for stage in config.chain}


def with_table(name: str, table: type):
    return tuple(replace(stage, settings=table) if stage.name == name else stage for stage in CHAIN)


def load(root: Path, chain, *more: str) -> Config:
    return Config.load("voc", [f"data.root={root}", "data.format=csv", "data.train=train", *more], chain=chain)


def test_a_new_setting_at_its_default_changes_no_key(root):
    class Newer(IRN):
        smooth: Share = 0.5

    Newer.__module__ = IRN.__module__  # as if it had always been its own
    chain = with_table("irn", Newer)
    assert keys(load(root, chain)) == keys(load(root, CHAIN))
    changed = keys(load(root, chain, "irn.smooth=0.25"))
    assert [name for name, key in keys(load(root, CHAIN)).items() if changed[name] != key] == [
        "irn", "masks", "segment", "predict",
    ]  # fmt: skip


def test_a_setting_that_only_an_evaluation_reads_changes_a_score_alone(root, tmp_path):
    class Newer(CAMs):
        tolerance: Annotated[Share, Mark.EVALUATION] = 0.5

    Newer.__module__ = CAMs.__module__
    chain = with_table("cams", Newer)
    assert keys(load(root, chain, "cams.tolerance=0.25")) == keys(load(root, CHAIN))
    small = [*configure(root, tmp_path / "out").to_toml().splitlines()]
    (tmp_path / "config.toml").write_text("\n".join(small))
    seen: list[str] = []

    def go(*more):
        config = Config.load(tmp_path / "config.toml", more, chain=chain)
        stages = ["warmup", "cacl", "cams"]
        given = {"encoder": TinyEncoder(), "backbone": TinyBackbone(), "chain": chain, "stages": stages}
        result = pipeline.run(config, callback=lambda record: seen.append(record["stage"]), **given)
        return {name: record["key"] for name, record in result.metrics.items()}

    before, trained = go(), len(seen)
    after = go("cams.tolerance=0.25")
    assert len(seen) == trained
    assert [name for name in before if before[name] != after[name]] == ["cams"]


def test_another_version_of_a_stage_is_done_again(root):
    chain = tuple(replace(stage, version=stage.version + 1) if stage.name == "cams" else stage for stage in CHAIN)
    before, after = keys(load(root, CHAIN)), keys(load(root, chain))
    assert [name for name in before if before[name] != after[name]] == ["cams", "irn", "masks", "segment", "predict"]


def test_what_a_preset_gives_counts_and_its_name_does_not_hide_it(root):
    one = keys(load(root, CHAIN, "segment.preset=paper"))
    assert one["segment"] != keys(load(root, CHAIN))["segment"]
    assert one["masks"] == keys(load(root, CHAIN))["masks"]


SAVED = Path(__file__).with_name("defaults.json")
"""Table -> the version of the stage whose key it is a part of, and its defaults."""


def defaults() -> dict[str, dict]:
    versions = {stage.name: stage.version for stage in CHAIN}
    tables = {stage.name: stage.settings for stage in CHAIN}
    tables |= {"encoder": Encoder, "prompts": Prompts, "camnet": CAMNetwork}
    versions |= {"encoder": versions["cacl"], "prompts": versions["cacl"], "camnet": versions["warmup"]}
    found = {}
    for name, table in tables.items():
        values = {key: field.get_default(call_default_factory=True) for key, field in table.model_fields.items()}
        found[name] = {"version": versions[name], "defaults": values}
    return json.loads(json.dumps(found))


def test_whoever_changes_a_default_raises_the_version():
    """A key says nothing of a default: where it means another value, old results would be taken for new ones.

    Where this fails: raise the `version` of the stage (of `cacl` for [encoder] and [prompts], of `warmup` and `segment`
    for [camnet]) if a default has changed, not if there is a new setting; then `python tests/test_keys.py`.
    """
    assert defaults() == checked(), "write down what is new: PYTHONPATH=tests python tests/test_keys.py"


def checked() -> dict[str, dict]:
    """What is saved, unless a default has changed under the same version."""
    saved, found = json.loads(SAVED.read_text()), defaults()
    for name in saved.keys() & found.keys():
        old, new = saved[name], found[name]
        changed = [key for key, value in old["defaults"].items() if new["defaults"].get(key, value) != value]
        assert not changed or old["version"] < new["version"], f"[{name}] {', '.join(changed)}: raise the version"
    return saved


if __name__ == "__main__":
    checked()
    SAVED.write_text(json.dumps(defaults(), indent=2) + "\n")
