"""One folder holds everything about one model under one calibration: what was asked, what was found, what was made.

    run.json        what the run is about: model, calibration; written once
    source.json     the model's files as they were found: folder, fingerprint, facts; written once
    events.jsonl    the diary (see `events`)
    worker.json     who works on it now; touched as a heartbeat (launched.json: who is about to)
    recipe.yaml     the last recipe
    votes.jsonl     which answers people preferred without knowing whose they were (see `votes`)
    statistics/ curves/ factors/ plans/ evaluations/ exports/   what each station of the pipeline left
    work/           hidden states and logs: may be deleted when nothing runs

A run's id is made of the model and the calibration, and names its folder unless another one is asked for, so that asking the same again
finds the statistics that are already there. Whoever lists, links or opens a run does so by its folder's name.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesvd_core import atomic
from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.events import EventLog
from moesvd_core.runs.process import HANGING_SECONDS, ProcessName, is_alive

FORMAT = 1
"""Version of the layout; a run of another version is refused, not guessed at."""
ROOT_VARIABLE = "MOESVD_RUNS"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
WORKER_LOG = Path("work", "worker.log")
"""In a run's folder."""
STATIONS = ("statistics", "curves", "factors", "plans", "evaluations", "exports", "work")


@dataclass(frozen=True)
class Identity:
    """Content of run.json: what a run is about, fixed when it is made.

    Attributes:
        model: hub id or folder, as it was asked for (folders absolute, unless they lie under the current folder).
        calibration: fields of `Calibration`.
        created: UTC time, ISO 8601.
        remote_code: whether the person allowed code that comes with the model.
        owner: the login that made the run, who alone changes it; "" where nobody logged in: everybody's.
    """

    id: str
    model: str
    calibration: Mapping[str, Any]
    created: str
    remote_code: bool = False
    format: int = FORMAT
    owner: str = ""


def _is_empty_station(path: Path) -> bool:
    """Whether a folder is what making a run leaves that was killed before it was one."""
    return path.name in STATIONS and path.is_dir() and not any(path.iterdir())


def runs_root() -> Path:
    """Where runs lie unless said otherwise: `$MOESVD_RUNS`, else ./runs."""
    return Path(os.environ.get(ROOT_VARIABLE) or "runs")


def run_id(model: str, fingerprint: str, calibration: Mapping[str, Any]) -> str:
    """Readable name of the model, then eight digits that stand for its content and the calibration.

    Args:
        fingerprint: of the model's files, and of a text file that it is calibrated on.
    """
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.")[:60] or "model"
    digest = hashlib.sha256(f"{fingerprint}\n{json.dumps(dict(calibration), sort_keys=True)}".encode()).hexdigest()
    return f"{name}-{digest[:8]}"


def is_run_id(text: str) -> bool:
    """Whether a run's folder can be chosen by this name; one that comes from a URL is no path out of the folder of runs."""
    return _ID.fullmatch(text) is not None


class ReadOnlyRunError(RunError):
    """A run that can be looked at and not changed: its folder belongs to another user, or the disk is read-only."""


class RunFolder:
    """A run on disk; makes no claim on it (that is the worker's part)."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = Path(os.path.abspath(path))  # "." has no name, by which runs are called, and wait in the queue
        self.identity = identity
        self.log = EventLog(self.path / "events.jsonl")

    @property
    def name(self) -> str:
        """By which lists, links and addresses know the run: its folder's, which is its id unless another folder was asked for."""
        return self.path.name

    @classmethod
    def create(cls, path: Path, identity: Identity) -> "RunFolder":
        """Make the folder, or open it when the same run is already there.

        Raises:
            RunError: the folder holds another run, or something that is not a run; or it cannot be made.
        """
        if (path / "run.json").exists():
            run = cls.open(path)
            if run.identity.id != identity.id:
                held = run.identity
                raise RunError(f"{path} holds run {held.id} of {held.model} with calibration {dict(held.calibration)}: name another folder")
            return run
        if path.is_dir() and not all(_is_empty_station(each) for each in path.iterdir()):
            raise RunError(f"{path} is not empty and holds no run: name an empty or a new folder")
        try:
            for station in STATIONS:
                (path / station).mkdir(parents=True, exist_ok=True)
            atomic.write_json(path / "run.json", asdict(identity))
        except OSError as error:
            raise RunError(f"run folder {path} cannot be made ({error.strerror}): name another folder") from error
        return cls(path, identity)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            RunError: there is no run, its run.json is damaged or cannot be read, or another version of this program made it.
        """
        try:
            fields = json.loads((path / "run.json").read_text(encoding="utf-8"))
            identity = Identity(**fields)
        except FileNotFoundError:
            raise RunError(f"no run in {path}: run.json is missing") from None
        except OSError as error:
            raise RunError(f"{path / 'run.json'} cannot be read ({error.strerror}): give yourself the right to read it") from error
        except (ValueError, TypeError) as error:
            raise RunError(f"{path / 'run.json'} is damaged ({error}): restore it, or remove the folder") from None
        if identity.format != FORMAT:
            raise RunError(f"{path} has format {identity.format}, this version reads {FORMAT}: analyze the model again")
        return cls(path, identity)

    def require_code_allowed(self, allowed: bool) -> None:
        """Refuse a model with code of its own where none may be run, whatever run.json says: anybody may have written that.

        Raises:
            RunError: it is one.
        """
        if self.identity.remote_code and not allowed:
            raise RunError(
                f"the model of run {self.name} brings code of its own, which is not run unasked: "
                "say --allow-remote-code (to a server, when it is started) if you trust the model"
            )

    @classmethod
    def named(cls, root: Path, run: str) -> "RunFolder":
        """Open a run by its folder's name, which may come from a URL: nothing outside `root` can be reached.

        Raises:
            RunError: no such run.
        """
        if not is_run_id(run) or (root / run).is_symlink():
            raise RunError(f"no run {run!r}: the name of a run's folder consists of letters, digits, dots, dashes and underscores")
        return cls.open(root / run)

    def station(self, name: str) -> Path:
        """Folder of one station, made when it is missing.

        Raises:
            InputError: no such station.
        """
        if name not in STATIONS:
            raise InputError(f"no station {name!r} in a run: there are {', '.join(STATIONS)}")
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def read_json(self, *parts: str) -> Any | None:
        """A JSON file of the run, or None when it is not there.

        Raises:
            RunError: the file is damaged.
        """
        path = self.path.joinpath(*parts)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}): delete it, it will be made again") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for a moment: between looking at who works on it and changing that. Not for the length of a job.

        Raises:
            ReadOnlyRunError: nothing can be changed in it.
            RunError: somebody else has deleted the run meanwhile.
        """
        gone = f"run {self.name} is not here any more: it was deleted"
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            raise RunError(gone) from None
        except OSError as error:
            fix = "give yourself the right to write there, or work on a copy"
            raise ReadOnlyRunError(f"run {self.name} cannot be changed: {self.path} is read-only ({error.strerror}); {fix}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not (self.path / "run.json").exists():
                raise RunError(gone)
            yield
        finally:
            os.close(descriptor)

    @property
    def worker_file(self) -> Path:
        """Who works on the run; its time of change is the heartbeat."""
        return self.path / "worker.json"

    @property
    def worker_log(self) -> Path:
        """What workers say that is for nobody but who looks for a fault."""
        return self.station(WORKER_LOG.parent.name) / WORKER_LOG.name

    @property
    def cancel_file(self) -> Path:
        """Holds the id of the job that is to stop."""
        return self.path / "cancel"

    @property
    def launched_file(self) -> Path:
        """A worker that was launched and has not claimed the run yet: on a busy machine that takes seconds."""
        return self.path / "launched.json"

    def worker(self) -> ProcessName | None:
        """The live process that works on this run, or None."""
        return _live(self.worker_file)

    def hanging(self) -> float | None:
        """Seconds for which a live worker has given no sign of life, None for one that is well, or where there is none."""
        worker = self.worker()
        try:
            silent = time.time() - self.worker_file.stat().st_mtime
        except FileNotFoundError:
            return None
        return silent if worker is not None and silent > HANGING_SECONDS else None

    def attended(self) -> bool:
        """Whether somebody works on this run, or is about to."""
        return self.worker() is not None or _live(self.launched_file) is not None


def _live(file: Path) -> ProcessName | None:
    """The process that a file names, if it is alive."""
    try:
        heartbeat = file.stat().st_mtime
        name = ProcessName(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return name if is_alive(name, heartbeat) else None


def list_runs(root: Path) -> list[RunFolder | RunError]:
    """Runs under `root`, newest first; a run that cannot be opened by its name is listed as the error that says why."""
    found: list[tuple[str, RunFolder | RunError]] = []
    if not root.is_dir():
        return []
    for path in sorted(root.iterdir()):
        if path.is_symlink() or path.name.startswith(".") or not _may_be_run(path):
            continue
        try:
            run = RunFolder.named(root, path.name)
            found.append((run.identity.created, run))
        except RunError as error:
            found.append(("", error))
    return [run for _, run in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _may_be_run(path: Path) -> bool:
    """Whether a folder holds a run, or is named like one and cannot be looked into."""
    try:
        return (path / "run.json").exists()
    except OSError:
        return is_run_id(path.name)


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
