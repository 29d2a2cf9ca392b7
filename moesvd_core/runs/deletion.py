"""What a run's folder holds that is gone once the run is deleted, and which runs cannot be."""

import os
from dataclasses import dataclass
from pathlib import Path

from moesvd_core.errors import RunError
from moesvd_core.runs.exports import list_exports
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.votes import read_votes

SHIPPED = Path(__file__).parents[2] / "assets"
"""What comes with the program; the run in it is copied among a person's own, and the copy is theirs."""


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
    """Count what a run holds; links are not followed, and a file that goes meanwhile is not counted."""
    total = 0
    for folder, _, names in os.walk(run.path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return Held(total, len(list_exports(run)), len(read_votes(run)))


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
