"""The diary of a run: JSON lines that are only ever appended, so that any process can follow along and a kill loses one line at most.

Everything that changes in a run is told here and nowhere else: what was asked for, how far it is, how it ended. State is what the lines
add up to (`jobs.fold`), so a reader never meets a file that contradicts another.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesvd_core import atomic

Kind = Literal["submitted", "started", "progress", "log", "finished", "failed", "cancelled", "interrupted"]


@dataclass(frozen=True)
class Event:
    """One line of the diary.

    Attributes:
        time: seconds since 1970.
        kind: what happened.
        job: the job it happened to.
        data: further fields, by kind: action and arguments (submitted); stage, done, total, message (progress); result (finished);
            error, error_kind (failed, cancelled, interrupted).
    """

    time: float
    kind: Kind
    job: str
    data: Mapping[str, Any] = field(default_factory=dict)


class EventLog:
    """An append-only file of events that several processes may write to and read at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: Kind, job: str, **data: Any) -> Event:
        """Write one event; everything but progress reaches the disk before this returns.

        Raises:
            OSError: the line could not be written whole; the file is as it was.
        """
        event = Event(time.time(), kind, job, data)
        fields = {"time": round(event.time, 3), "kind": kind, "job": job, **data}
        atomic.append_json(self.path, fields, durable=kind != "progress")
        return event

    def read(self, after: int = 0) -> tuple[list[Event], int]:
        """Events behind byte `after`, and the position from which to read on.

        A line that is still being written is left for the next call; a torn line is passed over.
        """
        lines, position = atomic.read_json_lines(self.path, after)
        return [event for fields in lines if (event := _event(fields)) is not None], position


_NEEDED: Mapping[str, Mapping[str, type]] = {"submitted": {"action": str}, "progress": {"stage": str, "done": int, "total": int}}
"""Fields without which an event of a kind says nothing."""


def _event(fields: dict[str, Any]) -> Event | None:
    """The event of one line, or None for a line that is none."""
    try:
        event = Event(float(fields.pop("time")), fields.pop("kind"), str(fields.pop("job")), fields)
        needed = _NEEDED.get(event.kind, {})
    except (ValueError, KeyError, TypeError):
        return None
    return event if all(isinstance(fields.get(name), kind) for name, kind in needed.items()) else None
