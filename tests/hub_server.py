"""The hub as far as a download asks it, on this machine: what a model is, what files it has, and the files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

NAME = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves one model folder as `NAME`, and notes every question.

    Attributes:
        asked: ("GET", name of the file), ("HEAD", name of the file), or ("GET", path of another question), in order.
        slow: of this file the second half comes only once `go_on` is set.
        broken: of this file nothing comes but its first half, however often it is asked for.
        by_xet: this file is in the hub's other storage, which answers nothing until `go_on` is set.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.slow = self.broken = self.by_xet = ""
        self.go_on = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return sorted({name for method, name in self.asked if method == "GET" and (self.folder / name).is_file()})


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        at_hand = path.startswith(f"/{NAME}/resolve/")
        server.asked.append((self.command, name if at_hand else path))
        if at_hand and (server.folder / name).is_file():
            self._file(name)
        elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}/revision/{COMMIT}"):
            self._answer(200, {"id": NAME, "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            self._answer(200, [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)} for file in server.folder.iterdir()
            ])
        elif path == "/xet-token":
            storage = {"X-Xet-Cas-Url": f"{server.address}/storage", "X-Xet-Access-Token": "none", "X-Xet-Token-Expiration": "9999999999"}
            self._answer(200, {}, storage)
        elif path.startswith("/storage/"):
            server.go_on.wait(20)
            self.close_connection = True
        else:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        server, file = self.server, self.server.folder / name
        data = file.read_bytes()
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name == server.by_xet:
            headers |= {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": f"{server.address}/xet-token"}
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if asked else 200)
        for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(data) // 2
        self.wfile.write(data[start:half])
        if name == server.broken:
            self.close_connection = True
            return
        if name == server.slow:
            self.wfile.flush()
            server.go_on.wait(20)
        self.wfile.write(data[max(start, half):])

    def _answer(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def serving(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that the hub's library takes for the hub, with a cache of its own that is empty at first."""
    with HubServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(hf_api.api, "endpoint", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # so that tiny files come in several pieces
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()


