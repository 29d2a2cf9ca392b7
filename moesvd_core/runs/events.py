"""The diary of a run: JSON lines that are only ever appended, so that any process can follow along and a kill loses one line at most.

Everything that changes in a run is told here and nowhere else: what was asked for, how far it is, how it ended. State is what the lines
add up to (`jobs.fold`), so a reader never meets a file that contradicts another.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # a writer was killed in the middle of its line: leave the torn line behind, alone
            try:
                written = os.write(descriptor, line)
                if written < len(line):
                    raise OSError(f"only {written} of {len(line)} bytes fitted into {self.path}: free some disk space")
            except OSError:
                os.ftruncate(descriptor, size)
                raise
            if kind != "progress":
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return event

    def read(self, after: int = 0) -> tuple[list[Event], int]:
        """Events behind byte `after`, and the position from which to read on.

        A line that is still being written is left for the next call; a torn line is passed over.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(after)
                data = file.read()
        except FileNotFoundError:
            return [], after
        whole = data[: data.rfind(b"\n") + 1]
        events = [event for line in whole.splitlines() if (event := _parsed(line)) is not None]
        return events, after + len(whole)


def _parsed(line: bytes) -> Event | None:
    """The event of one line, or None for a torn one."""
    try:
        fields = json.loads(line)
        return Event(float(fields.pop("time")), fields.pop("kind"), str(fields.pop("job")), fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
