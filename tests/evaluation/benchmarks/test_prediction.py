"""Predictions are judged by plans that their laws have not seen, and figures show all of them."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from moesvd_core.calibration import Calibration
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.figures import figures_of
from moesvd_core.evaluation.benchmarks.prediction import PredictionBenchmark
from moesvd_core.evaluation.benchmarks.table import Table
from moesvd_core.sensitivity import rank_correlation

torch.set_num_threads(1)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("prediction") / "model", fused=False)


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    settings = {"calibration": Calibration(samples=6, length=32, batch=3), "windows": 4, "length": 24, "dtype": torch.float32}
    asked = {"ratios": RATIOS, "fitted": (0.1, 0.2, 0.3), "layer_ratios": (0.3, 0.5, 0.8), "methods": ("svd-llm", "svd")}
    return PredictionBenchmark(str(folder), **settings, **asked).run()  # type: ignore[arg-type]


def test_plans_that_a_law_was_fitted_to_are_not_predicted_by_it(table: Table) -> None:
    laws = {row["method"]: row for row in table.details["laws"].records}
    for point in table.details["points"].records:
        law = laws[point["method"]]
        seen = point["layer"] is None and point["asked"] in (0.1, 0.2, 0.3) and float(point["delta_nll"] or 0) > 0
        assert (point["fitted"] is None) == (seen or law["factor"] is None)
        if point["layer"] is not None and law["factor"] is not None:
            assert point["fitted"] == pytest.approx(float(law["factor"]) * float(point["as planned"] or 0) ** float(law["power"] or 0))


def test_every_method_at_every_ratio_that_it_reaches_and_every_layer_alone(table: Table) -> None:
    points = table.details["points"].records
    layers = {point["layer"] for point in points if point["layer"] is not None}
    for name in ("svd-llm", "svd"):
        own = [point for point in points if point["method"] == name]
        assert [point["asked"] for point in own if point["layer"] is None] == [ratio for ratio in RATIOS if ratio < 0.9]
        assert [point["layer"] for point in own if point["asked"] == 0.5] == sorted(layers)
        assert not [point for point in own if point["asked"] == 0.8], "no layer can give so much"
        assert all(point["S_L"] is not None for point in own if point["layer"] is not None)


def test_the_table_judges_what_was_not_seen(table: Table) -> None:
    judged = [point for point in table.details["points"].records if point["fitted"] is not None]
    fitted, measured = [float(point["fitted"] or 0) for point in judged], [float(point["delta_nll"] or 0) for point in judged]
    first = table.records[0]
    assert (first["predictor"], first["over"], first["points"]) == ("fitted", "all", len(judged))
    assert first["Spearman with delta_nll"] == pytest.approx(rank_correlation(fitted, measured))
    errors = sorted(abs(claim / loss - 1) for claim, loss in zip(fitted, measured, strict=True))
    assert errors[(len(errors) - 1) // 2] <= float(first["median error"] or 0) <= errors[len(errors) // 2]
    cuts = [row for row in table.records if str(row["over"]).startswith("layers of each cut")]
    assert [row["predictor"] for row in cuts] == ["predicted", "S_L", "OWL"]


def test_figures_show_every_point_above_zero(table: Table) -> None:
    points = [point for point in table.details["points"].records if point["fitted"] is not None and float(point["delta_nll"] or 0) > 0]
    scatter, layers = figures_of("prediction", table)
    drawn = [trace for trace in scatter.data if trace.get("name") in ("svd-llm", "svd")]
    assert sum(len(trace["x"]) for trace in drawn) == len(points)
    assert [trace["name"] for trace in layers.data] == ["predicted", "S_L", "OWL"]
    assert all(max(trace["x"]) == 1 for trace in layers.data)


def test_laws_are_fitted_to_ratios_that_are_measured(folder: Path) -> None:
    with pytest.raises(InputError, match=r"got none of 0\.25"):
        PredictionBenchmark(str(folder), fitted=(0.2, 0.25, 0.4))
