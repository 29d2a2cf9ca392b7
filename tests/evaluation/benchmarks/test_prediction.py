"""Predictions are judged by plans that their laws have not seen, and figures show all of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from moesvd_core.calibration import Calibration
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.bench import CalibratedBench
from moesvd_core.evaluation.benchmarks.figures import figures_of
from moesvd_core.evaluation.benchmarks.prediction import PredictionBenchmark
from moesvd_core.evaluation.benchmarks.result import Result
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.evaluation.perplexity import Evaluation
from moesvd_core.planning import Plan
from moesvd_core.planning.loss_law import layer_losses
from moesvd_core.sensitivity import rank_correlation

torch.set_num_threads(1)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.9)
OWN = {0: 0.8, 1: 1.0, 2: 1.5}
"""Factors of layers in the world that is measured here: a random model's losses are noise."""


def evaluation_of(_: CalibratedBench, plan: Plan) -> Evaluation:
    """What a plan loses in that world, all but exactly measured."""
    lost = sum(2.5 * OWN[layer] * loss**0.8 for layer, loss in layer_losses(plan).items())
    figures = {"kl_mean": lost, "delta_nll": lost, "delta_nll_stderr": lost / 1000}
    return Evaluation("sotu", 4, 24, 92, 3.0 + lost, 20.0, 0.1, **figures)


def benchmark(folder: Path, **given: object) -> Table:
    settings = {"calibration": Calibration(samples=6, length=32, batch=3), "windows": 4, "length": 24, "dtype": torch.float32}
    asked = {"ratios": RATIOS, "fitted": (0.1, 0.2, 0.3), "layer_ratios": (0.2, 0.4, 0.8), "layers_fitted": (0.4,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibratedBench, "measured", evaluation_of)
        return PredictionBenchmark(str(folder), **{**settings, **asked, **given}).run()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("prediction") / "model", fused=False)


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return benchmark(folder, methods=("svd-llm", "svd"))


def row(table: Table, predictor: str, over: str) -> dict[str, Cell]:
    return next(row for row in table.records if (row["predictor"], row["over"]) == (predictor, over))


def is_seen(point: Mapping[str, Cell]) -> bool:
    """Whether the law was fitted to a point."""
    return point["asked"] in ((0.1, 0.2, 0.3) if point["layer"] is None else (0.4,))


def test_plans_that_a_law_was_fitted_to_are_not_predicted_by_it(table: Table) -> None:
    points = table.details["points"].records
    for point in points:
        assert (point["fitted"] is None) == is_seen(point)
        assert (point["whole models alone"] is None) == (is_seen(point) and point["layer"] is None)
    assert {law["points"] for law in table.details["laws"].records} == {6}


def test_layers_that_were_cut_alone_are_met_and_others_are_not(table: Table) -> None:
    learned, whole = (row(table, predictor, "single layers") for predictor in ("fitted", "whole models alone"))
    assert learned["points"] == whole["points"] == 6
    assert float(learned["median error"] or 0) < 0.15 < float(whole["median error"] or 0)
    assert float(learned["standard error"] or 0) == pytest.approx(0.001)
    unseen, judged = row(table, "whole models alone", "all that it did not see"), row(table, "fitted", "all")
    assert int(unseen["points"] or 0) == int(judged["points"] or 0) + 6


def test_a_plan_that_two_ratios_come_to_is_seen_by_both(folder: Path) -> None:
    """Ratios of half a percent give the same ranks in so small a layer."""
    points = benchmark(folder, methods=("svd",), layer_ratios=(0.4, 0.4001)).details["points"].records
    same = [point for point in points if point["asked"] == 0.4001]
    assert same
    assert all(point["fitted"] is None for point in same)


def test_without_cuts_there_is_one_law(folder: Path) -> None:
    points = benchmark(folder, methods=("svd",), layers_fitted=()).details["points"].records
    assert all(point["fitted"] == point["whole models alone"] for point in points)
    assert any(point["fitted"] is not None for point in points)


def test_every_method_at_every_ratio_that_it_reaches_and_every_layer_alone(table: Table) -> None:
    points = table.details["points"].records
    layers = {point["layer"] for point in points if point["layer"] is not None}
    for name in ("svd-llm", "svd"):
        own = [point for point in points if point["method"] == name]
        assert [point["asked"] for point in own if point["layer"] is None] == [ratio for ratio in RATIOS if ratio < 0.9]
        assert [point["layer"] for point in own if point["asked"] == 0.4] == sorted(layers)
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


@pytest.mark.parametrize(("ratio", "unknown"), [(0.05, 2), (0.0, 5)])
def test_what_one_point_cannot_tell_is_not_known(ratio: float, unknown: int, folder: Path, tmp_path: Path) -> None:
    """One plan has no rank among others, and one that loses nothing no error as a share of that."""
    table = benchmark(folder, methods=("svd",), ratios=(ratio, 0.1, 0.2, 0.3), layer_ratios=(), layers_fitted=())
    Result("prediction", table, figures_of("prediction", table), {}).write(tmp_path)
    first = table.records[0]
    figures = list(first)[3:]
    assert (first["over"], first["points"]) == ("all", 1)
    assert [name for name in figures if first[name] is None] == figures[:unknown]
    assert json.loads((tmp_path / "prediction.json").read_text(encoding="utf-8"))["rows"] == table.records
    written = (tmp_path / "prediction.csv").read_text(encoding="utf-8")
    assert written.splitlines()[1].split(",")[3 : 3 + unknown] == [""] * unknown
    assert "nan" not in table.text() + written


def test_figures_show_every_point_above_zero(table: Table) -> None:
    points = [point for point in table.details["points"].records if point["fitted"] is not None and float(point["delta_nll"] or 0) > 0]
    scatter, layers = figures_of("prediction", table)
    drawn = [trace for trace in scatter.data if trace.get("name") in ("svd-llm", "svd")]
    assert sum(len(trace["x"]) for trace in drawn) == len(points)
    assert [trace["name"] for trace in layers.data] == ["predicted", "S_L", "OWL"]
    assert all(max(trace["x"]) == 1 for trace in layers.data)


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), "0.5", True])
def test_refuses_ratios_that_no_method_reaches(ratio: float) -> None:
    for name, whole in (("ratios", "the model's parameters"), ("layer_ratios", "a layer's experts")):
        with pytest.raises(InputError, match=rf"^{name} must be numbers in \[0, 1\), shares of {whole} to remove, got {ratio!r}$"):
            PredictionBenchmark("nowhere", **{name: (0.2, 0.4, 0.6, ratio)})  # type: ignore[arg-type]


def test_laws_are_fitted_to_ratios_that_are_measured(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^ratios .* got none of 0\.25"):
        PredictionBenchmark(str(folder), fitted=(0.2, 0.25, 0.4))
    with pytest.raises(InputError, match=r"^layer_ratios .* got none of 0\.5"):
        PredictionBenchmark(str(folder), layers_fitted=(0.4, 0.5))
