"""A run that cannot be written to, or not even read, is told of, and the others are there as ever."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from run_helpers import new_run

from moesvd_core.errors import RunError
from moesvd_core.runs.client import Client
from moesvd_core.runs.events import EventLog
from moesvd_core.runs.folder import ReadOnlyRunError, RunFolder, list_runs


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path, launch=lambda run: None)


@pytest.fixture
def left(client: Client) -> RunFolder:
    """A run whose worker died at work, beside another one."""
    new_run(client.root, "other-00000002")
    run = new_run(client.root)
    run.log.append("submitted", "1", action="analyze", arguments={})
    run.log.append("started", "1")
    return run


def refused(monkeypatch: pytest.MonkeyPatch, place: Path, number: int, writing: bool) -> None:
    """Let the system refuse files in a folder; root may do everything."""
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if Path(path).is_relative_to(place) and (not writing or flags & (os.O_WRONLY | os.O_RDWR)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_dead_worker_s_job_is_told_to_be_interrupted_where_that_cannot_be_written(
    client: Client, left: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = left.log.path.read_bytes()
    refused(monkeypatch, left.path, number, writing=True)
    status = client.status(left)
    assert (status.state, [job.state for job in status.jobs]) == ("interrupted", ["interrupted"])
    assert "resume to go on" in status.jobs[0].error
    assert sorted((each.id, each.state) for each in client.runs()) == [("other-00000002", "new"), (left.name, "interrupted")]
    assert left.log.path.read_bytes() == before
    for change in (lambda: client.submit(left, "analyze"), lambda: client.resume(left), lambda: client.cancel(left)):
        with pytest.raises(ReadOnlyRunError, match=r"run tiny-00000001 cannot be changed: .* is read-only \(.*\); give yourself the right"):
            change()


def test_a_full_disk_does_not_hide_that_a_worker_has_died(client: Client, left: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EventLog, "append", full)
    assert client.status(left).state == "interrupted"


def test_a_diary_that_cannot_be_read_makes_one_damaged_row(client: Client, left: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    read = EventLog.read

    def refuse(log: EventLog, after: int = 0) -> Any:
        if log.path.is_relative_to(left.path):
            raise PermissionError(errno.EACCES, "Permission denied", str(log.path))
        return read(log, after)

    monkeypatch.setattr(EventLog, "read", refuse)
    rows = sorted((each.id, each.state, each.error) for each in client.runs())
    told = f"run {left.name} cannot be read (Permission denied): give yourself the right to read {left.path}"
    assert rows == [("", "damaged", told), ("other-00000002", "new", "")]


def test_a_folder_that_cannot_be_looked_into_is_listed_where_it_is_named_like_a_run(
    client: Client, left: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (client.root / "lost+found").mkdir()
    closed = (left.path, client.root / "lost+found")
    exists, read_text = Path.exists, Path.read_text

    def looked(path: Path) -> bool:
        if path.parent in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path)

    def opened(path: Path, *more: Any, **named: Any) -> str:
        if path.parent in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *more, **named)

    monkeypatch.setattr(Path, "exists", looked)
    monkeypatch.setattr(Path, "read_text", opened)
    good, error = list_runs(client.root)
    assert isinstance(good, RunFolder) and good.name == "other-00000002"
    assert isinstance(error, RunError) and str(error).startswith(f"{left.path / 'run.json'} cannot be read (Permission denied)")
    assert [each.state for each in client.runs()] == ["new", "damaged"]


def test_a_run_that_goes_while_the_list_is_made_takes_no_other_from_it(
    client: Client, left: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = list_runs(client.root)
    monkeypatch.setattr("moesvd_core.runs.client.list_runs", lambda root: listed)
    (left.path / "run.json").unlink()
    assert sorted((each.id, each.state) for each in client.runs()) == [("", "damaged"), ("other-00000002", "new")]


def test_a_dead_worker_s_ticket_that_cannot_be_removed_holds_nobody_up(
    client: Client, left: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (client.root / ".queue").mkdir()
    (client.root / ".queue" / f"{1:020d}.1.{left.name}").touch()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert client.queue() == []
