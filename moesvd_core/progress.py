"""How long work tells where it is, and how it is told to stop."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of long work.

    Attributes:
        stage: station of the pipeline: "calibrate", "decompose", "export", "evaluate" ...
        done: units finished, 0 <= done <= total.
        total: units of this stage (layers, windows, shards ...).
        message: what has just been finished, for a log line.
    """

    stage: str
    done: int
    total: int
    message: str = ""


Report = Callable[[Progress], None]
"""Called after every unit of work. It may raise `Cancelled`, and does nothing else that the work can see."""


def silent(progress: Progress) -> None:
    """A `Report` for callers who do not care."""
