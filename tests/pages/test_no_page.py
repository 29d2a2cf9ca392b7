"""An address that leads nowhere: a page for people, JSON for programs, and the same rules of the browser for both."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from pages.components import assets

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
NOWHERE = ["/nopage", "/explorer/nothing.js", "/download/gone-1/nothing/README.md", "/gradio_api/upload", "/a/b/c"]


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    kwargs = assets.app_kwargs(tmp_path)
    made = Starlette(routes=kwargs["routes"], middleware=kwargs["middleware"])
    made.auth = made.auth_dependency = None  # type: ignore[attr-defined] # as of Gradio's app, where nobody logs in
    return TestClient(made)


@pytest.mark.parametrize("path", NOWHERE)
def test_a_person_is_shown_a_page_with_the_way_home(client: TestClient, path: str) -> None:
    answer = client.get(path, headers=BROWSER)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "There is nothing at this address" in answer.text
    assert '<a href="/">To the Model page' in answer.text
    assert path not in answer.text, "nothing of what was asked for is repeated"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["vary"] == "accept"
    assert len(answer.content) == int(answer.headers["content-length"])


@pytest.mark.parametrize("headers", [{}, {"accept": "*/*"}, {"accept": "application/json"}])
@pytest.mark.parametrize("path", ["/explorer/nothing.js", "/download/gone-1/nothing/README.md", "/gradio_api/upload"])
def test_a_program_is_told_in_json(client: TestClient, path: str, headers: Mapping[str, str]) -> None:
    answer = client.get(path, headers=headers)
    assert (answer.status_code, answer.json()) == (404, {"detail": "not found"})


def test_what_is_there_and_what_is_sent_stays_as_it_is(client: TestClient) -> None:
    assert client.get("/healthz", headers=BROWSER).json()["status"] == "ok"
    assert client.post("/gradio_api/upload", headers=BROWSER).json() == {"detail": "not found"}


def test_home_is_where_the_app_is_mounted(tmp_path: Path) -> None:
    kwargs = assets.app_kwargs(tmp_path)
    mounted = TestClient(Starlette(routes=kwargs["routes"], middleware=kwargs["middleware"]), root_path="/behind/a-proxy")
    assert '<a href="/behind/a-proxy/">' in mounted.get("/nopage", headers=BROWSER).text
