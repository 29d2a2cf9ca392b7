"""Sensitivity of layers: Eq. 4 by hand, measuring, and the rank correlation that judges one by the other."""

from math import isnan

import numpy as np
import pytest
import torch

from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.errors import Cancelled, InputError, StatisticsError
from moesvd_core.progress import Progress
from moesvd_core.sensitivity import (
    Effect,
    LayerSensitivity,
    correlations,
    expert_table,
    layer_table,
    measure,
    rank_correlation,
    scores,
    sensitivities,
)


def layer_statistics(
    layer: int = 0, *, count: tuple[int, ...] = (30, 10), rank: tuple[int, ...] = (8, 4), owl: float = 0.02
) -> LayerStatistics:
    """Twenty tokens, two of two experts each; Grams are not looked at."""
    experts, none = len(count), torch.zeros(0)
    return LayerStatistics(
        layer=layer,
        tokens=20,
        count_E=torch.tensor(count),
        weight_square_E=torch.ones(experts),
        input_gram_EDD=none,
        output_gram_EDD=none,
        input_mean_ED=none,
        intermediate_mean_EM=none,
        outlier_E=torch.linspace(0.1, 0.3, experts, dtype=torch.float64),
        input_outlier=owl,
        principal_rank_E=torch.tensor(rank),
        saliency_E=torch.ones(experts),
        slope_EN=none,
    )


def test_score_is_the_sum_over_experts_of_frequency_rank_and_outliers() -> None:
    """Eq. 4: 1.5·8·0.1 + 0.5·4·0.3."""
    found = LayerSensitivity.of(layer_statistics())
    assert found.frequency_E.tolist() == [1.5, 0.5]
    assert found.score_E == pytest.approx([1.2, 0.6])
    assert found.score == pytest.approx(1.8)


def test_layers_come_in_the_order_of_the_model() -> None:
    layers = {index: layer_statistics(index) for index in (7, 2, 5)}
    assert [each.layer for each in sensitivities(layers)] == [2, 5, 7]


def test_scores_are_what_each_allocation_needs() -> None:
    found = [LayerSensitivity.of(layer_statistics(3, owl=0.04))]
    assert scores(found, "selective") == {3: pytest.approx(1.8)}
    assert scores(found, "owl") == {3: 0.04}
    assert scores(found, "greedy") is None
    assert scores(found, "uniform") is None


def test_refuses_statistics_that_saw_nothing_or_are_not_finite() -> None:
    with pytest.raises(StatisticsError, match="experts of layer 4 saw 0 tokens"):
        LayerSensitivity.of(layer_statistics(4, count=(0, 0)))
    damaged = layer_statistics(4)
    damaged.outlier_E[1] = float("nan")
    with pytest.raises(StatisticsError, match="outlier of layer 4, expert 1 is nan"):
        LayerSensitivity.of(damaged)
    with pytest.raises(StatisticsError, match="OWL's outlier ratio of layer 4 is inf"):
        LayerSensitivity.of(layer_statistics(4, owl=float("inf")))


def test_layer_table_has_a_row_a_layer_and_nan_for_what_is_not_known() -> None:
    found = sensitivities({index: layer_statistics(index) for index in (0, 1)})
    table = layer_table(found, predicted={1: 0.25}, measured={1: Effect(0.5, 0.75)})
    assert table.columns.tolist() == ["layer", "f", "r", "a", "S_L", "OWL", "predicted", "measured_nll", "measured_kl"]
    assert table.loc[0, ["f", "r", "a", "S_L", "OWL"]].tolist() == pytest.approx([1.5, 7.0, 0.15, 1.8, 0.02])
    assert table.loc[1, ["predicted", "measured_nll", "measured_kl"]].tolist() == [0.25, 0.5, 0.75]
    assert table.loc[0, ["predicted", "measured_nll", "measured_kl"]].isna().all()


def test_expert_table_has_a_row_an_expert_and_sums_to_the_layer() -> None:
    found = sensitivities({0: layer_statistics(0), 3: layer_statistics(3, count=(20, 10, 10), rank=(1, 2, 3))})
    table = expert_table(found)
    assert table[["layer", "expert"]].to_numpy().tolist() == [[0, 0], [0, 1], [3, 0], [3, 1], [3, 2]]
    assert table.groupby("layer")["score"].sum().tolist() == pytest.approx([each.score for each in found])


def test_measures_every_layer_alone_in_order_and_reports() -> None:
    seen: list[Progress] = []
    effects = measure([5, 1], lambda layer: Effect(layer / 10, layer / 100), seen.append)
    assert effects == {1: Effect(0.1, 0.01), 5: Effect(0.5, 0.05)}
    assert [(each.stage, each.done, each.total) for each in seen] == [("sensitivity", 1, 2), ("sensitivity", 2, 2)]
    assert "layer 5: ΔNLL +0.5000" in seen[1].message


def test_measuring_names_the_layer_whose_effect_is_not_finite() -> None:
    with pytest.raises(StatisticsError, match="layer 2 decomposed alone gives ΔNLL inf"):
        measure([2], lambda layer: Effect(float("inf"), 1.0))


def test_measuring_stops_when_asked_to() -> None:
    def stop(progress: Progress) -> None:
        raise Cancelled("stopped")

    measured: list[int] = []

    def evaluate(layer: int) -> Effect:
        measured.append(layer)
        return Effect(0.0, 0.0)

    with pytest.raises(Cancelled):
        measure([0, 1, 2], evaluate, stop)
    assert measured == [0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 100, 1000, 10000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12], -29 / 165),  # IQ and hours of TV
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # ties share their mean rank
    ],
)
def test_rank_correlation_of_known_examples(first: list[float], second: list[float], expected: float) -> None:
    assert rank_correlation(first, second) == pytest.approx(expected)


def test_rank_correlation_is_the_linear_one_of_mean_ranks() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, 40), rng.normal(size=40)
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(each) == value)) for value in each]) for each in (first, second)]
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_rank_correlation_of_nothing_to_compare_is_nan() -> None:
    assert all(isnan(rank_correlation(*pair)) for pair in (([], []), ([1], [2]), ([1, 1, 1], [1, 2, 3])))


def test_rank_correlation_refuses_gaps() -> None:
    with pytest.raises(InputError, match="leave out what is unknown"):
        rank_correlation([1, float("nan")], [1, 2])
    with pytest.raises(InputError, match=r"got shapes \(2,\) and \(3,\)"):
        rank_correlation([1, 2], [1, 2, 3])


def test_correlations_judge_each_metric_by_the_layers_that_were_measured() -> None:
    found = sensitivities({index: layer_statistics(index, rank=(8 + index, 4), owl=-index) for index in range(4)})
    measured = {index: Effect(0.1 * index, 0.2 * index) for index in range(3)}
    table = correlations(layer_table(found, predicted={0: 0.3, 1: 0.1}, measured=measured)).set_index("metric")
    assert table.loc["S_L"].tolist() == pytest.approx([1.0, 1.0, 3])
    assert table.loc["OWL"].tolist() == pytest.approx([-1.0, -1.0, 3])
    assert table.loc["predicted"].tolist() == pytest.approx([-1.0, -1.0, 2])
