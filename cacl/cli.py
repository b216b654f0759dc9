"""The command line, ``cacl run`` and the others; errors of the user's making are one line and exit code 2."""

from __future__ import annotations

import argparse
import io
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import cacl
from cacl import commands
from cacl._support.launch import is_first
from cacl.errors import ElsewhereError, InputError, NotFiniteError, shown

if TYPE_CHECKING:
    from cacl.stages.chain import Chain


def main(arguments: Sequence[str] | None = None, *, chain: Chain | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: those of the process by default.
        chain: the stages; CA-CL's by default. A script that gives its own has all commands for it.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files and classes may have letters that it lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command is commands.predict and not any(word.startswith("-") for word in rest):
        options.photos, rest = [*options.photos, *rest], []  # those after an option
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.chain = chain
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("cacl")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_first() else logging.WARNING)
    try:
        with _terminating():
            return int(options.command(options))
    except ElsewhereError:  # another process of the run says it
        return 2
    except (InputError, ImportError, OSError) as error:  # OSError: a full disk, a process that died
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{shown(error.filename)}: {error.strerror}"
        print(f"cacl: {message}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Terminated) as stop:
        if is_first():
            resumes = options.command in (commands.run, commands.reproduce, commands.ablate) and not getattr(
                options, "restart", False
            )
            print(f"cacl: stopped{'; the same command goes on from the last checkpoint' * resumes}", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    except NotFiniteError as error:
        if is_first():
            print(f"cacl: {error}", file=sys.stderr)
        return 1
    finally:
        logger.removeHandler(handler)


class _Terminated(BaseException):
    """SIGTERM."""


@contextmanager
def _terminating() -> Iterator[None]:
    """Make SIGTERM end the command as Ctrl-C does: what is open is closed, what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cacl", description=cacl.__doc__)
    parser.add_argument("--version", action="version", version=f"cacl {cacl.__version__}")
    added = parser.add_subparsers(required=True, metavar="COMMAND")

    run = added.add_parser("run", help="run the stages of the chain", description="Run the stages of the chain.")
    run.add_argument("config", metavar="CONFIG", help="a TOML file, or a preset: voc, coco, scenes")
    run.add_argument("--stages", metavar="A,B", help="only these stages")
    run.add_argument("--restart", action="store_true", help="do the stages again, from their beginning")
    run.add_argument("--dry-run", action="store_true", help="print the configuration and the stages, run nothing")
    run.set_defaults(command=commands.run)

    reproduce = added.add_parser(
        "reproduce",
        help="the paper's runs, and what came of them beside its figures",
        description="Run the paper's setting stage by stage and write reproduce.json.",
    )
    reproduce.add_argument("experiment", choices=("voc", "coco"), help="whose data")
    reproduce.add_argument("--data-root", required=True, metavar="DIR", help="the folder of the data, such as VOC2012")
    reproduce.add_argument("--out", metavar="DIR", help="the run folder (default: cacl-voc, cacl-coco)")
    reproduce.add_argument("--check", action="store_true", help="look at the data and print the plan, run nothing")
    reproduce.add_argument(
        "--any-data", action="store_true", help="take data that are not the paper's too; the result says so"
    )
    reproduce.set_defaults(command=commands.reproduce)

    ablate = added.add_parser(
        "ablate", help="the paper's tables on your data", description="Train the variants of the paper's tables."
    )
    ablate.add_argument("config", metavar="CONFIG", help="what the variants vary: a TOML file or a preset")
    ablate.add_argument(
        "--tables", default="4,5,6,7,8", metavar="A,B", help="4, 5, 6, 7, 8, theta, methods (default: 4,5,6,7,8)"
    )
    ablate.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings a variant (default: %(default)s)")
    ablate.set_defaults(command=commands.ablate)

    check = added.add_parser(
        "check", help="open every file of a data set once", description="List every problem of a data set."
    )
    check.add_argument("path", metavar="PATH", help="a data set's folder, or a configuration")
    check.add_argument(
        "--sample", type=int, metavar="N", help="open N images of each split, evenly spread, instead of all"
    )
    check.set_defaults(command=commands.check)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run folder, its segment/model.pt, or an exported folder"
    )
    predict = added.add_parser(
        "predict",
        parents=[model],
        help="masks for photos",
        description="Write a palette PNG for every photo, by a trained segmenter.",
    )
    predict.add_argument("photos", nargs="*", metavar="PHOTOS", help="files and folders")
    predict.add_argument("--list", metavar="FILE", help="a file with the path of a photo a line; - for standard input")
    predict.add_argument("--out", required=True, metavar="DIR", help="folder of the masks")
    predict.add_argument("--keep", action="store_true", help="leave photos out that have a mask already")
    predict.add_argument(
        "--shard",
        metavar="I/N",
        help="the I-th of N parts (default: that of a torchrun process or of a Slurm array job)",
    )
    predict.add_argument("--overlay", action="store_true", help="also draw the masks over the photos, with a legend")
    predict.add_argument("--no-crf", action="store_true", help="the network's output as it is: faster")
    predict.add_argument(
        "--longest", type=int, metavar="N", help="scale larger photos down to N pixels (default: the run's)"
    )
    predict.add_argument(
        "--no-tags", action="store_const", const=False, dest="tags", help="the network's classes alone"
    )
    predict.add_argument("--device", default="auto", help="a torch device (default: a GPU if there is one)")
    predict.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="what the network computes in (default: bf16 where the device has it)",
    )  # fmt: skip
    predict.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    predict.set_defaults(command=commands.predict)

    report = added.add_parser("report", help="one HTML file about a run", description="Write the report of a run.")
    report.add_argument("run", metavar="RUN", help="the run folder")
    report.add_argument("--out", metavar="PATH", help="an HTML file or a folder (default: RUN/report)")
    report.add_argument("--ablation", metavar="DIR", help="folder of `cacl ablate` (default: RUN-ablation)")
    report.add_argument("--device", metavar="NAME", help="a torch device (default: the run's)")
    report.set_defaults(command=commands.report)

    export = added.add_parser(
        "export",
        parents=[model],
        help="the segmenter as one file, or as a folder to share",
        description="Write a segmenter for use without this package, or as a folder with weights and a model card.",
    )
    export.add_argument(
        "--out",
        required=True,
        metavar="OUT",
        help="a .pt2 (torch.export) or .onnx file; or a new folder, whose name ends in / or has no ending",
    )
    export.add_argument("--license", default="", metavar="NAME", help="of the folder's card, such as cc-by-4.0")
    export.set_defaults(command=commands.export)

    voc = added.add_parser(
        "export-voc", help="the archive for VOC's server", description="Check masks and pack them for VOC's server."
    )
    voc.add_argument("masks", metavar="MASKS", help="folder of palette PNGs, such as `cacl predict` makes")
    voc.add_argument("--root", required=True, metavar="DIR", help="the folder VOC2012")
    voc.add_argument("--out", required=True, metavar="FILE", help="a .tgz or .tar.gz file")
    voc.add_argument("--split", default="test", help="(default: test)")
    voc.add_argument("--competition", default="comp6", help="comp5 for VOC's own data only (default: comp6)")
    voc.set_defaults(command=commands.export_voc)

    labels = added.add_parser(
        "labels",
        help="masks as labels of other tools",
        description="Write masks as COCO, YOLO, labelme or CVAT has labels, to train on or to correct.",
    )
    labels.add_argument("source", metavar="RUN_OR_MASKS", help="a run folder, or a folder of masks")
    labels.add_argument("--format", required=True, choices=("coco", "yolo", "labelme", "cvat"), help="whose labels")
    labels.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there yet, or is empty")
    labels.add_argument(
        "--stage", choices=("masks", "predict"), help="of a run: which masks (default: the last ones of its photos)"
    )
    labels.add_argument("--photos", metavar="DIR", help="of a folder of masks: that of their photos")
    labels.add_argument(
        "--classes", metavar="FILE", help="of a folder of masks: a text with a class a line, or their run or model"
    )
    labels.add_argument(
        "--shape", default="polygon", choices=("polygon", "rle"), help="rle is each pixel as it is (default: polygon)"
    )
    labels.add_argument(
        "--tolerance", type=float, default=1.0, metavar="PIXELS",
        help="how far polygons may be from the pixels' edges; 0: not at all (default: %(default)g)",
    )  # fmt: skip
    labels.add_argument(
        "--whole", action="store_false", dest="parts", help="one label for each class of a photo, not for each region"
    )
    labels.add_argument(
        "--min-area", type=int, default=1, metavar="N", help="leave regions of fewer pixels out (default: %(default)s)"
    )
    labels.add_argument(
        "--worst-first", action="store_true", help="of a run: first.csv, by how little masks agree with their photos"
    )
    labels.add_argument(
        "--confidence", action="store_true", help="of pseudo masks: a picture of what speaks for each pixel"
    )
    labels.add_argument("--copy", action="store_true", help="copy the photos in place of links; for CVAT, pack them")
    labels.add_argument("--device", metavar="NAME", help="a torch device for the encoder (default: the run's)")
    labels.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    labels.set_defaults(command=commands.labels)
    for command in (run, reproduce, ablate, check, predict, report, voc, labels):
        command.add_argument(
            "--no-progress", action="store_false", dest="progress", help="no progress bars, not on a terminal either"
        )
    for command in (check, predict):
        command.add_argument(
            "--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="what the values of deep images span"
            " (default: that of the data set or the segmenter, or by their type)",
        )  # fmt: skip
    for command in (run, reproduce, ablate, check):
        command.add_argument(
            "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting; may be repeated"
        )
    return parser
