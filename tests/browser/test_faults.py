"""Faults in the middle of an analysis: the tab closed, the server killed, the worker killed, both killed.

Each time the page finds the run again by its address, no process is left over, and the figures are to the last digit those of a run that
nobody disturbed.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from browser.serving import Server
from playwright.sync_api import Browser, Page, expect
from runs.run_helpers import until
from runs.tiny_runs import contents, do
from tiny_models import save_tiny

from moesvd_core.calibration.settings import Calibration
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.source import prepare
from pages.model import PLANNED

MODEL, METHOD = "tiny-mixtral", "svd-llm"
CALIBRATION = Calibration(samples=200, length=24, batch=1)
"""Some seconds for a tiny model: long enough that a fault comes in the middle."""
FIGURES = ("statistics", "curves", "factors", "plans", "evaluations")
WHOLE_SECONDS = 120.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, with one in it."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny("mixtral", folder / MODEL)
    return folder


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same analysis, done in this process with as many threads."""
    torch.set_num_threads(1)
    run = prepare(str(models / MODEL), CALIBRATION, folder=tmp_path_factory.mktemp("undisturbed") / "run")
    job = do(run, "analyze", methods=[METHOD], probe=True)
    assert job.state == "finished", job.error
    return run


@pytest.fixture
def server(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An app of its own for each fault; when it has ended, no process knows its folder of runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["app.py", "--no-demo", "--models", str(models), "--runs", str(tmp_path)]
    started = Server(command, tmp_path / "log", flag=["--port"])
    started.start()
    yield started
    started.stop()
    until(lambda: at_work_in(tmp_path) == [], 10)


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The Model page, where an analysis has been asked for and is in the middle of its calibration."""
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(server.address)
    field = opened.get_by_role("combobox", name="Model")
    field.fill(MODEL)
    field.press("Enter")
    expect(opened.locator("#model-facts")).to_contain_text("mixtral", timeout=30_000)
    opened.get_by_role("button", name="Calibration settings").click()
    opened.get_by_label("Windows", exact=True).fill(str(CALIBRATION.samples))
    opened.get_by_label("Tokens a window").fill(str(CALIBRATION.length))
    opened.get_by_label("Windows at once").fill(str(CALIBRATION.batch))
    for method in set(PLANNED) - {METHOD}:
        opened.get_by_role("checkbox", name=method, exact=True).uncheck()
    opened.get_by_role("button", name="Analyse", exact=True).click()
    expect(opened.locator(".job.running .job-text")).to_contain_text("calibrate", timeout=60_000)
    opened.wait_for_function("location.search.includes('run=tiny-mixtral-')")
    yield opened
    context.close()


def run_of(page: Page, tmp_path: Path) -> RunFolder:
    """The run that a page shows, by its address."""
    found = re.search(r"run=([\w.-]+)", page.url)
    assert found is not None
    return RunFolder.named(tmp_path, found[1])


def worker_of(run: RunFolder) -> int:
    """Number of the process that works on a run."""
    worker = run.worker()
    assert worker is not None
    return worker.pid


def at_work_in(runs: Path) -> list[list[str]]:
    """Command lines of live processes that name the folder of runs."""
    lines = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(runs) in word for word in process.info["cmdline"] or []):
            lines.append(process.info["cmdline"])
    return lines


def in_the_middle(run: RunFolder) -> None:
    """Nothing is planned yet, and much is still to be done."""
    assert not list((run.path / "plans").iterdir())
    assert Client(run.path.parent).status(run).state == "running"


def ends_as(page: Page, undisturbed: RunFolder, run: RunFolder) -> None:
    """The page tells the end, and everything is as in the run that nobody disturbed."""
    expect(page.locator(".job.finished .job-title")).to_have_text("Analysis finished", timeout=1000 * WHOLE_SECONDS)
    expect(page.locator(".strip .worker")).to_have_text("idle", timeout=10_000)
    for station in FIGURES:
        assert contents(run.path / station) == contents(undisturbed.path / station), station
    assert run.worker() is None


def test_a_closed_tab_stops_nothing(page: Page, browser: Browser, tmp_path: Path, undisturbed: RunFolder) -> None:
    run, address = run_of(page, tmp_path), page.url
    in_the_middle(run)
    page.close()
    assert Client(tmp_path).wait(run, "1", WHOLE_SECONDS).state == "finished"
    context = browser.new_context()
    again = context.new_page()
    again.goto(address)
    ends_as(again, undisturbed, run)
    context.close()


def test_a_killed_server_stops_nothing_and_open_pages_come_back(
    page: Page, server: Server, tmp_path: Path, undisturbed: RunFolder
) -> None:
    run = run_of(page, tmp_path)
    in_the_middle(run)
    worker = worker_of(run)
    server.kill()
    assert psutil.pid_exists(worker)
    server.start()
    ends_as(page, undisturbed, run)  # without a reload by hand
    kinds = [event.kind for event in run.log.read()[0] if event.kind != "progress"]
    assert kinds == ["submitted", "started", "finished"], "the worker went on by itself, and nobody started another"


def test_a_killed_worker_is_told_within_ten_seconds_and_its_run_resumes(page: Page, tmp_path: Path, undisturbed: RunFolder) -> None:
    run = run_of(page, tmp_path)
    in_the_middle(run)
    os.kill(worker_of(run), signal.SIGKILL)
    expect(page.locator(".job.interrupted .job-text")).to_contain_text("the worker ended without a word", timeout=10_000)
    expect(page.locator(".strip .worker")).to_have_text("interrupted")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    page.get_by_role("button", name="Resume").click()
    ends_as(page, undisturbed, run)


def test_a_machine_that_went_down_loses_one_layer(page: Page, server: Server, tmp_path: Path, undisturbed: RunFolder) -> None:
    run, address = run_of(page, tmp_path), page.url
    in_the_middle(run)
    worker = worker_of(run)
    page.close()
    os.kill(worker, signal.SIGKILL)
    server.kill()
    done = {event.data["message"] for event in run.log.read()[0] if event.data.get("stage") == "calibrate"}
    server.start()
    again = page.context.new_page()
    again.goto(address)
    expect(again.locator(".job.interrupted")).to_be_visible(timeout=10_000)
    again.get_by_role("button", name="Resume").click()
    ends_as(again, undisturbed, run)
    redone = [event.data["message"] for event in run.log.read()[0] if event.job == "2" and event.data.get("message") in done]
    assert len(redone) <= 1
