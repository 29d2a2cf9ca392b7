"""One job at a time on a machine: the others wait in the order in which they were asked for, and everybody can see it.

A ticket is an empty file `.queue/<time>.<run>.<job>` beside the runs. Its place among the tickets is its place in the queue. A ticket
whose run has no live worker is void, and so is one whose job has ended: it is removed by whoever looks next, so a killed worker never
holds up the others.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moesvd_core.errors import RunError
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.jobs import read_jobs

START_SECONDS = 10.0
"""How long a worker that has just been launched may take until it is there."""
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, order=True)
class Ticket:
    """A job's place in the queue: earlier tickets come first."""

    nanoseconds: int
    run: str
    job: str

    @property
    def name(self) -> str:
        """Name of the ticket's file; sorts as the tickets do."""
        return f"{self.nanoseconds:020d}.{self.job}.{self.run}"


class Queue:
    """The queue of all runs in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".queue"

    @classmethod
    def of(cls, run: RunFolder) -> "Queue":
        """The queue that the run's jobs wait in."""
        return cls(run.path.parent)

    def join(self, run: RunFolder, job: str) -> Ticket:
        """Take the last place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ticket = Ticket(time.time_ns(), run.name, job)
        (self.folder / ticket.name).touch()
        return ticket

    def leave(self, run: RunFolder, job: str) -> None:
        """Give up every place of the job."""
        for ticket in self._files():
            if (ticket.run, ticket.job) == (run.name, job):
                (self.folder / ticket.name).unlink(missing_ok=True)

    def tickets(self) -> list[Ticket]:
        """Tickets that count, first in turn first; void ones are removed."""
        waiting = []
        for ticket in self._files():
            if self._counts(ticket):
                waiting.append(ticket)
            else:
                with suppress(OSError):  # where nothing can be written, nobody works, and it is in nobody's way
                    (self.folder / ticket.name).unlink()
        return waiting

    def place(self, run: RunFolder, job: str) -> int | None:
        """Jobs that come before this one, 0 for the one whose turn it is; None without a ticket."""
        for place, ticket in enumerate(self.tickets()):
            if (ticket.run, ticket.job) == (run.name, job):
                return place
        return None

    @contextmanager
    def turn(self, run: RunFolder, job: str, waiting: Callable[[int], None]) -> Iterator[None]:
        """Wait until it is the job's turn, hold it for the length of the block, and leave the queue.

        Args:
            waiting: called with the number of jobs ahead several times a second; may raise to give up.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "turn.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not self._taken(descriptor, run, job, waiting):
                time.sleep(_LOOK_SECONDS)
            yield
        finally:
            os.close(descriptor)
            self.leave(run, job)

    def _taken(self, descriptor: int, run: RunFolder, job: str, waiting: Callable[[int], None]) -> bool:
        """Whether the turn has come and could be taken. The lock backs up the tickets: no two jobs run even if their clocks disagree."""
        place = self.place(run, job)
        if place is None:
            self.join(run, job)  # the ticket was thought void because this worker was slow to start
            return False
        waiting(place)
        if place:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _files(self) -> list[Ticket]:
        """All tickets, void ones too, first in turn first."""
        if not self.folder.is_dir():
            return []
        tickets = []
        for name in os.listdir(self.folder):
            nanoseconds, _, rest = name.partition(".")
            job, _, run = rest.partition(".")
            if nanoseconds.isdecimal() and run:
                tickets.append(Ticket(int(nanoseconds), run, job))
        return sorted(tickets)

    def _counts(self, ticket: Ticket) -> bool:
        """Whether somebody works, or is about to work, on the ticket's job."""
        try:
            run = RunFolder.open(self.root / ticket.run)
        except RunError:
            return False
        try:
            job = read_jobs(run.log).get(ticket.job)
        except OSError:  # a diary that cannot be read must not hold up the other runs
            job = None
        if job is not None and not job.is_open:
            return False
        if run.attended():
            return True
        young = time.time() - ticket.nanoseconds / 1e9 < START_SECONDS
        return young and (job is None or job.state == "queued")
