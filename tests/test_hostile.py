"""Hostile and odd input: what is wrong is one line, nothing in it is run, nothing is lost, nothing leaks out.

``python tests/test_hostile.py`` writes docs/results/hostile-input.md from the tables below.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bad_files as bad
import numpy as np
import pytest
import torch
from bad_files import Build, all_of, change, folder, link, nothing, pipe, put
from drawn import write_csv, write_voc

from cacl.artifacts import load_cams, save_mask
from cacl.cli import main
from cacl.errors import shown
from cacl.images import read_mask
from cacl.log import _peak_mb

pytestmark = pytest.mark.posix
PAGE = Path(__file__).parents[1] / "docs/results/hostile-input.md"
SECONDS, MEGABYTES = 20, 700
"""What any bad input may cost at most."""


class Case(NamedTuple):
    """Something odd in the folder of :func:`place`, and what meets it."""

    name: str
    build: Build
    call: str | Callable[[], object]
    """A command, or a function of the package."""
    says: str
    """A regular expression that the message matches."""
    lines: int = 1
    """One a problem."""


RUN = "run config.toml"
REPORT = "report run"
CHECK = "check data"
VOC = "check voc"
COCO = "check coco"
PREDICT = "predict model.pt photos --out out --workers 0"
PACK = "export-voc sent --root voc --split val --out out.tgz"
ENCODER = f"{RUN} --set encoder.name=clip.pt"
BACKBONE = f"{RUN} --set camnet.backbone=resnet18 --set camnet.weights=weights.pt"
CAMS = partial(load_cams, Path("x.npz"), 2)
RUN_NOTHING = r"not a( CLIP)? checkpoint \(nothing in it was run\): "
UNFINISHED = change("run/segment/stage.json", finished=False)


def row(image: str = "images/0.png", mask: str = "", labels: str = "boat") -> Build:
    return put("data/dataset.csv", f"image,labels,mask,split\n{image},{labels},{mask},train\n")


def table(text: str | bytes) -> Build:
    return put("data/dataset.csv", text)


def classes(text: str | bytes) -> Build:
    return put("data/classes.txt", text)


def photo(content: object) -> Build:
    return put("data/images/0.png", content)


def mask(content: object) -> Build:
    return put("data/masks/0.png", content)


def ids(text: str | bytes) -> Build:
    return put("voc/ImageSets/Segmentation/train.txt", text)


def annotation(text: str | bytes) -> Build:
    return put("voc/Annotations/2007_000000.xml", text)


def settings(text: str | bytes) -> Build:
    """At the end of the configuration, or in its place."""
    return put("config.toml", text if isinstance(text, bytes) else lambda: Path("config.toml").read_text() + text)


def setting(name: str, value: str, says: str) -> Case:
    where, key = name.split(".")
    call = f"{RUN} --set {shlex.quote(f'{name}={value}')}"
    short = shown(value if len(value) < 30 else f"{value[:12]}… ({len(value)} letters)")
    return Case(f"{name} = {short}", nothing, call, rf"^config.toml: \[{where}\] {key}: {says}")


BAD = [
    # Files that could run something
    Case("a pickle as checkpoint.pt", all_of(UNFINISHED, put("run/segment/checkpoint.pt", bad.PICKLED)), RUN,
         rf"run/segment/checkpoint.pt: {RUN_NOTHING}it holds something else than tensors and plain values$"),
    Case("a pickle as model.pt of a stage", put("run/cacl/model.pt", bad.PICKLED), REPORT,
         rf"run/cacl/model.pt: {RUN_NOTHING}"),
    Case("a pickle as segmenter", put("model.pt", bad.PICKLED), PREDICT, rf"^model.pt: {RUN_NOTHING}"),
    Case("a pickle in torch's archive as segmenter", put("model.pt", lambda: bad.saved({"a": bad.Payload()})), PREDICT,
         rf"^model.pt: {RUN_NOTHING}"),
    Case("a pickle in torch's old format as segmenter",
         put("model.pt", lambda: bad.saved({"a": bad.Payload()}, _use_new_zipfile_serialization=False)),
         "export model.pt --out out.pt2", rf"^model.pt: {RUN_NOTHING}"),
    Case("a pickle as encoder", put("clip.pt", bad.PICKLED), ENCODER, rf"clip.pt: {RUN_NOTHING}"),
    Case("a pickle as backbone", put("weights.pt", bad.PICKLED), BACKBONE, rf"weights.pt: {RUN_NOTHING}"),
    Case("a pickle as CAMs", put("x.npz", bad.PICKLED), CAMS, r"^x.npz: not a file of CAMs \(it holds something else"),
    Case("objects in an array of CAMs", put("x.npz", bad.arrays(classes=np.array([bad.Payload()]))), CAMS,
         r"^x.npz: not a file of CAMs \(it holds something else"),
    Case("a .npy of objects as CAMs", put("x.npz", lambda: bad.array(np.array([bad.Payload()]))), CAMS,
         r"^x.npz: not a file of CAMs \(it holds something else"),
    Case("TorchScript that writes a file when it is loaded", put("clip.pt", bad.script), ENCODER,
         rf"clip.pt: {RUN_NOTHING}it holds something else"),
    Case("TorchScript with a default value that writes a file",
         put("clip.pt", lambda: bad.script_of(bad.NET, bad.DEFAULT_ARGUMENT)), ENCODER,
         "clip.pt: expected the state dict of a CLIP model, but it has no 'positional_embedding'"),
    Case("TorchScript with a function of Python", put("clip.pt", lambda: bad.script_of(bad.PICKLED)), ENCODER,
         rf"clip.pt: {RUN_NOTHING}it holds something else"),
    Case("TorchScript whose modules hold each other 2^60 times", put("clip.pt", lambda: bad.script_of(bad.doubling())),
         ENCODER, "clip.pt: expected the state dict of a CLIP model"),
    Case("PostScript as photo", bad.postscript, CHECK, "images/0.png: not an image that decodes"),
    Case("a template that looks into objects", settings('[prompts]\ntemplates = ["{0.__class__}"]'), RUN,
         r"^config.toml: \[prompts\] templates: .* exactly one {}, but got '{0.__class__}'"),
    Case("a template that asks for a gigabyte", settings('[prompts]\ntemplates = ["{:>1000000000}"]'), RUN,
         r"^config.toml: \[prompts\] templates: .* exactly one {}, but got '{:>1000000000}'"),
    # Files that say that they are large
    Case("a segmenter that unpacks to 400 MB", put("model.pt", lambda: bad.inflating("m/data.pkl", "m/data/0")),
         PREDICT, rf"^model.pt: {RUN_NOTHING}it would unpack to \d+ bytes"),
    Case("CAMs that unpack to 400 MB", put("x.npz", lambda: bad.inflating("classes.npy", "maps.npy")), CAMS,
         r"^x.npz: not a file of CAMs \(it would unpack to \d+ bytes"),
    Case("CAMs that say to have 10^12 pixels", put("x.npz", lambda: bad.claiming((1, 10**6, 10**6))), CAMS,
         r"^x.npz: not a file of CAMs"),
    Case("a tensor of 10^10 numbers that are one",
         put("clip.pt", lambda: bad.clip(ln_final=torch.ones(1).expand(10**10))), ENCODER,
         "clip.pt: 'ln_final': expected a tensor with all of its values"),
    Case("an encoder whose sizes ask for 30 GB",
         put("clip.pt", lambda: bad.clip(**{"ln_final.weight": torch.zeros(25600)})), ENCODER,
         "clip.pt: its parameters do not make a CLIP model"),
    Case("an encoder for texts of 10^5 tokens",
         put("clip.pt", lambda: bad.clip(positional_embedding=torch.zeros(10**5, 2))), ENCODER,
         "clip.pt: expected texts of at most 4096 tokens, but the checkpoint is for 100000"),
    Case("a photo of 60000 × 60000 pixels in 1 kB", photo(bad.png(60000, 60000)), CHECK,
         r"images/0.png: too large \(Image size \(3600000000 pixels\) exceeds .*\); scale it down$"),
    Case("a mask of 60000 × 60000 pixels in 1 kB", mask(bad.png(60000, 60000)), CHECK, "masks/0.png: too large"),
    Case("a mask for VOC's server of 60000 × 60000 pixels", put("sent/2007_000002.png", bad.png(60000, 60000)), PACK,
         "2007_000002.png: not a PNG that decodes"),
    Case("entities of XML that unfold to 10^13 letters", annotation(bad.LAUGHS), VOC,
         "2007_000000.xml: not an annotation that parses"),
    Case("an entity of XML that is another file",
         all_of(put("voc/Annotations/secret.txt", "boat"), annotation(bad.OUTSIDE)), VOC,
         "2007_000000.xml: not an annotation that parses"),
    Case("a cell of 10 MB", row(image="x" * 10**7), CHECK,
         r"dataset.csv: line 2: expected a row of a CSV file, but field larger than field limit"),
    Case("background words nested 100000 deep", put("data/backgrounds.json", "[" * 100000),
         f"{RUN} --set cacl.beta=2.0",
         "backgrounds.json: expected a JSON object of words a class, but it is nested too deep$"),
    Case("stage.json nested 100000 deep", put("run/cacl/stage.json", '{"a":' * 100000), RUN,
         "run/cacl/stage.json: expected a JSON object, but it is nested too deep$"),
    Case("a configuration nested 100000 deep", settings("x = " + "[" * 100000), RUN,
         "^config.toml: expected a TOML file, but it is nested too deep$"),
    Case("a number of 10000 digits", settings("x = " + "1" * 10000), RUN,
         r"^config.toml: expected a TOML file, but Exceeds the limit"),
    setting("cacl.batch_size", "1" + "0" * 400, "input should be less than or equal to 65536, but got 1000"),
    setting("cacl.batch_size", "0x" + "f" * 9000, "input should be less than or equal to 65536, but got a number of"),
    setting("cacl.batch_size", "1000000000000", "input should be less than or equal to 65536"),
    setting("cacl.epochs", "1e308", "input should be less than or equal to 1000000"),
    setting("warmup.crop", "1000000000", "input should be less than or equal to 16384"),
    setting("irn.radius", "1000000000", "input should be less than or equal to 64"),
    setting("report.images", "1000000000000", "input should be less than or equal to 1000000"),
    setting("run.seed", str(2**64), "input should be less than 9223372036854775808"),
    # Paths that lead out
    Case("an image that is an absolute path", row(image="/etc/passwd"), CHECK,
         "dataset.csv: line 2: expected a path inside the folder, but got '/etc/passwd'"),
    Case("an image outside of the folder", row(image="images/../../photos/0.png"), CHECK,
         "dataset.csv: line 2: expected a path inside the folder, but got 'images/../../photos/0.png'"),
    Case("a mask that is an absolute path", row(mask="/etc/passwd"), CHECK,
         "dataset.csv: line 2: expected a path inside the folder, but got '/etc/passwd'"),
    Case("a mask outside of the folder", row(mask="../photos/0.png"), CHECK,
         "dataset.csv: line 2: expected a path inside the folder, but got '../photos/0.png'"),
    Case("an image outside of the folder, as Windows writes it", row(image=r"..\..\x.png"), CHECK,
         r"x.png: no such file|expected a path inside the folder"),
    Case("an image on another drive of Windows", row(image=r"C:\x.png"), CHECK,
         r"x.png: no such file|expected a path inside the folder"),
    Case("an id of VOC outside of the folder", ids("2007_000000\n../../x\n"), VOC,
         r"train.txt: expected an id a line, but got '../../x'"),
    Case("an id of VOC that is an absolute path", ids("2007_000000\n/tmp/x\n"), VOC,
         r"train.txt: expected an id a line, but got '/tmp/x'"),
    Case("an id of VOC in another folder", ids("2007_000000\na/x\n"), VOC,
         r"train.txt: expected an id a line, but got 'a/x'"),
    Case("an id of VOC's server outside of the folder", put("voc/ImageSets/Segmentation/val.txt", "2007_000002\n../x"),
         PACK, r"val.txt: expected an id a line, but got '../x'"),
    Case("two images of one id",
         all_of(put("data/a/x.png", bad.picture), put("data/a/x.jpg", bad.picture), row("a/x.png"),
                put("data/dataset.csv",
                    "image,labels,mask,split\na/x.png,boat,,train\na/x.jpg,boat,,train\nimages/0.png,,,train")), CHECK,
         "dataset.csv: duplicate id a/x"),
    Case("photos whose masks would be one file",
         all_of(put("photos/a/x.png", bad.picture), put("photos/b/x.png", bad.picture)),
         "predict model.pt photos/a/x.png photos/b/x.png --out out", "expected photos of different names"),
    Case("masks in place of the photos", put("photos/x.png", bad.picture),
         "predict model.pt photos/x.png --out photos",
         "^photos/x.png: expected another folder `out`: this photo would be replaced"),
    Case("masks to a file", nothing, "predict model.pt photos/0.png --out model.pt --workers 0",
         "^model.pt: expected a folder, but it is a file$"),
    Case("masks to a device", nothing, "predict model.pt photos/0.png --out /dev/null --workers 0",
         "^/dev/null: expected a folder, but it is a file$"),
    Case("a run folder that is a file", put("x"), f"{RUN} --set run.out=x", "x"),
    Case("a run folder that is a device", nothing, f"{RUN} --set run.out=/dev/null", "/dev/null"),
    Case("a run folder that cannot be written to", nothing, f"{RUN} --set run.out=/proc/x", "/proc/x"),
    Case("a run folder that is a loop of links", link("x", "x"), f"{RUN} --set run.out=x", "x"),
    Case("a data set that is a loop of links", link("x", "x"), f"{RUN} --set data.root=x", "x/classes.txt: "),
    Case("a segmenter with an unknown ending", nothing, "export model.pt --out out.txt",
         "Expected argument `out` to be a file that ends in .pt2 or .onnx"),
    Case("an archive for VOC with an unknown ending", nothing, PACK.replace("out.tgz", "out.zip"),
         "Expected argument `out` to be a path that ends in .tgz"),
    Case("a lock that is a link to a file elsewhere",
         all_of(put("precious.txt"), link("run/.lock", "../precious.txt")), RUN,
         "run: expected a folder to write to, but "),
    Case("a log that is a link to a file elsewhere",
         all_of(UNFINISHED, put("precious.txt"), link("run/log.jsonl", "../precious.txt")), RUN, "run/log.jsonl: "),
    # Photos and masks
    *(Case(f"a {kind} that is cut off", photo(lambda kind=kind: bad.half(bad.picture(kind))), CHECK,
           "images/0.png: not an image that decodes") for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")),
    Case("a text as photo", photo("hello"), CHECK, "images/0.png: not an image that decodes"),
    Case("an empty file as photo", photo(b""), CHECK, "images/0.png: not an image that decodes"),
    Case("a photo without pixels", photo(bad.png(0, 0)), CHECK, "images/0.png: not an image that decodes"),
    Case("a folder as photo", folder("data/images/0.png"), CHECK, "images/0.png: no such file"),
    Case("a pipe as photo of a data set", pipe("data/images/0.png"), CHECK, "images/0.png: no such file"),
    Case("a pipe as photo", pipe("photos/x.png"), PREDICT, "^photos/x.png: no such file"),
    Case("a pipe as photo that is named", pipe("x"), "predict model.pt x --out out --workers 0", "^x: no such file"),
    Case("a folder of that name among the photos", all_of(folder("photos/x.png"), put("photos/y.jpg", "hello")),
         PREDICT, "^photos/y.jpg: not an image that decodes"),
    Case("a pipe as mask for VOC's server", pipe("sent/2007_000002.png"), PACK, "2007_000002.png: no such file"),
    Case("a pipe as photo for VOC's server", pipe("voc/JPEGImages/2007_000002.jpg"), PACK,
         "2007_000002.jpg: no such file"),
    Case("a photo that is a loop of links", link("photos/x.png", "x.png"), PREDICT, "^photos/x.png: no such file"),
    Case("a photo that is a link to nothing", link("photos/x.png", "nowhere"), PREDICT, "^photos/x.png: no such file"),
    Case("a photo that is not there, with a line break in its name", row(image='"images/x\ncacl: all is well.png"'),
         CHECK, r"'.*images/x\\ncacl: all is well.png': no such file"),
    Case("a broken photo with a line break in its name", put("photos/x\ncacl: all is well.png", "hello"), PREDICT,
         r"^'photos/x\\ncacl: all is well.png': not an image that decodes"),
    Case("a broken photo whose name is no UTF-8", put(os.fsdecode(b"photos/\xff.png"), "hello"), PREDICT,
         r"^'photos/\\udcff.png': not an image that decodes"),
    Case("a photo whose name is too long", nothing, f"predict model.pt {'x' * 300}.png --out out",
         "x.png: no such file or folder"),
    Case("a mask in colours", mask(lambda: bad.grey((128, 0, 0), mode="RGB")), CHECK,
         "masks/0.png: expected a palette or grey mask, but got mode RGB"),
    Case("a mask with a value of no class", mask(lambda: bad.grey(200)), CHECK,
         "masks/0.png: expected values 0 to 2 or 255, but got 200"),
    Case("a mask of another size", mask(lambda: bad.grey(size=(5, 5))), CHECK,
         "masks/0.png: expected 64×48 pixels as the image, but got 5×5"),
    # Lists and texts
    Case("a table in latin-1", table("image,labels,mask,split\nimages/0.png,fußgänger,,train\n".encode("latin-1")),
         CHECK, "dataset.csv: expected a text file in UTF-8"),
    Case("a table in UTF-16", table("image,labels,mask,split\nimages/0.png,boat,,train\n".encode("utf-16")), CHECK,
         "dataset.csv: expected a text file in UTF-8"),
    Case("a table of a header only", table("image,labels,mask,split\n"), CHECK,
         "dataset.csv: expected rows, but there is no row"),
    Case("a row with a zero", row(image="images/\0.png"), CHECK, r"'.*images/\\x00.png': no such file"),
    Case("a quote that is not closed", row(image='"images/0.png'), CHECK,
         "dataset.csv: line 2: expected 4 columns, but got 1"),
    Case("class names in latin-1", classes("schiff\nfußgänger\n".encode("latin-1")), CHECK,
         "classes.txt: expected a text file in UTF-8"),
    Case("class names in UTF-16", classes("boat\ntrain\n".encode("utf-16")), CHECK,
         "classes.txt: expected a text file in UTF-8"),
    Case("no class names", classes("\n \n"), CHECK,
         "classes.txt: expected 1 to 254 class names, a line each, but got 0"),
    Case("300 class names", classes("\n".join(map(str, range(300)))), CHECK,
         "classes.txt: expected 1 to 254 class names, a line each, but got 300"),
    Case("a class name with a semicolon", classes("boat; ship\ntrain\n"), CHECK,
         "classes.txt: expected class names without a semicolon, .* but got 'boat; ship'", 4),
    Case("a class name of 1 MB", annotation(f"<a><object><name>{'x' * 10**6}</name></object></a>"), VOC,
         "2007_000000.xml: unknown class 'xxx"),
    Case("ids of VOC in latin-1", ids("2007_000000\nfußgänger".encode("latin-1")), VOC,
         "train.txt: expected a text file in UTF-8"),
    Case("ids of VOC in UTF-16", ids("2007_000000".encode("utf-16")), VOC, "train.txt: expected a text file in UTF-8"),
    Case("XML that is cut off", annotation("<annotation><object>"), VOC,
         "2007_000000.xml: not an annotation that parses"),
    Case("XML in another encoding than it says",
         annotation("<?xml version='1.0' encoding='utf-8'?><a>ß</a>".encode("latin-1")), VOC,
         "2007_000000.xml: not an annotation that parses"),
    Case("XML in an encoding of its own", annotation("<?xml version='1.0' encoding='none'?><a/>"), VOC,
         r"2007_000000.xml: not an annotation that parses \(unknown encoding"),
    Case("a photo of COCO outside of the folder", partial(bad.coco, file_name="../../photos/0.png"), COCO,
         "instances_train.json: image 1: expected a path inside the folder, but got '../../photos/0.png'"),
    Case("an image of COCO of 65535 × 65535 pixels", partial(bad.coco, height=65535, width=65535), COCO,
         "instances_train.json: image 1: expected .* pixels"),
    Case("annotations of COCO nested 100000 deep",
         put("coco/annotations/instances_train.json", '{"x": ' + "[" * 10**5), COCO,
         "instances_train.json: not JSON: nested too deep"),
    Case("annotations of COCO that are cut off", put("coco/annotations/instances_train.json", '{"images": [{"id"'),
         COCO, "instances_train.json: not JSON: "),
    # Numbers
    Case("NaN in CAMs", put("x.npz", bad.arrays(maps=np.full((1, 2, 2), np.nan, np.float16))), CAMS,
         "^x.npz: expected maps that are finite and not negative"),
    Case("infinity in CAMs", put("x.npz", bad.arrays(maps=np.full((1, 2, 2), np.inf, np.float16))), CAMS,
         "^x.npz: expected maps that are finite and not negative"),
    Case("negative CAMs", put("x.npz", bad.arrays(maps=-np.ones((1, 2, 2), np.float16))), CAMS,
         "^x.npz: expected maps that are finite and not negative"),
    Case("CAMs of integers", put("x.npz", bad.arrays(maps=np.ones((1, 2, 2), int))), CAMS,
         "^x.npz: expected classes of integers and maps of floats, but got int64, int64"),
    Case("CAMs of texts", put("x.npz", bad.arrays(classes=np.array(["boat"]))), CAMS,
         "^x.npz: expected classes of integers"),
    Case("CAMs without pixels", put("x.npz", bad.arrays(maps=np.ones((1, 0, 2), np.float16))), CAMS,
         "^x.npz: expected maps of at least one pixel"),
    Case("CAMs of a class that is not there", put("x.npz", bad.arrays(classes=np.array([7]))), CAMS,
         r"^x.npz: expected classes 0 to 1, but got \[7\]"),
    Case("CAMs of another shape", put("x.npz", bad.arrays(maps=np.ones((3, 2, 2), np.float16))), CAMS,
         r"^x.npz: expected classes \(C,\) and maps \(C, h, w\)"),
    Case("a .npy as CAMs", put("x.npz", lambda: bad.array(np.ones(3))), CAMS, r"^x.npz: not a file of CAMs"),
    Case("CAMs that are cut off", put("x.npz", lambda: bad.half(bad.arrays()())), CAMS, r"^x.npz: not a file of CAMs"),
    Case("NaN in an encoder", put("clip.pt", lambda: bad.clip(ln_final=torch.full((2,), float("nan")))), ENCODER,
         "clip.pt: 'ln_final': expected finite weights, but got NaN or infinity"),
    Case("NaN in a backbone", put("weights.pt", bad.backbone), BACKBONE, "weights.pt: .*: expected finite weights"),
    Case("NaN in a segmenter", put("model.pt", partial(bad.segmenter, bad.with_nan)), PREDICT,
         "^model.pt: '.*': expected finite weights, but got NaN or infinity"),
    Case("a sparse tensor in a segmenter", put("model.pt", partial(bad.segmenter, bad.with_sparse)), PREDICT,
         "^model.pt: '.*': expected a tensor with all of its values"),
    setting("cacl.lr", "nan", "input should be a finite number, but got nan"),
    setting("cacl.lr", "inf", "input should be a finite number, but got inf"),
    setting("cacl.threshold", "nan", "input should be less than or equal to 1, but got nan"),
    setting("cacl.lr", '"0.1"', "input should be a valid number, but got '0.1'"),
    setting("cacl.lr", "true", "input should be a valid number, but got True"),
    setting("run.seed", "1.5", "input should be a valid integer, but got 1.5"),
    setting("run.workers", "-1", "input should be greater than or equal to 0, but got -1"),
    # Configurations
    setting("run.out", "a\0b", r"expected text in UTF-8 without zeros, but got '.*a\\x00b'"),
    setting("run.out", "\udcff", r"expected text in UTF-8 without zeros, but got '.*\\udcff'"),
    Case("the home of nobody", nothing, f"{RUN} --set data.root=~nobody.of.that.name/x", "classes.txt: no such file"),
    Case("a key twice", settings("[cacl]\nlr = 1.0\nlr = 2.0\n"), RUN,
         "^config.toml: expected a TOML file, but Cannot"),
    Case("a table twice", settings("[data]\n"), RUN, "^config.toml: expected a TOML file, but Cannot declare"),
    Case("an unknown key", settings("[prompts]\ntemplate = 1\n"), RUN,
         r'^config.toml: \[prompts\] template: unknown key; did you mean "templates"\?'),
    Case("an unknown table", settings("[coffee]\nsugar = 1\n"), RUN, r"^config.toml: \[coffee\]: unknown table"),
    Case("a key with a line break", settings('[prompts]\n"a\\ncacl: all is well" = 1\n'), RUN,
         r"^config.toml: \[prompts\] 'a\\ncacl: all is well': unknown key"),
    Case("a value in place of a table", put("config.toml", "run = 3\n"), RUN,
         r"^config.toml: \[run\]: input should be a valid", 2),
    Case("a configuration in latin-1", settings("# fußgänger".encode("latin-1")), RUN,
         "^config.toml: expected a TOML file"),
    Case("a configuration in UTF-16", settings("[run]".encode("utf-16")), RUN, "^config.toml: expected a TOML file"),
    Case("a folder as configuration", nothing, "run photos", "^photos: expected a TOML file"),
    Case("a name of a configuration with a line break", nothing, "run 'x\ncacl: all is well.toml'",
         r"^'x\\ncacl: all is well.toml': no such file"),
    # Words and what a run folder holds
    Case("background words that are no JSON", put("data/backgrounds.json", "boat: water"),
         f"{RUN} --set cacl.beta=2.0", "backgrounds.json: expected a JSON object of words a class"),
    Case("background words that are a list", put("data/backgrounds.json", '["water"]'), f"{RUN} --set cacl.beta=2.0",
         "backgrounds.json: expected a JSON object that maps each class to a list"),
    Case("background words that are numbers", put("data/backgrounds.json", '{"boat": [1], "train": [2]}'),
         f"{RUN} --set cacl.beta=2.0", r"backgrounds.json: Expected `words\['boat'\]` to be a list of strings"),
    Case("background words of a class twice", put("data/backgrounds.json", bad.twice), f"{RUN} --set cacl.beta=2.0",
         "backgrounds.json: expected a JSON object of words a class, but '0' stands twice"),
    Case("background words of no class", put("data/backgrounds.json", "{}"), f"{RUN} --set cacl.beta=2.0",
         "backgrounds.json: Expected argument `words` to be a mapping with at least one class"),
    Case("a segmenter whose classes are a number", put("model.pt", partial(bad.segmenter, classes=7)), PREDICT,
         "^model.pt: expected the model of a stage `segment`"),
    Case("a segmenter of 10^6 classes", put("model.pt", partial(bad.segmenter, classes=["x"] * 10**6)), PREDICT,
         "^model.pt: expected the model of a stage `segment`"),
    Case("a segmenter whose weights are a list", put("model.pt", partial(bad.segmenter, weights=[1])), PREDICT,
         "^model.pt: expected the model of a stage `segment`"),
    Case("a segmenter whose backbone is a number", put("model.pt", partial(bad.segmenter, backbone=1)), PREDICT,
         "^model.pt: expected the model of a stage `segment`"),
    Case("a checkpoint that holds its key only",
         all_of(UNFINISHED, put("run/segment/checkpoint.pt", partial(bad.checkpoint, "segment"))), RUN,
         "run/segment/checkpoint.pt: not a checkpoint of this stage"),
    Case("model.pt of the stage segment without weights",
         all_of(change("run/predict/stage.json", finished=False),
                put("run/segment/model.pt", lambda: bad.saved({"a": 1}))), RUN,
         "run/segment/model.pt: expected the model of a stage `segment`"),
    Case("stage.json that is no JSON", put("run/cacl/stage.json", "finished"), RUN,
         "run/cacl/stage.json: expected a JSON object"),
    Case("stage.json that is a list", put("run/cacl/stage.json", "[1]"), RUN,
         "run/cacl/stage.json: expected a JSON object, but got list"),
    Case("data.json that is no JSON", put("run/data.json", "\xff"), RUN, "run/data.json: expected a JSON object"),
    Case("metrics.json that is no JSON", put("run/metrics.json", "{"), RUN, "run/metrics.json: expected a JSON object"),
    Case("config.toml of a run that is broken", put("run/config.toml", "= 3"), "predict run photos --out out",
         "run/config.toml: expected a TOML file"),
]  # fmt: skip

FINE = [
    Case("photos with spaces, quotes, line breaks and letters of any script in their names", bad.named, CHECK,
         "^no problems$"),
    Case("the same photos for a segmenter", bad.named, PREDICT, "^6 masks in out, 0 left out$"),
    Case("a photo whose name is no UTF-8", put(os.fsdecode(b"photos/\xff.png"), bad.picture), PREDICT,
         "^2 masks in out, 0 left out$"),
    Case("a photo that is called .png", all_of(put("data/.png", bad.picture), row(".png")), CHECK, "^no problems$"),
    Case("photos whose names differ in upper and lower case",
         all_of(put("data/images/A.png", bad.picture), put("data/images/a.png", bad.picture),
                table("image,labels,mask,split\nimages/A.png,boat,,train\nimages/a.png,,,train\n")), CHECK,
         "^no problems$"),
    Case("a PNG that is called .jpg", all_of(put("data/images/x.jpg", bad.picture), row("images/x.jpg")), CHECK,
         "^no problems$"),
    Case("a link to a photo elsewhere", all_of(link("data/images/x.png", "../../photos/0.png"), row("images/x.png")),
         CHECK, "^no problems$"),
    Case("photos of 1 × 1 and of 1 × 5000 pixels",
         all_of(put("photos/a.png", lambda: bad.picture(size=(1, 1))),
                put("photos/b.png", lambda: bad.picture(size=(1, 5000)))), PREDICT, "^3 masks in out, 0 left out$"),
    Case("a GIF that moves: its first picture", put("photos/a.gif", partial(bad.frames, "GIF")), PREDICT,
         "^2 masks in out, 0 left out$"),
    Case("a TIFF of many pages: its first one", put("photos/a.tif", partial(bad.frames, "TIFF")), PREDICT,
         "^2 masks in out, 0 left out$"),
    Case("a table with line ends of Windows", table("image,labels,mask,split\r\nimages/0.png,boat,,train\r\n"), CHECK,
         "^no problems$"),
    Case("a table with line ends of old Macs", table("image,labels,mask,split\rimages/0.png,boat,,train\r"), CHECK,
         "^no problems$"),
    Case("a table and class names with a byte order mark",
         all_of(classes("\ufeffboat\r\ntrain\r\n"), table("\ufeffimage,labels,mask,split\nimages/0.png,boat,,train\n")),
         CHECK, "^no problems$"),
    Case("a table of 10^6 rows, most of another split", table(bad.many_rows), f"{RUN} --dry-run",
         "^warmup: to be done again$"),
    Case("ids of VOC with a byte order mark and line ends of Windows", ids("\ufeff2007_000000\r\n2007_000001\r\n"),
         VOC, "^no problems$"),
    Case("annotations in UTF-16 and in latin-1",
         all_of(annotation(bad.xml("<object><name>boat</name></object>", "utf-16")),
                put("voc/Annotations/2007_000001.xml", bad.xml("ß", "latin-1"))), VOC, "^no problems$"),
    Case("a configuration with a byte order mark",
         put("config.toml", lambda: "\ufeff" + Path("config.toml").read_text()), f"{RUN} --dry-run",
         "^warmup: finished$"),
    Case("background words with a byte order mark",
         put("data/backgrounds.json", '\ufeff{"boat": ["sky"], "train": ["sky"]}'), f"{RUN} --dry-run",
         "^cacl: to be done again$"),
    Case("10^9 workers: at most one a core", nothing, f"{RUN} --dry-run --set run.workers=1000000000",
         "^warmup: finished$"),
    Case("10^9 workers for a segmenter", nothing, f"{PREDICT} --workers 1000000000", "^1 mask in out, 0 left out$"),
    Case("class names with commas, quotes and markup, in a report", bad.markup, bad.report_of_markup,
         "^&lt;script&gt;alert$"),
    Case("lines of log.jsonl that are none",
         put("run/log.jsonl", '{"stage": "cacl", "step"\n[1]\n\xff\n' + "[" * 10**5), REPORT,
         "^report: .*run/report/index.html$"),
    Case("values of other types in log.jsonl",
         all_of(UNFINISHED, put("run/log.jsonl", '{"stage": "segment", "step": "x"}\n{"stage": "cacl", "loss": {}}\n')),
         RUN, "^run folder: "),
    Case("values of other types in times.json",
         all_of(UNFINISHED, put("run/times.json", '{"segment": 3, "predict": {"seconds": "x"}}')), RUN,
         "^run folder: "),
    Case("values of other types in metrics.json, in a report",
         put("run/metrics.json", '{"warmup": [], "cacl": {"miou": 0.5}, "cams": {"miou": "x", "iou": {"boat": "y"}}}'),
         REPORT, "^report: .*run/report/index.html$"),
    Case("values of other types in metrics.json: evaluated again",
         put("run/metrics.json", '{"warmup": [], "cacl": {"miou": 0.5}, "cams": {"miou": "x", "iou": {"boat": "y"}}}'),
         bad.evaluated_again, "^warmup, cacl, cams, irn, masks, segment, predict$"),
    Case("a link to a file elsewhere where a temporary file goes",
         all_of(put("precious.txt", "precious"), link("run/config.toml.tmp", "../precious.txt")), RUN, "^run folder: "),
    Case("a photo whose name has 255 bytes", put(f"photos/{'x' * 251}.png", bad.picture), PREDICT,
         "^2 masks in out, 0 left out$"),
    Case("a segmenter whose class name has a line break",
         put("model.pt", partial(bad.segmenter, classes=["a\nb", "train"])), PREDICT,
         r"^mask values: 0 background, 1 'a\\nb', 2 train$"),
    Case("letters that the terminal lacks", all_of(classes("fußgänger\n"), row(labels="fussgänger")),
         bad.check_in_ascii, r"unknown label 'fussg\\xe4nger'; did you mean \"fu\\xdfg\\xe4nger\""),
    Case("a photo of 100 million pixels", put("photos/0.png", bad.hundred_megapixels), PREDICT,
         "^1 mask in out, 0 left out$"),
]  # fmt: skip
SLOW = ("a photo of 100 million pixels",)

CONFIG = """base = "voc"
[run]
out = "run"
workers = 0
device = "cpu"
[data]
format = "csv"
root = "data"
train = "train"
eval = "val"
[encoder]
name = "scenes"
[camnet]
backbone = "scenes"
weights = ""
[cams]
scales = [1.0]
flip = false
""" + "".join(f"[{stage}]\nepochs = 1\nbatch_size = 2\ncrop = 32\n" for stage in ("warmup", "cacl", "irn"))
CONFIG += '[segment]\nbackbone = ""\nepochs = 1\nbatch_size = 2\ncrop = 32\n'


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two data sets, photos, a configuration, and what a run of it left."""
    folder = tmp_path_factory.mktemp("whole")
    write_csv(folder / "data", train=3, val=1)
    (folder / "data/backgrounds.json").write_text('{"boat": ["water"], "train": ["rails"]}')
    write_voc(folder / "voc", train=2, val=1)
    sent = read_mask(folder / "voc/SegmentationClass/2007_000002.png").numpy()
    save_mask(folder / "sent/2007_000002.png", sent)  # for VOC's server
    (folder / "photos").mkdir()
    shutil.copy(folder / "data/images/0.png", folder / "photos/0.png")
    (folder / "config.toml").write_text(CONFIG)
    with torch.random.fork_rng():
        assert main(["run", str(folder / "config.toml")]) == 0
    shutil.copy(folder / "run/segment/model.pt", folder / "model.pt")
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of it, which is the current folder."""

    def copy(source, target):
        (os.link if source.endswith(".pt") else shutil.copy2)(source, target)  # only replaced as a whole, by anybody

    shutil.copytree(whole, tmp_path / "here", copy_function=copy)
    path = tmp_path / "here/run/config.toml"
    path.write_text(path.read_text().replace(str(whole), str(tmp_path / "here")))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(logging.getLogger("cacl"), "disabled", True)  # what a run says while all is well
    monkeypatch.setenv("PATH", str(tmp_path / "here/bin"), prepend=os.pathsep)
    yield tmp_path
    shutil.rmtree(tmp_path)


def contents(folder: Path) -> dict[str, object]:
    """What lies in a folder, without following links and reading pipes."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else mode
        found[os.path.relpath(path)] = content
    return found


def memory() -> float:
    """The most memory in MB that this process has held since it was last asked; 0 where the system does not say it."""
    peak = _peak_mb() or 0.0
    if peak:
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def meet(case: Case, place: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and lines of what is said; what no input may bring about is looked for."""
    case.build()
    before = contents(place)
    memory()
    held, start = memory(), time.monotonic()
    if isinstance(case.call, str):
        code = main(shlex.split(case.call))
        captured = capsys.readouterr()
        errors = captured.err[captured.err.index("cacl: ") :] if "cacl: " in captured.err else ""
        lines = [line.removeprefix("cacl: ") for line in errors.splitlines()] or captured.out.splitlines()
        if lines[-1] == f"{len(lines) - 1} problem{'s' * (len(lines) != 2)}":  # of `cacl check`
            lines.pop()
    else:
        try:
            code, lines = 0, str(case.call()).splitlines()
        except (ValueError, OSError) as error:
            code, lines = 2, str(error).splitlines()
    assert time.monotonic() - start < SECONDS
    assert code == 0 or memory() - held < MEGABYTES
    after = contents(place)
    assert not [name for name in after if Path(name).name == "executed"], "something in it was run"
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert not [name for name in changed if not re.match(r"(run|out)(/|$)", name)], "it leaked out"
    assert code == 0 or changed & before.keys() <= {"run/times.json"}, "something was lost"
    found = [line for line in lines if re.search(case.says, line)]
    assert found, lines
    SAID[case] = found[0].replace(f"{place / 'here'}/", "")
    return code, lines


SAID: dict[Case, str] = {}
"""For the page."""


def parameters(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in SLOW)) for case in cases]


@pytest.mark.parametrize("case", parameters(BAD))
def test_bad_input(case, place, capsys):
    code, lines = meet(case, place, capsys)
    assert code == 2
    assert len(lines) == case.lines, lines


@pytest.mark.parametrize("case", parameters(FINE))
def test_odd_input(case, place, capsys):
    code, lines = meet(case, place, capsys)
    assert code == 0, lines


def test_the_page_has_every_case():
    assert len(BAD) >= 50
    rows = [[line.split(" | ")[0].removeprefix("| ") for line in part.splitlines()] for part in page_parts()]
    for cases, names in zip((BAD, FINE), rows, strict=True):
        assert {case.name for case in cases} <= set(names), "python tests/test_hostile.py writes the page"


def page_parts() -> list[str]:
    """What the page has on bad input and on odd input."""
    return re.split("^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[-2:]


def rows(cases: Iterable[Case], said: Mapping[Case, str]) -> str:
    """The rows of a table: what it is, what meets it, what is said."""

    def code(text: str) -> str:
        return f"`` {shown(text if len(text) <= 150 else f'{text[:150]}…')} ``".replace("|", "\\|")

    def call(case: Case) -> str:
        if isinstance(case.call, str):
            return code(f"cacl {case.call}")
        return code(case.call.func.__name__) if isinstance(case.call, partial) else str(case.call.__doc__)

    return "".join(f"| {case.name} | {call(case)} | {code(said[case])} |\n" for case in cases)


if __name__ == "__main__":
    assert pytest.main([__file__, "-q", "-k", "bad_input or odd_input", "-m", "slow or not slow"]) == 0
    import test_hostile as run  # as pytest has imported it

    text, parts = PAGE.read_text(encoding="utf-8"), page_parts()
    for part, cases in zip(parts, (run.BAD, run.FINE), strict=True):
        head = part[: part.index("|---|---|---|\n")] + "|---|---|---|\n"
        text = text.replace(part, head + rows(cases, run.SAID) + "\n" * (cases is run.BAD))
    PAGE.write_text(text, encoding="utf-8")
