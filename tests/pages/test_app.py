"""The app as a whole: its pages, its own addresses, the run it ships."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio.queueing import EventQueue
from runs.run_helpers import new_run
from starlette.applications import Starlette
from starlette.testclient import TestClient

import app
from moesvd_core import atomic
from moesvd_core.errors import InputError
from moesvd_core.runs.folder import RunFolder, list_runs
from pages.components import assets, demo
from pages.components.settings import Settings


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    kwargs = assets.app_kwargs(tmp_path)
    return TestClient(Starlette(routes=kwargs["routes"], middleware=kwargs["middleware"]))


def test_every_page_of_the_list_is_a_route(tmp_path: Path) -> None:
    made = app.create(Settings(runs=tmp_path / "runs", demo=False))
    assert [f"/{path}" for path, *_ in made.pages] == [path for _, path, _ in app.PAGES]
    assert (tmp_path / "runs").is_dir()


def test_a_closed_tab_does_not_end_the_loop_that_all_events_wait_for(tmp_path: Path) -> None:
    queue = app.create(Settings(runs=tmp_path / "runs", demo=False))._queue
    waiting = EventQueue("pages", 1)
    waiting.queue.append(SimpleNamespace(session_hash="closed", alive=True, _id="1", fn="look"))  # type: ignore[arg-type]
    queue.event_queue_per_concurrency_id["pages"] = waiting
    queue.broadcast_estimations("pages")  # Gradio does so in its loop, after every event
    assert not queue.pending_event_ids_session["closed"]


def test_health_tells_whether_runs_can_be_kept(client: TestClient, tmp_path: Path) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    tmp_path.rmdir()
    assert client.get("/healthz").status_code == 503


def test_health_tells_of_runs_that_cannot_be_written(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: not (place == tmp_path and mode & os.W_OK))  # root may write anywhere
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (503, "the folder of runs is read-only")


def test_only_the_app_s_own_files_are_served_and_nothing_may_be_fetched_elsewhere(client: TestClient) -> None:
    for name in ("explorer.js", "plotly.min.js"):
        answer = client.get(f"/explorer/{name}")
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    for name in ("app.py", "explorer.css", "..%2fapp.py", "../app.py", "demo-moe/config.json"):
        assert client.get(f"/explorer/{name}").status_code == 404


def test_public_address_without_password_ends_with_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESVD_PASSWORD", raising=False)
    assert app.main(["--host", "0.0.0.0"]) == 2  # noqa: S104 - refused
    assert "MOESVD_PASSWORD" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken_is_named_before_anything_is_made(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert app.main(["--host", host, "--port", str(port), "--runs", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: port {port} is taken by another program: choose another with --port, 0 for any free one\n"
    assert told.out == "" and not (tmp_path / "runs").exists()


def test_an_address_of_another_machine_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match=r"port 0 of 192\.0\.2\.1 cannot be opened .*--port and --host"):  # an address for documents
        Settings(host="192.0.2.1", port=0, public_demo=True).require_port()


def test_the_shipped_run_is_copied_once_and_finds_the_model_of_this_machine(tmp_path: Path) -> None:
    shipped = new_run(tmp_path / "shipped")
    atomic.write_json(shipped.path / "source.json", {"path": "elsewhere", "fingerprint": "1", "facts": {}})
    runs = tmp_path / "runs"
    runs.mkdir()
    model = tmp_path / "model"
    assert demo.install(runs, shipped.path, model) == "tiny-00000001"
    copied = RunFolder.open(runs / "tiny-00000001")
    assert copied.identity.model == str(model)
    assert copied.read_json("source.json")["path"] == str(model)
    (copied.path / "mark").touch()
    demo.install(runs, shipped.path, model)
    assert (copied.path / "mark").exists()
    assert json.loads((shipped.path / "run.json").read_text())["model"] == "tiny"  # what is shipped stays as it is
    assert demo.install(runs, tmp_path / "nothing", model) == ""


@pytest.mark.parametrize("left", [{}, {"events.jsonl": "{}", "thesis.tex": "mine"}], ids=["empty", "files"])
def test_a_folder_without_a_run_makes_room_for_the_demo_run_and_loses_nothing(tmp_path: Path, left: dict[str, str]) -> None:
    shipped = new_run(tmp_path / "shipped")
    atomic.write_json(shipped.path / "source.json", {"path": "elsewhere", "fingerprint": "1", "facts": {}})
    runs = tmp_path / "runs"
    place = runs / "tiny-00000001"
    place.mkdir(parents=True)
    for name, content in left.items():
        (place / name).write_text(content)
    assert demo.install(runs, shipped.path, tmp_path / "model") == place.name
    assert RunFolder.open(place).identity.model == str(tmp_path / "model")
    kept = [path for path in runs.iterdir() if path != place]
    assert {path.name: path.read_text() for folder in kept for path in folder.iterdir()} == left
    assert [run.name for run in list_runs(runs) if isinstance(run, RunFolder)] == [place.name]


def test_a_damaged_demo_run_ends_the_start_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / RunFolder.open(demo.SHIPPED).identity.id
    place.mkdir()
    (place / "run.json").write_text("{")
    assert app.main(["--port", "0", "--runs", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {place / 'run.json'} is damaged") and line.endswith("restore it, or remove the folder")


def test_what_interrupted_deletions_left_is_gone_after_a_start(tmp_path: Path) -> None:
    left = tmp_path / ".deleted.1764000000000000000.tiny-00000001"
    left.mkdir()
    app.create(Settings(runs=tmp_path, demo=False))
    assert not left.exists()
