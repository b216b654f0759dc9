"""What is wrong with the data of a run: the same for ``cacl check``, and for a run before its first step."""

from __future__ import annotations

from cacl._support.distributed import first_here, rank
from cacl.config import Config
from cacl.datasets import FORMATS
from cacl.datasets.checking import Findings, check_files, check_lists, check_parts
from cacl.datasets.files import missing, spread
from cacl.errors import InputError
from cacl.runs.session import Session
from cacl.stages.contrast import backgrounds
from cacl.tables import CACL


def check_config(config: Config, *, sample: int | None = None, progress: bool = False) -> list[str]:
    """What is wrong with the data that a configuration names, a line each as :func:`cacl.datasets.check_folder` gives
    them: its lists and files, or a sample of these, and the background words."""
    data, session = config.data, Session(config, planning=True)
    found, _ = check_parts(
        data.root, data.format, _splits(session), [data.train], range=data.range, sample=sample, progress=progress
    )
    for stage in session.chain:
        if isinstance(settings := session.settings(stage), CACL):
            try:
                backgrounds(session, settings)
            except InputError as error:
                found.problems += str(error).splitlines()
    return found.lines


def are_known(session: Session) -> bool:
    """Whether the data of a run are those that were last checked."""
    return session.known_data == {role: each._asdict() for role, each in session.fingerprints.items()}


def check_elsewhere(session: Session, *, known: bool) -> None:
    """Refuse files that are missing on this machine, where it is another one than that of rank 0, which looks itself;
    of data that are known in a sample.

    Raises:
        ValueError: one line a file.
    """
    if rank() and first_here():
        sample = session.config.data.sample if known else None
        entries = [session.open(split).entries for split in _splits(session)]
        if lines := [line for some in entries for line in missing(some, spread(len(some), sample))]:
            raise InputError("\n".join(dict.fromkeys(lines)))


def check_lists_of(session: Session) -> list[str]:
    """Refuse what is wrong with the lists of a run's data.

    Returns:
        What is worth knowing, a line each.

    Raises:
        ValueError: one line a problem.
    """
    data = session.config.data
    datasets = {split: session.open(split) for split in _splits(session)}
    return _sound(check_lists(datasets, [data.train], disjoint=FORMATS[data.format].disjoint))


def check_files_of(session: Session) -> list[str]:
    """As :func:`check_lists_of`, of the files, of which ``[data] sample`` a split are opened."""
    found = Findings()
    # Training never opens a mask, but the CAMs of the training images are evaluated where there are masks.
    datasets = {split: session.open(split) for split in _splits(session)}
    check_files(datasets, found, sample=session.config.data.sample, progress=session.machine.progress)
    return _sound(found)


def _splits(session: Session) -> list[str]:
    return [split for split in dict.fromkeys(session.splits.values()) if split]


def _sound(found: Findings) -> list[str]:
    if found.problems:
        raise InputError("\n".join(dict.fromkeys(found.problems)))
    return found.notes
