"""How the house is built: who may import whom, no circles, nothing private taken, a setting stands once."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import cacl
from cacl import camnet, crf, criterion, irn, log, losses, mining, random_walk, training, transforms
from cacl.settings import CRF, Run, Training
from cacl.tables import CACL, IRN, CAMs, Masks

PACKAGE = Path(cacl.__file__).parent
# Each floor may import from itself and from those before it; what stands in no floor fails.
FLOORS = [
    "constants errors _support",
    "thresholds dense prompts selector regions losses matching criterion agreement pretrained camnet encoders "
    "backbones timm_backbones embedded crf random_walk irn mining deeplab metrics tagger methods clip_es",
    "images folders transforms pictures outlines datasets scenes",
    "settings tables log trackers training loading artifacts photos seeds",
    "stages",
    "config",
    "runs",
    "paper_tables reproduction inputs predict export sharing voc_archive label_formats label_sources labels",
    "figures",
    "report",
    "pipeline",
    "methods_table ablate rehearsal reproduce",
    "commands",
    "cli",
    "__main__",
]
LOOKS = ("figures", "report")
"""What looks: imported by nobody but what runs a command, and only when it is called."""


@cache
def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def imports(name: str) -> list[tuple[str, str, bool]]:
    """(module, name taken from it, whether at the top of the file) of all imports from the package."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            if (node.module or "").partition(".")[0] == "cacl":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    target, taken = (whole, "") if whole in modules() else (node.module or "", alias.name)
                    found.append((target, taken, node.col_offset == 0))
        elif isinstance(node, ast.Import):
            found += [(a.name, "", node.col_offset == 0) for a in node.names if a.name.partition(".")[0] == "cacl"]
    return found


def room(name: str) -> str:
    return name.split(".")[1]


ROOMS = [name for name in modules() if name != "cacl"]


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_downwards_only(name):
    height = {each: i for i, floor in enumerate(FLOORS) for each in floor.split()}
    assert room(name) in height, f"{name} stands on no floor; add it to FLOORS"
    for target, _, at_the_top in imports(name):
        if target == "cacl":
            continue
        # A stage may bring in the report when it is called; nobody below it may.
        assert height[room(target)] <= height[room(name)], f"{name} imports {target}, which is above it"
        if room(target) in LOOKS and room(name) not in LOOKS:
            assert room(name) in ("pipeline", "methods_table", "commands"), f"{name} imports {target}, which only looks"
            assert not at_the_top, f"{name} imports {target} before it is needed"
        if room(name) == "figures":
            assert room(target) != "report"


def test_there_are_no_circles():
    arrows = {name: {target for target, _, _ in imports(name)} - {name, "cacl"} for name in ROOMS}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(arrows[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in ROOMS:
        visit(name, ())


@pytest.mark.parametrize("name", ROOMS)
def test_nobody_takes_what_is_private(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    known = {}
    for target, taken, _ in imports(name):
        private = taken.startswith("_") and not taken.startswith("__")
        assert not private, f"{name} takes {target}.{taken}"
        known[target.rpartition(".")[2]] = target
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert not re.match("_[^_]", node.attr), f"{name} takes {known[node.value.id]}.{node.attr}"


def test_nothing_public_is_defined_in_support():
    for name in cacl.__all__:
        assert not getattr(getattr(cacl, name), "__module__", "").startswith("cacl._support"), name
    pages = "".join(path.read_text() for path in (PACKAGE.parent / "docs/api").glob("*.md"))
    assert "_support" not in pages


def test_torch_distributed_is_imported_when_there_is_a_group():
    for name in ROOMS:
        for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            whole = getattr(node, "module", None) or node.names[0].name
            if re.match(r"torch\.(distributed|nn\.parallel)", whole):
                assert node.col_offset > 0, f"{name} imports {whole} at its top"
                assert name in ("cacl._support.distributed", "cacl._support.parallel")


def test_no_public_function_takes_anything_whatever():
    for name in ROOMS:
        for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.args.kwarg:
                kind = ast.unparse(node.args.kwarg.annotation) if node.args.kwarg.annotation else "Any"
                assert kind != "Any" or room(name) == "_support", f"{name}.{node.name}(**{node.args.kwarg.arg})"


LARGE = {
    "cacl.losses": "the three losses, each a function and a module with their formulas: they are read together",
    "cacl.scenes.scenery": "data: what the drawn world is made of",
}
"""Modules of more than 300 lines, and why they may."""


def test_no_room_is_too_full():
    full = {name for name in ROOMS if len(modules()[name].read_text(encoding="utf-8").splitlines()) > 300}
    assert full == set(LARGE), "a module of more than 300 lines: part it, or say why in LARGE"


@pytest.mark.parametrize(
    ("function", "table"),
    [
        (crf.dense_crf, CRF()),
        (crf.DenseCRF, CRF()),
        (mining.mine_labels, IRN(foreground_score=0.3, background_score=0.1)),
        (mining.pseudo_mask, Masks()),
        (mining.refine_maps, Masks()),
        (mining.crf_labels, IRN()),
        (irn.affinity_loss, IRN()),
        (random_walk.propagate, Masks()),
        (random_walk.spread, Masks()),
        (training.Loop, Training(epochs=1, lr=0, schedule="cosine")),
        (training.Loop, Run(precision="fp32")),  # which is decided when a run begins
        (log.Journal, Run()),
        (transforms.RandomView, Training(epochs=1, lr=0, schedule="cosine")),
        (criterion.CACLLoss, CACL()),
        (losses.ITCLoss, CACL()),
        (losses.BGSuppressionLoss, CACL()),
        (camnet.CAMNet.predict, CAMs()),
    ],
)
def test_plain_keywords_have_the_defaults_of_the_tables(function, table):
    parameters = inspect.signature(function).parameters
    shared = [key for key in parameters if key in type(table).model_fields]
    shared = [key for key in shared if parameters[key].default is not inspect.Parameter.empty]
    shared = [key for key in shared if key not in ("crop", "seed", "progress", "device", "workers", "momentum")]
    assert shared
    assert {key: parameters[key].default for key in shared} == {key: getattr(table, key) for key in shared}
