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
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import cacl
from cacl._support.launch import is_first
from cacl._support.values import check_choice
from cacl.errors import ElsewhereError, InputError, NotFiniteError, shown

if TYPE_CHECKING:
    from cacl.config import Config
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
    options = _parser().parse_args(arguments)
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
            resumes = options.command in (_run, _ablate) and not getattr(options, "restart", False)
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


def _config(options: argparse.Namespace, source: str) -> Config:
    """What all processes read, and one complains about."""
    from cacl.config import Config

    quiet = [] if options.progress else ["run.progress=false"]
    try:
        return Config.load(source, [*options.set, *quiet], chain=options.chain)
    except InputError as error:
        raise error if is_first() else ElsewhereError(str(error)) from None


def _run(options: argparse.Namespace) -> int:
    config = _config(options, options.config)
    stages = [name.strip() for name in options.stages.split(",")] if options.stages else None
    for name in stages or ():
        check_choice("stages", name, config.stages)
    from cacl import pipeline

    if options.dry_run:
        print(config.to_toml())
        print("\n".join(pipeline.plan(config, stages, resume=not options.restart)))
        return 0
    result = pipeline.run(config, stages=stages, resume=not options.restart)
    if is_first():
        print(result.summary())
        print(f"run folder: {result.out}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from cacl.predict import predict

    made = predict(
        options.model,
        options.photos,
        options.out,
        overlays=options.overlay,
        crf=not options.no_crf,
        longest=options.longest,
        tags=options.tags,
        range=options.range,
        device=options.device,
        workers=options.workers,
        progress=options.progress,
    )
    for problem in made.problems:
        print(f"cacl: {problem}", file=sys.stderr)
    names = ", ".join(f"{k} {shown(name)}" for k, name in enumerate(made.classes, start=1))
    print(f"mask values: 0 background, {names}")
    count = len(made.masks)
    files = f"other file{'' if len(made.others) == 1 else 's'}"
    no_photos = f"; {len(made.others)} {files}, such as {shown(made.others[0].name)}" if made.others else ""
    print(f"{count} mask{'' if count == 1 else 's'} in {options.out}, {len(made.problems)} left out{no_photos}")
    return 2 if made.problems else 0


def _report(options: argparse.Namespace) -> int:
    from cacl.report import report

    path = report(
        options.run, options.out, ablation=options.ablation, device=options.device, progress=options.progress,
        chain=options.chain,
    )  # fmt: skip
    print(f"report: {path}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from cacl.export import export_segmenter
    from cacl.predict import open_model

    print(f"segmenter: {export_segmenter(open_model(options.model)[0], Path(options.out))}")
    return 0


def _export_voc(options: argparse.Namespace) -> int:
    from cacl.voc_archive import export_voc

    root, out = Path(options.root), Path(options.out)
    path = export_voc(
        Path(options.masks), root, out, split=options.split, competition=options.competition, progress=options.progress
    )
    print(f"archive: {path}")
    return 0


def _ablate(options: argparse.Namespace) -> int:
    from cacl.config import split_overrides

    options.set, methods = split_overrides(options.set)
    config = _config(options, options.config)
    from cacl import ablate

    config = config.changed({"run": {"out": config.run.out.with_name(f"{config.run.out.name}-ablation")}})
    paths = ablate.run(
        config, tables=[name.strip() for name in options.tables.split(",")], seeds=options.seeds, methods=methods
    )
    for path in paths if is_first() else ():
        print(path.read_text(encoding="utf-8"))
        print(f"table: {path}, {path.with_suffix('.csv')}")
    return 0


def _check(options: argparse.Namespace) -> int:
    path = Path(options.path)
    config = None if path.is_dir() else _config(options, options.path)
    from cacl.datasets.checking import NOTE, check_folder
    from cacl.runs.checking import check_config

    if config is None:
        lines = check_folder(path, range=options.range, progress=options.progress)
    else:
        if options.range:
            config = config.changed({"data": {"range": options.range}})
        lines = check_config(config, progress=options.progress)
    for line in lines:
        print(line)
    count = sum(not line.startswith(NOTE) for line in lines)
    print(f"{count} problem{'' if count == 1 else 's'}" if count else "no problems")
    return 2 if count else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cacl", description=cacl.__doc__)
    parser.add_argument("--version", action="version", version=f"cacl {cacl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the stages of the chain", description="Run the stages of the chain.")
    run.add_argument("config", metavar="CONFIG", help="a TOML file, or a preset: voc, coco, scenes")
    run.add_argument("--stages", metavar="A,B", help="only these stages")
    run.add_argument("--restart", action="store_true", help="do the stages again, from their beginning")
    run.add_argument("--dry-run", action="store_true", help="print the configuration and the stages, run nothing")
    run.set_defaults(command=_run)

    ablate = commands.add_parser(
        "ablate", help="the paper's tables on your data", description="Train the variants of the paper's tables."
    )
    ablate.add_argument("config", metavar="CONFIG", help="what the variants vary: a TOML file or a preset")
    ablate.add_argument(
        "--tables", default="4,5,6,7,8", metavar="A,B", help="4, 5, 6, 7, 8, theta, methods (default: 4,5,6,7,8)"
    )
    ablate.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings a variant (default: %(default)s)")
    ablate.set_defaults(command=_ablate)

    check = commands.add_parser(
        "check", help="open every file of a data set once", description="List every problem of a data set."
    )
    check.add_argument("path", metavar="PATH", help="a data set's folder, or a configuration")
    check.set_defaults(command=_check)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, or the segment/model.pt of one")
    predict = commands.add_parser(
        "predict",
        parents=[model],
        help="masks for photos",
        description="Write a palette PNG for every photo, by a trained segmenter.",
    )
    predict.add_argument("photos", nargs="+", metavar="PHOTOS", help="files and folders")
    predict.add_argument("--out", required=True, metavar="DIR", help="folder of the masks")
    predict.add_argument("--overlay", action="store_true", help="also draw the masks over the photos, with a legend")
    predict.add_argument("--no-crf", action="store_true", help="the network's output as it is: faster")
    predict.add_argument(
        "--longest", type=int, metavar="N", help="scale larger photos down to N pixels (default: the run's)"
    )
    predict.add_argument(
        "--no-tags", action="store_const", const=False, dest="tags", help="the network's classes alone"
    )
    predict.add_argument("--device", default="auto", help="a torch device (default: a GPU if there is one)")
    predict.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    predict.set_defaults(command=_predict)

    report = commands.add_parser("report", help="one HTML file about a run", description="Write the report of a run.")
    report.add_argument("run", metavar="RUN", help="the run folder")
    report.add_argument("--out", metavar="PATH", help="an HTML file or a folder (default: RUN/report)")
    report.add_argument("--ablation", metavar="DIR", help="folder of `cacl ablate` (default: RUN-ablation)")
    report.add_argument("--device", metavar="NAME", help="a torch device (default: the run's)")
    report.set_defaults(command=_report)

    export = commands.add_parser(
        "export",
        parents=[model],
        help="the segmenter as one file",
        description="Write a segmenter for use without this package.",
    )
    export.add_argument("--out", required=True, metavar="FILE", help="a .pt2 (torch.export) or .onnx file")
    export.set_defaults(command=_export)

    voc = commands.add_parser(
        "export-voc", help="the archive for VOC's server", description="Check masks and pack them for VOC's server."
    )
    voc.add_argument("masks", metavar="MASKS", help="folder of palette PNGs, such as `cacl predict` makes")
    voc.add_argument("--root", required=True, metavar="DIR", help="the folder VOC2012")
    voc.add_argument("--out", required=True, metavar="FILE", help="a .tgz or .tar.gz file")
    voc.add_argument("--split", default="test", help="(default: test)")
    voc.add_argument("--competition", default="comp6", help="comp5 for VOC's own data only (default: comp6)")
    voc.set_defaults(command=_export_voc)
    for command in (run, ablate, check, predict, report, voc):
        command.add_argument(
            "--no-progress", action="store_false", dest="progress", help="no progress bars, not on a terminal either"
        )
    for command in (check, predict):
        command.add_argument(
            "--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="what the values of deep images span"
            " (default: that of the data set or the segmenter, or by their type)",
        )  # fmt: skip
    for command in (run, ablate, check):
        command.add_argument(
            "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting; may be repeated"
        )
    return parser
