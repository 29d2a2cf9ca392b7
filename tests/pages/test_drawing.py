"""What components draw: numbers with units, everything escaped, every method with its own mark."""

import json

import pandas as pd
import plotly.graph_objects as go
import pytest

from moesvd_core.decomposition.registry import METHODS
from moesvd_core.marks import METHOD_MARKS
from moesvd_core.runs.estimate import Estimate
from pages.components import figure, tables, text
from pages.components.machine import Machine
from pages.components.model_facts import facts_html, needs_html

EVIL = '<img src=x onerror="alert(1)">'
FACTS = {
    "family": "mixtral", "model_type": "mixtral", "layers": 32, "moe_layers": 32, "experts": 8, "active": 2, "shared_experts": 0,
    "hidden": 4096, "width": 14336, "parameters": 46_702_792_704, "expert_parameters": 45_097_156_608,
    "active_parameters": 12_879_925_248, "bytes": 93_405_585_408, "dtype": "bfloat16", "context_length": 32768, "licence": None,
    "factored": False, "warnings": [EVIL],
}


def test_numbers_have_three_digits_and_a_unit() -> None:
    assert [text.count(value) for value in (8, 9_999, 16_300, 16_267_264, 46.7e9, 1.2e12)] == [
        "8", "9,999", "16.3 K", "16.3 M", "46.7 B", "1.20 T",
    ]
    assert [text.size(value) for value in (512, 32.5e6, 93.4e9)] == ["512 B", "32.5 MB", "93.4 GB"]
    assert [text.duration(value) for value in (8.4, 60, 200, 3000, 7500)] == ["8 s", "1 min", "3 min 20 s", "50 min", "2 h 5 min"]
    assert text.share(0.405) == "40.5 %"
    assert [text.number(value) for value in (None, 0.001234, 38.5656, 123456.0)] == ["–", "0.00123", "38.6", "123,456"]
    near = [999.7, 99.96, 999_600.0]
    assert [text.number(value) for value in near] == ["1,000", "100", "999,600"]
    assert [text.count(value) for value in (999_960_000, 999.6e9, 9_999, 99_960)] == ["1.00 B", "1.00 T", "9,999", "100 K"]
    assert [text.size(value) for value in (999_960_000, 999_400_000, 99.96e6)] == ["1.00 GB", "999 MB", "100 MB"]
    assert text.moment("2026-01-01T09:30:00+00:00") == "2026-01-01 09:30 UTC"
    assert text.moment("yesterday") == "yesterday"


@pytest.mark.parametrize("made", [
    text.notice(EVIL, "error"), text.empty(EVIL, EVIL), facts_html(EVIL, EVIL, FACTS), tables.facts([(EVIL, EVIL, EVIL)], EVIL),
    tables.table([{"name": EVIL}], [tables.Column("name", EVIL)], caption=EVIL, name=EVIL),
    tables.table([{"name": EVIL}], [tables.Column("name", EVIL, link=lambda row: EVIL)], caption=EVIL, name=EVIL),
], ids=["notice", "empty", "facts", "figures", "table", "links"])
def test_what_strangers_wrote_is_escaped(made: str) -> None:
    assert "<img" not in made
    assert 'onerror="' not in made


def test_a_table_keeps_values_for_the_download_and_lights_a_row() -> None:
    columns = [tables.Column("layer", "Layer", number=True), tables.Column("kept", "Kept", text.share, number=True)]
    made = tables.table([{"layer": 0, "kept": 1 / 3}, {"layer": 1, "kept": None}], columns, caption="Layers", name="layers",
                        chosen=lambda row: row["layer"] == 1)
    assert f'data-value="{1 / 3}">33.3 %' in made
    assert 'data-value="">–' in made
    assert made.count("class=chosen") == 1
    assert made.index("class=chosen") > made.index("33.3 %")


def test_a_figure_carries_its_data_and_leaves_style_to_the_browser() -> None:
    table = pd.DataFrame({"x": [1, 2], "y": [3.0, None]})
    data = json.loads(figure.drawing(go.Figure(go.Scatter(x=table["x"], y=table["y"])), table, "On a text.", "it"))
    assert data["columns"] == ["x", "y"]
    assert data["rows"] == [[1, 3.0], [2, None]]
    assert "template" not in data["figure"]["layout"]
    assert json.loads(figure.nothing("Nothing", "Do this")) == {"empty": "Nothing", "advice": "Do this"}


def test_every_method_is_drawn_in_its_own_way() -> None:
    assert set(METHOD_MARKS) == set(METHODS)
    assert len(set(METHOD_MARKS.values())) == len(METHODS)
    assert len({(mark.dash, mark.symbol) for mark in METHOD_MARKS.values()}) == len(METHODS)  # without colour too


def test_what_does_not_fit_is_said_in_words() -> None:
    machine = Machine(2, 10 * 10**9, 16 * 10**9, 10 * 10**9, 500 * 10**9)
    made = needs_html(FACTS, Estimate(memory=12 * 10**9, run_disk=10**9, export_disk=0, flops=1), 3700.0, machine)
    assert "12.0 GB of 10.0 GB free <strong>does not fit: 2.00 GB short</strong>" in made
    assert made.count("does not fit") == 2  # nor does a comparison, at two and a half times the model's size
    assert "about 1 h" in made
