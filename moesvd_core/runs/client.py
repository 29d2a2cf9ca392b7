"""How pages and the command line ask for work and follow it: submit, status, cancel, resume, wait, tail.

Everything goes through files, so a client may come and go: closing a tab or restarting the server neither stops a run nor loses it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from moesvd_core import atomic
from moesvd_core.checkpoint.staging import discard
from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.deletion import Held, held, remove, require_deletable, set_aside, sweep
from moesvd_core.runs.events import Event
from moesvd_core.runs.exports import export_folder
from moesvd_core.runs.folder import ReadOnlyRunError, RunFolder, list_runs, runs_root
from moesvd_core.runs.jobs import INTERRUPTED, Job, JobState, read_jobs
from moesvd_core.runs.process import name_of
from moesvd_core.runs.queue import START_SECONDS, Queue

ActionName = Literal["analyze", "sensitivity", "similarity", "plan", "measure", "compress", "export", "evaluate"]
ACTION_NAMES: tuple[ActionName, ...] = get_args(ActionName)
Launch = Callable[[RunFolder], None]
"""Starts a worker for a run and returns at once."""
_STOPPED: frozenset[JobState] = frozenset({"cancelled", "interrupted"})
"""States of a job that was ended from outside."""
Who = Callable[[], str]
"""Name of the login on whose behalf this thread asks, "" for whoever sits at the machine, who may do everything."""


@dataclass(frozen=True)
class RunStatus:
    """What a page shows of a run.

    Attributes:
        id: name of its folder, by which lists and addresses know it.
        state: of the latest job; "new" before the first, "damaged" for a folder that cannot be read (see `error`).
        job: the job that runs, else the first that waits, else the latest.
        jobs: all of them, oldest first.
        place: jobs ahead of it in the machine's queue, 0 when it is its turn, None when it does not wait.
        hanging: seconds for which a live worker has given no sign of life, None for one that is well.
        owner: the login that made the run, "" for everybody's.
    """

    id: str
    model: str
    created: str
    state: JobState | Literal["new", "damaged"]
    job: Job | None
    jobs: tuple[Job, ...]
    place: int | None = None
    error: str = ""
    hanging: float | None = None
    owner: str = ""

    @property
    def busy(self) -> bool:
        """Whether something runs or waits."""
        return self.state in ("queued", "running")

    @property
    def analysed(self) -> bool:
        """Whether an analysis has finished."""
        return any(job.action == "analyze" and job.state == "finished" for job in self.jobs)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "id": self.id, "model": self.model, "created": self.created, "state": self.state, "place": self.place, "error": self.error,
            "hanging": self.hanging,
            "job": self.job.as_dict() if self.job else None,
        }


def launch(run: RunFolder) -> None:
    """Start a worker as a process of its own session: no terminal, no parent to die with."""
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}  # idle threads of torch leave the cores to the pages
    with run.worker_log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter, and a path of ours
            [sys.executable, "-m", "moesvd_core", "worker", str(run.path.resolve())],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=environment,
        )
    if (name := name_of(process.pid)) is not None:
        atomic.write_json(run.launched_file, name.as_dict())
    threading.Thread(target=process.wait, name=f"reaper of {process.pid}", daemon=True).start()  # a dead child must not stay as a zombie


def nobody() -> str:
    """No login: whoever sits at the machine."""
    return ""


class Client:
    """Works on the runs in one folder. Safe to share between threads; holds nothing that is not also on disk.

    A run that a login made is changed by that login alone; in a run of nobody, every login stops and resumes its own jobs and nobody's.
    """

    def __init__(self, root: Path | None = None, launch: Launch = launch, who: Who = nobody, remote_code: bool = True) -> None:
        self.root, self._remote_code = root or runs_root(), remote_code
        self._launch = launch
        self._who = who

    def open(self, run: str) -> RunFolder:
        """The folder of a run by its name.

        Raises:
            RunError: no such run.
        """
        return RunFolder.named(self.root, run)

    def submit(self, run: RunFolder, action: str, **arguments: Any) -> Job:
        """Ask for work; it is done by the run's worker, which is started when there is none.

        Raises:
            InputError: no such action.
            RunError: the run belongs to another login, or its model's code is not allowed here.
        """
        self.require_own(run)
        run.require_code_allowed(self._remote_code)
        job = enqueue(run, action, arguments, by=self._who())
        if not run.attended():
            self._launch(run)
        return job

    def owns(self, run: RunFolder) -> bool:
        """Whether whoever asks may change the run."""
        return not self._who() or run.identity.owner in ("", self._who())

    def may_delete(self, owner: str) -> bool:
        """Whether whoever asks may delete runs of this owner: what is everybody's ("") is no login's to take from the others."""
        return not self._who() or owner == self._who()

    def require_own(self, run: RunFolder) -> None:
        """Refuse whoever may look at the run only.

        Raises:
            RunError: the run belongs to another login.
        """
        if not self.owns(run):
            raise RunError(
                f"run {run.name} belongs to {run.identity.owner}, who alone changes it: "
                "analyse the model with another seed to have a run of your own"
            )

    def status(self, run: RunFolder) -> RunStatus:
        """Where the run stands. A job whose worker has died is marked interrupted here, and told to be where nothing can be written."""
        with suppress(ReadOnlyRunError, OSError):
            _mark_interrupted(run)
        jobs = tuple(_interrupted(job) if _abandoned(run, job) else job for job in read_jobs(run.log).values())
        identity = run.identity
        if not jobs:
            return RunStatus(run.name, identity.model, identity.created, "new", None, (), owner=identity.owner)
        open_jobs = [job for job in jobs if job.is_open]
        job = next((job for job in open_jobs if job.state == "running"), open_jobs[0] if open_jobs else jobs[-1])
        place = Queue.of(run).place(run, job.id) if job.state == "queued" else None
        hanging = run.hanging()
        return RunStatus(run.name, identity.model, identity.created, job.state, job, jobs, place, hanging=hanging, owner=identity.owner)

    def runs(self) -> list[RunStatus]:
        """All runs, newest first; damaged ones too, and those that cannot be read, with the reason."""
        return [_damaged(run) if isinstance(run, RunError) else self._listed(run) for run in list_runs(self.root)]

    def _listed(self, run: RunFolder) -> RunStatus:
        """Where a run stands; one that cannot be read does not take the others from the list."""
        try:
            return self.status(run)
        except RunError as error:
            return _damaged(error)
        except OSError as error:
            return _damaged(RunError(f"run {run.name} cannot be read ({error.strerror}): give yourself the right to read {run.path}"))

    def queue(self) -> list[RunStatus]:
        """Runs with a job that runs or waits, in the order of their turns."""
        order: list[RunStatus] = []
        for ticket in Queue(self.root).tickets():
            if ticket.run not in [status.id for status in order]:
                with suppress(RunError, OSError):  # deleted since, or not to be read: its turn concerns nobody here
                    order.append(self.status(RunFolder.open(self.root / ticket.run)))
        return order

    def cancel(self, run: RunFolder) -> None:
        """Ask the run's work to stop; what was finished is kept. Takes effect within seconds (`status` tells when).

        Raises:
            RunError: nothing runs or waits, or what does belongs to another login.
        """
        self.require_own(run)
        with run.locked():
            open_jobs = [job for job in read_jobs(run.log).values() if job.is_open]
            if not open_jobs:
                raise RunError(f"run {run.name} has nothing to cancel: no job runs or waits")
            own = [job for job in open_jobs if self._asked(job)]
            if not own:
                raise RunError(f"{open_jobs[0].by} asked for the {open_jobs[0].action} of run {run.name} and alone can cancel it")
            current, worker = open_jobs[0], run.worker()
            if worker is not None and current in own and run.hanging() is not None:
                os.kill(worker.pid, signal.SIGKILL)  # it cannot read that it should stop, and nothing is lost
                worker = None
            for job in own:
                if job is not current or worker is None:
                    run.log.append("cancelled", job.id, error="cancelled")
                    Queue.of(run).leave(run, job.id)
            if worker is not None and current in own:
                atomic.write_text(run.cancel_file, current.id)
            elif worker is None and any(job.state == "queued" for job in open_jobs if job not in own):
                self._launch(run)  # for those behind it, of others

    def resume(self, run: RunFolder) -> list[Job]:
        """Ask again for the latest job unless it finished, and for those that were stopped together with it. Finished work is not redone.

        Raises:
            RunError: there is nothing to resume, or it belongs to another login.
        """
        self.require_own(run)
        status = self.status(run)
        again = [job for job in _unfinished(status.jobs) if self._asked(job)]
        if status.busy or not again:
            raise RunError(f"run {status.id} has nothing to resume: it is {status.state}")
        return [self.submit(run, job.action, **job.arguments) for job in again]

    def _asked(self, job: Job) -> bool:
        """Whether whoever asks now may also stop or resume this job."""
        return not self._who() or job.by in ("", self._who())

    def wait(self, run: RunFolder, job: str, seconds: float = float("inf")) -> Job:
        """Wait until a job has ended.

        Raises:
            RunError: no such job, or it has not ended in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = next((each for each in self.status(run).jobs if each.id == job), None)
            if found is None:
                raise RunError(f"run {run.name} has no job {job!r}")
            if not found.is_open:
                return found
            if time.monotonic() > deadline:
                raise RunError(f"job {job} of run {run.name} is still {found.state} after {seconds:g} s")
            time.sleep(0.1)

    def tail(self, run: RunFolder, after: int = 0) -> Iterator[tuple[Event, int]]:
        """Events behind byte `after` as they come, each with the position to go on from, until nothing runs or waits."""
        while True:
            busy = self.status(run).busy
            events, after = run.log.read(after)
            yield from ((event, after) for event in events)
            if not busy:
                return
            time.sleep(0.1)

    def require_deletable(self, run: RunFolder) -> None:
        """Refuse what `delete` would refuse, before a person is asked whether they mean it.

        Raises:
            RunError: a job runs or waits; the run belongs to another login or to everybody, comes with the program, or is read-only.
        """
        self._require_deletable(run)
        _require_ended(run)

    def delete(self, run: RunFolder) -> Held:
        """Remove a run and everything in it; returns what it held.

        Raises:
            RunError: as `require_deletable`; or something in it could not be removed.
        """
        self.require_deletable(run)
        sweep(run.path.resolve().parent)
        with run.locked():
            _require_ended(run)  # again: work may have been asked for meanwhile
            gone, aside = held(run), set_aside(run)
        remove(run, aside)
        return gone

    def require_deletable_export(self, run: RunFolder, name: str) -> None:
        """Refuse what `delete_export` would refuse, before a person is asked whether they mean it.

        Raises:
            RunError: no such export, or one that is being written; or the run is another login's, everybody's, or read-only.
        """
        self._require_deletable(run)
        _require_written(run, export_folder(run, name))

    def delete_export(self, run: RunFolder, name: str) -> None:
        """Remove one export of a run; everything else of the run stays.

        Raises:
            RunError: as `require_deletable_export`.
            ResourceError: it could not be removed.
        """
        self.require_deletable_export(run, name)
        with run.locked():
            folder = export_folder(run, name)
            _require_written(run, folder)  # again: it may have been asked for meanwhile
            discard(folder)

    def _require_deletable(self, run: RunFolder) -> None:
        self.require_own(run)
        if not self.may_delete(run.identity.owner):
            raise RunError(f"run {run.name} is everybody's, and no login deletes from it: whoever sits at the machine does")
        require_deletable(run)
        _mark_interrupted(run)


def enqueue(run: RunFolder, action: str, arguments: Mapping[str, Any], by: str = "") -> Job:
    """Write a job into the run's diary and the machine's queue; it is done once a worker looks.

    Args:
        by: the login that asks, "" for none.

    Raises:
        InputError: no such action.
    """
    if action not in ACTION_NAMES:
        raise InputError(f"no action {action!r}: there are {', '.join(ACTION_NAMES)}")
    _mark_interrupted(run)  # a job that waited for a worker which never came is not done unasked
    with run.locked():
        number = str(len(read_jobs(run.log)) + 1)
        Queue.of(run).join(run, number)
        run.log.append("submitted", number, action=action, arguments=dict(arguments), **({"by": by} if by else {}))
        return read_jobs(run.log)[number]


def _require_ended(run: RunFolder) -> None:
    """Refuse a run that somebody works on, or is about to.

    Raises:
        RunError: a job runs or waits.
    """
    if run.worker() is not None or any(job.is_open for job in read_jobs(run.log).values()):
        raise RunError(f"run {run.name} is at work: cancel it before it is deleted")


def _require_written(run: RunFolder, export: Path) -> None:
    """Refuse an export that a job of the run writes anew, or is about to.

    Raises:
        RunError: one does.
    """
    for job in read_jobs(run.log).values():
        if job.is_open and job.arguments.get("output") == str(export.absolute()):
            raise RunError(f"{export.name} is being written anew: wait for it, or cancel it")


def _damaged(error: RunError) -> RunStatus:
    """A run of which no more is known than what is wrong with it."""
    return RunStatus("", "", "", "damaged", None, (), error=str(error))


def _unfinished(jobs: tuple[Job, ...]) -> list[Job]:
    """What `resume` asks for again: the latest job unless it finished, and what was stopped together with it, in their order."""
    latest = jobs[-1:]
    if latest and latest[0].state in _STOPPED:
        return [job for job in jobs if job.state in _STOPPED and _overlap(job, latest[0])]
    return [job for job in latest if job.state == "failed"]


def _overlap(one: Job, other: Job) -> bool:
    """Whether two jobs that have ended were open at once: neither began, or was asked for if it never began, after the other's end."""
    return all((first.ended or 0.0) >= (then.started or then.submitted) for first, then in ((one, other), (other, one)))


def _interrupted(job: Job) -> Job:
    """A job whose worker has died, of which nothing can be written down."""
    return replace(job, state="interrupted", error=INTERRUPTED, ended=job.updated or job.submitted)


def _mark_interrupted(run: RunFolder) -> None:
    """Write down that the worker has died, if it has.

    Raises:
        ReadOnlyRunError, OSError: it has, and that cannot be written down.
    """
    if not any(_abandoned(run, job) for job in read_jobs(run.log).values()):
        return
    with run.locked():  # look again: another client may have been faster, or a worker may have come
        for job in read_jobs(run.log).values():
            if _abandoned(run, job):
                run.log.append("interrupted", job.id, error=INTERRUPTED)
                Queue.of(run).leave(run, job.id)


def _abandoned(run: RunFolder, job: Job) -> bool:
    """Whether a job waits for a worker that does not come, or was left by one that died."""
    if not job.is_open or run.worker() is not None:
        return False
    return job.state == "running" or (not run.attended() and time.time() - job.submitted > START_SECONDS)
