"""Encoders: reading CLIP checkpoints without running what is in them, and open_clip behind the same protocol."""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from cacl import ImageTextEncoder, load_encoder
from cacl._support import clip_checkpoint
from cacl._support.torchscript import read_torchscript

TEXTS = ["a photo of cat.", "a picture of dining table."]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def checkpoint(clip_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    torch.save(clip_state, path)
    return path


@pytest.fixture(scope="module")
def clip_model(clip_state):
    from clip.model import build_model

    return build_model(dict(clip_state)).float()


@pytest.fixture
def loaded(checkpoint):
    return load_encoder(checkpoint)


def test_satisfies_the_protocol(loaded, encoder):
    assert isinstance(loaded, ImageTextEncoder)
    assert isinstance(encoder, ImageTextEncoder)
    assert not isinstance(nn.Linear(1, 1), ImageTextEncoder)
    assert loaded.image_size == 32
    assert loaded.mean == (0.48145466, 0.4578275, 0.40821073)
    assert loaded.std == (0.26862954, 0.26130258, 0.27577711)


def test_features_are_clip_s_own(loaded, clip_model, randn):
    import clip

    images = randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), clip_model.encode_image(images))
        torch.testing.assert_close(loaded.encode_text(TEXTS), clip_model.encode_text(clip.tokenize(TEXTS)))


def test_images_are_differentiable_texts_and_weights_are_not(loaded, randn):
    images = randn(2, 3, 32, 32).requires_grad_()
    loaded.encode_image(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in loaded.parameters())
    assert not loaded.encode_text(TEXTS).requires_grad


def test_stays_in_evaluation_mode_and_float32(loaded):
    assert loaded.train() is loaded
    assert not any(module.training for module in loaded.modules())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_device_and_path_as_text(checkpoint):
    encoder = load_encoder(str(checkpoint), device="cpu")
    assert {parameter.device.type for parameter in encoder.parameters()} == {"cpu"}


def test_torchscript_archive(clip_model, loaded, tmp_path, randn):
    example = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 77, dtype=torch.int64)}
    torch.jit.trace_module(clip_model, example, check_trace=False).save(str(tmp_path / "tiny.pt"))
    encoder = load_encoder(tmp_path / "tiny.pt")
    assert type(encoder) is type(loaded)
    images = randn(1, 3, 32, 32)
    assert torch.equal(encoder.encode_image(images), loaded.encode_image(images))


def test_a_torchscript_archive_has_the_state_that_torch_reads(clip_model, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.tied = nn.Linear(2, 3, dtype=torch.float16)
            self.tied.bias = nn.Parameter(self.tied.weight[:, 0])
            self.other = torch.ones(2)  # neither a parameter nor a buffer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.other.sum()

    torch.jit.script(Net()).save(str(tmp_path / "net.pt"))
    torch.jit.trace_module(clip_model, {"encode_image": torch.zeros(1, 3, 32, 32)}).save(str(tmp_path / "clip.pt"))
    for name in ("net.pt", "clip.pt"):
        state, wanted = read_torchscript(tmp_path / name), torch.jit.load(tmp_path / name).state_dict()
        assert set(state) == set(wanted)
        for key, value in wanted.items():
            assert torch.equal(state[key], value), key
            assert state[key].dtype == value.dtype


def test_a_text_that_is_too_long(loaded):
    with pytest.raises(ValueError, match="too long for context length 77"):
        loaded.encode_text(["a photo of " + "very " * 80 + "old cat."])


# Files that are no CLIP checkpoint


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class SavesWhenLoaded(nn.Module):
    """TorchScript that writes a file when torch.jit.load restores it."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(self.weight, self.path)


def refused(path):
    """The message of the error that ``path`` gives."""
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as error:
        load_encoder(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "torchscript"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, kind):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    state = {"positional_embedding": Payload(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "torchscript":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("model/constants.pkl", pickle.dumps(()))
    assert "not a CLIP checkpoint (nothing in it was run)" in refused(path)
    assert not trace.exists()


def test_no_torchscript_is_run(tmp_path):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.jit.script(SavesWhenLoaded(str(trace))).save(str(path))
    trace.unlink(missing_ok=True)
    refused(path)
    assert not trace.exists()


def test_a_truncated_file(checkpoint, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint.read_bytes()[:10_000])
    assert "not a CLIP checkpoint" in refused(path)


@pytest.mark.parametrize("content", [b"", b"a photo of a cat"])
def test_a_file_of_something_else(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert "not a CLIP checkpoint" in refused(path)


@pytest.mark.parametrize("entry", ["readme.txt", "model/constants.pkl"])
def test_a_zip_of_something_else(tmp_path, entry):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry, "hello")
    assert "not a CLIP checkpoint" in refused(path)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"epoch": 3}])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert "expected a state dict (name -> tensor) of a CLIP model" in refused(tmp_path / "model.pt")


def test_the_state_dict_of_another_model(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert "expected the state dict of a CLIP model, but it has no 'positional_embedding'." in refused(path)


@pytest.mark.parametrize("name", ["visual.proj", "visual.ln_pre.weight", "transformer.resblocks.0.ln_1.bias"])
def test_a_parameter_is_missing(clip_state, tmp_path, name):
    path = tmp_path / "model.pt"
    torch.save({key: value for key, value in clip_state.items() if key != name}, path)
    assert "its parameters do not make a CLIP model" in refused(path)


@pytest.mark.parametrize("name", ["token_embedding.weight", "ln_final.weight", "positional_embedding"])
def test_a_parameter_of_another_shape(clip_state, tmp_path, name):
    path = tmp_path / "model.pt"
    torch.save({**clip_state, name: torch.tensor(1.0)}, path)
    assert str(path) in refused(path)


def test_a_small_vocabulary(clip_state, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({**clip_state, "token_embedding.weight": torch.zeros(100, 64)}, path)
    assert "CLIP's tokenizer has 49408 tokens, but the checkpoint knows 100." in refused(path)


# What trainings leave


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPED = {
    "DDP": lambda state: under("module.", state),
    "torch.compile": lambda state: under("_orig_mod.", state),
    "both": lambda state: under("module._orig_mod.", state),
    "a compiled tower": lambda state: {key.replace("visual.", "visual._orig_mod."): v for key, v in state.items()},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "model": lambda state: {"model": under("module.", state), "best": 0.3},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "Lightning": lambda state: {"state_dict": {**under("clip.", state), "head.weight": torch.ones(2)}, "loops": {}},
    "an average": lambda state: {**under("module.", state), "n_averaged": torch.tensor(3)},
    "an average alone": lambda state: {"ema": {"shadow": state}},
    "without what encodes nothing": lambda state: {k: v for k, v in state.items() if k != "logit_scale"},
    "sizes as tensors": lambda state: {
        **state,
        "input_resolution": torch.tensor(32),
        "vocab_size": torch.tensor(49408),
    },
    "a bias of the loss": lambda state: {**state, "logit_bias": torch.ones(())},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_checkpoints_of_trainings(clip_state, clip_model, tmp_path, name):
    import clip

    torch.save(WRAPPED[name](dict(clip_state)), tmp_path / "model.pt")
    wanted = clip_model.encode_text(clip.tokenize(TEXTS)).detach()
    torch.testing.assert_close(load_encoder(tmp_path / "model.pt").encode_text(TEXTS), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_in_half_precision(clip_state, loaded, tmp_path, dtype):
    torch.save({key: value.to(dtype) for key, value in clip_state.items()}, tmp_path / "model.pt")
    encoder = load_encoder(tmp_path / "model.pt")
    assert encoder.encode_text(TEXTS).dtype == torch.float32
    torch.testing.assert_close(encoder.encode_text(TEXTS), loaded.encode_text(TEXTS), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (
            lambda state: {"state_dict": state, "state_dict_ema": {k: v.clone() for k, v in state.items()}},
            """expected the weights of one CLIP model, but it has "['state_dict']", "['state_dict_ema']"; save""",
        ),
        (
            lambda state: {**under("student.", state), **under("teacher.", state)},
            "the weights of one CLIP model, but it has 'student.', 'teacher.'; save a file with one of them alone",
        ),
        (
            lambda state: {"epoch": 3, "name": "x", "state_dict": under("module.", state), "optimizer": {}},
            "is of a training by open_clip ('epoch', 'name', 'state_dict'), and does not say which activation",
        ),
        (
            lambda state: {"visual.trunk.norm.weight": torch.ones(2), "text.token_embedding.weight": torch.ones(2, 2)},
            "is of a model whose image tower is timm's ('visual.trunk.'): load it with its name in open_clip",
        ),
        (
            lambda state: {
                key if key.startswith(("visual", "logit")) else f"text.{key}": v for key, v in state.items()
            },
            "with a text tower of its own ('text.'): load it with its name there, open_clip:MODEL/",
        ),
        (
            lambda state: {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2)},
            "has the names of the library transformers ('text_model.')",
        ),
        (lambda state: {**state, "adapter.weight": torch.ones(2)}, 'Unexpected key(s) in state_dict: "adapter.weight"'),
        (
            lambda state: {"state_dict": state, "hyper_parameters": SimpleNamespace(lr=1)},
            "something else than tensors and plain values; a file of torch.save(model.state_dict(), …)",
        ),
    ],
)
def test_checkpoints_that_are_not_clear(clip_state, tmp_path, wrap, text):
    torch.save(wrap(dict(clip_state)), tmp_path / "model.pt")
    assert text in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is an empty file: copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 353976522\n", "git lfs pull fetches it"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page: the download gave another file"),
    ],
)
def test_what_a_download_leaves_in_a_checkpoint_s_place(tmp_path, content, text):
    (tmp_path / "model.pt").write_bytes(content)
    assert text in refused(tmp_path / "model.pt")


def test_quantised_weights(clip_state, tmp_path):
    torch.save({key: value.to(torch.int8) for key, value in clip_state.items()}, tmp_path / "model.pt")
    assert "expected weights of a floating point type, but got torch.int8." in refused(tmp_path / "model.pt")


def test_a_text_tower_alone(clip_state, tmp_path):
    torch.save({k: v for k, v in clip_state.items() if not k.startswith("visual.")}, tmp_path / "model.pt")
    assert "the state dict of a CLIP model, but it has no 'visual.conv1.weight'." in refused(tmp_path / "model.pt")


def test_weights_in_place_of_a_name(clip_state):
    with pytest.raises(TypeError, match="`name` to be an encoder's name or a path, but got dict"):
        load_encoder(dict(clip_state))


@pytest.fixture
def archive(clip_model, tmp_path):
    """A TorchScript archive, its hash, and a reader that fails on it."""
    example = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 77, dtype=torch.int64)}
    path = tmp_path / "tiny.pt"
    torch.jit.trace_module(clip_model, example, check_trace=False).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_archive_of_clip_s_own_is_read_whatever_comes(monkeypatch, archive, loaded, tmp_path):
    import clip

    def unreadable(path):
        raise pickle.UnpicklingError("another format")

    path, sha256 = archive
    monkeypatch.setattr(clip_checkpoint, "read_torchscript", unreadable)
    monkeypatch.setattr(clip.clip, "_MODELS", {"tiny": f"https://localhost/clip/{sha256}/tiny.pt"})
    monkeypatch.setattr(clip.clip, "_download", lambda url, folder: str(path))
    assert torch.equal(load_encoder("tiny", root=tmp_path).encode_text(TEXTS), loaded.encode_text(TEXTS))

    # One byte more, and it is another file: its code does not run, whatever it is called and wherever it comes from.
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("torch.jit.load was called"))
    path.write_bytes(path.read_bytes() + b"\0")
    assert "not a CLIP checkpoint (nothing in it was run)" in refused(path)
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_encoder("tiny", root=tmp_path)


# Names


@pytest.mark.parametrize(("name", "hint"), [("ViT-B-32", '; did you mean "ViT-B/32"?'), ("absent/model.pt", "")])
def test_unknown_names(name, hint):
    with pytest.raises(ValueError, match="or the path of a checkpoint, but got " + re.escape(repr(name) + hint)):
        load_encoder(name)


def test_a_name_is_looked_up_in_root(monkeypatch, checkpoint, loaded, tmp_path):
    import clip

    def download(url, folder):
        assert "ViT-B-32" in url
        return shutil.copy(checkpoint, folder)

    monkeypatch.setattr(clip.clip, "_download", download)
    assert load_encoder(root=tmp_path).image_size == 32
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt"]


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("the SHA256 checksum does not match")])
def test_a_download_that_fails(monkeypatch, loaded, tmp_path, error):
    import clip

    def download(url, folder):
        raise error

    monkeypatch.setattr(clip.clip, "_download", download)
    text = f"CLIP ViT-B/32 is not in {tmp_path} and could not be downloaded ({error}); give the path of its checkpoint"
    with pytest.raises(ValueError, match=re.escape(text)):
        load_encoder("ViT-B/32", root=tmp_path)


# open_clip


class OpenModel(nn.Module):
    """What this package uses of an open_clip model."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4).half()
        self.visual = SimpleNamespace(image_size=(24, 24), image_mean=(0.5, 0.5, 0.5), image_std=None)

    def encode_image(self, images):
        return self.head(images.mean((2, 3)))

    def encode_text(self, tokens):
        return self.head(tokens)


@pytest.fixture
def open_clip(monkeypatch):
    module = ModuleType("open_clip")
    module.list_models = lambda: ["ViT-B-32", "RN50"]
    module.create_model = lambda name, pretrained, cache_dir: OpenModel()
    module.get_tokenizer = lambda name: lambda texts: torch.ones(len(texts), 3)
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


def test_open_clip(open_clip):
    encoder = load_encoder("open_clip:ViT-B-32/laion2b")
    assert isinstance(encoder, ImageTextEncoder)
    assert encoder.image_size == 24
    assert encoder.mean == (0.5, 0.5, 0.5)
    assert encoder.std == (0.26862954, 0.26130258, 0.27577711)
    assert encoder.encode_text(TEXTS).shape == (2, 4)
    assert encoder.encode_image(torch.zeros(1, 3, 24, 24)).dtype == torch.float32


def test_open_clip_names(open_clip):
    with pytest.raises(ValueError, match=r"Expected an encoder name like open_clip:.*, but got 'ViT-B-32'"):
        load_encoder("open_clip:ViT-B-32")
    text = "open_clip has no model 'ViT-B32'; did you mean \"ViT-B-32\"?"
    with pytest.raises(ValueError, match=re.escape(text)):
        load_encoder("open_clip:ViT-B32/laion2b")


def test_open_clip_refuses_the_weights(open_clip):
    def create_model(name, pretrained, cache_dir):
        raise RuntimeError(f"Pretrained weights ({pretrained}) not found\nfor model {name}")

    open_clip.create_model = create_model
    text = "open_clip:ViT-B-32/laion: Pretrained weights (laion) not found"
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        load_encoder("open_clip:ViT-B-32/laion")


def test_open_clip_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'cacl[open-clip]'")):
        load_encoder("open_clip:ViT-B-32/laion2b")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ModuleNotFoundError("No module named 'transformers'", name="transformers"),
            "transformers sentencepiece protobuf",
        ),
        (ImportError("T5Tokenizer requires the SentencePiece library"), "transformers sentencepiece protobuf"),
        (ValueError("You need to have sentencepiece or tiktoken installed"), "transformers sentencepiece protobuf"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "timm"),
        (RuntimeError("Please `pip install open_clip_torch[x]`\nfor this"), "'cacl[open-clip]'"),
    ],
)
def test_what_an_open_clip_model_lacks(open_clip, error, text):
    """It is said before the weights are downloaded."""

    def get_tokenizer(name):
        raise error

    open_clip.get_tokenizer = get_tokenizer
    open_clip.create_model = lambda *args, **kwargs: pytest.fail("the weights were asked for")
    with pytest.raises(ImportError) as caught:
        load_encoder("open_clip:ViT-B-32/laion2b")
    first = str(error).splitlines()[0]
    assert str(caught.value) == f"open_clip:ViT-B-32/laion2b needs more than its extra: pip install {text} ({first})"


def test_an_open_clip_model_that_sees_no_squares(open_clip):
    model = OpenModel()
    model.visual.image_size = (24, 48)
    open_clip.create_model = lambda name, pretrained, cache_dir: model
    with pytest.raises(ValueError, match="that sees squares, but this one sees 24 x 48"):
        load_encoder("open_clip:ViT-B-32/laion2b")


# import clip


@pytest.mark.parametrize(
    "before",
    [
        "sys.modules.pop('pkg_resources', None)",
        "sys.modules['pkg_resources'] = types.ModuleType('pkg_resources')",  # as setuptools 70 to 81: no packaging
    ],
)
def test_clip_is_imported_without_a_trace(before):
    code = f"import sys, types; {before}; left = sys.modules.get('pkg_resources')\n"
    code += "from cacl._support.clip_library import import_clip\n"
    code += "print(import_clip().tokenize('cat').shape[1], sys.modules.get('pkg_resources') is left)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["77", "True"], result.stderr


def test_clip_is_missing(monkeypatch):
    for name in ("clip", "clip.clip", "clip.model", "clip.simple_tokenizer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(ImportError, match="pip install clip-anytorch"):
        load_encoder("ViT-B/32")
