"""Several people at one server, by raw HTTP: every address and every event, asked by somebody who may not."""

import asyncio
import http.client
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from browser.serving import serving
from browser.visitor import Visitor
from run_exports import NAME, add_export

import app
from moesvd_core import atomic
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import Identity, RunFolder
from moesvd_core.runs.process import this_process

RUN = "hers-00000001"
PATHS = [path for _, path, _ in app.PAGES]
FORGED: tuple[Any, ...] = (None, "<img src=x onerror=alert(1)>", {"run": RUN})


@pytest.fixture(scope="module")
def hers(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of Ann, with an export; this process is its worker, and works for ever."""
    root = tmp_path_factory.mktemp("people")
    run = RunFolder.create(root / RUN, Identity(RUN, "tiny", {"samples": 1}, "2026-01-01T00:00:00+00:00", owner="ann"))
    add_export(run)
    run.log.append("submitted", "1", action="analyze", arguments={}, by="ann")
    run.log.append("started", "1")
    run.log.append("progress", "1", stage="calibrate", done=3, total=4, message="layer 2")
    atomic.write_json(run.worker_file, this_process().as_dict())
    return run


@pytest.fixture(scope="module")
def address(hers: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with two logins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESVD_LOGINS", "ann:of-ann bob:of-bob")
        command = ["tests/browser/counted_app.py", "--no-demo", "--runs", str(hers.path.parent)]
        with serving(command, tmp_path_factory.mktemp("app") / "log", flag=["--port"]) as started:
            yield started


def as_visitor(address: str, name: str, does: Callable[[Visitor], Awaitable[None]]) -> None:
    async def whole() -> None:
        visitor = Visitor(address)
        try:
            if name:
                await visitor.log_in(name, f"of-{name}")
            await does(visitor)
        finally:
            await visitor.close()

    with ThreadPoolExecutor(1) as own:  # where browsers were driven before, this thread has a loop that runs already
        own.submit(asyncio.run, whole()).result()


def contents(run: RunFolder) -> Mapping[Path, bytes]:
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_no_event_of_another_changes_a_run(address: str, hers: RunFolder) -> None:
    before = contents(hers)

    async def tries_everything(bob: Visitor) -> None:
        for path in PATHS:
            await bob.open(path, f"run={RUN}&ratio=0.3")
            for event in bob.events():
                usual = bob.usual(event)
                for data, told in ((usual, {"percent": 20, "layer": 0}), *(([forged] * len(usual), forged) for forged in FORGED)):
                    try:
                        await bob.fire(event, data, told)
                    except RuntimeError as refused:
                        assert "Traceback" not in str(refused)
                    except httpx.RemoteProtocolError:
                        assert "unload" in str(event["targets"]), "only who says that his tab is closed is sent nothing more"
        assert any("belongs to ann, who alone changes it" in sentence for sentence in bob.said)
        assert not any("<img" in sentence for sentence in bob.said)
        assert (await bob.http.get("/healthz")).status_code == 200

    as_visitor(address, "bob", tries_everything)
    assert contents(hers) == before
    assert Client(hers.path.parent).status(hers).state == "running"
    assert [path.name for path in hers.path.parent.iterdir() if path.name != ".queue"] == [RUN]


def test_she_cancels_it_herself(address: str, hers: RunFolder) -> None:
    async def presses_cancel(ann: Visitor) -> None:
        await ann.open("/", f"run={RUN}")
        button = next(part["id"] for part in ann.config["components"] if part["props"].get("value") == "Cancel")
        await ann.fire(next(event for event in ann.events("click") if event["targets"][0][0] == button))

    os.utime(hers.worker_file)  # a sign of life: a worker that hangs is ended, and this process is the worker
    as_visitor(address, "ann", presses_cancel)
    assert hers.cancel_file.read_text() == "1"
    hers.cancel_file.unlink()


def test_a_closed_tab_is_let_go(address: str) -> None:
    async def opens_and_closes(ann: Visitor) -> None:
        before = (await ann.http.get("/counts")).json()
        tabs = [Visitor(address) for _ in PATHS]
        for tab, path in zip(tabs, PATHS, strict=True):
            await tab.log_in("ann", "of-ann")
            await tab.open(path, f"run={RUN}")
        assert (await ann.http.get("/counts")).json()["sessions"] == before["sessions"] + len(tabs)
        for tab in tabs:
            await tab.close()
        for _ in range(50):
            after = (await ann.http.get("/counts")).json()
            if after["sessions"] == before["sessions"]:
                break
            await asyncio.sleep(0.1)
        for name in ("sessions", "session times", "message queues", "event ids by session"):
            assert after[name] == before[name], name

    as_visitor(address, "ann", opens_and_closes)


def test_a_tab_that_was_forgotten_goes_on_from_its_address(address: str) -> None:
    async def comes_back(ann: Visitor) -> None:
        await ann.open("/", f"run={RUN}&ratio=0.3")
        ann.session = "ofanotherserver"
        [tick] = ann.events("tick")
        _, head, *_ = await ann.fire(tick)
        assert RUN in head
        assert "30 %" in head

    as_visitor(address, "ann", comes_back)


def test_who_is_not_logged_in_reaches_the_login_and_nothing_else(address: str) -> None:
    async def looks_around(stranger: Visitor) -> None:
        for path in PATHS:
            page = await stranger.http.get(path)
            assert RUN not in page.text
            assert '"auth_required":true' in page.text.replace(" ", "")
        for path in ("/config", "/gradio_api/info", "/gradio_api/queue/status", "/gradio_api/queue/data?session_hash=guessed"):
            assert (await stranger.http.get(path)).status_code == 401, path
        assert (await stranger.http.get(f"/download/{RUN}/{NAME}/README.md")).status_code == 401
        body = {"data": [], "fn_index": 0, "session_hash": "guessed"}
        assert (await stranger.http.post("/gradio_api/queue/join", json=body)).status_code == 401
        assert (await stranger.http.post("/login", data={"username": "ann", "password": "of-bob"})).status_code == 400

    as_visitor(address, "", looks_around)


UNASKED = [
    ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/upload_progress?upload_id=1"), ("GET", "/gradio_api/proxy=https://huggingface.co"),
    ("GET", "/gradio_api/file=pyproject.toml"), ("GET", "/gradio_api/file/pyproject.toml"), ("POST", "/gradio_api/run/predict"),
    ("POST", "/gradio_api/api/predict"), ("POST", "/gradio_api/call/predict"), ("POST", "/gradio_api/component_server"),
    ("GET", "/gradio_api/run-history/buckets"), ("GET", "/gradio_api/runs"), ("GET", "/gradio_api/deep_link?session_hash=1"),
    ("POST", "/gradio_api/process_recording"), ("POST", "/gradio_api/stream/1"), ("POST", "/gradio_api/vibe-code"),
    ("GET", "/gradio_api/dev/reload"), ("GET", "/gradio_api/openapi.json"), ("GET", "/monitoring"), ("GET", "/monitoring/summary"),
    ("GET", "//gradio_api/upload"), ("GET", "/gradio_api//upload"), ("GET", "/gradio_api/queue/../file=pyproject.toml"),
    ("GET", "/%67radio_api/file=pyproject.toml"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"),
]


@pytest.mark.parametrize(("method", "path"), UNASKED)
def test_what_no_page_asks_for_is_not_there(address: str, method: str, path: str) -> None:
    with httpx.Client(base_url=address) as browser:
        browser.post("/login", data={"username": "bob", "password": "of-bob"})
        cookies = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)  # sends the path exactly as it is written
    with closing(connection):
        connection.request(method, path, headers={"Cookie": cookies})
        answer = connection.getresponse()
        assert (answer.status, b"[build-system]" in answer.read()) == (404, False)
