"""What the server gives away: its pages, and nothing else of the machine."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from browser.wellmade import faults_of
from playwright.sync_api import Page, expect

HOUSE = Path(__file__).parents[2]


def fetch(address: str, path: str) -> tuple[int, bytes]:
    """Ask for a path exactly as it is written: no dots are resolved on the way."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    with closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.mark.parametrize("prefix", ["/gradio_api/file=", "/gradio_api/file/", "/explorer/", "/static/", "/assets/", "/"])
def test_no_file_of_the_machine_is_served(address: str, prefix: str) -> None:
    secret = HOUSE / "pyproject.toml"
    up = "../" * 12
    forms = [
        str(secret), "pyproject.toml", f"{up}{str(secret)[1:]}", quote(str(secret), safe=""), quote(f"{up}{str(secret)[1:]}", safe=""),
        f"./assets/../{secret.name}", f"..%2f{secret.name}", f"....//{secret.name}", f"{secret}%00.png",
    ]
    for form in forms:
        status, body = fetch(address, prefix + form)
        assert b"[build-system]" not in body, (status, form)


def test_no_run_of_the_folder_is_served(address: str, runs: Path) -> None:
    for form in (str(runs / "tiny-0000000f" / "run.json"), "runs/tiny-0000000f/run.json"):
        status, body = fetch(address, f"/gradio_api/file={form}")
        assert status in (403, 404)
        assert b"calibration" not in body


def test_answers_carry_the_rules_of_the_browser(address: str) -> None:
    with urllib.request.urlopen(f"{address}/") as answer:  # noqa: S310 - our own address
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "googleapis" not in answer.read().decode()


def test_nobody_reads_the_api_from_another_site(address: str) -> None:
    request = urllib.request.Request(f"{address}/gradio_api/info", headers={"Origin": "https://example.org"})  # noqa: S310
    try:
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            assert answer.headers.get("access-control-allow-origin") not in ("*", "https://example.org")
    except urllib.error.HTTPError as refused:
        assert refused.code == 403


def test_a_wrong_address_shows_the_way_home_and_a_program_is_told_in_json(visit: Callable[..., Page], address: str) -> None:
    page = visit()
    page.get_by_role("button", name="Switch between light and dark").click()
    other = page.context.new_page()
    answered = other.goto(f"{address}/nopage")
    assert answered is not None
    assert answered.status == 404
    assert other.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 24)", "as it was chosen in the explorer"
    assert [fault for width in (360, 1440) for fault in faults_of(other, width)] == []
    other.get_by_role("link", name="To the Model page, which lists all runs").click()
    expect(other.locator("#runs table")).to_be_visible(timeout=30_000)
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(f"{address}/nopage"):  # noqa: S310 - our own address
        pass
    assert json.loads(refused.value.read())["detail"]
