"""What the page says about a run's work."""

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from runs.run_helpers import new_run

from moesvd_core.runs.client import ACTION_NAMES, Client
from moesvd_core.runs.folder import Identity, RunFolder
from pages.components import header
from pages.components.context import Context
from pages.components.header import is_stopping, worker
from pages.components.jobs import ACTION_WORDS, LOG_LINES, Panel, draw, log_html, log_lines, resumable, summary
from pages.components.page import Page
from pages.components.session import ViewState
from pages.components.settings import Settings

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose worker is this process, so that it counts as alive."""
    from moesvd_core import atomic
    from moesvd_core.runs.process import this_process

    made = new_run(tmp_path)
    atomic.write_json(made.worker_file, this_process().as_dict())
    made.log.append("submitted", "1", action="analyze", arguments={})
    return made


def shown(run: RunFolder) -> str:
    return draw(Client(run.path.parent).status(run))


def test_nothing_to_show() -> None:
    assert "Nothing runs" in draw(None)
    assert worker(None) == "no run yet"
    assert not resumable(None)


def test_a_job_from_its_turn_to_its_end(run: RunFolder) -> None:
    client = Client(run.path.parent)
    assert "Analysis waits" in shown(run)
    run.log.append("started", "1")
    for done in (1, 2, 3):
        run.log.append("progress", "1", stage="calibrate", done=done, total=4, message=EVIL)
    status = client.status(run)
    assert "calibrate: 3 of 4" in draw(status)
    assert 'aria-valuenow="75"' in draw(status)
    assert re.fullmatch(r"calibrate 75 %, \d+ s left in this stage", worker(status)), "other stages follow, of which nothing is known yet"
    assert summary(status) == f"Analysis {worker(status)}"
    assert EVIL not in draw(status) + log_html(log_lines(run))
    assert "&lt;script&gt;" in log_html(log_lines(run))
    run.log.append("progress", "1", stage="calibrate", done=4, total=4, message=EVIL)
    assert worker(client.status(run)) == "calibrate done", "a stage that is through, not a job with no time left"
    run.log.append("finished", "1", result={})
    status = client.status(run)
    assert "Analysis finished" in draw(status)
    assert (worker(status), summary(status), resumable(status)) == ("idle", "Analysis finished", False)


def test_a_download_is_told_by_its_size_and_the_time_it_still_takes(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 101.0, 102.0, 112.0))
    monkeypatch.setattr("moesvd_core.runs.events.time", SimpleNamespace(time=lambda: next(clock)))
    run.log.append("started", "1")
    run.log.append("progress", "1", stage="inspect", done=0, total=1, message="looking for owner/name")
    for done in (0, 1000):
        run.log.append("progress", "1", stage="fetch", done=done, total=93400, message=f"{done / 1000:.1f} of 93.4 GB of owner/name")
    status = Client(run.path.parent).status(run)
    assert "fetch: 1000 of 93400, 16 min left in this stage (1.0 of 93.4 GB of owner/name)." in draw(status)
    assert worker(status) == "fetch 1 %, 16 min left in this stage"


def test_a_job_that_was_asked_to_stop_is_told_to_be_cancelled_until_it_has_stopped(run: RunFolder) -> None:
    context, view = Context(Settings(runs=run.path.parent)), ViewState(run.name)
    with gr.Blocks(analytics_enabled=False), Page(context, "Ratio", "Purpose") as page:
        panel = Panel(page)

    def told() -> tuple[str, bool, bool, str]:
        status = context.status(view)
        shown, cancel, *_ = panel._draw(view, status)
        return shown, cancel.visible, cancel.interactive, header.draw(context, "Ratio", "Purpose", view, status)

    run.log.append("started", "1")
    run.log.append("progress", "1", stage="calibrate", done=3, total=4, message="layer 2")
    shown, *button, head = told()
    assert "Analysis runs" in shown and button == [True, True] and "calibrate 75 %" in head
    context.client.cancel(run)
    shown, *button, head = told()
    assert "Cancelling: Analysis" in shown and "Analysis runs" not in shown
    assert 'aria-valuenow="75"' in shown
    assert button == [True, False]
    assert "cancelling" in head and "calibrate" not in head
    status = context.status(view)
    assert status is not None
    assert summary(status, stopping=is_stopping(context, status)) == "Analysis cancelling"
    os.utime(run.worker_file, (time.time() - 95,) * 2)
    shown, *button, head = told()
    assert "Analysis hangs" in shown and button == [True, True], "a worker that hangs is ended by another press"
    os.utime(run.worker_file)
    run.log.append("cancelled", "1", error="cancelled")
    run.cancel_file.unlink()
    shown, *button, head = told()
    assert "Analysis cancelled" in shown and button == [False, True]
    run.log.append("submitted", "2", action="analyze", arguments={})
    run.log.append("started", "2")
    run.cancel_file.write_text("1")
    assert "Analysis runs" in told()[0], "another job was asked to stop"


@pytest.mark.parametrize(("kind", "advice"), [("cancelled", True), ("interrupted", True), ("failed", False)])
def test_work_that_ended_early_says_why_and_can_be_resumed(run: RunFolder, kind: str, advice: bool) -> None:
    run.log.append("started", "1")
    run.log.append(kind, "1", error="not enough memory: 61 GiB are needed")
    status = Client(run.path.parent).status(run)
    assert f"Analysis {kind}" in draw(status)
    assert "61 GiB are needed" in draw(status)
    assert ("resume goes on" in draw(status)) is advice
    assert resumable(status)


def test_every_kind_of_work_has_words() -> None:
    assert set(ACTION_WORDS) == set(ACTION_NAMES)


def test_the_log_is_short_and_newest_first(run: RunFolder) -> None:
    for done in range(100):
        run.log.append("progress", "1", stage="calibrate", done=done, total=100, message=f"layer {done}")
    lines = log_lines(run)
    assert len(lines) == LOG_LINES
    assert lines[0].endswith("layer 99")


def test_where_the_model_lies_is_not_told(tmp_path: Path) -> None:
    identity = Identity("tiny-00000002", "/srv/secret/demo-moe", {"samples": 1}, "2026-01-01T00:00:00+00:00")
    run = RunFolder.create(tmp_path / identity.id, identity)
    run.log.append("submitted", "1", action="analyze", arguments={})
    run.log.append("progress", "1", stage="inspect", done=0, total=1, message="looking for /srv/secret/demo-moe")
    run.log.append("failed", "1", error="/srv/secret/demo-moe is not the model any more")
    told = draw(Client(tmp_path).status(run)) + log_html(log_lines(run))
    assert "looking for demo-moe" in told
    assert "secret" not in told


def test_a_worker_that_hangs_is_told(run: RunFolder) -> None:
    run.log.append("started", "1")
    run.log.append("progress", "1", stage="calibrate", done=3, total=4, message="layer 2")
    assert "hangs" not in shown(run)
    long_ago = time.time() - 95
    os.utime(run.worker_file, (long_ago, long_ago))
    status = Client(run.path.parent).status(run)
    assert "no sign of life for 1 min" in draw(status)
    assert worker(status).startswith("silent for 1 min")
