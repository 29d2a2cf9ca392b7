"""Pictures of every page, made from the running explorer on its demo: `python tests/browser/screenshots.py` writes docs/images again.

They show what a person sees: real figures, real answers, an export that was written. Their sizes in pixels are fixed; a picture that comes
out heavier than a page of documentation should carry is an error. `--runs DIR` goes on from the runs of an earlier call.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

HOUSE = Path(__file__).parents[2]
sys.path[:0] = [str(HOUSE), str(HOUSE / "tests")]

from browser.benchmark_slider import calibrated_demo, opened  # noqa: E402 - the paths come first
from playwright.sync_api import Browser, Page, expect  # noqa: E402

FOLDER = HOUSE / "docs" / "images"
WIDE, NARROW = 1280, 390
SHARP = 1.5
"""Pixels of the picture for one of the page: sharp enough for a good screen."""
HEAVIEST = 300_000
VIEW = "layer=6&method=auto&ratio=0.4"
SLOW = 300_000
"""Milliseconds that anything may take on a slow machine."""


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of the file, without ending.
        path: of the page; it shows the demo at `VIEW`.
        height: of the part that is shown, pixels of the page.
        act: what a person does first.
        since: selector of the element that the part starts at; "" for the page's top.
    """

    name: str
    path: str
    height: int
    act: Callable[[Page], None]
    since: str = ""
    theme: str = "light"
    width: int = WIDE


def drawn(page_name: str, *names: str) -> Callable[[Page], None]:
    """Wait until these figures of a page are drawn."""

    def wait(page: Page) -> None:
        for each in names:
            expect(page.locator(f"#{page_name}-{each} .main-svg").first).to_be_visible(timeout=SLOW)

    return wait


def model(page: Page) -> None:
    expect(page.locator("#next-steps a").first).to_be_visible(timeout=SLOW)
    expect(page.locator("#model-needs")).to_contain_text("This machine", timeout=SLOW)


def ratio(page: Page) -> None:
    expect(page.locator("#ratio-measured")).to_contain_text("Same first choice", timeout=SLOW)
    drawn("ratio", "curve")(page)


def pinned(page: Page) -> None:
    """Pin the plan by one method, and look at another's."""
    ratio(page)
    page.get_by_role("button", name="Pin this plan").click()
    field = page.get_by_role("combobox", name="Method")
    field.click()
    page.get_by_role("option", name="svd-llm").click()
    expect(page.locator('[data-part="layers-title"]')).to_contain_text("differ", timeout=SLOW)
    ratio(page)


def answers(page: Page) -> None:
    page.get_by_role("button", name="Ask both").click()
    page.wait_for_function("/part|same/.test(document.querySelector('#told').textContent)", timeout=SLOW)


def text(page: Page) -> None:
    page.get_by_role("button", name="Colour by change").click()
    expect(page.locator(".scored")).to_be_visible(timeout=SLOW)


def export(page: Page) -> None:
    expect(page.locator("#export-summary")).to_contain_text("MB", timeout=SLOW)
    if not page.locator("#export-files table").is_visible():
        page.get_by_role("button", name="Write and verify").click()
    expect(page.locator("#export-files table")).to_be_visible(timeout=SLOW)
    expect(page.locator("#export-card h2").first).to_be_visible(timeout=SLOW)
    expect(page.locator(".strip .worker")).to_have_text("idle", timeout=SLOW)


PICTURES = (
    Picture("model", "/", 1090, model),
    Picture("sensitivity", "/sensitivity", 1390, drawn("sensitivity", "metrics", "routing", "lines")),
    Picture("sensitivity-layer", "/sensitivity", 1330, drawn("layer", "curves-input", "curves-output", "kept"), "#layer-facts"),
    Picture("ratio", "/ratio", 1394, ratio),
    Picture("ratio-curve", "/ratio", 510, ratio, "#ratio-retained"),
    Picture("ratio-pinned", "/ratio", 640, pinned, "#ratio-map"),
    Picture("ratio-dark", "/ratio", 1394, ratio, theme="dark"),
    Picture("ratio-phone", "/ratio", 1394, ratio, "#ratio-control", width=NARROW),
    Picture("similarity", "/similarity", 1590, drawn("similarity", "pairs", "control", "means", "overlap")),
    Picture("compare", "/compare", 1000, answers),
    Picture("compare-text", "/compare", 480, text, '[role="tablist"]'),
    Picture("export", "/export", 1400, export),
)


def take(picture: Picture, browser: Browser, address: str, run: str) -> bytes:
    """The picture as a small PNG."""
    context = browser.new_context(viewport={"width": picture.width, "height": 900}, device_scale_factor=SHARP, reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{address}{picture.path}?run={run}&{VIEW}&__theme={picture.theme}")
    expect(page.locator(".strip .worker")).to_have_text("idle", timeout=SLOW)
    picture.act(page)
    page.wait_for_timeout(1500)  # toasts and glides come to rest
    box = page.locator(picture.since).first.bounding_box() if picture.since else None
    top = 0.0 if box is None else box["y"] + page.evaluate("scrollY") - 16
    shown = page.screenshot(full_page=True, clip={"x": 0, "y": top, "width": picture.width, "height": picture.height})
    context.close()
    return small(shown)


def small(shown: bytes) -> bytes:
    """The same in a palette of 256 colours; this way of choosing them keeps those of thin lines."""
    packed = io.BytesIO()
    image = Image.open(io.BytesIO(shown)).convert("RGB")
    image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def main(arguments: argparse.Namespace, runs: Path) -> int:
    """Write the pictures; exit status 1 when one is too heavy."""
    heavy = []
    with opened(runs) as (address, blank):
        run = calibrated_demo(runs).name
        browser = blank.context.browser
        assert browser is not None
        for picture in PICTURES:
            if arguments.only and picture.name not in arguments.only:
                continue
            packed = take(picture, browser, address, run)
            (FOLDER / f"{picture.name}.png").write_bytes(packed)
            print(f"{picture.name:<20}{len(packed) / 1000:>7.0f} kB", flush=True)
            heavy += [picture.name] if len(packed) > HEAVIEST else []
    if heavy:
        print(f"heavier than {HEAVIEST / 1000:.0f} kB: {', '.join(heavy)}", file=sys.stderr)
    return 1 if heavy else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the pictures of docs/images.")
    parser.add_argument("--runs", type=Path, help="folder of runs to go on from; default: a new one each time")
    parser.add_argument("--only", nargs="+", help="names of pictures; default: all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(given, given.runs or Path(folder) / "runs"))
