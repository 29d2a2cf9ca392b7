"""What resuming asks for again: what was stopped last, all of it, and nothing that is older."""

from pathlib import Path

import pytest
from run_helpers import new_run

from moesvd_core import atomic
from moesvd_core.errors import RunError
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import RunFolder


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path, launch=lambda run: None)


def diary(run: RunFolder, *events: tuple[float, str, str]) -> None:
    """Events (seconds, kind, job); a job counts to its number."""
    for time, kind, job in events:
        more = {"action": "analyze", "arguments": {"to": int(job)}} if kind == "submitted" else {}
        atomic.append_json(run.log.path, {"time": time, "kind": kind, "job": job, **more})


def resumed(client: Client, run: RunFolder) -> list[int]:
    """What is asked for again, by what it counts to."""
    return [job.arguments["to"] for job in client.resume(run)]


def test_all_jobs_that_were_cancelled_together_go_on_in_their_order(client: Client) -> None:
    run = new_run(client.root)
    for to in (1, 2, 3):
        client.submit(run, "analyze", to=to)
    client.cancel(run)
    assert resumed(client, run) == [1, 2, 3]


def test_a_job_at_work_that_takes_seconds_to_stop_was_cancelled_with_those_that_waited(client: Client) -> None:
    run = new_run(client.root)
    diary(run, (1, "submitted", "1"), (2, "started", "1"), (3, "submitted", "2"), (9, "cancelled", "2"), (13, "cancelled", "1"))
    assert resumed(client, run) == [1, 2]


def test_all_jobs_that_were_interrupted_together_go_on(client: Client) -> None:
    run = new_run(client.root)
    diary(run, (1, "submitted", "1"), (2, "started", "1"), (3, "submitted", "2"), (9, "interrupted", "1"), (20, "interrupted", "2"))
    assert resumed(client, run) == [1, 2]


@pytest.mark.parametrize("how", ["interrupted", "cancelled", "failed"])
def test_what_ended_before_a_later_job_was_asked_for_stays_as_it_is(client: Client, how: str) -> None:
    run = new_run(client.root)
    diary(run, (1, "submitted", "1"), (2, "started", "1"), (3, how, "1"), (4, "submitted", "2"), (5, "started", "2"), (6, "cancelled", "2"))
    assert resumed(client, run) == [2]


def test_what_was_cancelled_alone_does_not_go_on_with_a_job_that_went_on_then(client: Client) -> None:
    run = new_run(client.root)
    diary(
        run, (1, "submitted", "1"), (2, "started", "1"), (3, "submitted", "2"), (4, "cancelled", "1"), (5, "started", "2"),
        (6, "interrupted", "2"),
    )
    assert resumed(client, run) == [2]


def test_an_interrupted_job_is_not_dug_up_once_a_later_one_has_finished(client: Client) -> None:
    run = new_run(client.root)
    diary(run, (1, "submitted", "1"), (2, "started", "1"), (3, "interrupted", "1"))
    diary(run, (4, "submitted", "2"), (5, "started", "2"), (6, "finished", "2"))
    with pytest.raises(RunError, match="nothing to resume: it is finished"):
        client.resume(run)
    diary(run, (7, "submitted", "3"), (8, "started", "3"), (9, "failed", "3"))
    assert resumed(client, run) == [3]


def test_a_run_that_was_asked_for_nothing_has_nothing_to_resume(client: Client) -> None:
    with pytest.raises(RunError, match="nothing to resume: it is new"):
        client.resume(new_run(client.root))
