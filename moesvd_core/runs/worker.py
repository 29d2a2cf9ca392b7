"""The process that does a run's work, in its own session: it outlives the page, the terminal and the server that asked for it.

It does the run's jobs one after the other, each when the queue says so, and tells the diary how far it is. It may be killed at any
instruction: every station stores what it finishes, so the same job asked again goes on from there. For the same reason a worker that
was told to stop and is deep inside one long operation simply ends itself after a few seconds; what waits behind a cancelled job is done
by a worker that it starts in its place.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from moesvd_core import atomic
from moesvd_core.errors import Cancelled, MoesvdError, RunError
from moesvd_core.progress import Progress, Report
from moesvd_core.runs.client import launch
from moesvd_core.runs.faults import translate
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.jobs import INTERRUPTED, Job, read_jobs
from moesvd_core.runs.process import HEARTBEAT_SECONDS, this_process
from moesvd_core.runs.queue import Queue

Action = Callable[[RunFolder, Mapping[str, Any], Report], Mapping[str, Any]]
"""Does one job: (run, arguments, report) -> result, small plain data for the diary."""

STOP_SECONDS = 4.0
"""How long work may take to notice that it should stop, before the process ends itself."""
PROGRESS_SECONDS = 0.25
"""Progress is written to the diary no more often than this."""

log = logging.getLogger(__name__)


def work(run: RunFolder, actions: Callable[[], Mapping[str, Action]] | None = None, watch: Report | None = None) -> list[Job]:
    """Claim the run, do every queued job, and let go of it. Returns the jobs that were done, with the state they ended in.

    Args:
        actions: gives the actions by name; asked only when it is this worker's turn, because importing them takes seconds and memory.
        watch: is told every step as well (the command line's progress bar).

    Returns an empty list when another process is already at work on the run: it will do the jobs.
    """
    if not _claim(run):
        return []
    done: list[Job] = []
    try:
        with _Attendant(run) as attendant, logging_to(run.worker_log):
            while not attendant.closing and (job := _next(run)) is not None:
                attendant.attend(job.id)
                _do(run, job, actions or _all_actions, attendant, watch)
                done.append(read_jobs(run.log)[job.id])
    finally:
        _release(run)  # also when the diary itself cannot be written, as on a full disk
    return done


def _all_actions() -> Mapping[str, Action]:
    from moesvd_core.runs.stages import ACTIONS  # torch and transformers: only once there is something to do

    return ACTIONS


def _claim(run: RunFolder) -> bool:
    """Put this process's name on the run, unless a live one stands there. Jobs that a dead one left running become interrupted."""
    with run.locked():
        if run.worker() is not None:
            return False
        for job in read_jobs(run.log).values():
            if job.state == "running":
                run.log.append("interrupted", job.id, error=INTERRUPTED)
                Queue.of(run).leave(run, job.id)
        run.cancel_file.unlink(missing_ok=True)
        atomic.write_json(run.worker_file, this_process().as_dict())
        run.launched_file.unlink(missing_ok=True)
        return True


def _release(run: RunFolder) -> None:
    """Take this process's name off the run, if it still stands there."""
    with run.locked():
        if run.worker() == this_process():
            run.worker_file.unlink(missing_ok=True)


def _next(run: RunFolder) -> Job | None:
    """The next queued job; when there is none the claim is given up at the same moment, so that no submitted job falls between."""
    with run.locked():
        for job in read_jobs(run.log).values():
            if job.state == "queued":
                return job
        run.worker_file.unlink(missing_ok=True)
        return None


def _do(run: RunFolder, job: Job, actions: Callable[[], Mapping[str, Action]], attendant: "_Attendant", watch: Report | None) -> None:
    """One job, from its turn to its last line in the diary."""
    report = _Reporter(run, job.id, attendant, watch)
    try:
        with Queue.of(run).turn(run, job.id, report.waiting):
            run.log.append("started", job.id)
            result = actions()[job.action](run, job.arguments, report)
        attendant.leave()
        run.log.append("finished", job.id, result=dict(result))
    except Cancelled as error:
        attendant.leave()
        run.log.append("cancelled", job.id, error=str(error))
    except MoesvdError as error:
        attendant.leave()
        run.log.append("failed", job.id, error=str(error), error_kind=type(error).__name__)
    except Exception as error:
        attendant.leave()
        translated = translate(error, run.path)
        log.exception("job %s of %s failed", job.id, run.path.name)
        run.log.append("failed", job.id, error=str(translated), error_kind=type(translated).__name__)


class _Reporter:
    """Passes progress on to the diary, and the wish to stop on to the work."""

    def __init__(self, run: RunFolder, job: str, attendant: "_Attendant", watch: Report | None) -> None:
        self._run, self._job, self._attendant, self._watch = run, job, attendant, watch
        self._stage, self._written, self._place = "", 0.0, 0

    def __call__(self, progress: Progress) -> None:
        self._attendant.check()
        if self._watch is not None:
            self._watch(progress)
        now = time.monotonic()
        if progress.stage == self._stage and progress.done < progress.total and now - self._written < PROGRESS_SECONDS:
            return
        self._stage, self._written = progress.stage, now
        fields = {"stage": progress.stage, "done": progress.done, "total": progress.total, "message": progress.message}
        self._run.log.append("progress", self._job, **fields)

    def waiting(self, place: int) -> None:
        """Called while the job waits for its turn."""
        self._attendant.check()
        if self._watch is not None and place != self._place:
            self._watch(Progress("queue", 0, place, f"{place} jobs ahead"))
        self._place = place


class _Attendant:
    """Keeps the heartbeat, and watches for the wish to stop, while the work itself is busy."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._job = ""
        self._stop_asked = ""
        self._stop_time = 0.0
        self.closing = False
        self._over = threading.Event()
        self._guard = threading.RLock()  # a signal's handler may find its own thread holding it
        self._thread = threading.Thread(target=self._beat, name="attendant", daemon=True)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Attendant":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._signalled)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def attend(self, job: str) -> None:
        """From now on the wish to stop concerns this job; a signal concerns all."""
        with self._guard:
            self._job = job
            if not self.closing:
                self._stop_asked = ""

    def leave(self) -> None:
        """The job's last line is about to be written by the work itself."""
        with self._guard:
            self._job = ""
        self._run.cancel_file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise `Cancelled` when somebody asked to stop."""
        if self._stop_asked:
            raise Cancelled(self._stop_asked)

    def _signalled(self, number: int, _: object) -> None:
        self.closing = True
        if self._stop_asked:  # asked twice: at once
            self._end()
        self._ask(f"stopped by {signal.Signals(number).name}")

    def _ask(self, why: str) -> None:
        self._stop_time = time.monotonic()
        self._stop_asked = why

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS / 4):
            try:
                os.utime(self._run.worker_file)
                if not self._stop_asked and self._run.cancel_file.read_text() == self._job:
                    self._ask("cancelled")
            except FileNotFoundError:
                pass  # nobody asked to stop; or the run has just ended, or was deleted under us
            if self._overdue():
                self._end_or_hand_over()

    def _overdue(self) -> bool:
        """Whether the work was asked to stop and has not noticed in time."""
        return bool(self._stop_asked and self._job) and time.monotonic() - self._stop_time > STOP_SECONDS

    def _end_or_hand_over(self) -> None:
        """End the process, unless the work has stopped by itself at the last moment.

        The run is held meanwhile (before the guard: a signal's handler, whose thread may hold the run, wants the guard alone), so a job
        that is asked for now either finds a worker on the run that will do it, or finds none.
        """
        try:
            with self._run.locked(), self._guard:
                if self._overdue():
                    self._end(hand_over=not self.closing)
        except RunError:  # the run was deleted, or made read-only: nobody waits for it
            self._end()

    def _end(self, hand_over: bool = False) -> NoReturn:
        """End the process in the middle of its work, which is safe, and say so first.

        Args:
            hand_over: start a worker for the jobs that still wait; it finds the run free once this process has gone.
        """
        try:
            with self._guard:
                if self._job:
                    self._run.log.append("cancelled", self._job, error=self._stop_asked)
                    Queue.of(self._run).leave(self._run, self._job)
            self._run.cancel_file.unlink(missing_ok=True)
            if hand_over and any(job.state == "queued" for job in read_jobs(self._run.log).values()):
                launch(self._run)
            self._run.worker_file.unlink(missing_ok=True)
        finally:
            os._exit(130)


class _QuietFile(logging.FileHandler):
    """A log that finds no room is lost in silence: the diary tells what went wrong."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the program's log to a file, and nowhere else, as long as the block lasts."""
    handler = _QuietFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("moesvd_core")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()
