"""A result reads the same as CSV, JSON and a page, and the page needs nothing from anywhere."""

import csv
import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks import page as page_module
from moesvd_core.evaluation.benchmarks.figures import Figure
from moesvd_core.evaluation.benchmarks.machine import machine
from moesvd_core.evaluation.benchmarks.result import Result
from moesvd_core.evaluation.benchmarks.table import Table

RECORDS = ({"method": "svd", "bytes": 1234567, "kl": 0.12342}, {"method": "<original>", "bytes": 99, "kl": None})
SEEDS = Table.of("Seeds", ({"seed": 3, "kl": 0.5},))
TABLE = Table.of("Sizes", RECORDS, ["measured on <air>"], {"seeds": SEEDS})
FIGURE = Figure("Size", "Smaller is better.", [{"type": "bar", "x": [1], "y": ["</script>"]}], {"xaxis": {"title": {"text": "MB"}}})
RESULT = Result("sizes", TABLE, [FIGURE], {"command": "moesvd benchmark sizes", "torch": "9.9"})


def test_files_hold_the_unrounded_figures(tmp_path: Path) -> None:
    RESULT.write(tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "sizes.csv").read_text(encoding="utf-8").splitlines()))
    assert rows == [{"method": "svd", "bytes": "1234567", "kl": "0.12342"}, {"method": "<original>", "bytes": "99", "kl": ""}]
    assert (tmp_path / "out" / "sizes-seeds.csv").read_text(encoding="utf-8") == "seed,kl\n3,0.5\n"
    data = json.loads((tmp_path / "out" / "sizes.json").read_text(encoding="utf-8"))
    assert data["rows"] == list(RECORDS)
    assert data["details"]["seeds"]["rows"] == [{"seed": 3, "kl": 0.5}]
    assert data["facts"] == {"command": "moesvd benchmark sizes", "torch": "9.9"}


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_json_has_no_word_for_what_is_no_number(figure: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Result("sizes", Table.of("Sizes", ({"kl": figure},)), [], {}).json()


def test_the_terminal_shows_where_it_was_measured() -> None:
    assert RESULT.text().endswith("measured on <air>\n\ncommand: moesvd benchmark sizes; torch: 9.9\n")


def test_the_page_holds_tables_figures_and_plotly_and_asks_nobody_for_anything() -> None:
    made = page_module.page("sizes", TABLE, [FIGURE], RESULT.facts)
    assert "&lt;original&gt;" in made and "measured on &lt;air&gt;" in made
    assert "<original>" not in made
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", made)
    drawn = re.search(r'<script type="application/json" id="drawings">(.*?)</script>', made, re.DOTALL)
    assert drawn is not None
    assert json.loads(drawn.group(1)) == [{"data": FIGURE.data, "layout": FIGURE.layout}]
    assert len(made) > 1_000_000, "plotly's script is inside"


def test_without_plotly_the_page_says_so_and_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(page_module, "distribution", missing)
    with pytest.raises(InputError, match="pip install plotly"):
        RESULT.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sizes.csv", "sizes.json", "sizes-seeds.csv"}


def test_the_machine_names_what_figures_depend_on() -> None:
    found = machine()
    assert {"processor", "memory", "graphics card", "python", "torch", "transformers"} <= found.keys()
    assert all(found.values())
