"""Downloads: only listed files of finished exports, whole or from a position on, and only for who is logged in."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from run_exports import NAME, add_export
from starlette.applications import Starlette
from starlette.testclient import TestClient

from moesvd_core.runs.folder import Identity, RunFolder
from pages.components import assets, downloads

RUN = "tiny-00000001"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunFolder.create(tmp_path / RUN, Identity(RUN, "tiny", {}, "2026-01-01T00:00:00+00:00"))
    return add_export(run, size=3_000_000)


def serve(runs: Path, passwords: dict[str, str] | None = None) -> TestClient:
    """The addresses in an app that has of Gradio's what tells who is logged in; the real one is tested with the whole explorer."""
    app: Any = Starlette(**{name: assets.app_kwargs(runs)[name] for name in ("routes", "middleware")})
    app.auth, app.auth_dependency, app.cookie_id, app.tokens = passwords, None, "abc", {"token-of-someone": "someone"}
    return TestClient(app)


@pytest.fixture
def client(folder: Path, tmp_path: Path) -> TestClient:
    return serve(tmp_path)


def test_a_file_comes_as_it_is_and_is_never_shown_as_a_page(client: TestClient, folder: Path) -> None:
    answer = client.get(downloads.file_address(RUN, NAME, "README.md"))
    assert (answer.status_code, answer.content) == (200, (folder / "README.md").read_bytes())
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="README.md"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch('"[0-9a-f]{64}"', answer.headers["etag"])


def test_a_part_of_a_file_comes_as_asked(client: TestClient) -> None:
    answer = client.get(downloads.file_address(RUN, NAME, "model.safetensors"), headers={"range": "bytes=2999990-"})
    assert (answer.status_code, answer.content) == (206, bytes(10))


def test_everything_comes_as_one_tar(client: TestClient, folder: Path) -> None:
    answer = client.get(downloads.archive_address(RUN, NAME))
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["content-disposition"].endswith(f"{NAME}.tar")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert {Path(name).name for name in tar.getnames()} == {path.name for path in folder.iterdir()}


def test_a_broken_download_goes_on(client: TestClient) -> None:
    address = downloads.archive_address(RUN, NAME)
    whole = client.get(address).content
    rest = client.get(address, headers={"range": "bytes=1234567-"})
    assert (rest.status_code, rest.content) == (206, whole[1234567:])
    assert rest.headers["content-range"] == f"bytes 1234567-{len(whole) - 1}/{len(whole)}"
    for odd in ("bytes=5-2", f"bytes={len(whole)}-", "bytes=-5", "lines=1-", "bytes=0-1,4-5"):
        assert client.get(address, headers={"range": odd}).status_code == 200
    head = client.head(address)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(whole)), b"")


def traversals() -> Iterator[str]:
    for name in ("..", "../run.json", "../../run.json", "/etc/passwd", "moesvd.json/../../../run.json", "..\\run.json", "notes.txt", "\0"):
        yield f"/download/{RUN}/{NAME}/{quote(name)}"
        yield f"/download/{RUN}/{NAME}/{quote(name, safe='')}"
        yield f"/download/{RUN}/{quote(name, safe='')}/README.md"
        yield f"/download/{RUN}/{quote(name, safe='')}.tar"
        yield f"/download/{quote(name, safe='')}/{NAME}/README.md"
        yield f"/download/{quote(quote(name, safe=''), safe='')}/{NAME}/README.md"


def test_nothing_else_has_an_address(client: TestClient, folder: Path) -> None:
    (folder / "notes.txt").write_text("secret")
    for address in traversals():
        answer = client.get(address)
        assert (answer.status_code, b"secret" in answer.content, b"created" in answer.content) == (404, False, False), address
        assert client.post(address).status_code in (404, 405)


def test_a_damaged_export_is_not_sent(client: TestClient, folder: Path) -> None:
    (folder / "README.md").unlink()
    assert client.get(downloads.archive_address(RUN, NAME)).status_code == 404
    assert client.get(downloads.file_address(RUN, NAME, "model.safetensors")).status_code == 404


def test_who_is_not_logged_in_gets_nothing(folder: Path, tmp_path: Path) -> None:
    client = serve(tmp_path, {"someone": "right"})
    addresses = (downloads.archive_address(RUN, NAME), downloads.file_address(RUN, NAME, "README.md"))
    for name, token, status in (
        ("access-token-abc", "", 401), ("access-token-abc", "guessed", 401), ("other", "token-of-someone", 401),
        ("access-token-abc", "token-of-someone", 200), ("access-token-unsecure-abc", "token-of-someone", 200),
    ):
        client.cookies = {name: token}  # type: ignore[assignment]
        assert [client.get(address).status_code for address in addresses] == [status, status], name
