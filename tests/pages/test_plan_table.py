"""The packed table says what the plans say, cell by cell."""

import base64
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planned_run import planned_run
from runs.run_helpers import new_run

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.errors import RunError
from moesvd_core.planning import DENSE, Ranks
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import analysed
from pages.components import plan_table
from pages.components.plan_table import DENSE_RANK, STATES, WHOLE


def unpacked(text: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays, as the browser reads them."""
    data = zlib.decompress(base64.b64decode(text))
    size = int.from_bytes(data[:4], "little")
    header, arrays, start = json.loads(data[4 : 4 + size]), {}, 4 + size
    for name, kind, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, kind, count, start).reshape(shape)
        start += arrays[name].nbytes
    assert start == len(data)
    return header, arrays


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return planned_run(tmp_path_factory.mktemp("runs"), methods=["auto", "svd", "moe-svd"])


@pytest.mark.parametrize("method", ["auto", "svd", "moe-svd"])
def test_every_plan_is_in_the_table(run: RunFolder, method: str) -> None:
    made = run.read_json("plans", f"all-{method}.json")
    header, arrays = unpacked(plan_table.read(run, method) or "")
    assert header["asked"] == [round(100 * plan["asked_ratio"]) for plan in made["plans"]]
    assert header["totals"]["bytes"] == [plan["bytes"] for plan in made["plans"]]
    assert header["original"]["active_parameters"] == made["plans"][0]["original_active_parameters"]
    for place in (0, 7, len(made["plans"]) - 1):
        for row, layer in enumerate(made["plans"][place]["layers"]):
            assert arrays["stored"][place, row] == layer["parameters"]
            assert arrays["loss"][place, row] == pytest.approx(layer["predicted_loss"], rel=1e-6)
            assert header["reasons"][arrays["reason"][place, row]] == layer["reason"]
            assert [STATES[code] for code in arrays["state"][place, row]] == [layer["structure"][side] for side in ("input", "output")]


def test_cells_add_up_to_what_the_layer_keeps(run: RunFolder) -> None:
    header, arrays = unpacked(plan_table.read(run, "auto") or "")
    kept_RL = arrays["kept"].mean(axis=2) / WHOLE
    assert kept_RL == pytest.approx(arrays["stored"] / np.array(header["original_layer"]), abs=1 / WHOLE)
    assert (arrays["kept"][0] == WHOLE).all()
    assert (np.diff(arrays["kept"].sum(axis=(1, 2), dtype=np.int64)) <= 0).all()


def test_load_is_what_calibration_routed(run: RunFolder) -> None:
    _, arrays = unpacked(plan_table.read(run, "auto") or "")
    rows = run.read_json("evaluations", "sensitivity.json")["experts"]
    assert arrays["load"].ravel() == pytest.approx([row["f"] for row in rows])


LAYER = ExpertLayer(0, "experts", experts=4, hidden=8, width=8, active=2)  # input 16 x 8 = 128, output 8 x 8 = 64


def row(structures: tuple[str, str], ranks: tuple[list[int], list[int]], stored: tuple[int, int]) -> dict[str, Any]:
    sides = ("input", "output")
    pairs = {"structure": structures, "ranks": ranks, "side_parameters": stored}
    return {name: dict(zip(sides, values, strict=True)) for name, values in pairs.items()}


def test_a_cell_is_empty_full_or_in_between() -> None:
    own = row(("per-expert", "per-expert"), ([0, 2, DENSE, DENSE], [0, 0, 1, DENSE]), (2 * 24 + 2 * 128, 16 + 64))
    assert plan_table.cells(own, LAYER).tolist() == [0, round(255 * 48 / 192), round(255 * 144 / 192), WHOLE]
    shared = row(("latent", "dense"), ([2], [DENSE]), (2 * (8 + 4 * 16), 4 * 64))
    assert plan_table.cells(shared, LAYER).tolist() == [round(255 * (36 + 64) / 192)] * 4
    nearly = row(("per-expert", "dense"), ([1, DENSE, DENSE, DENSE], [DENSE]), (127 + 3 * 128, 4 * 64))
    assert plan_table.cells(nearly, LAYER).tolist() == [254, WHOLE, WHOLE, WHOLE]
    pruned = row(("kept-experts", "kept-experts"), ([DENSE, 0, DENSE, 0], [DENSE, 0, DENSE, 0]), (2 * 128, 2 * 64))
    assert plan_table.cells(pruned, LAYER).tolist() == [WHOLE, 0, WHOLE, 0]
    merged = row(("merged-experts", "merged-experts"), ([2], [2]), (2 * 128, 2 * 64))
    assert plan_table.cells(merged, LAYER).tolist() == [round(255 / 2)] * 4
    based = row(("base-delta", "dense"), ([0, 0, 1, DENSE], [DENSE]), (128 + 24 + 128, 4 * 64))
    third = 128 / 3
    assert plan_table.cells(based, LAYER).tolist() == [*[round(255 * (third + 64) / 192)] * 2, round(255 * (third + 88) / 192), WHOLE]
    pivoted = row(("pivoted", "pivoted"), ([1, 2, DENSE, 0], [0, 3, DENSE, 0]), (24 + 46 + 128, 42 + 64))
    assert plan_table.cells(pivoted, LAYER).tolist() == [round(255 * 24 / 192), round(255 * (46 + 42) / 192), WHOLE, 0]
    barely = row(("shared-v", "shared-v"), ([1], [0]), (1, 0))
    assert plan_table.cells(barely, LAYER).tolist() == [1] * 4


def test_ranks_are_spread_with_dense_slots_at_the_top_alone() -> None:
    assert plan_table._spread([8, 0, 24, 16]) == (0, 8, 24)
    assert plan_table._spread([DENSE, 8, DENSE]) == (8, 8, DENSE_RANK)
    assert plan_table._spread([DENSE, 24, 8, DENSE, DENSE, 16]) == (8, 16, DENSE_RANK)
    assert plan_table._spread([DENSE, DENSE]) == (DENSE_RANK, DENSE_RANK, DENSE_RANK)
    assert plan_table._spread([40]) == (40, 40, 40)


@pytest.mark.parametrize("ranks", [[80, 88, 96, 104], [0, DENSE, 24, 8, DENSE, 16]])
def test_every_place_that_shows_a_plan_has_the_same_median(ranks: list[int]) -> None:
    found = Ranks.of(ranks)
    assert found.median in ranks
    assert plan_table._spread(ranks)[1] == found.median
    assert found.words.split(" · ")[1] == str(found.median)


def test_what_was_not_planned_has_no_table(run: RunFolder, tmp_path: Path) -> None:
    assert plan_table.read(run, "owl") is None
    assert plan_table.totals(run, "owl") is None
    assert analysed(run) == ["auto", "moe-svd", "svd"]
    assert analysed(new_run(tmp_path)) == []


def test_a_table_is_packed_again_when_its_file_has_changed(tmp_path: Path) -> None:
    run = planned_run(tmp_path, methods=["auto"])
    first = plan_table.read(run, "auto")
    assert plan_table.read(run, "auto") is first
    file = run.path / "plans" / "all-auto.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "plans": table["plans"][:5]}))
    os.utime(file, ns=(1, 1))
    assert len((plan_table.totals(run, "auto") or {})["bytes"]) == 5
    file.write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        plan_table.read(run, "auto")


def test_plans_of_a_large_model_fit_into_a_megabyte(tmp_path: Path) -> None:
    run = planned_run(tmp_path, layers=60, experts=128, hidden=2048, width=768, methods=["auto"])
    text = plan_table.read(run, "auto")
    assert text is not None
    assert len(text) < 1_000_000
    assert unpacked(text)[1]["kept"].shape == (81, 60, 128)
