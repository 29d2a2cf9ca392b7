"""Whose is a run, and whose a job: logins work beside each other and not against each other."""

from pathlib import Path

import pytest
from fake_worker import ACTIONS
from run_helpers import launch_fake, new_run, until
from tiny_models import save_tiny
from tiny_runs import CALIBRATION

from moesvd_core.errors import RunError
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import Identity, RunFolder
from moesvd_core.runs.source import prepare
from moesvd_core.runs.worker import work


def as_login(root: Path, name: str) -> Client:
    return Client(root, launch=lambda run: None, who=lambda: name)


@pytest.fixture
def ann(tmp_path: Path) -> Client:
    return as_login(tmp_path, "ann")


@pytest.fixture
def bob(tmp_path: Path) -> Client:
    return as_login(tmp_path, "bob")


def test_the_login_that_makes_a_run_owns_it(tmp_path: Path) -> None:
    model = str(save_tiny("mixtral", tmp_path / "model"))
    run = prepare(model, CALIBRATION, root=tmp_path, owner="ann")
    assert RunFolder.open(run.path).identity.owner == "ann"
    assert prepare(model, CALIBRATION, root=tmp_path, owner="bob").identity.owner == "ann", "the same run is found, not taken"


def test_a_run_of_another_login_can_be_seen_and_not_changed(ann: Client, bob: Client) -> None:
    run = RunFolder.create(ann.root / "her-1", Identity("her-1", "tiny", {}, "2026-01-01T00:00:00+00:00", owner="ann"))
    ann.submit(run, "analyze", to=1)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert bob.status(run).state == "queued"
    for change in (lambda: bob.submit(run, "analyze", to=1), lambda: bob.cancel(run), lambda: bob.resume(run), lambda: bob.delete(run)):
        with pytest.raises(RunError, match="belongs to ann, who alone changes it"):
            change()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    ann.cancel(run)
    assert [job.state for job in ann.status(run).jobs] == ["cancelled"]


def test_whoever_sits_at_the_machine_changes_everything(ann: Client) -> None:
    run = RunFolder.create(ann.root / "her-1", Identity("her-1", "tiny", {}, "2026-01-01T00:00:00+00:00", owner="ann"))
    ann.submit(run, "analyze", to=1)
    Client(ann.root).cancel(run)
    assert ann.status(run).state == "cancelled"


def test_in_a_run_of_nobody_everyone_cancels_their_own_jobs(ann: Client, bob: Client) -> None:
    run = new_run(ann.root)
    ann.submit(run, "analyze", to=1)
    with pytest.raises(RunError, match="ann asked for the analyze"):
        bob.cancel(run)
    bob.submit(run, "evaluate", how="input")
    bob.cancel(run)
    assert [(job.by, job.state) for job in ann.status(run).jobs] == [("ann", "queued"), ("bob", "cancelled")]
    ann.cancel(run)
    assert [(job.by, job.state) for job in ann.status(run).jobs] == [("ann", "cancelled"), ("bob", "cancelled")]


def test_cancelling_a_waiting_job_leaves_the_one_of_another_at_work(tmp_path: Path) -> None:
    ann, bob = Client(tmp_path, launch_fake, who=lambda: "ann"), as_login(tmp_path, "bob")
    run = new_run(tmp_path)
    job = ann.submit(run, "analyze", to=8, pause=0.1)
    until(lambda: ann.status(run).state == "running")
    bob.submit(run, "analyze", to=1)
    bob.cancel(run)
    assert ann.wait(run, job.id, 20).state == "finished"
    assert [each.state for each in ann.status(run).jobs] == ["finished", "cancelled"]


def test_only_own_jobs_are_resumed_and_keep_their_name(ann: Client, bob: Client) -> None:
    run = new_run(ann.root)
    ann.submit(run, "evaluate", how="input")
    [failed] = work(run, lambda: ACTIONS)
    assert failed.state == "failed"
    with pytest.raises(RunError, match="nothing to resume"):
        bob.resume(run)
    [again] = ann.resume(run)
    assert again.by == "ann"
