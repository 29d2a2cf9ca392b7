"""The whole path as a person goes it for the first time: from the name of a model to a checkpoint on their disk that loads."""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from pages.model import PLANNED

Open = Callable[..., Page]
PERCENT = 40
PROBE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import moesvd_core  # makes the factored form known
from transformers import AutoModelForCausalLM, AutoTokenizer
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(**tokenizer("My fellow Americans, tonight", return_tensors="pt")).logits
print(json.dumps({
    "finite": bool(torch.isfinite(logits).all()), "spread": float(logits.float().std()), "parameters": model.num_parameters(),
    "missing": len(loading["missing_keys"]), "unexpected": len(loading["unexpected_keys"]),
}))
"""
ORIGINAL_PARAMETERS = 16_273_664


def go(page: Page, name: str) -> None:
    """To another page, by the navigation."""
    page.get_by_role("navigation", name="Pages").get_by_role("link", name=name).click()
    page.wait_for_selector(f".head h1:text-is('{name}')", timeout=60_000)
    expect(page.locator(".strip")).to_contain_text("demo-moe-", timeout=30_000)


def test_from_a_model_to_a_checkpoint_that_loads(visit: Open, tmp_path: Path) -> None:
    page = visit()
    expect(page.locator("#runs table")).to_be_visible(timeout=30_000)

    field = page.get_by_role("combobox", name="Model")  # pick
    field.fill("demo-moe")
    field.press("Enter")
    expect(page.locator("#model-facts")).to_contain_text("16.3 M", timeout=15_000)  # probe
    expect(page.locator("#model-needs")).to_contain_text("This machine")

    page.get_by_role("button", name="Calibration settings").click()  # analyse
    page.get_by_label("Windows", exact=True).fill("12")
    page.get_by_label("Tokens a window").fill("64")
    for method in set(PLANNED) - {"auto"}:
        page.get_by_role("checkbox", name=method, exact=True).uncheck()
    page.get_by_role("button", name="Analyse", exact=True).click()
    page.wait_for_function("location.search.includes('run=demo-moe-')", timeout=30_000)
    expect(page.locator(".job.finished .job-title")).to_have_text("Analysis finished", timeout=240_000)

    go(page, "Sensitivity")  # heatmap
    expect(page.locator("#sensitivity-metrics .hm image, #sensitivity-metrics .heatmaplayer image").first).to_be_attached(timeout=30_000)
    expect(page.locator("#layer-facts h2")).to_have_text(re.compile("Layer \\d"))

    go(page, "Ratio")  # slider
    slider = page.locator('[data-part="slider"]')
    expect(page.locator('[data-part="loss-remark"]')).to_contain_text("fitted to", timeout=30_000)  # the analysis has measured
    expect(page.locator("#ratio-measured")).to_contain_text(f"Measured at {PERCENT} %", timeout=120_000)
    slider.focus()
    slider.press("ArrowRight")
    expect(page.locator("#ratio-measured")).to_contain_text(f"Measured at {PERCENT + 1} %", timeout=60_000)
    slider.press("ArrowLeft")
    page.wait_for_function("location.search.includes('ratio=0.4&') || location.search.endsWith('ratio=0.4')")

    go(page, "Similarity")  # similarity
    page.get_by_role("button", name="Compare experts").click()
    expect(page.locator(".js-plotly-plot")).to_have_count(4, timeout=120_000)

    go(page, "Compare")  # compare
    page.get_by_role("button", name="How to answer").click()
    page.get_by_label("Tokens", exact=True).fill("12")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#told")).to_contain_text(re.compile("part|same"), timeout=120_000)
    expect(page.locator("#right h2")).to_have_text(f"Compressed by {PERCENT} %, auto")

    go(page, "Export")  # export
    page.get_by_role("button", name="Write and verify").click()
    expect(page.locator(".job.finished .job-title")).to_have_text("Compression finished", timeout=240_000)
    name = f"demo-moe-auto-{PERCENT}-factored-compensated"
    expect(page.get_by_role("combobox", name="Export")).to_have_value(name, timeout=15_000)
    expect(page.locator("#export-card")).to_contain_text("perplexity (sotu, 64 windows of 256 tokens)")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download everything").click()
    with tarfile.open(download.value.path()) as tar:
        tar.extractall(tmp_path, filter="data")

    answer = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path / name)], capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 0, answer.stderr
    loaded = json.loads(answer.stdout.splitlines()[-1])
    assert loaded["finite"]
    assert loaded["spread"] > 0.1, "the logits say something"
    assert (loaded["missing"], loaded["unexpected"]) == (0, 0)
    assert abs(loaded["parameters"] / ORIGINAL_PARAMETERS - (1 - PERCENT / 100)) < 0.005
