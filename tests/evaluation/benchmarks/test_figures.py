"""Figures say what their tables say."""

from moesvd_core.evaluation.benchmarks.figures import figures_of
from moesvd_core.evaluation.benchmarks.table import Table
from moesvd_core.marks import METHOD_MARKS


def test_quality_has_a_line_a_method_in_its_own_colour_and_no_point_that_was_not_measured() -> None:
    none = {"perplexity": 40.0, "delta_nll": None, "delta_nll_spread": None, "kl_mean": None, "kl_mean_spread": None}
    table = Table.of("Quality", [
        {"method": "original", "bytes": 4_000_000, **none},
        {"method": "auto", "bytes": 3_000_000, **none, "delta_nll": 0.1, "delta_nll_spread": 0.01, "kl_mean": 0.2},
        {"method": "auto", "bytes": None, **none},
        {"method": "svd", "bytes": 3_000_000, **none, "delta_nll": 0.3, "kl_mean": 0.4},
    ])
    loss, kl = figures_of("quality", table)
    assert [(trace["name"], trace["x"], trace["y"]) for trace in loss.data] == [("auto", [3.0], [0.1]), ("svd", [3.0], [0.3])]
    assert loss.data[0]["line"]["color"] == METHOD_MARKS["auto"].color
    assert loss.data[0]["error_y"]["array"] == [0.01]
    assert [trace["y"] for trace in kl.data] == [[0.2], [0.4]]


def test_speed_is_a_grid_of_models_and_cells() -> None:
    table = Table.of("Speed", [
        {"model": "original, 1 × 32", "prefill × original": 1.0},
        {"model": "latent 40%, 1 × 32", "prefill × original": 2.0},
        {"model": "latent 40%, 4 × 32", "prefill × original": 0.5},
    ])
    (figure,) = figures_of("inference", table)
    (heat,) = figure.data
    assert (heat["y"], heat["x"]) == (["latent 40%", "original"], ["1 × 32", "4 × 32"])
    assert heat["z"] == [[1.0, -1.0], [0.0, None]]
    assert heat["text"] == [["2.00", "0.50"], ["1.00", ""]]


def test_a_speed_without_cells_is_one_column() -> None:
    table = Table.of("Speed", [{"model": "original", "decode × original": 1.0}, {"model": "auto 20%", "decode × original": 1.5}])
    assert [figure.data[0]["x"] for figure in figures_of("inference", table)] == [["all"]]


def test_a_table_without_rows_has_no_figures() -> None:
    assert figures_of("quality", Table.of("Nothing", [])) == []
