"""Deleting a run: what it holds is told beforehand, and what must stay is refused before anything is touched."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from run_exports import add_export
from run_helpers import new_run

from moesvd_core import atomic
from moesvd_core.errors import RunError
from moesvd_core.runs import deletion
from moesvd_core.runs.client import Client
from moesvd_core.runs.deletion import Held, held, sweep
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.process import this_process
from moesvd_core.runs.votes import Vote, add_vote

SHIPPED_RUN = Path(__file__).parents[2] / "assets" / "demo-run"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path, launch=lambda run: None)


def test_what_a_run_holds_is_counted(client: Client) -> None:
    run = new_run(client.root)
    (run.path / "statistics" / "layer").write_bytes(b"1234567")
    (run.path / "work" / "link").symlink_to(Path(__file__))
    written = sum(map(len, files(run.path).values())) - Path(__file__).stat().st_size
    link = (run.path / "work" / "link").lstat().st_size
    assert held(run) == Held(written + link, 0, 0)
    assert held(run).counted == []
    add_export(run)
    for _ in range(2):
        add_vote(run, Vote("auto", 0.4, "neither", "original", "Why?", "a", "b", {}))
    assert held(run).exports == 1
    assert held(run).counted == ["1 export", "2 votes"]


def test_a_deleted_run_is_gone_with_all_it_held_and_nothing_else(client: Client, tmp_path: Path) -> None:
    run, other = new_run(client.root), new_run(client.root, "tiny-00000002")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (run.path / "exports" / "link").symlink_to(outside)
    expected, before = held(run), files(other.path)
    assert client.delete(run) == expected
    assert not run.path.exists()
    assert [status.id for status in client.runs()] == [other.name]
    assert (files(other.path), (outside / "kept").read_text()) == (before, "kept")


def test_a_run_of_a_dead_worker_can_be_deleted(client: Client) -> None:
    """Its job is not at work any more, whether or not anybody has looked since."""
    run = new_run(client.root)
    run.log.append("submitted", "1", action="analyze", arguments={})
    run.log.append("started", "1")
    client.delete(run)
    assert client.runs() == []


def test_a_run_at_work_is_refused_by_the_question_too(client: Client) -> None:
    run = new_run(client.root)
    atomic.write_json(run.worker_file, this_process().as_dict())
    before = files(run.path)
    for refused in (client.require_deletable, client.delete):
        with pytest.raises(RunError, match="run tiny-00000001 is at work: cancel it before it is deleted"):
            refused(run)
    run.worker_file.unlink()
    client.submit(run, "analyze")
    with pytest.raises(RunError, match="is at work"):
        client.delete(run)
    assert before.keys() - {run.worker_file} <= files(run.path).keys()


def test_the_run_that_comes_with_the_program_stays(client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped = RunFolder.open(SHIPPED_RUN)
    with pytest.raises(RunError, match="comes with the program"):  # asks only: nothing is at stake should it be forgotten
        Client(SHIPPED_RUN.parent).require_deletable(shipped)
    copy = tmp_path / "assets" / "demo-run"
    shutil.copytree(SHIPPED_RUN, copy)
    monkeypatch.setattr(deletion, "SHIPPED", tmp_path / "assets")
    before = files(copy)
    (tmp_path / "way-in").symlink_to(copy)
    for way in (copy, tmp_path / "way-in"):
        with pytest.raises(RunError, match="comes with the program"):
            Client(way.parent).delete(RunFolder.open(way))
    assert files(copy) == before
    mine = tmp_path / "runs" / "demo-run"
    shutil.copytree(SHIPPED_RUN, mine)
    Client(mine.parent).delete(RunFolder.open(mine))
    assert not mine.exists()


def test_a_link_is_not_followed(client: Client, tmp_path: Path) -> None:
    run = new_run(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(run.path)
    with pytest.raises(RunError, match=r"is a link: name the folder that it leads to, .*/elsewhere/tiny-00000001"):
        client.delete(RunFolder.open(tmp_path / "link"))
    assert RunFolder.open(run.path).identity == run.identity


def test_a_run_on_a_disk_for_reading_only_is_refused_whole(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(client.root)
    before = files(run.path)
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != run.path)  # root may write anywhere
    with pytest.raises(RunError, match="read-only for you"):
        client.delete(run)
    assert files(run.path) == before


def test_what_cannot_be_removed_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_of_trouble(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    run = new_run(client.root)
    monkeypatch.setattr(shutil, "rmtree", full_of_trouble)
    with pytest.raises(RunError, match=r"tiny-00000001 could not be emptied \(Permission denied\): remove that folder"):
        client.delete(run)
    assert client.runs() == []


def test_whoever_comes_too_late_is_told(client: Client) -> None:
    """Two tabs delete, or one asks for work while the other deletes: the second waits for the lock of a folder that is gone then."""
    run = new_run(client.root)
    said: list[str] = []

    def late() -> None:
        try:
            client.submit(run, "analyze")
        except RunError as error:
            said.append(str(error))

    with run.locked():
        waiting = threading.Thread(target=late)
        waiting.start()
        (run.path / "run.json").unlink()
    waiting.join(10)
    shutil.rmtree(run.path)
    late()
    assert said == ["run tiny-00000001 is not here any more: it was deleted"] * 2
    assert not run.path.exists()


def test_a_deletion_that_is_interrupted_leaves_no_half_of_a_run(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same analysis can begin anew at once, and what is left goes with the next deletion."""
    run, other = new_run(client.root), new_run(client.root, "tiny-00000002")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            client.delete(run)
    assert not run.path.exists()
    assert [status.id for status in client.runs()] == [other.name]
    [left] = client.root.glob(".deleted.*")
    assert (left / "run.json").exists(), "nothing was taken out of it under its name"
    again = RunFolder.create(run.path, run.identity)
    client.delete(other)
    assert [path.name for path in client.root.iterdir() if path.name.startswith(".deleted")] == []
    assert files(again.path).keys() == {again.path / "run.json"}


def test_a_run_that_cannot_be_renamed_stays_whole(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(client.root)
    before = files(run.path)

    def refuse(path: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match=r"cannot be deleted: .* cannot be renamed \(Device or resource busy\)"):
        client.delete(run)
    assert before.items() <= files(run.path).items()


def test_sweeping_takes_what_deletions_left_and_nothing_of_anybody_s(tmp_path: Path) -> None:
    for name in (".deleted.1764000000000000000.tiny-00000001", ".deleted.notes", ".deleted.1764000000000000000.", "deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / ".deleted.1764000000000000000.link").symlink_to(outside)
    sweep(tmp_path)
    kept = [".deleted.1764000000000000000.", ".deleted.1764000000000000000.link", ".deleted.notes", "deleted", "outside"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
