"""A push is one commit of the whole export; the token reaches the hub and nothing else."""

import base64
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from moesvd_core.checkpoint.hub import push
from moesvd_core.checkpoint.manifest import MANIFEST, write_manifest
from moesvd_core.errors import CheckpointError, HubError, InputError

TOKEN = "hf_aVerySecretToken123"  # noqa: S105 - of nobody


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push of small files needs; keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None, list[dict[str, Any]]]] = []
        self.status = 200
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.requests.append((self.path, self.headers["Authorization"], lines))
        answer: dict[str, Any] = {"error": f"no, {TOKEN}"} if self.server.status != 200 else {}
        if not answer and self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/someone/demo-40"}
        elif not answer and "/preupload/" in self.path:
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]]}
        elif not answer:
            answer = {"commitUrl": f"{self.server.address}/someone/demo-40/commit/abc", "commitOid": "abc"}
        data = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "auto@0.4000-factored"
    path.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (path / name).write_text(name)
    write_manifest(path)
    return path


def test_pushes_every_file_in_one_commit(hub: Hub, folder: Path) -> None:
    (folder / ".cache").mkdir()  # hidden names are no part of the export, and are not published with it
    (folder / ".cache" / "token").write_text("secret")
    (folder / ".env").write_text("secret")
    address = push(folder, "someone/demo-40", TOKEN, endpoint=hub.address)
    assert address == f"{hub.address}/someone/demo-40/commit/abc"
    assert {token for _, token, _ in hub.requests} == {f"Bearer {TOKEN}"}
    created = next(lines for path, _, lines in hub.requests if path == "/api/repos/create")
    assert (created[0]["name"], created[0]["organization"], created[0]["visibility"]) == ("demo-40", "someone", "private")
    commits = [lines for path, _, lines in hub.requests if "/commit/" in path]
    assert len(commits) == 1
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]).decode() for line in commits[0] if line["key"] == "file"}
    assert sent == {name: (folder / name).read_text() for name in ("config.json", "model.safetensors", "README.md", MANIFEST)}


REFUSALS = {401: "copy it again", 403: "write access", 404: "owner's name", 422: r"no, \[token\]"}


@pytest.mark.parametrize(("status", "advice"), REFUSALS.items())
def test_a_refusal_says_what_to_do_and_never_the_token(
    hub: Hub, folder: Path, status: int, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.status = status
    caplog.set_level(logging.DEBUG)
    with pytest.raises(HubError, match=advice) as caught:
        push(folder, "someone/demo-40", TOKEN, endpoint=hub.address)
    assert TOKEN not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_an_unreachable_hub_is_a_clear_error(hub: Hub, folder: Path) -> None:
    with pytest.raises(HubError, match="cannot be reached, or the transfer broke off"):
        push(folder, "someone/demo-40", TOKEN, endpoint="http://127.0.0.1:1")


def test_offline_is_a_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="set to work offline"):
        push(folder, "someone/demo-40", TOKEN)


def test_a_damaged_export_is_not_pushed(hub: Hub, folder: Path) -> None:
    (folder / "config.json").write_text("other")
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        push(folder, "someone/demo-40", TOKEN, endpoint=hub.address)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "demo", "a/b/c", "../demo", "a/..", "someone/de mo", "someone/a--b", "http://x/y"])
def test_refuses_what_is_no_repository(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="repository must be owner/name"):
        push(folder, name, TOKEN)


@pytest.mark.parametrize("token", ["", "short", f"{TOKEN}\nX-Evil: 1", f"{TOKEN} {TOKEN}", "x" * 401])
def test_refuses_what_is_no_token_and_does_not_repeat_it(folder: Path, token: str) -> None:
    """An empty one, too: the library would fall back on the login of whoever runs the server."""
    with pytest.raises(InputError, match="token must be") as caught:
        push(folder, "someone/demo-40", token)
    assert not token or token not in str(caught.value)
