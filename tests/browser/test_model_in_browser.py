"""The first page: it opens, tells what a model is, starts, cancels and finds work again."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from browser.serving import serving
from playwright.sync_api import Browser, Page, expect
from runs.run_helpers import new_run

from moesvd_core.runs.client import Client
from pages.components.page import SLOW_SECONDS

Open = Callable[..., Page]


def settled(page: Page) -> Page:
    """The page once its data has arrived."""
    expect(page.locator("#runs table")).to_be_visible(timeout=30_000)
    return page


def test_the_page_opens_on_a_finished_run_and_puts_it_into_the_address(visit: Open) -> None:
    page = settled(visit())
    assert "run=" in page.url
    expect(page).to_have_title("Model · MoE-SVD Explorer")
    expect(page.locator(".strip .worker")).to_have_text("idle")
    expect(page.locator(".job-title")).to_have_text("Analysis finished")


def test_a_shared_address_shows_its_run(visit: Open) -> None:
    page = settled(visit("/?run=tiny-0000000e&ratio=0.25"))
    expect(page.locator(".strip")).to_contain_text("tiny-0000000e")
    expect(page.locator(".strip")).to_contain_text("25 %")
    expect(page.locator(".job-text")).to_contain_text("61 GiB are needed")
    expect(page.get_by_role("button", name="Resume")).to_be_enabled()


def test_names_of_strangers_are_text(visit: Open) -> None:
    page = settled(visit("/?run=evil-00000001"))
    expect(page.locator("#runs")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("#runs img").count() == 0


def test_a_bad_address_is_explained(visit: Open) -> None:
    page = settled(visit("/?run=gone-1&ratio=9"))
    expect(page.get_by_text("run gone-1 is not here")).to_be_visible()
    expect(page.get_by_text("ratio must be in [0, 1), got 9.0")).to_be_visible()


def test_a_model_is_known_within_seconds_and_a_wrong_name_is_explained(visit: Open) -> None:
    page = settled(visit())
    field = page.get_by_role("combobox", name="Model")
    field.fill("demo-moe")
    field.press("Enter")
    expect(page.locator("#model-facts")).to_contain_text("16.3 M", timeout=5_000)
    expect(page.locator("#model-needs")).to_contain_text("This machine")
    field.fill("/etc")
    field.press("Enter")
    refused = page.locator("#model-facts")
    expect(page.locator(".toast-body").get_by_text("'/etc' is neither a model folder")).to_be_visible()
    expect(refused).to_contain_text("'/etc' is neither a model folder")
    expect(refused).to_contain_text("is still chosen")
    expect(refused).not_to_contain_text("16.3 M")
    expect(page.locator("#model-needs")).not_to_contain_text("This machine")
    field.fill("   ")
    field.press("Enter")
    expect(refused).to_contain_text("No model is named")


SAID = """() => {
  window.said = new Set();
  const note = () => document.querySelectorAll('.sr-only[role=status]').forEach(each => window.said.add(each.textContent.trim()));
  new MutationObserver(note).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


def test_what_is_read_out_while_a_model_is_looked_at_is_words(visit: Open) -> None:
    page = settled(visit())
    page.evaluate(SAID)
    field = page.get_by_role("combobox", name="Model")
    field.fill("demo-moe")
    field.press("Enter")
    page.wait_for_function("window.said.has('Done')", timeout=15_000)
    assert [said for said in page.evaluate("[...window.said]") if re.fullmatch(r"\w+\.\w+", said)] == []


def test_work_starts_is_found_again_and_stops_within_seconds(visit: Open) -> None:
    page = settled(visit())
    field = page.get_by_role("combobox", name="Model")
    field.fill("demo-moe")
    field.press("Enter")
    expect(page.locator("#model-facts")).to_contain_text("16.3 M", timeout=15_000)
    page.get_by_role("button", name="Calibration settings").click()
    page.get_by_label("Windows", exact=True).fill("64")
    page.get_by_role("button", name="Analyse", exact=True).click()
    expect(page.locator(".job.running, .job.queued")).to_be_visible(timeout=15_000)
    expect(page.locator(".strip")).to_contain_text("demo-moe-")
    where = page.url.removeprefix(page.evaluate("location.origin"))
    page.close()  # nobody looks
    page = settled(visit(where))
    expect(page.locator(".job.running, .job.queued")).to_be_visible(timeout=15_000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".job.cancelled")).to_be_visible(timeout=15_000)
    expect(page.get_by_role("button", name="Resume")).to_be_enabled()


def test_light_and_dark_can_be_switched_and_are_kept(visit: Open) -> None:
    page = settled(visit())
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(background) == "rgb(16, 19, 24)"
    page.goto(page.url.replace("__theme=light&", ""))
    settled(page)
    assert page.evaluate(background) == "rgb(16, 19, 24)"


def test_a_run_is_deleted_once_that_was_confirmed_and_other_tabs_are_told(visit: Open, runs: Path) -> None:
    for name in ("going-1", "going-2"):
        new_run(runs, name)
    page, other = settled(visit("/?run=going-1&ratio=0.25")), settled(visit("/?run=going-1"))
    row = page.get_by_role("button", name="Delete run going-1")
    row.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#run-question [role=alert]")).to_contain_text("Delete run going-1 of tiny?")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#run-question")).to_be_hidden()
    expect(page.get_by_role("region", name="Runs")).to_be_focused()
    row.click()
    page.get_by_role("button", name="Delete run", exact=True).click()
    expect(page.get_by_text("Run going-1 is deleted")).to_be_visible()
    expect(page.locator("#runs")).not_to_contain_text("going-1")
    expect(page.locator(".strip")).to_contain_text("tiny-0000000f")
    page.wait_for_function("location.search.includes('run=tiny-0000000f') && location.search.includes('ratio=0.25')")
    assert not (runs / "going-1").exists()
    page.get_by_role("button", name="Delete run going-2").click()
    page.get_by_role("button", name="Delete run", exact=True).click()
    expect(page.locator("#runs")).not_to_contain_text("going-2")
    expect(page.locator(".strip")).to_contain_text("tiny-0000000f")
    other.get_by_role("button", name="Delete run going-1").click()
    told = other.get_by_text("run going-1 is not here: it was deleted")
    expect(told).to_be_visible()
    other.reload()
    expect(told).to_be_visible()
    expect(settled(other).locator(".strip")).to_contain_text("tiny-0000000f")


def test_what_others_start_is_seen_and_disturbs_nobody(visit: Open, runs: Path) -> None:
    own, others = (new_run(runs, name) for name in ("own-1", "others-1"))
    page = settled(visit("/?run=own-1"))
    field = page.get_by_role("combobox", name="Model")
    field.fill("half a na")
    page.get_by_role("button", name="Calibration settings").click()
    page.get_by_label("Seed", exact=True).fill("17")
    client = Client(runs, launch=lambda run: None)
    row = page.locator("#runs tr", has_text="others-1")
    try:
        field.focus()
        client.submit(others, "similarity")
        expect(row).to_contain_text("Comparing experts starting", timeout=15_000)
        expect(page.locator(".strip .worker")).to_have_text("nothing asked yet")
        expect(field).to_be_focused()
        expect(field).to_have_value("half a na")
        own.log.append("submitted", "1", action="evaluate", arguments={})
        own.log.append("finished", "1", result={})
        expect(page.locator(".job-title")).to_have_text("Evaluation finished", timeout=15_000)
        expect(field).to_have_value("half a na")
        expect(page.get_by_label("Seed", exact=True)).to_have_value("17")
        expect(page.locator(".strip .worker")).to_have_text("idle")
        expect(row).to_contain_text("interrupted", timeout=25_000)  # its worker never came
        pressed = page.get_by_role("button", name="Delete run own-1")
        pressed.focus()
        page.wait_for_timeout(1000 * SLOW_SECONDS + 1000)
        expect(pressed).to_be_focused()  # nothing changed, so nothing was drawn
    finally:
        for made in (own, others):
            shutil.rmtree(made.path)


def test_without_its_last_run_the_page_and_its_address_are_as_at_the_start(browser: Browser, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    new_run(runs, "last-1")
    with serving(["app.py", "--no-demo", "--runs", str(runs)], tmp_path / "log", flag=["--port"]) as address:
        page = browser.new_page()
        page.goto(f"{address}/?run=last-1&ratio=0.25")
        page.get_by_role("button", name="Delete run last-1").click(timeout=60_000)
        page.get_by_role("button", name="Delete run", exact=True).click()
        expect(page.locator("#runs")).to_contain_text("No runs yet")
        expect(page.locator("#model-facts")).to_contain_text("No model is chosen")
        page.wait_for_function("location.search === ''")
        expect(page.get_by_text("is not here")).to_have_count(0)
        page.close()


def test_whoever_leaves_pages_before_they_have_answered_stops_nobody(visit: Open) -> None:
    page = visit()
    for turn in range(24):
        page.goto(page.url, wait_until="commit")
        page.wait_for_selector(".head h1")
        page.wait_for_timeout(100 * (turn % 5))
    settled(visit())


def test_the_table_can_be_downloaded(visit: Open) -> None:
    page = settled(visit())
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV: Runs").click()
    assert download.value.suggested_filename == "runs.csv"
    assert Path(download.value.path()).read_text().startswith("Run,Model,State,Made\n")
