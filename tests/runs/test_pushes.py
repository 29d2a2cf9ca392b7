"""A push goes on without the tab that asked for it, and tells how it ended."""

import threading
from pathlib import Path

import pytest
from run_helpers import until

from moesvd_core.errors import HubError, RunError
from moesvd_core.runs.pushes import Push, Pushes

FOLDER = Path("runs/demo/exports/demo-40")


def ended(pushes: Pushes) -> Push:
    until(lambda: (pushes.state(FOLDER) or Push("")).state != "running")
    state = pushes.state(FOLDER)
    assert state is not None
    assert state.ended is not None
    return state


def test_tells_where_the_commit_is() -> None:
    pushes = Pushes()
    assert pushes.state(FOLDER) is None
    pushes.start(FOLDER, "a/b", lambda: "https://hub/a/b/commit/1")
    state = ended(pushes)
    assert (state.repository, state.state, state.address) == ("a/b", "finished", "https://hub/a/b/commit/1")


def test_tells_why_it_failed_and_can_be_asked_again() -> None:
    def refused() -> str:
        raise HubError("the hub answers 403")

    pushes = Pushes()
    pushes.start(FOLDER, "a/b", refused)
    assert (ended(pushes).state, ended(pushes).error) == ("failed", "the hub answers 403")
    pushes.start(FOLDER, "a/b", lambda: "address")
    assert ended(pushes).state == "finished"


def test_a_fault_of_ours_is_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> str:
        raise KeyError("details")

    pushes = Pushes()
    pushes.start(FOLDER, "a/b", broken)
    assert ended(pushes).error == "the push broke off unexpectedly: the server's log has the details"
    assert "KeyError: 'details'" in caplog.text


def test_one_push_of_a_folder_at_a_time() -> None:
    pushes, gate = Pushes(), threading.Event()

    def slow() -> str:
        assert gate.wait(20)
        return "address"

    pushes.start(FOLDER, "a/b", slow)
    with pytest.raises(RunError, match="is being pushed to a/b"):
        pushes.start(FOLDER, "c/d", lambda: "other")
    gate.set()
    assert ended(pushes).address == "address"
