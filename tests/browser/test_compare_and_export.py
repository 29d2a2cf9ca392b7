"""Comparing and exporting as a person does it, from the first question to the files on their disk."""

import http.cookiejar
import re
import shutil
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from browser.serving import serving
from playwright.sync_api import Page, expect
from run_exports import NAME, add_export
from runs.run_helpers import new_run
from runs.tiny_runs import analysed_tiny_run

from moesvd_core.checkpoint.manifest import check_manifest
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.votes import read_votes

Open = Callable[..., Page]
RUN = "taken-0000000b"


@pytest.fixture(scope="module")
def run(runs: Path) -> RunFolder:
    """An analysed run, older than any other, with one export."""
    torch.set_num_threads(1)
    made = analysed_tiny_run(runs / RUN, created="2023-01-01T00:00:00+00:00")
    add_export(made)
    return RunFolder.open(made.path)


@pytest.fixture
def compare(visit: Open, run: RunFolder) -> Open:
    """Opens the page of comparison."""

    def opened(query: str = "", **how: object) -> Page:
        page = visit(f"/compare?run={RUN}&ratio=0.4{query}", **how)
        expect(page.locator(".strip")).to_contain_text(RUN, timeout=30_000)
        page.get_by_role("button", name="How to answer").click()
        page.get_by_label("Tokens", exact=True).fill("24")
        page.get_by_label("Prompt").fill("once upon a time")
        return page

    return opened


@pytest.fixture
def export(visit: Open, run: RunFolder) -> Open:
    """Opens the page of exports."""

    def opened(query: str = "", **how: object) -> Page:
        page = visit(f"/export?run={RUN}&ratio=0.2{query}", **how)
        expect(page.locator("#export-files table")).to_be_visible(timeout=30_000)
        return page

    return opened


def asked(page: Page) -> Page:
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#told")).to_contain_text(re.compile("part|same"), timeout=60_000)
    return page


def test_both_answer_side_by_side_and_nothing_jumps(compare: Open) -> None:
    page = compare()
    before = page.locator("#scored-text").bounding_box()
    asked(page)
    for side, title in (("left", "Original"), ("right", "Compressed by 40 %, auto")):
        panel = page.locator(f"#{side} .answer")
        expect(panel.locator("h2")).to_have_text(title)
        expect(panel.locator(".asked")).to_have_text("once upon a time")
        expect(panel).to_contain_text("tokens a second")
        expect(panel).to_contain_text("kB")
    parted = page.locator(".answer mark").count()
    assert parted == (0 if "wrote the same" in page.locator("#told").inner_text() else 2)
    assert page.locator("#scored-text").bounding_box() == before


def test_the_ratio_can_be_changed_and_asked_again(compare: Open) -> None:
    page = compare()
    page.get_by_label("number input for Ratio").fill("10")
    page.keyboard.press("Enter")
    expect(page.locator(".strip")).to_contain_text("10 %")
    asked(page)
    expect(page.locator("#right h2")).to_have_text("Compressed by 10 %, auto")
    assert "ratio=0.1" in page.url


def test_a_ratio_out_of_bounds_gives_way_to_the_one_that_counts(compare: Open) -> None:
    page = compare()
    box = page.get_by_label("number input for Ratio")
    box.fill("95")
    page.keyboard.press("Enter")
    expect(page.get_by_text("greater than maximum")).to_be_visible()
    expect(box).to_have_value("40")
    expect(page.locator(".strip")).to_contain_text("40 %")


def test_a_part_of_a_percent_is_rounded_in_the_box_as_everywhere(compare: Open) -> None:
    page = compare()
    for typed, shown in (("40.4", "40"), ("30.6", "31")):
        box = page.get_by_label("number input for Ratio")
        box.fill(typed)
        page.keyboard.press("Enter")
        expect(box).to_have_value(shown)
        expect(page.locator(".strip")).to_contain_text(f"{shown} %")
    assert "ratio=0.31" in page.url


def test_a_ratio_beyond_the_methods_reach_is_brought_within_it(visit: Open, run: RunFolder) -> None:
    most = int(100 * run.read_json("plans", "all-auto.json")["max_ratio"])
    for path in ("compare", "export"):
        page = visit(f"/{path}?run={RUN}&ratio=0.9")
        expect(page.get_by_label("number input for Ratio")).to_have_value(str(most), timeout=30_000)
        expect(page.locator(".strip")).to_contain_text(f"{most} %")
        page.wait_for_function(f"location.search.includes('ratio={most / 100:g}')")
        expect(page.get_by_text("choose less")).to_have_count(0)


FREE = """input => {
  const pen = document.createElement('canvas').getContext('2d'), style = getComputedStyle(input);
  pen.font = style.font;
  const end = input.getBoundingClientRect().left + parseFloat(style.paddingLeft) + pen.measureText(input.value).width;
  return input.parentElement.querySelector('.icon-wrap').getBoundingClientRect().left - end;
}"""
"""Pixels between the text of a list and its arrow."""


@pytest.mark.parametrize(("method", "widths"), [("fisher", (360, 1024, 1280)), ("expert-pruning-frequency", (390, 1280, 1440))])
def test_a_method_does_not_run_under_the_arrow_of_the_list(visit: Open, run: RunFolder, method: str, widths: tuple[int, ...]) -> None:
    for path in ("compare", "export"):
        for width in widths:
            page = visit(f"/{path}?run={RUN}&method={method}&ratio=0.2", width=width)
            field = page.get_by_role("combobox", name="Method")
            expect(field).to_have_value(f"{method} (not planned)", timeout=30_000)
            assert field.evaluate(FREE) > 0, (path, width)
            page.context.close()


def test_a_fault_of_the_program_is_an_error_and_no_warning(visit: Open, runs: Path) -> None:
    made = new_run(runs, "faulty-1")
    (made.path / "votes.jsonl").mkdir()
    try:
        page = visit(f"/compare?run={made.name}")
        told = page.get_by_test_id("toast-body")
        expect(told).to_contain_text("unexpected IsADirectoryError: the server's log has the details", timeout=30_000)
        expect(told).to_contain_text("Error")
        expect(told).not_to_contain_text("Warning")
        expect(page.locator(".strip")).to_contain_text(made.name)  # the event went on
    finally:
        shutil.rmtree(made.path)


def test_a_blind_vote_is_counted_once(compare: Open, run: RunFolder) -> None:
    page = compare()
    page.get_by_label("Blind").check()
    before = len(read_votes(run))
    for prompt in ("once upon a time", "my fellow", "tonight", "the people", "we"):
        page.get_by_label("Prompt").fill(prompt)
        asked(page)
        if "Which is better?" in page.locator("#told").inner_text():
            break
    expect(page.locator("#left h2")).to_have_text("A")
    assert "Compressed by" not in page.locator(".answers").inner_html()
    page.get_by_role("button", name="A is better").click()
    expect(page.locator("#told")).to_contain_text("You preferred")
    expect(page.get_by_role("button", name="B is better")).to_be_disabled()
    page.get_by_role("tab", name="Blind votes").click()
    expect(page.locator("#votes")).to_contain_text("auto 40 %")
    assert len(read_votes(run)) == before + 1


def test_a_text_is_coloured_and_its_tokens_are_a_table(compare: Open) -> None:
    page = compare()
    page.locator("#scored-text textarea").fill("once upon a time we the people <b>")
    page.get_by_role("button", name="Colour by change").click()
    expect(page.locator(".scored")).to_have_text("once upon a time we the people <b>", timeout=60_000)
    assert page.locator(".scored span[title*=nats]").count() == page.locator("#scored tbody tr").count() > 5
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV: Tokens").click()
    assert Path(download.value.path()).read_text().startswith("Token,Reads,")


def test_a_wrong_question_is_explained(compare: Open) -> None:
    page = compare()
    page.get_by_label("Prompt").fill("  ")
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_text("prompt must not be empty")).to_be_visible(timeout=60_000)
    expect(page.locator("#told")).to_have_text("")


def test_half_a_token_and_too_many_are_refused_by_name(compare: Open) -> None:
    page = compare()
    field = page.get_by_label("Tokens", exact=True)
    for given, words in (("2.5", "must be a whole number of at least 1, got 2.5"), ("5000", "must be in [1, 4096], got 5000")):
        field.fill(given)
        page.get_by_role("button", name="Ask both").click()
        expect(page.get_by_text(f"“Tokens” {words}")).to_be_visible(timeout=60_000)


def test_an_export_goes_from_the_button_to_the_visitor_s_disk(export: Open, run: RunFolder, tmp_path: Path) -> None:
    page = export()
    expect(page.locator("#export-summary")).to_contain_text("model-mixtral-auto-20-factored-compensated")
    page.get_by_role("button", name="Write and verify").click()
    expect(page.locator(".job.finished .job-title")).to_have_text("Compression finished", timeout=120_000)
    name = "model-mixtral-auto-20-factored-compensated"
    expect(page.get_by_role("combobox", name="Export")).to_have_value(name, timeout=15_000)
    expect(page.locator("#export-card")).to_contain_text("compressed by")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download everything").click()
    assert download.value.suggested_filename == f"{name}.tar"
    with tarfile.open(download.value.path()) as tar:
        tar.extractall(tmp_path, filter="data")
    assert check_manifest(tmp_path / name) == len(list((run.path / "exports" / name).iterdir())) - 1
    with page.expect_download() as download:
        page.get_by_role("link", name="config.json", exact=True).click()
    assert Path(download.value.path()).read_bytes() == (run.path / "exports" / name / "config.json").read_bytes()


def test_the_box_the_preview_and_the_commands_say_the_same_whatever_method_is_chosen(export: Open) -> None:
    page = export("&method=svd")
    page.get_by_role("button", name="The same on the command line").click()
    box, summary, twin = page.locator("#export-compensate input"), page.locator("#export-summary"), page.locator("#export-twin")

    def agree(method: str, ticked: bool) -> None:
        expect(box).to_be_checked(checked=ticked, timeout=15_000)
        expect(summary).to_contain_text(f"exports/model-mixtral-{method}-20-factored{'-compensated' if ticked else ''} of this run")
        expect(twin).to_contain_text(f"compensate: {str(ticked).lower()}")

    agree("svd", False)
    for method, ticked in (("auto", True), ("expert-pruning", False), ("auto", True)):
        page.get_by_role("combobox", name="Method").click()
        page.get_by_role("option", name=re.compile(rf"(^|\s){method}( \(not planned\))?$")).click()
        agree(method, ticked)
    box.uncheck()
    agree("auto", False)


def test_a_push_without_network_is_explained_and_forgets_the_token(export: Open, run: RunFolder) -> None:
    page = export()
    page.get_by_role("combobox", name="Export").click()
    page.get_by_role("option", name=NAME).click()
    expect(page.locator("#export-files")).to_contain_text("41.0 %")
    page.get_by_role("button", name="Push to the Hugging Face hub").click()
    page.get_by_label("Repository", exact=True).fill("someone/tiny")
    token = page.get_by_label("Access token")
    assert token.get_attribute("type") == "password"
    token.fill("hf_aVerySecretToken123")
    page.get_by_role("button", name="Push as one commit").click()
    expect(page.locator("#push-state")).to_contain_text("set to work offline", timeout=30_000)
    expect(token).to_have_value("")
    kept = [path for path in run.path.parent.rglob("*") if path.is_file() and b"hf_aVerySecretToken123" in path.read_bytes()]
    assert kept == []


def test_the_commands_can_be_copied(export: Open) -> None:
    page = export()
    page.get_by_role("button", name="The same on the command line").click()
    page.get_by_role("button", name="Copy: From this run").click()
    expect(page.locator("[data-copy]").first).to_have_text("Copied")
    expect(page.locator("#export-twin")).to_contain_text(f"moesvd export {RUN}")


def test_downloads_ask_for_the_same_login_as_the_pages(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESVD_PASSWORD", "right")
    with serving(["app.py", "--no-demo", "--runs", str(run.path.parent)], tmp_path / "log", flag=["--port"]) as address:
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        file = f"{address}/download/{RUN}/{NAME}/README.md"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            opener.open(file)
        form = urllib.parse.urlencode({"username": "moesvd", "password": "right"}).encode()
        opener.open(f"{address}/login", form)
        assert b"tiny, compressed" in opener.open(file).read()


def test_an_export_is_deleted_once_that_was_confirmed(export: Open, run: RunFolder) -> None:
    extra = add_export(run, "extra-export")
    page = export()
    field = page.get_by_role("combobox", name="Export")
    expect(field).to_have_value("extra-export", timeout=15_000)
    page.get_by_role("button", name="Delete this export").click()
    expect(page.locator("#export-question [role=alert]")).to_contain_text("Delete export extra-export? 1.")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#export-question")).to_be_hidden()
    expect(page.get_by_role("button", name="Delete this export")).to_be_focused()
    assert extra.is_dir()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete export", exact=True).click()
    expect(page.get_by_text("Export extra-export is deleted")).to_be_visible()
    expect(field).not_to_have_value("extra-export")
    expect(page.locator("#export-files")).not_to_contain_text("extra-export")
    expect(page.locator("#export-question")).to_be_hidden()
    assert not extra.exists()


def test_a_damaged_export_is_marked_tells_how_and_is_deleted(export: Open, run: RunFolder) -> None:
    damaged = add_export(run, "broken-export")
    (damaged / "README.md").unlink()
    page = export()
    field = page.get_by_role("combobox", name="Export")
    field.click()
    page.get_by_role("option", name="broken-export (damaged)").click()
    expect(page.locator("#export-files [role=alert]")).to_contain_text("broken-export/README.md: is missing")
    expect(page.get_by_text("Push to the Hugging Face hub")).to_be_hidden()
    page.get_by_role("button", name="Delete this export").click()
    page.get_by_role("button", name="Delete export", exact=True).click()
    expect(page.get_by_text("Export broken-export is deleted")).to_be_visible()
    expect(page.locator("#export-files table")).to_be_visible()
    expect(page.get_by_text("Push to the Hugging Face hub")).to_be_visible()
    assert not damaged.exists()
