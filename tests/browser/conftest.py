"""The app in a browser: started once with runs of its own, and every page watched for errors and for requests to other machines.

Chromium comes from the system (`chromium`), else from `playwright install chromium`; without any these tests fail and say so.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser.serving import serving
from playwright.sync_api import Browser, Page, Playwright, sync_playwright
from runs.run_helpers import new_run

from moesvd_core.runs.folder import Identity, RunFolder

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)
EVIL = "<img src=x onerror=alert(1)>"
Open = Callable[..., Page]
_LEFT = ("AbortError: BodyStreamBuffer was aborted", "AbortError: signal is aborted", "Unexpected error Connection errored out")


def chromium_path(playwright: Playwright) -> str:
    """The system's chromium, else the one that playwright installs."""
    system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return system or str(playwright.chromium.executable_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: one that has finished, one that failed, one whose model has a hostile name, one that is damaged."""
    root = tmp_path_factory.mktemp("runs")
    for name, kind in (("tiny-0000000f", "finished"), ("tiny-0000000e", "failed")):
        log = new_run(root, name).log
        log.append("submitted", "1", action="analyze", arguments={})
        log.append("started", "1")
        log.append("progress", "1", stage="calibrate", done=3, total=4, message=EVIL)
        log.append(kind, "1", **({"result": {}} if kind == "finished" else {"error": "not enough memory: 61 GiB are needed"}))
    RunFolder.create(root / "evil-00000001", Identity("evil-00000001", f"{EVIL}/{EVIL}", {"samples": 1}, "2025-01-01T00:00:00+00:00"))
    (root / "damaged").mkdir()
    (root / "damaged" / "run.json").write_text("{")
    return root


@pytest.fixture(scope="session")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The running app."""
    with serving(["app.py", "--no-demo", "--runs", str(runs)], tmp_path_factory.mktemp("app") / "log", flag=["--port"]) as started:
        yield started


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One chromium for all tests."""
    with sync_playwright() as playwright:
        path = chromium_path(playwright)
        if not Path(path).exists():
            pytest.fail("no chromium: install it (apt install chromium), or run `playwright install chromium`", pytrace=False)
        started = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Open]:
    """Opens a page of the app: `visit("/ratio?run=…", width=360, theme="dark")`; at the end nothing may have gone wrong in it."""
    contexts, troubles = [], []

    def follow(page: Page) -> None:
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if _local(request.url, address) else troubles.append(f"request to {request.url}"))

    def opened(path: str = "/", *, width: int = 1440, theme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        follow(page)
        page.goto(f"{address}{path}{'&' if '?' in path else '?'}__theme={theme}")
        page.wait_for_selector(".head h1", timeout=60_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert without_left_pages(troubles) == []


def without_left_pages(troubles: list[str]) -> list[str]:
    """All but what Gradio's client says when a page is left before the answer to an event came, in one line or two.

    A server that does fail is seen by what the page then lacks.
    """
    return [trouble for trouble in troubles if not any(words in trouble for words in _LEFT)]


def _local(url: str, address: str) -> bool:
    return url.startswith((f"{address}/", "data:", "blob:"))
