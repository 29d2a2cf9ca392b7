"""What the diary adds up to: the jobs of a run, the state each is in, and how long the current one still takes."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from moesvd_core.runs.events import Event, EventLog

JobState = Literal["queued", "running", "finished", "failed", "cancelled", "interrupted"]
ENDED: frozenset[JobState] = frozenset({"finished", "failed", "cancelled", "interrupted"})
"""States in which nothing more happens to a job by itself."""
INTERRUPTED = "the worker ended without a word (killed, or the machine restarted): resume to go on from where it was"


@dataclass(frozen=True)
class Job:
    """One thing that was asked of a run.

    Attributes:
        id: number within the run, "1", "2" ...
        action: name of the action, one of `stages.ACTIONS`.
        arguments: what the action was given.
        state: where it is; "interrupted" when its worker died, which loses nothing.
        submitted, started, ended, updated: seconds since 1970; updated is the last sign of progress.
        stage: station that it has reached, "" before the first.
        done, total: units of that stage.
        message: what was finished last.
        stage_started, stage_start_done: when this worker entered the stage, and how much of it an earlier one had already done.
        error, error_kind: message and class of what ended it.
        by: the login that asked for it, "" where nobody logged in.
        result: what the action returned.
    """

    id: str
    action: str
    arguments: Mapping[str, Any]
    submitted: float
    state: JobState = "queued"
    started: float | None = None
    ended: float | None = None
    updated: float | None = None
    stage: str = ""
    done: int = 0
    total: int = 0
    message: str = ""
    stage_started: float = 0.0
    stage_start_done: int = 0
    error: str = ""
    error_kind: str = ""
    by: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether it runs, or waits."""
        return self.state not in ENDED

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the current stage ends at the pace seen so far; None before a pace is known."""
        finished = self.done - self.stage_start_done
        if self.state != "running" or self.updated is None or finished <= 0:
            return None
        return (self.updated - self.stage_started) / finished * (self.total - self.done)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, for the command line and the pages."""
        names = ("id", "action", "state", "stage", "done", "total", "message", "error", "submitted", "started", "ended")
        return {name: getattr(self, name) for name in names} | {
            "arguments": dict(self.arguments),
            "result": dict(self.result),
            "eta_seconds": self.eta_seconds,
        }


class _Diary:
    """What a diary says of its run's jobs, as far as this process has read it: many look several times a second, and diaries grow long."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._began: tuple[int, bytes] = (0, b"")
        self._position = 0
        self._jobs: dict[str, Job] = {}

    def read_on(self, log: EventLog) -> dict[str, Job]:
        """The jobs by now; from the beginning where this is not the file any more that was read before."""
        with self._lock:
            began, size = _beginning(log)
            (file, line), (known, before) = began, self._began
            if file != known or not line.startswith(before) or size < self._position:
                self._position, self._jobs = 0, {}
            events, position = log.read(self._position)
            advance(self._jobs, events)
            self._began, self._position = began, position
            return dict(self._jobs)


_DIARIES: dict[Path, _Diary] = {}
_DIARIES_LOCK = Lock()


def read_jobs(log: EventLog) -> dict[str, Job]:
    """The jobs of a run by id, oldest first. A process reads each line of a diary once."""
    with _DIARIES_LOCK:
        diary = _DIARIES.setdefault(log.path, _Diary())
    return diary.read_on(log)


def _beginning(log: EventLog) -> tuple[tuple[int, bytes], int]:
    """What tells a diary from that of a later run in the same folder: its file, and the first line, which says when; and its size."""
    try:
        with log.path.open("rb") as file:
            found = os.fstat(file.fileno())
            return (found.st_ino, file.read(64)), found.st_size
    except FileNotFoundError:
        return (0, b""), 0


def advance(jobs: dict[str, Job], events: Iterable[Event]) -> None:
    """Bring `jobs` (by id, in the order of submission) up to date with further events."""
    for event in events:
        if event.kind == "submitted":
            jobs[event.job] = Job(
                event.job, event.data["action"], event.data.get("arguments", {}), event.time, by=event.data.get("by", ""),
            )
        elif event.job in jobs:
            jobs[event.job] = _after(jobs[event.job], event)


def _after(job: Job, event: Event) -> Job:
    """The job once `event` has happened to it."""
    data = event.data
    match event.kind:
        case "started":
            return replace(job, state="running", started=event.time, updated=event.time, ended=None)
        case "progress":
            new_stage = data["stage"] != job.stage
            entered = event.time if job.updated is None else job.updated
            return replace(
                job,
                stage=data["stage"], done=data["done"], total=data["total"], message=data.get("message", ""), updated=event.time,
                stage_started=entered if new_stage else job.stage_started,
                stage_start_done=max(0, data["done"] - 1) if new_stage else job.stage_start_done,
            )
        case "finished":
            return replace(job, state="finished", ended=event.time, result=data.get("result", {}))
        case "failed" | "cancelled" | "interrupted":
            return replace(job, state=event.kind, ended=event.time, error=data.get("error", ""), error_kind=data.get("error_kind", ""))
        case _:
            return job
