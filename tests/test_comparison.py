"""The page beside other libraries: each of this package's cells names a test that is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import cacl

ROOT = Path(__file__).parents[1]


def test_every_row_names_tests_that_exist():
    page = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    header, *rows = rows
    assert len(rows) >= 20
    assert [len(row) for row in rows] == [len(header)] * len(rows)
    assert header[-1].strip() == "cacl"
    named = {row[0].strip(): re.findall(r"`(tests/\w+\.py)`", row[-1]) for row in rows}
    assert [feature for feature, tests in named.items() if not tests] == []
    missing = {test for tests in named.values() for test in tests if not (ROOT / test).is_file()}
    assert not missing, f"docs/comparison.md names tests that are not there: {sorted(missing)}"


def test_licence_and_types_are_what_the_page_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "MIT"
    assert (ROOT / project["license-files"][0]).read_text(encoding="utf-8").startswith("MIT License")
    assert Path(cacl.__file__).with_name("py.typed").is_file()
