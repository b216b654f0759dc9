"""What users build on stays as it is: public names, signatures, a light import, examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest
import torch

import cacl
from cacl import datasets, log, photos, settings, stages
from cacl.stages.chain import CHAIN
from cacl.tables import TABLES

# A changed line here is a change that users notice: write it into CHANGELOG.md.
API = """
DEFAULT_TEMPLATES = ('a photo of {}.', 'an image of {}.', 'a picture of {}.', 'a snapshot of {}.')
BGSuppressionLoss(threshold: float = 0.26, *, mode: ThresholdMode = 'fixed', bounds: tuple[float, float] = (0.2,
    0.3), temperature: float = 0.01, quantile: float = 0.8, momentum: float = 0.99, num_classes: int | None = None,
    reduction: Reduction = 'sum') -> None
BGSuppressionLoss.threshold
BGSuppressionLoss.forward(self, foreground: Tensor, background_text: Tensor, classes: Tensor | None = None, *, across:
    bool = False) -> Tensor
BackgroundSet(words: Mapping[str, Sequence[str]]) -> None
BackgroundSet.voc(n: int = 5) -> BackgroundSet
BackgroundSet.coco(n: int = 5) -> BackgroundSet
BackgroundSet.from_json(path: str | PathLike[str], n: int | None = None) -> BackgroundSet
BackgroundSet.built_in(names: Sequence[str], n: int = 5) -> BackgroundSet
BackgroundSet.texts(self, name: str, prompts: PromptSet) -> list[str]
BackgroundSet.encode(self, encoder: ImageTextEncoder, names: Sequence[str], prompts: PromptSet, *, batch_size: int =
    256) -> Tensor
BackgroundSet.query(name: str, n: int) -> str
BackgroundSet.parse(answer: str) -> tuple[str, ...]
CACLLoss(encoder: ImageTextEncoder, names: Sequence[str], *, prompts: PromptSet | None = None, backgrounds:
    BackgroundSet | None = None, alpha: float = 40.0, beta: float = 1.0, gamma: float = 0.4, margin: float = 0.5,
    suppression: BGSuppressionLoss | None = None, template: int | None = None, normalization: Literal['encoder',
    'imagenet'] = 'encoder') -> None
CACLLoss.encoder
CACLLoss.forward(self, images: Tensor, cams: Tensor, labels: Tensor) -> CACLTerms
CACLLoss.record(self) -> dict[str, Tensor]
CACLTerms(total, itc, bgs, region, foreground_similarity, background_similarity, pass_rate)
CAMNet(num_classes: int = 20, *, backbone: str | nn.Module = 'resnet50', weights: str | None = 'DEFAULT') -> None
CAMNet.forward(self, images: Tensor) -> CAMOutput
CAMNet.classify(self, images: Tensor) -> Tensor
CAMNet.scores(self, images: Tensor) -> Tensor
CAMNet.predict(self, images: Tensor, *, scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0), flip: bool = True, size:
    tuple[int, int] | None = None, classes: Tensor | None = None, activation: Literal['relu', 'sigmoid'] = 'relu') ->
    Tensor
CAMNet.parameter_groups(self, lr: float, *, head_factor: float = 10.0) -> list[dict[str, object]]
CAMOutput(cams, scores)
ContextSelector(prompt_features: Tensor, *, mode: Literal['dynamic', 'fixed'] = 'dynamic', template: int = 0) ->
    None
ContextSelector.forward(self, foreground: Tensor, classes: Tensor, *, across: bool = False) -> Selection
ContrastLoss(temperature: float = 0.7, *, weights: tuple[float, float] = (10.0, 8.0), reduction: Reduction = 'sum') ->
    None
ContrastLoss.forward(self, foreground: Tensor, background: Tensor, text: Tensor, words: Tensor, *, across: bool =
    False) -> Tensor
ITCLoss(margin: float = 0.5, *, reduction: Reduction = 'mean') -> None
ITCLoss.forward(self, foreground: Tensor, background: Tensor, text: Tensor, *, across: bool = False) -> Tensor
ImageTextEncoder: image_size, mean, std
ImageTextEncoder.encode_image(self, images: Tensor) -> Tensor
ImageTextEncoder.encode_text(self, texts: Sequence[str]) -> Tensor
MatchingLoss(weights: tuple[float, float] = (10.0, 24.0), *, reduction: Reduction = 'mean') -> None
MatchingLoss.forward(self, foreground: Tensor, background: Tensor, text: Tensor, *, across: bool = False) -> Tensor
PromptSet(templates: Iterable[str] = ('a photo of {}.', 'an image of {}.', 'a picture of {}.', 'a snapshot of {}.'))
    -> None
PromptSet.texts(self, name: str) -> list[str]
PromptSet.encode(self, encoder: ImageTextEncoder, names: Sequence[str], *, batch_size: int = 256) -> Tensor
RegionLoss()
RegionLoss.forward(self, cams: Tensor, *, across: bool = False) -> Tensor
Regions(foreground, background, image_index, class_index)
Selection(text, index, similarity)
bg_suppression_loss(foreground: Tensor, background_text: Tensor, threshold: Tensor | float = 0.26, *, temperature:
    float | None = None, reduction: Reduction = 'sum', across: bool = False) -> Tensor
contrast_loss(foreground: Tensor, background: Tensor, text: Tensor, words: Tensor, *, temperature: float = 0.7,
    weights: tuple[float, float] = (10.0, 8.0), reduction: Reduction = 'sum', across: bool = False) -> Tensor
itc_loss(foreground: Tensor, background: Tensor, text: Tensor, *, margin: float = 0.5, reduction: Reduction = 'mean',
    across: bool = False) -> Tensor
load_encoder(name: str | PathLike[str] = 'ViT-B/32', *, device: torch.device | str | None = None, root: str |
    PathLike[str] | None = None) -> ImageTextEncoder
matching_loss(foreground: Tensor, background: Tensor, text: Tensor, *, weights: tuple[float, float] = (10.0, 24.0),
    reduction: Reduction = 'mean', across: bool = False) -> Tensor
pipeline
present_pairs(labels: Tensor) -> tuple[Tensor, Tensor]
region_loss(cams: Tensor, *, across: bool = False) -> Tensor
split_regions(images: Tensor, cams: Tensor, labels: Tensor, *, size: int = 224) -> Regions
"""


# The stages: what a user calls without the pipeline.
STAGES = """
pipeline.run(config: Config | str | PathLike[str], *, encoder: ImageTextEncoder | None = None, backbone: nn.Module |
    None = None, criterion: Criterion | None = None, chain: Chain = {chain}, stages: Sequence[str] | None = None,
    resume: bool = True, callback: Callback | None = None) -> Result
pipeline.plan(config: Config | str | PathLike[str], stages: Sequence[str] | None = None, *, resume: bool = True,
    encoder: ImageTextEncoder | None = None, backbone: nn.Module | None = None, criterion: Criterion | None = None,
    chain: Chain = {chain}) -> list[str]
reproduce.run(name: str, config: Config, *, any_data: bool = False, encoder: ImageTextEncoder | None = None, backbone:
    nn.Module | None = None, callback: Callback | None = None) -> dict[str, Any]
reproduce.plan(name: str, config: Config, *, any_data: bool = False) -> list[str]
paper_tables.experiment(name: str, root: str | PathLike[str], out: str | PathLike[str] | None = None, overrides:
    Sequence[str] = (), *, chain: Chain | None = None) -> Config
datasets.VOC(root: str | PathLike[str], split: str) -> None
datasets.COCO(root: str | PathLike[str], split: str) -> None
datasets.CSVDataset(root: str | PathLike[str], split: str | None = None) -> None
datasets.Sample(id, image, labels, mask)
datasets.Entry(id, image, labels, mask)
settings.Machine(device: torch.device | str = 'cpu', workers: int = 0, precision: Precision = 'fp32', progress: bool =
    True, crf: Backend = 'auto') -> None
log.Journal(checkpoint: Path | None = None, key: str = '', log: Log | None = None, callback: Callback | None = None,
    checkpoint_seconds: float = 60.0, name: str = '', pictures: Pictures | None = None) -> None
trackers.tracker(name: TrackerName, folder: str | PathLike[str], *, records: Sequence[Record] = (), settings:
    Mapping[str, Any] | None = None, resume: bool = True) -> Tracker
stages.warmup.train_classifier(net: CAMNet, dataset: Dataset, settings: Warmup = {Warmup}, *, seed: int = 0, machine:
    Machine = {Machine}, journal: Journal = {Journal}) -> None
stages.contrast.train_cacl(net: CAMNet, criterion: Criterion, dataset: Dataset, settings: CACL = {CACL}, *, seed: int =
    0, machine: Machine = {Machine}, journal: Journal = {Journal}) -> None
stages.cams.make_cams(net: CAMNet, dataset: Dataset, out: Path, settings: CAMs = {CAMs}, *, machine: Machine =
    {Machine}, keep: bool = False) -> None
stages.irn.make_labels(dataset: Dataset, cams: Path, out: Path, settings: IRN = {IRN}, *, machine: Machine = {Machine},
    keep: bool = False) -> None
stages.irn.train_irnet(net: IRNet, dataset: Dataset, labels: Path, settings: IRN = {IRN}, *, seed: int = 0, machine:
    Machine = {Machine}, journal: Journal = {Journal}) -> None
stages.masks.walk_cams(net: IRNet | None, dataset: Dataset, cams: Path, out: Path, settings: Walk = {Walk}, *, machine:
    Machine = {Machine}, keep: bool = False) -> None
stages.masks.make_masks(dataset: Dataset, cams: Path, out: Path, settings: Masks = {Masks}, *, machine: Machine =
    {Machine}, keep: bool = False) -> None
stages.segment.train_segmenter(net: DeepLabV2, dataset: Dataset, masks: Path, settings: Segment = {Segment}, *, seed:
    int = 0, machine: Machine = {Machine}, journal: Journal = {Journal}) -> None
stages.predict.make_predictions(net: DeepLabV2, dataset: Dataset, out: Path, settings: Photos = {Photos}, *, labelled:
    bool = False, tagger: PhotoTagger | None = None, machine: Machine = {Machine}, keep: bool = False) -> None
stages.tags.train_tagger(encoder: ImageTextEncoder, dataset: Dataset, settings: Tags = {Tags}, *, prompts: PromptSet |
    None = None, machine: Machine = {Machine}) -> PhotoTagger
photos.segment_photos(net: DeepLabV2, photos: Iterable[Path], finish: Callable[[int, Pixels, Mask], R], settings: Photos
    = {Photos}, *, crf: bool = True, tags: Iterable[NDArray[np.float32]] | None = None, range: Range | None = None,
    machine: Machine = {Machine}, desc: str = 'predict') -> Iterator[tuple[int, R | InputError]]
predict.predict(model: str | os.PathLike[str], photos: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], *,
    overlays: bool = False, crf: bool = True, longest: int | None = None, tags: bool | None = None, range: Range | None
    = None, device: str = 'auto', workers: int | None = None, backend: Backend = 'auto', backbone: nn.Module | None =
    None, encoder: ImageTextEncoder | None = None, progress: bool = True, keep: bool = False,
    precision: Precision | Literal['auto'] = 'auto') -> Predicted
crf.dense_crf(image: NDArray[np.uint8], probabilities: NDArray[np.floating], *, iterations: int = 10, gaussian:
    tuple[float, float] = (3.0, 3.0), bilateral: tuple[float, float, float] = (50.0, 5.0, 10.0), backend: Backend =
    'auto', device: torch.device | str = 'cpu') -> NDArray[np.float32]
mining.mine_labels(image: NDArray[np.uint8], classes: NDArray[np.integer], maps: NDArray[np.floating], *,
    foreground_score: float = 0.3, background_score: float = 0.1, gaussian: tuple[float, float] = (3.0, 3.0), bilateral:
    tuple[float, float, float] = (50.0, 5.0, 10.0), iterations: int = 10, backend: Backend = 'auto', device:
    torch.device | str = 'cpu') -> NDArray[np.uint8]
irn.IRNet(backbone: str | nn.Module = 'resnet50', *, weights: str | None = 'DEFAULT') -> None
irn.IRNOutput(edges, displacements)
irn.affinity_loss(edges: Tensor, displacements: Tensor, labels: Tensor, *, radius: int = 10, across: bool = False) ->
    IRNTerms
random_walk.propagate(cams: Tensor, edges: Tensor, *, radius: int = 5, beta: float = 10.0, steps: int = 256) -> Tensor
random_walk.spread(cams: Tensor, photo: Tensor, *, radius: int = 5, colour: float = 5.0, restart: float = 0.02) ->
    Tensor
metrics.ConfusionMatrix(num_classes: int) -> None
metrics.threshold_sweep(samples: Iterable[tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.floating]]],
    num_classes: int, *, scores: Sequence[float] = ({scores})) -> Sweep
training.train(step: Callable[[Batch], Mapping[str, Tensor]], modules: Mapping[str, nn.Module], optimizer:
    torch.optim.Optimizer, dataset: Dataset, loop: Loop, *, name: str = 'train', checkpoint: Path | None = None, key:
    str = '', log: Log | None = None, callback: Callback | None = None) -> None
config.Config.load(source: str | PathLike[str], overrides: Sequence[str] = (), *, chain: Chain | None = None) ->
    Config
"""


class Defaults(dict):
    """What is too long to be written out: {Table} for a table at its defaults, and so on."""

    def __missing__(self, name):
        for module in (settings, log, photos, *(importlib.import_module(f"cacl.stages.{x}") for x in STAGE_FILES)):
            if hasattr(module, name):
                return repr(getattr(module, name)())
        raise KeyError(name)


STAGE_FILES = [module.name for module in pkgutil.iter_modules(stages.__path__)]


def signature(function: object) -> str:
    """The signature with its annotations as they are written in the source."""
    return re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", str(inspect.signature(function)))


def described(name: str) -> list[str]:
    """A line for the name and one for each public member that its class defines."""
    if name == "pipeline":  # a module; looking at it would import it
        return ["pipeline"]
    thing = getattr(cacl, name)
    if not callable(thing):
        return [f"{name} = {thing!r}"]
    if hasattr(thing, "_fields"):
        return [f"{name}({', '.join(thing._fields)})"]
    if not inspect.isclass(thing):
        return [name + signature(thing)]
    if getattr(thing, "_is_protocol", False):
        lines = [f"{name}: {', '.join(thing.__annotations__)}"]
    else:
        lines = [name + (signature(thing) if "__init__" in vars(thing) else "()")]
    for member, value in vars(thing).items():
        if isinstance(value, property):
            lines.append(f"{name}.{member}")
        elif not member.startswith("_") and member != "extra_repr":
            lines.append(f"{name}.{member}{signature(getattr(thing, member))}")
    return lines


def test_public_names_and_signatures():
    wanted = re.sub(r"\n +", " ", API).strip().splitlines()
    assert [line for name in cacl.__all__ for line in described(name)] == wanted


def test_stage_names_and_signatures():
    known = Defaults(chain=repr(CHAIN), scores=", ".join(str(i / 100) for i in range(100)))
    for written in re.sub(r"\n +", " ", STAGES).strip().splitlines():
        line = written.format_map(known)
        module, _, path = written.partition("(")[0].partition(".")
        if module == "stages":
            stage, _, path = path.partition(".")
            module = f"stages.{stage}"
        thing = importlib.import_module(f"cacl.{module}")
        for part in path.split("."):
            thing = getattr(thing, part)
        rest = f"({', '.join(thing._fields)})" if hasattr(thing, "_fields") else signature(thing)
        assert f"{module}.{path}{rest}" == line


def test_all_is_sorted_and_without_doubles():
    assert len(set(cacl.__all__)) == len(cacl.__all__)
    assert set(cacl.__all__) <= {*dir(cacl), "pipeline"}
    assert set(datasets.__all__) <= set(dir(datasets))


@pytest.mark.parametrize("package", [cacl, datasets])
def test_what_type_checkers_see_is_what_there_is(package):
    """Names are imported when they are asked for; the imports that type checkers read are another list of them."""
    tree = ast.parse(inspect.getsource(package))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {(alias.name, node.module) for node in blocks[0].body for alias in node.names}
    for name, module in seen:
        found = getattr(importlib.import_module(module), name, None)
        assert getattr(package, name) is (found or importlib.import_module(f"{module}.{name}"))
    assert {name for name, _ in seen} | {*vars(package)} >= set(package.__all__)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'cacl' has no attribute 'itc'"):
        _ = cacl.itc
    assert not hasattr(cacl, "a.b")


def test_modules_are_imported_when_they_are_asked_for():
    code = "import cacl; print(cacl.random_walk.propagate.__name__, cacl.losses.itc_loss is cacl.itc_loss)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "propagate True\n", result.stderr


HEAVY = ("torch", "torchvision", "numpy", "scipy", "matplotlib", "clip")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["--version"], ["run", "--help"], ["--no-such"], ["run", "nowhere.toml"],
        ["run", "scenes", "--set", "cacl.alpa=1"], ["run", "scenes", "--stages", "nothing"],
        ["check", "scenes", "--set", "cacl.alpha=-1"], ["ablate", "scenes", "--set", "data.format=x"],
        ["ablate", "scenes", "--set", "pole.lr=x", "--set", "run.seed=-1"],
        ["run", "voc", "--set", "prompts.templates=[]"], ["reproduce", "--help"],
        ["reproduce", "voc", "--data-root", ".", "--set", "cacl.alpa=1"],
    ],
)  # fmt: skip
def test_the_command_line_answers_without_torch(arguments):
    code = f"""
import sys
from cacl.cli import main
try:
    status = main({arguments})
except SystemExit as stop:
    status = stop.code
print(status, [name for name in {HEAVY} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    asked = "--help" in arguments or "--version" in arguments
    assert result.stdout.endswith(f"{0 if asked else 2} []\n"), (result.stdout, result.stderr)
    assert asked or len(result.stderr.strip().splitlines()) <= 2  # argparse has its usage before


def test_the_tables_are_those_of_the_chain():
    assert list(TABLES.items()) == [(stage.name, stage.settings) for stage in CHAIN]


def test_import_is_light():
    heavy = *HEAVY, "clip", "open_clip", "pydensecrf", "pydantic"
    code = f"import sys, cacl; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stderr


MODULES = [
    "cacl",
    *(m.name for m in pkgutil.walk_packages(cacl.__path__, "cacl.") if m.name != "cacl.__main__"),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert failed == 0


def test_the_building_blocks_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("losses", "prompts", "selector", "regions", "camnet", "crf", "irn", "random_walk"):
        assert any(test.examples for test in finder.find(importlib.import_module(f"cacl.{name}"))), name


WITHOUT_DISTRIBUTED = """
import importlib.abc, sys, torch

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("torch.distributed."):
            raise ModuleNotFoundError(f"No module named {name!r}")

for name in [name for name in sys.modules if name.startswith("torch.distributed.")]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
torch.distributed.is_available = lambda: False
for name in ("is_initialized", "init_process_group", "DistError", "get_rank", "get_world_size", "all_reduce"):
    delattr(torch.distributed, name)

import cacl, cacl.cli, cacl.pipeline
features = torch.ones(2, 3, requires_grad=True)
cacl.itc_loss(features, -features, features, across=True).backward()
print(features.grad.shape)
"""


def test_a_torch_without_distributed_will_do():
    done = subprocess.run([sys.executable, "-c", WITHOUT_DISTRIBUTED], capture_output=True, text=True, check=False)
    assert done.stdout == "torch.Size([2, 3])\n", done.stderr


def test_importing_leaves_warnings_as_they_are():
    modules = ", ".join(MODULES)
    code = "import warnings, PIL.Image, scipy.special, torch, torchvision, pydantic, tqdm\n"
    code += "before = list(warnings.filters)\n"
    code += f"import {modules}\n"
    code += "print([f for f in warnings.filters if f not in before], len(before) == len(warnings.filters))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"
