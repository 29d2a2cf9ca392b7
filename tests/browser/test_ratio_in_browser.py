"""The ratio page as a person uses it: dragging asks nobody, what is shown is what the plans say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planned_run import RUN, add_curves, cut_alone, measured, planned_run
from playwright.sync_api import Page, expect
from runs.tiny_runs import analysed_tiny_run

from moesvd_core.planning import Recipe
from moesvd_core.runs.bounded import bounded_table
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import loss_laws
from pages.components.text import size

Open = Callable[..., Page]
LIVE = "live-0000000d"
LARGE = "large-0000000e"
LAW, MORE = "law-0000000d", "more-0000000e"
PERCENT, SLIDER = '[data-part="percent"]', '[data-part="slider"]'
ROWS = '[data-part="rows"] tr:not([hidden])'
FILLED = """(selector) => {
  const canvas = document.querySelector(selector), data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const colors = new Set();
  for (let pixel = 0; pixel < data.length; pixel += 4) if (data[pixel + 3] === 255) colors.add(data.slice(pixel, pixel + 3).join());
  return colors.size;
}"""

SLOW = """() => {
  const fetch = window.fetch, wait = what => new Promise(done => setTimeout(() => done(fetch(...what)), 1500));
  window.fetch = (...what) => (String(what[0]).includes('queue/join') ? wait(what) : fetch(...what));
}"""
"""A network on which an event takes a second and a half to the server."""


@pytest.fixture(scope="module")
def run(runs: Path) -> RunFolder:
    """With plans by two methods, and measured points of one; its model is not there."""
    made = planned_run(runs)
    add_curves(made, "auto")
    for percent, added in ((10, 0.01), (40, 0.04), (60, 0.2)):
        measured(made, Recipe(ratio=percent / 100), added)
    cut_alone(made, {0: (0.001, 0.006), 1: (0.001, 0.003), 2: (0.001, 0.002)})
    return made


@pytest.fixture
def ratio(visit: Open, run: RunFolder) -> Open:
    """Opens the page and waits for the plans."""

    def opened(query: str = f"run={RUN}", **how: object) -> Page:
        page = visit(f"/ratio?{query}", **how)
        expect(page.locator(PERCENT)).to_contain_text("%", timeout=30_000)
        return page

    return opened


def drag(page: Page, share: float) -> list[str]:
    """Drag the slider to a share of its length, without letting go; what was requested meanwhile."""
    page.wait_for_load_state("load")
    page.wait_for_timeout(1000)
    area = page.locator(SLIDER).bounding_box()
    assert area is not None
    asked: list[str] = []
    y, start = area["y"] + area["height"] / 2, area["x"] + 12
    page.mouse.move(start, y)
    page.mouse.down()
    page.on("request", lambda request: asked.append(request.url))
    page.mouse.move(start + share * (area["width"] - 24), y, steps=25)
    page.wait_for_timeout(500)
    return list(asked)


def test_the_predicted_loss_is_of_the_size_of_measured_ones(ratio: Open, run: RunFolder) -> None:
    page = ratio()
    law = loss_laws(run, ["auto"], "sotu").get("auto")
    assert law is not None and law.layers and law.together != 1
    expect(page.locator('[data-part="loss-remark"]')).to_contain_text("fitted to 6 measured plans")
    layers = {layer["layer"]: layer["predicted_loss"] for layer in run.read_json("plans", "all-auto.json")["plans"][40]["layers"]}
    shown = float(page.locator('[data-part="loss"]').inner_text())
    assert shown == pytest.approx(law.loss(layers), rel=0.02)
    for row, (layer, loss) in zip(page.locator(ROWS).all(), layers.items(), strict=True):
        alone = float(row.locator("td > span").all_inner_texts()[3].split()[0])
        assert alone == pytest.approx(law.layer_loss(layer, loss), rel=0.05)


def test_dragging_shows_every_plan_and_asks_nobody(ratio: Open, run: RunFolder) -> None:
    page = ratio()
    assert drag(page, 0.5) == []
    place = int(page.locator(PERCENT).inner_text().removesuffix(" %"))
    plan = run.read_json("plans", "all-auto.json")["plans"][place]
    expect(page.locator('[data-part="size"]')).to_have_text(size(plan["bytes"]))
    whole = f"of {size(plan['original_bytes'])}, on disk"
    expect(page.locator('[data-part="size-remark"]')).to_have_text(whole)
    rows = page.locator(ROWS)
    expect(rows).to_have_count(len(plan["layers"]))
    for row, layer in zip(rows.all(), plan["layers"], strict=True):
        cells = row.locator("td > span").all_inner_texts()
        assert [cell.split("\n")[0] for cell in cells[:2]] == [layer["structure"][side] for side in ("input", "output")]
        assert float(cells[2].removesuffix(" %")) == pytest.approx(100 * layer["parameters"] / layer["original_parameters"], abs=0.051)
    page.mouse.up()
    page.wait_for_function(f"location.search.includes('ratio=0.{place:02d}'.replace(/0$/, ''))")
    expect(page.locator(".strip")).to_contain_text(f"{place} %")


def test_operations_are_bounded_by_plans_that_are_sent_once(ratio: Open, run: RunFolder) -> None:
    page = ratio(f"run={RUN}&ratio=0.2")
    saved, operations = page.locator("#flops-slider"), page.locator('[data-part="operations"]')
    expect(page.locator('[data-part="saved"]')).to_have_text("any")
    free = operations.inner_text()
    saved.focus()
    for _ in range(30):
        saved.press("ArrowRight")
    page.wait_for_function("location.search.includes('flops_ratio=0.3')")
    title = page.locator('[data-part="layers-title"]')
    expect(title).to_contain_text("auto, 30 % fewer operations at 20 %", timeout=10_000)
    expect(page.locator(".strip")).to_contain_text("20 %, 30 % of operations")
    assert operations.inner_text() != free
    plans = bounded_table(run, "auto", 0.3)["plans"]
    assert drag(page, 0.5) == []
    place = int(page.locator(PERCENT).inner_text().removesuffix(" %"))
    expect(page.locator('[data-part="size"]')).to_have_text(size(plans[place]["bytes"]))
    page.mouse.up()
    page.wait_for_function("location.search.includes('flops_ratio=0.3') && !location.search.includes('ratio=0.2&')")
    page.reload()
    expect(page.locator('[data-part="saved"]')).to_have_text("30 %", timeout=30_000)
    expect(title).to_contain_text(f"fewer operations at {place} %")


def test_methods_that_do_not_weigh_operations_say_which_do(ratio: Open) -> None:
    page = ratio(f"run={RUN}&method=svd&ratio=0.2")
    expect(page.locator("#flops-slider")).to_be_disabled()
    expect(page.locator('[data-part="flops-reach"]')).to_have_text("svd does not weigh operations: auto, fisher, latent do")


def test_the_keyboard_moves_the_slider_and_the_address_follows(ratio: Open) -> None:
    page = ratio(f"run={RUN}&ratio=0.2")
    slider = page.locator(SLIDER)
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    expect(page.locator(PERCENT)).to_have_text("23 %")
    assert slider.get_attribute("aria-valuetext") == "23 percent removed"
    page.wait_for_function("location.search.includes('ratio=0.23')")
    page.reload()
    expect(page.locator(PERCENT)).to_have_text("23 %", timeout=30_000)


def test_a_slider_that_moves_on_before_the_server_has_answered_ends_where_it_stands(ratio: Open) -> None:
    page = ratio(f"run={RUN}&ratio=0.2")
    slider = page.locator(SLIDER)
    page.evaluate(SLOW)
    slider.focus()
    for _ in range(2):  # the second time while the first choice is on its way
        slider.press("ArrowRight")
        slider.press("ArrowRight")
        page.wait_for_timeout(600)
    expect(page.locator(PERCENT)).to_have_text("24 %")
    page.wait_for_function("location.search.includes('ratio=0.24')")
    expect(page.locator(".strip")).to_contain_text("24 %")


def test_another_method_brings_its_own_plans_and_one_that_is_not_planned_says_so(ratio: Open) -> None:
    page = ratio()
    page.locator("#ratio-method input").click()
    page.get_by_role("option", name="svd", exact=True).click()
    expect(page.locator('[data-part="layers-title"]')).to_contain_text("Layers, svd at", timeout=10_000)
    expect(page.locator('[data-part="reach"]')).to_contain_text("svd reaches")
    page.locator("#ratio-method input").click()
    page.get_by_role("option", name="owl (not planned)").click()
    expect(page.locator("#ratio-map .empty")).to_contain_text("No plans by owl yet", timeout=10_000)
    expect(page.locator("#ratio-plan")).to_be_enabled()


def test_a_pinned_plan_leaves_what_differs(ratio: Open, run: RunFolder) -> None:
    page = ratio(f"run={RUN}&ratio=0.1")
    page.locator('[data-part="pin"]').click()
    expect(page.locator('[data-part="pin-text"]')).to_have_text("Pinned: auto at 10 %")
    slider = page.locator(SLIDER)
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    plans = run.read_json("plans", "all-auto.json")["plans"]
    differing = [
        mine["layer"] for mine, other in zip(plans[13]["layers"], plans[10]["layers"], strict=True) if mine["ranks"] != other["ranks"]
    ]
    assert 0 < len(differing)
    expect(page.locator('[data-part="layers-title"]')).to_contain_text(f"{len(differing)} of 3 layers differ from auto at 10 %")
    expect(page.locator(f"{ROWS} th")).to_have_text([str(layer) for layer in differing])
    expect(page.locator('[data-part="size-remark"]')).to_contain_text("against the pinned plan")
    remark = page.locator('[data-part="loss-remark"]')
    expect(remark).to_contain_text("against the pinned plan")
    expect(remark).to_contain_text("fitted to 6 measured plans")
    expect(page.locator('[data-part="legend"]')).to_contain_text("more than the pinned plan")
    page.locator('[data-part="unpin"]').click()
    expect(page.locator(ROWS)).to_have_count(3)


def test_cells_say_what_they_hold_and_light_their_layer(ratio: Open) -> None:
    page = ratio()
    canvas = page.locator('[data-part="experts"]')
    canvas.scroll_into_view_if_needed()
    area = canvas.bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + area["width"] - 8, area["y"] + 24 + 56 * 1.5)
    expect(page.locator('[data-part="tip"]')).to_contain_text("Layer 1, expert 3")
    expect(page.locator('[data-part="tip"]')).to_contain_text("of tokens")
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("[data-part=rows] tr.chosen th")).to_have_text("1")
    page.wait_for_function("location.search.includes('layer=1')")


def test_a_row_of_the_map_of_ratios_leads_there(ratio: Open) -> None:
    page = ratio(f"run={RUN}&ratio=0.2")
    canvas = page.locator("#ratio-retained canvas")
    canvas.scroll_into_view_if_needed()
    canvas.click(position={"x": 120, "y": 24 + 4 * 8 + 2})
    expect(page.locator(PERCENT)).to_have_text("8 %")
    page.wait_for_function("location.search.includes('ratio=0.08')")


def test_everything_drawn_can_be_downloaded(ratio: Open) -> None:
    page = ratio(f"run={RUN}&ratio=0.2")
    heads = {
        "experts": ("experts-auto-20.csv", "layer,expert,kept,share of tokens", 12),
        "layers": ("layers-auto-20.csv", "layer,gate and up,down,", 3),
        "retained": ("retained-auto.csv", '"ratio, %",layer 0,', 70),
    }
    for name, (file, head, least) in heads.items():
        with page.expect_download() as download:
            page.locator(f'[data-save="{name}"]').click()
        assert download.value.suggested_filename == file
        lines = Path(download.value.path()).read_text().splitlines()
        assert lines[0].startswith(head)
        assert len(lines) - 1 >= least


def test_the_curve_shows_measured_points_of_all_methods(ratio: Open) -> None:
    page = ratio()
    expect(page.locator("#ratio-curve .scatterlayer .trace")).to_have_count(4, timeout=30_000)
    expect(page.locator("#ratio-curve figcaption")).to_contain_text("held-out text of sotu")
    expect(page.locator("#ratio-measured")).to_contain_text("Measured at 40 % by auto")


def test_letting_go_measures_a_small_model_and_puts_the_point_on_the_curve(ratio: Open, runs: Path) -> None:
    torch.set_num_threads(1)
    analysed_tiny_run(runs / LIVE, created="2023-01-02T00:00:00+00:00")
    page = ratio(f"run={LIVE}&ratio=0.1")
    expect(page.locator("#ratio-measured")).to_contain_text("Measured at 10 % by auto", timeout=60_000)
    drag(page, 0.5)
    page.mouse.up()
    percent = page.locator(PERCENT).inner_text()
    expect(page.locator("#ratio-measured")).to_contain_text(f"Measured at {percent} by auto", timeout=30_000)
    two_points = "trace => trace.mode === 'markers' && trace.x.length === 2"
    page.wait_for_function(f"document.querySelector('#ratio-curve .plot').data.some({two_points})")


def test_one_law_tells_the_predicted_loss_and_the_curve(ratio: Open, runs: Path) -> None:
    torch.set_num_threads(1)
    made = analysed_tiny_run(runs / LAW, created="2023-01-03T00:00:00+00:00")
    for percent in (30, 40):
        measured(made, Recipe(ratio=percent / 100), percent / 1000)
    page = ratio(f"run={LAW}&ratio=0.15")
    page.locator(SLIDER).press("ArrowLeft")
    expect(page.locator("#ratio-measured")).to_contain_text("Measured at 14 % by auto", timeout=20_000)
    expect(page.locator("#ratio-curve figcaption")).to_contain_text("fitted to")
    told = page.locator("#ratio-curve figcaption").inner_text().partition("fitted to ")[2].split()[0]
    expect(page.locator('[data-part="loss-remark"]')).to_contain_text(f"fitted to {told} measured plans")


def test_a_ratio_beyond_the_methods_reach_is_nowhere(ratio: Open) -> None:
    page = ratio(f"run={RUN}&method=auto&ratio=0.75")
    page.locator("#ratio-method input").click()
    page.get_by_role("option", name="svd", exact=True).click()
    expect(page.locator('[data-part="layers-title"]')).to_contain_text("Layers, svd at", timeout=10_000)
    most = int(page.locator(SLIDER).get_attribute("max") or "")
    assert most < 75
    expect(page.locator(PERCENT)).to_have_text(f"{most} %")
    expect(page.locator(".strip")).to_contain_text(f"{most} %")
    page.wait_for_function(f"location.search.includes('ratio={most / 100:g}')")
    page.locator("#ratio-method input").click()
    page.get_by_role("option", name="auto", exact=True).click()
    expect(page.locator('[data-part="layers-title"]')).to_contain_text(f"Layers, auto at {most} %", timeout=10_000)
    opened = ratio(f"run={RUN}&method=svd&ratio=0.75")
    expect(opened.locator(".strip")).to_contain_text(f"{most} %")
    opened.wait_for_function(f"location.search.includes('ratio={most / 100:g}')")


def test_a_plan_of_more_operations_says_so(ratio: Open, runs: Path) -> None:
    made = planned_run(runs, MORE, methods=["svd"])
    table = made.read_json("plans", "all-svd.json")
    for percent, factor in ((20, 1.053), (21, 1.004), (22, 0.95)):
        table["plans"][percent]["flops"] = round(factor * table["plans"][percent]["original_flops"])
    (made.path / "plans" / "all-svd.json").write_text(json.dumps(table))
    page = ratio(f"run={MORE}&method=svd&ratio=0.2")
    for words in (", 5 % more", ", 0 % saved", ", 5 % saved"):
        expect(page.locator('[data-part="operations-remark"]')).to_contain_text(words)
        page.locator(SLIDER).press("ArrowRight")


def test_sixty_layers_of_128_experts_are_drawn(ratio: Open, runs: Path) -> None:
    planned_run(runs, LARGE, layers=60, experts=128, hidden=2048, width=768, methods=["auto"])
    page = ratio(f"run={LARGE}")
    expect(page.locator("#ratio-map .is-wide")).to_be_visible()
    expect(page.locator(ROWS)).to_have_count(60)
    assert page.evaluate(FILLED, '[data-part="experts"]') > 50
    assert drag(page, 0.7) == []
    page.mouse.up()


def test_without_plans_the_page_says_what_to_do(visit: Open) -> None:
    page = visit("/ratio?run=tiny-0000000f")
    expect(page.locator("#ratio-map .empty")).to_contain_text("This run has no plans yet", timeout=30_000)
    expect(page.locator("#ratio-curve .empty")).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_map_is_drawn_at_every_width(ratio: Open, theme: str) -> None:
    page = ratio(theme=theme)
    for width in (360, 768, 1440, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert page.evaluate(FILLED, '[data-part="experts"]') > 5
