"""Makers of bad files for the tables of test_hostile: each gives a function that writes one into the current folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from cacl.pipeline import run
from cacl.report import report

Build = Callable[[], object]


class Payload:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("executed", "w")


def put(name: str, content: Any = b"") -> Build:
    """Write a file in place of what is there: text, bytes, or what a function returns."""

    def build() -> None:
        value = content() if callable(content) else content
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(value.encode() if isinstance(value, str) else value)

    return build


def row(image: str = "images/0.png", mask: str = "", labels: str = "boat") -> Build:
    return put("data/dataset.csv", f"image,labels,mask,split\n{image},{labels},{mask},train\n")


def table(text: str) -> Build:
    return put("config.toml", lambda: Path("config.toml").read_text() + text)


def voc_list(text: str | bytes) -> Build:
    return put("voc/ImageSets/Segmentation/train.txt", text)


def annotation(text: str | bytes) -> Build:
    return put("voc/Annotations/2007_000000.xml", text)


def link(name: str, target: str) -> Build:
    def build() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).symlink_to(target)

    return build


def folder(name: str) -> Build:
    """In place of a file."""

    def build() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir()

    return build


def pipe(name: str) -> Build:
    """In place of a file; who reads it waits."""

    def build() -> None:
        Path(name).unlink(missing_ok=True)
        os.mkfifo(name)

    return build


def change(name: str, **values: object) -> Build:
    """Other values in a JSON object."""
    return put(name, lambda: json.dumps({**json.loads(Path(name).read_text()), **values}))


def all_of(*builds: Build) -> Build:
    return lambda: [build() for build in builds]


def nothing() -> None:
    pass


def saved(value: object, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def arrays(**values: Any) -> Callable[[], bytes]:
    def content() -> bytes:
        file = io.BytesIO()
        np.savez(file, **{"classes": np.zeros(1, int), "maps": np.zeros((1, 2, 2), np.float16), **values})
        return file.getvalue()

    return content


def array(value: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **how)
    return file.getvalue()


def inflating(*names: str) -> bytes:
    """An archive of some kilobytes that unpacks to 400 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in names:
            archive.writestr(name, bytes(2**28 + 2**27 if name == names[-1] else 10))
    return file.getvalue()


def claiming(shape: tuple[int, ...]) -> bytes:
    """An archive of arrays, one of which says that it is far larger than it is."""
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("classes.npy", array(np.zeros(1, int)))
        archive.writestr("maps.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    return file.getvalue()


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48), **how: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, kind, **how)
    return file.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def png(width: int, height: int) -> bytes:
    """A grey PNG that says how large it is and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grey(value: int | tuple[int, int, int] = 0, size: tuple[int, int] = (64, 48), mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, "PNG")
    return file.getvalue()


def postscript() -> None:
    """A photo that is PostScript, and a Ghostscript that leaves a trace."""
    put("bin/gs", "#!/bin/sh\ntouch executed\n")()
    Path("bin/gs").chmod(0o755)
    put("data/images/0.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")()


def clip(**changes: Any) -> bytes:
    """Some of the state dict of a small CLIP, with other parameters."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 64), "text_projection": (64, 64), "token_embedding.weight": (49408, 64),
        "ln_final.weight": (64,), "visual.proj": (64, 64), "visual.conv1.weight": (64, 3, 16, 16),
        "visual.positional_embedding": (5, 64), "transformer.resblocks.0.ln_1.weight": (64,),
    }  # fmt: skip
    return saved({**{name: torch.zeros(shape) for name, shape in shapes.items()}, **changes})


class Scripted(nn.Module):
    """TorchScript that writes a file when ``torch.jit.load`` restores it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]
        torch.save(self.weight, "executed")


def script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Scripted()), file)
    return file.getvalue()


def script_of(pickled: bytes, code: str = "") -> bytes:
    """A TorchScript archive by hand."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        files = {"data.pkl": pickled, "code/__torch__.py": code, "constants.pkl": b"\x80\x02).", "version": "3\n"}
        for name, content in files.items():
            archive.writestr(f"net/{name}", content)
    return file.getvalue()


DEFAULT_ARGUMENT = """class Net(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  def forward(self: __torch__.Net,
    x: Tensor=torch.from_file("executed", True, 8, dtype=6, layout=0, device=torch.device("cpu"))) -> Tensor:
    return x
"""
NET = b"\x80\x02c__torch__\nNet\n)\x81}X\x08\x00\x00\x00training\x88sb."


def doubling(levels: int = 60) -> bytes:
    """Modules each of which holds the one before it twice: 2^60 in all."""
    one = b"c__torch__\nNet\n)\x81"
    content = b"\x80\x02" + one + b"q\x00"
    for level in range(1, levels):
        held = b"h" + bytes([level - 1])
        content += one + b"}(X\x01\x00\x00\x00a" + held + b"X\x01\x00\x00\x00b" + held + b"ubq" + bytes([level])
    return content + b"."


LAUGHS = "<!DOCTYPE x [<!ENTITY a0 'ha'>{}]><annotation><object><name>&a9;</name></object></annotation>".format(
    "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 30}'>" for i in range(1, 10))
)
OUTSIDE = "<!DOCTYPE x [<!ENTITY a SYSTEM 'secret.txt'>]><annotation><object><name>&a;</name></object></annotation>"


def xml(content: str, encoding: str) -> bytes:
    return f"<?xml version='1.0' encoding='{encoding}'?><a>{content}</a>".encode(encoding)


PICKLED = pickle.dumps({"weights": Payload()}, protocol=2)


def backbone() -> bytes:
    from torchvision.models import resnet18

    state = resnet18().state_dict()
    state["layer1.0.conv1.weight"][0] = float("nan")
    return saved(state)


def twice() -> str:
    """A JSON object of 10^5 keys, of which the first comes again at the end."""
    return "{" + ", ".join(f'"{name}": ["x"]' for name in (*range(10**5), 0)) + "}"


def named() -> None:
    """Photos of odd names, and a table of them."""
    names = ("a b", "it's", 'say "x"', "two\nlines", "фото 写真 ✓")
    rows = []
    for name in names:
        put(f"data/images/{name}.png", picture)()
        put(f"photos/{name}.png", picture)()
        quoted = name.replace('"', '""')
        rows.append(f'"images/{quoted}.png",boat,,train\n')
    put("data/dataset.csv", "image,labels,mask,split\n" + "".join(rows))()


def frames(kind: str) -> bytes:
    file = io.BytesIO()
    first, second = (Image.new("RGB", (40, 30), (shade, 0, 0)) for shade in (0, 200))
    first.save(file, kind, save_all=True, append_images=[second])
    return file.getvalue()


def many_rows() -> str:
    rows = "".join(f"images/{i}.png,boat,,unused\n" for i in range(10**6))
    return f"image,labels,mask,split\nimages/0.png,boat,,train\nimages/1.png,train,,val\n{rows}"


MARKUP = '<script>alert(1)</script>, "$x_$" & co'


def markup() -> None:
    """The first class has another name."""
    put("data/classes.txt", f"{MARKUP}\ntrain\n")()
    quoted = MARKUP.replace('"', '""')
    rows = [f'images/{i}.png,"{quoted};train",masks/{i}.png,{"train" if i < 3 else "val"}\n' for i in range(4)]
    put("data/dataset.csv", "image,labels,mask,split\n" + "".join(rows))()


def report_of_markup() -> str:
    """`cacl report run`, and how its page has the name"""
    return " and ".join(sorted(set(re.findall(r"(?:<|&lt;)script(?:>|&gt;)alert", report("run").read_text("utf-8")))))


def evaluated_again() -> str:
    """`cacl run config.toml`, and what metrics.json has then"""
    run("config.toml")
    return ", ".join(json.loads(Path("run/metrics.json").read_text()))


def hundred_megapixels() -> bytes:
    file = io.BytesIO()
    Image.new("1", (10000, 10000)).save(file, "PNG")
    return file.getvalue()


def segmenter(change: Callable[[dict[str, Any]], object] | None = None, **changes: object) -> bytes:
    """The one in ``model.pt``, changed."""
    state = torch.load("model.pt", weights_only=True)
    if change is not None:
        change(state["weights"])
    return saved({**state, **changes})


def with_nan(weights: dict[str, Any]) -> None:
    next(iter(weights.values())).fill_(float("nan"))


def with_sparse(weights: dict[str, Any]) -> None:
    name = next(iter(weights))
    weights[name] = weights[name].to_sparse()


def checkpoint(stage: str) -> bytes:
    """A checkpoint of the run that has nothing but the key that it needs to be taken for one."""
    return saved({"key": json.loads(Path(f"run/{stage}/stage.json").read_text())["key"]})


def check_in_ascii() -> str:
    """`cacl check data` where nothing but ASCII can be printed"""
    command = [sys.executable, "-m", "cacl", "check", "data"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run(command, capture_output=True, encoding="ascii", env=environment, check=False).stdout


def coco(**changes: object) -> None:
    """A data set of one photo, of which the file of annotations says something else."""
    put("coco/train/0.png", picture)()
    image = {"id": 1, "file_name": "0.png", "height": 48, "width": 64, **changes}
    square = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    tables = {"images": [image], "annotations": [square], "categories": [{"id": 1, "name": "boat"}]}
    put("coco/annotations/instances_train.json", json.dumps(tables))()
