"""Many visitors at once: `python tests/browser/benchmark_load.py` prints the table again.

On a finished run, while one job after another runs: browsers that walk through all pages, then tabs over plain HTTP that do the same faster
than a person could. Then a soak: tabs that are opened and closed, and what the server holds after the first half and at the end.
Exit status 1 where anything failed, where one event in twenty took longer than a second, or where the server grew by 5 %.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

HOUSE = Path(__file__).parents[2]
sys.path[:0] = [str(HOUSE), str(HOUSE / "tests"), str(HOUSE / "tests/runs")]

import httpx  # noqa: E402 - the paths come first
import torch  # noqa: E402
from analysed_run import analysed_run  # noqa: E402
from browser.conftest import ARGUMENTS, chromium_path, without_left_pages  # noqa: E402
from browser.serving import serving  # noqa: E402
from browser.visitor import Visitor  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

from moesvd_core.calibration.settings import Calibration  # noqa: E402
from moesvd_core.runs.client import Client  # noqa: E402
from moesvd_core.runs.source import prepare  # noqa: E402

PAGES = ("/", "/sensitivity", "/ratio", "/similarity", "/compare", "/export")
WORST_SECONDS, GROWTH = 1.0, 0.05
STREAMS = "performance.getEntriesByType('resource').filter(each => each.name.includes('/queue/data')).map(each => each.duration)"
"""Milliseconds of a page's events: the stream of an event's answers ends when the event does."""
THINKING = (1.0, 3.0)
"""Seconds between two things that a tab over plain HTTP does."""


@contextmanager
def jobs(runs: Path) -> Iterator[list[str]]:
    """One analysis of the demo model after the other, as long as the block lasts; gives the states in which they ended."""
    ended: list[str] = []
    over = threading.Event()
    client = Client(runs)

    def work() -> None:
        seed = 0
        while not over.is_set():
            seed += 1
            run = prepare(str(HOUSE / "assets/demo-moe"), Calibration(samples=32, seed=seed), root=runs)
            job = client.submit(run, "analyze", methods=["svd-llm"])
            while (status := client.status(run)).busy and not over.wait(0.5):
                pass
            if status.busy:
                client.cancel(run)
                ended.append(f"{client.wait(run, job.id, 60).state} at the end")
            else:
                ended.append(status.state)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join()


def browse(address: str, run: str, count: int, seconds: float) -> tuple[list[float], list[str]]:
    """Browsers that walk from page to page; seconds of every event, and everything that went wrong."""
    times: list[float] = []
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(playwright), args=list(ARGUMENTS))
        pages: list[Page] = []
        for _ in range(count):
            page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
            pages.append(page)
        rounds, deadline = 0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            for number, page in enumerate(pages):
                page.goto(f"{address}{PAGES[(number + rounds) % len(PAGES)]}?run={run}", wait_until="commit", timeout=60_000)
            for page in pages:
                page.wait_for_selector(f".strip:has-text('{run}')", timeout=60_000)
                page.wait_for_function(f"{STREAMS}.length", timeout=60_000)
                times += [milliseconds / 1000 for milliseconds in page.evaluate(STREAMS)]
                wrong += [toast.inner_text() for toast in page.locator(".toast-body").all()]
            rounds += 1
        browser.close()
    return times, without_left_pages(wrong)


async def visit(address: str, run: str, seconds: float, times: list[float], wrong: list[str]) -> None:
    """One tab that opens page after page and lets the clock of each tick, for so long."""
    visitor, deadline = Visitor(address), time.monotonic() + seconds
    await asyncio.sleep(random.uniform(0, THINKING[1]))
    while time.monotonic() < deadline:
        try:
            await visitor.open(random.choice(PAGES), f"run={run}&ratio=0.{random.randint(1, 6)}")
            for event in visitor.events("tick")[:1]:
                await asyncio.sleep(random.uniform(*THINKING))
                await visitor.fire(event)
        except (RuntimeError, httpx.HTTPError, AssertionError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
    times += visitor.seconds
    await visitor.close()


async def open_and_close(address: str, run: str, count: int, at_once: int) -> None:
    """So many tabs, a few at a time, each closed once its page has arrived."""
    left = iter(range(count))

    async def some() -> None:
        for number in left:
            visitor = Visitor(address)
            await visitor.open(PAGES[number % len(PAGES)], f"run={run}")
            await visitor.close()

    await asyncio.gather(*(some() for _ in range(at_once)))
    await asyncio.sleep(1)


def counts(address: str) -> Mapping[str, int]:
    found: Mapping[str, int] = httpx.get(f"{address}/counts", timeout=60).json()
    return found


def row(title: str, count: int, times: list[float], wrong: list[str]) -> bool:
    """One line of the table; whether it is as it should be."""
    middle, worst, longest = statistics.median(times), statistics.quantiles(times, n=20, method="inclusive")[-1], max(times)
    print(f"{title:<28}{count:>7}{len(times):>9}{middle:>9.2f} s{worst:>9.2f} s{longest:>9.2f} s{len(wrong):>8}", flush=True)
    for line in sorted(set(wrong))[:5]:
        print(f"    {line[:160]}")
    return not wrong and worst <= WORST_SECONDS


def main(folder: Path, asked: argparse.Namespace) -> int:
    """Print the tables."""
    torch.set_num_threads(1)
    runs = folder / "runs"
    run = analysed_run(runs).path.name
    os.environ["OMP_NUM_THREADS"] = "1"  # the job leaves a core to the server
    with serving(["tests/browser/counted_app.py", "--no-demo", "--runs", str(runs)], folder / "log", flag=["--port"]) as address:
        print(f"{'':<28}{'tabs':>7}{'events':>9}{'median':>11}{'95 %':>11}{'longest':>11}{'errors':>8}")
        with jobs(runs) as ended:
            kept = row("browsers", asked.browsers, *browse(address, run, asked.browsers, asked.seconds))
            times: list[float] = []
            wrong: list[str] = []

            async def all_of_them() -> None:
                await asyncio.gather(*(visit(address, run, asked.seconds, times, wrong) for _ in range(asked.tabs)))

            asyncio.run(all_of_them())
            kept &= row("tabs over plain HTTP", asked.tabs, times, wrong)
        print(f"jobs meanwhile: {', '.join(ended)}\n")
        kept &= not set(ended) - {"finished", "finished at the end", "cancelled at the end"}
        half = asked.sessions // 2
        asyncio.run(open_and_close(address, run, half, 4))
        before = counts(address)
        asyncio.run(open_and_close(address, run, asked.sessions - half, 4))
        after = counts(address)
        growth = after["memory"] / before["memory"] - 1
        first, last = (f"{counted['memory'] / 2**20:.0f} MiB" for counted in (before, after))
        print(f"server after {half} tabs {first}, after {asked.sessions} {last}: {growth:+.1%}")
        print("held at the end: " + ", ".join(f"{count} {name}" for name, count in after.items() if name != "memory"))
        grown = [name for name, count in after.items() if name not in ("memory", "event analytics") and count > before[name] + 8]
        print(f"grown: {', '.join(grown) or 'nothing'}")
    return 0 if kept and growth < GROWTH and not grown else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browsers", type=int, default=20, help="pages of chromium, each in a context of its own (%(default)s)")
    parser.add_argument("--tabs", type=int, default=50, help="tabs over plain HTTP (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="for each of both (%(default)s)")
    parser.add_argument("--sessions", type=int, default=600, help="tabs of the soak (%(default)s)")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder), parser.parse_args()))
