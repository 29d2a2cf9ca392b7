"""What a run's folder holds that is gone once the run is deleted, which runs cannot be, and how a folder goes in one step."""

import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moesvd_core.errors import RunError
from moesvd_core.runs.exports import list_exports
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.votes import read_votes

SHIPPED = Path(__file__).parents[2] / "assets"
"""What comes with the program; the run in it is copied among a person's own, and the copy is theirs."""
_ASIDE = re.compile(r"\.deleted\.\d{19}\..+")
"""Name of a folder that is being deleted."""


@dataclass(frozen=True)
class Held:
    """What a run holds.

    Attributes:
        bytes: of all files in its folder.
        exports: finished checkpoints in it; those that were written to other folders stay.
        votes: blind votes, which nothing makes again.
    """

    bytes: int
    exports: int
    votes: int

    @property
    def counted(self) -> list[str]:
        """What is in it besides what an analysis makes again, in words: "2 exports", "1 vote"; nothing for none."""
        found = ((self.exports, "export"), (self.votes, "vote"))
        return [f"{number} {name}{'' if number == 1 else 's'}" for number, name in found if number]


def held(run: RunFolder) -> Held:
    """Count what a run holds."""
    return Held(sum(file_sizes(run.path)), len(list_exports(run)), len(read_votes(run)))


def file_sizes(folder: Path) -> list[int]:
    """Bytes of every file in a folder, deep down; links are not followed, and a file that goes meanwhile is not counted."""
    sizes = []
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append(os.lstat(os.path.join(place, name)).st_size)
    return sizes


def set_aside(run: RunFolder) -> Path:
    """Take a run out of sight in one step, so that its name never stands for half of it; returns where its folder lies then.

    Raises:
        RunError: its folder cannot be renamed; it is as it was.
    """
    folder = run.path.resolve()
    aside = folder.with_name(f".deleted.{time.time_ns()}.{folder.name}")
    try:
        return folder.rename(aside)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"run {run.name} cannot be deleted: {folder} cannot be renamed ({reason}); remove that folder by hand") from error


def remove(run: RunFolder, aside: Path) -> None:
    """Empty and remove the folder of a run that was set aside, also while another process sweeps it.

    Raises:
        RunError: something in it cannot be removed.
    """
    try:
        while aside.exists():
            with suppress(FileNotFoundError):
                shutil.rmtree(aside)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"run {run.name} is deleted, but {aside} could not be emptied ({reason}): remove that folder") from error


def sweep(root: Path) -> None:
    """Remove what interrupted deletions left among the runs; what cannot be removed now is left to the next time."""
    for path in root.glob(".deleted.*"):
        if _ASIDE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def require_deletable(run: RunFolder) -> None:
    """Refuse a folder that is not to be emptied, or that cannot be, before anything in it is touched.

    Raises:
        RunError: it comes with the program, is a link, or may not be written to.
    """
    if run.path.resolve().is_relative_to(SHIPPED):
        raise RunError(f"run {run.name} in {run.path} comes with the program: only copies of it among the runs can be deleted")
    if run.path.is_symlink():
        raise RunError(f"{run.path} is a link: name the folder that it leads to, {run.path.resolve()}")
    if not all(os.access(folder, os.W_OK | os.X_OK) for folder in (run.path, run.path.absolute().parent)):
        raise RunError(f"run {run.name} cannot be deleted: {run.path} or the folder around it is read-only for you")
