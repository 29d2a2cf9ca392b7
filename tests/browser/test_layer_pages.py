"""The pages of layers and experts: choosing a layer by mouse and keyboard."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from analysed_run import analysed_run
from playwright.sync_api import Locator, Page, expect

Open = Callable[..., Page]
RUN = "analysed-0000000a"
PLOTS = {"sensitivity": 7, "similarity": 4}


@pytest.fixture(scope="module", autouse=True)
def analysed(runs: Path) -> None:
    torch.set_num_threads(1)
    analysed_run(runs)


@pytest.fixture
def shown(visit: Open) -> Open:
    """Opens one of the pages on the analysed run, and waits until everything is drawn."""

    def opened(name: str, query: str = "", **how: object) -> Page:
        page = visit(f"/{name}?run={RUN}{query}", **how)
        expect(page.locator(".js-plotly-plot")).to_have_count(PLOTS[name], timeout=30_000)
        return page

    return opened


def cell(page: Page, box: str, column: float, row: float) -> tuple[float, float]:
    """Where a cell of a heatmap lies, by shares of its width and height."""
    area = page.locator(f"#{box} .plot .nsewdrag").bounding_box()
    assert area is not None
    return area["x"] + column * area["width"], area["y"] + row * area["height"]


def heading(page: Page) -> Locator:
    return page.locator("#layer-facts h2")


def test_a_click_on_a_row_shows_that_layer_and_is_kept_in_the_address(shown: Open) -> None:
    page = shown("sensitivity", "&layer=0")
    expect(heading(page)).to_have_text("Layer 0")
    page.locator("#sensitivity-metrics .plot").scroll_into_view_if_needed()
    page.mouse.click(*cell(page, "sensitivity-metrics", 0.3, 5 / 6))
    expect(heading(page)).to_have_text("Layer 2", timeout=10_000)
    page.wait_for_function("location.search.includes('layer=2')")
    page.reload()
    expect(heading(page)).to_have_text("Layer 2", timeout=20_000)


def test_layers_can_be_chosen_by_keyboard(shown: Open) -> None:
    page = shown("sensitivity", "&layer=0")
    plot = page.locator("#sensitivity-routing .plot")
    plot.focus()
    plot.press("ArrowRight")
    plot.press("ArrowDown")
    plot.press("Enter")
    expect(heading(page)).to_have_text("Layer 1", timeout=10_000)


def test_a_click_on_a_methods_line_chooses_ratio_and_method(shown: Open) -> None:
    page = shown("sensitivity", "&layer=1")
    plot = page.locator("#layer-kept .plot")
    plot.scroll_into_view_if_needed()
    plot.focus()
    for _ in range(11):
        plot.press("ArrowRight")
    plot.press("ArrowUp")
    plot.press("Enter")
    expect(page.locator("#layer-plans .chosen")).to_contain_text("moe-svd", timeout=10_000)
    expect(page.locator(".strip")).to_contain_text("10 %")
    page.wait_for_function("location.search.includes('method=moe-svd') && location.search.includes('ratio=0.1')")


def test_matrix_estimator_and_control_change_what_is_shown(shown: Open) -> None:
    page = shown("similarity", "&layer=1")
    facts = page.locator("#similarity-facts")
    expect(facts).to_contain_text("W, debiased")
    page.get_by_role("radio", name="V", exact=True).check()
    expect(facts).to_contain_text("V at rank", timeout=10_000)
    page.get_by_role("radio", name="Biased, as in the paper").check()
    expect(facts).to_contain_text("read it only against chance", timeout=10_000)
    page.get_by_role("radio", name="Shuffled experts").check()
    expect(page.locator("#similarity-control figcaption")).to_contain_text("samples shuffled", timeout=10_000)
    page.get_by_role("radio", name="Down").check()
    expect(page.locator("#similarity-pairs figcaption")).to_contain_text("Layer 1, down", timeout=10_000)


@pytest.mark.parametrize(("name", "box", "file", "head"), [
    ("sensitivity", "sensitivity-metrics", "sensitivity-auto@0.5000.csv", "layer,f (of tokens)"),
    ("similarity", "similarity-pairs", "similarity-layer-0-input-W.csv", "expert,other,cka"),
])
def test_every_figure_gives_its_data(shown: Open, name: str, box: str, file: str, head: str) -> None:
    page = shown(name)
    for button in page.locator(".figure-tools button").all():
        expect(button).to_be_visible()
    with page.expect_download() as download:
        page.locator(f"#{box} .figure-tools button").click()
    assert download.value.suggested_filename == file
    assert Path(download.value.path()).read_text().startswith(head)


def test_runs_without_an_analysis_say_what_to_do(visit: Open) -> None:
    page = visit("/sensitivity?run=tiny-0000000f")
    expect(page.locator("#sensitivity-metrics .empty")).to_contain_text("Model page", timeout=20_000)
    page = visit("/similarity?run=tiny-0000000f")
    expect(page.locator("#similarity-pairs .empty")).to_contain_text("Compare experts", timeout=20_000)


def test_a_narrow_figure_names_its_lines_beside_the_drawing(shown: Open) -> None:
    page = shown("sensitivity", width=360)
    expect(page.locator("#layer-kept .figure-name").first).to_contain_text("auto")
    assert page.locator("#layer-kept g.legend").count() == 0
    wide = shown("sensitivity")
    assert wide.locator("#layer-kept .figure-name").count() == 0
