"""The figure in a browser: clicks and keys reach Python, its data can be read and saved, it follows light and dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.serving import serving
from playwright.sync_api import Browser, Page, expect

APP = Path(__file__).with_name("figure_app.py")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving([str(APP)], tmp_path_factory.mktemp("figure") / "log") as started:
        yield started


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page with the heatmap drawn; it must end without an error in its console."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    opened, errors = context.new_page(), []
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(f"{address}/?__theme=light")
    expect(opened.locator(".figure .nsewdrag")).to_be_visible(timeout=60_000)
    yield opened
    context.close()
    assert errors == []


def show(page: Page, kind: str) -> None:
    page.get_by_label("Kind").fill(kind)
    page.get_by_label("Kind").press("Enter")


def test_a_click_reaches_python(page: Page) -> None:
    area = page.locator(".figure .nsewdrag")
    box = area.bounding_box()
    assert box
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
    expect(page.get_by_label("Chosen")).to_have_value("1 10 0.2 0 b")


def test_keys_choose_as_clicks_do(page: Page) -> None:
    page.locator(".figure .plot").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):  # the first one only shows where one is
        page.keyboard.press(key)
    expect(page.locator(".figure .unseen")).to_have_text("2, 11: 0.600")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Chosen")).to_have_value("2 11 0.6 0 f")


def test_keys_walk_along_lines_too(page: Page) -> None:
    show(page, "lines")
    expect(page.locator(".figure .scatterlayer .trace")).to_have_count(2)
    page.locator(".figure .plot").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Chosen")).to_have_value("2 0.5 None row 1 None")


def test_its_data_are_shown_and_saved_and_are_no_formulas(page: Page) -> None:
    page.get_by_text("Show data").click()
    expect(page.locator(".figure-rows td").first).to_have_text("=1+1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV: Heat of things").click()
    assert download.value.suggested_filename == "heatmap.csv"
    assert Path(download.value.path()).read_text() == 'name,value\n\'=1+1,0.1\n"plain, with comma",\n'


def test_it_follows_the_shade(page: Page) -> None:
    color = "document.querySelector('.figure .xtick text').style.fill"
    light = page.evaluate(color)
    page.evaluate("document.body.classList.add('dark')")
    page.wait_for_function(f"{color} !== '{light}'")


def test_empty_and_full_take_the_same_room(page: Page) -> None:
    figure = page.locator(".figure")
    full = figure.bounding_box()
    show(page, "nothing")
    expect(page.locator(".figure .empty")).to_contain_text("Analyse a model first.")
    expect(page.locator(".figure-tools")).to_be_hidden()
    empty = figure.bounding_box()
    assert full
    assert empty
    assert abs(full["height"] - empty["height"]) < 1
    show(page, "heatmap")
    expect(page.locator(".figure .nsewdrag")).to_be_visible()
