"""Every page on the finished run of the demo model: at every width in light and dark, for every visitor, and by keyboard alone."""

import re
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from browser.serving import serving
from browser.wellmade import WIDTHS, faults_of, tab_to, unreached
from playwright.sync_api import Page, expect
from run_exports import add_export
from runs.tiny_runs import do

from moesvd_core.runs.folder import RunFolder
from pages.components import demo

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The demo's run as the first start of the app leaves it, and an export."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("demo") / "runs"
    runs.mkdir()
    made = RunFolder.named(runs, demo.install(runs))
    job = do(made, "analyze", methods=["auto"])
    assert job.state == "finished", job.error
    add_export(made)
    return made


@pytest.fixture(scope="module")
def address(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = ["app.py", "--no-demo", "--runs", str(run.path.parent)]
    with serving(command, tmp_path_factory.mktemp("app") / "log", flag=["--port"]) as started:
        yield started


def model(page: Page) -> None:
    expect(page.locator("#runs table")).to_be_visible(timeout=30_000)
    for name in ("Calibration settings", "Log"):
        page.get_by_role("button", name=name).click()
    expect(page.locator("#model-facts")).to_contain_text("16.3 M")


def plots(count: int) -> Callable[[Page], None]:
    def drawn(page: Page) -> None:
        expect(page.locator(".js-plotly-plot")).to_have_count(count, timeout=60_000)

    return drawn


def ratio(page: Page) -> None:
    expect(page.locator("#ratio-measured")).to_contain_text("Measured at", timeout=120_000)
    expect(page.locator("#ratio-curve .js-plotly-plot")).to_be_visible(timeout=30_000)


def compare(page: Page) -> None:
    page.get_by_role("button", name="How to answer").click()
    page.get_by_label("Tokens", exact=True).fill("12")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#told")).to_contain_text(re.compile("part|same"), timeout=120_000)
    page.get_by_role("button", name="Colour by change").click()
    expect(page.locator(".scored")).to_be_visible(timeout=60_000)


def export(page: Page) -> None:
    expect(page.locator("#export-files table")).to_be_visible(timeout=30_000)
    for name in ("The same on the command line", "Push to the Hugging Face hub"):
        page.get_by_role("button", name=name).click()
    expect(page.locator("#push-send")).to_be_visible()


READY: Mapping[str, Callable[[Page], None]] = {
    "": model, "sensitivity": plots(7), "ratio": ratio, "similarity": plots(4), "compare": compare, "export": export,
}


@pytest.fixture
def ready(visit: Open, run: RunFolder) -> Open:
    """Opens a page of the demo's run, and shows whatever it has to show."""

    def opened(name: str, **how: object) -> Page:
        page = visit(f"/{name}?run={run.path.name}&ratio=0.4", **how)
        READY[name](page)
        return page

    return opened


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", list(READY))
def test_it_fits_every_width_and_locks_nobody_out(ready: Open, name: str, theme: str) -> None:
    page = ready(name, theme=theme)
    assert [fault for width in WIDTHS for fault in faults_of(page, width)] == []
    page.set_viewport_size({"width": 1920, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1920


@pytest.mark.parametrize("name", list(READY))
def test_the_tab_key_reaches_everything(ready: Open, name: str) -> None:
    assert unreached(ready(name)) == []


def test_a_keyboard_goes_from_the_model_to_a_layer(ready: Open) -> None:
    page = ready("")
    keys = page.keyboard
    tab_to(page, ".shade")
    keys.press("Enter")
    assert page.evaluate("document.body.classList.contains('dark')")
    tab_to(page, "#model-name input")
    keys.type("/etc")
    keys.press("Enter")
    for place in (page.get_by_test_id("toast-text"), page.locator(".empty")):
        expect(place.filter(has_text="'/etc' is neither a model folder")).to_be_visible(timeout=15_000)
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "nav a[href*='sensitivity']")
    keys.press("Enter")
    plots(7)(page)
    tab_to(page, "#sensitivity-routing .plot")
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        keys.press(key)
    expect(page.locator("#layer-facts h2")).to_have_text("Layer 1", timeout=10_000)
    page.wait_for_function("location.search.includes('layer=1')")


def test_a_keyboard_moves_the_slider_pins_and_lights_a_layer(ready: Open) -> None:
    page = ready("ratio")
    keys = page.keyboard
    tab_to(page, '[data-part="slider"]')
    for _ in range(3):
        keys.press("ArrowLeft")
    expect(page.locator('[data-part="percent"]')).to_have_text("37 %")
    expect(page.locator("#ratio-measured")).to_contain_text("Measured at 37 %", timeout=60_000)
    tab_to(page, '[data-part="pin"]')
    keys.press("Space")
    expect(page.locator('[data-part="pin-text"]')).to_contain_text("auto at 37 %")


def test_a_keyboard_asks_both_and_votes(ready: Open) -> None:
    page = ready("compare")
    keys = page.keyboard
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "#blind input")
    keys.press("Space")
    for prompt in ("Once upon a time there was", "My fellow Americans, tonight", "The state of our Union is", "It was a cold evening"):
        page.evaluate("document.activeElement.blur()")
        tab_to(page, "#prompt textarea")
        keys.press("Control+a")
        keys.type(prompt)
        tab_to(page, "#ask")
        keys.press("Enter")
        expect(page.locator(".answer .asked").first).to_have_text(prompt, timeout=60_000)
        expect(page.locator("#told")).to_contain_text(re.compile("better|same"), timeout=60_000)
        if "Which is better?" in page.locator("#told").inner_text():
            break
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "#vote-left")
    keys.press("Enter")
    expect(page.locator("#told")).to_contain_text("You preferred", timeout=15_000)


def test_a_keyboard_chooses_how_to_export(ready: Open) -> None:
    page = ready("export")
    expect(page.locator("#export-summary")).to_contain_text("factored")
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "#export-format input")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#export-summary")).to_contain_text("auto-40-dense", timeout=10_000)
    tab_to(page, "#export-write")
