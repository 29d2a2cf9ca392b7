"""Inner products of a layer: against the tokens that they were collected from, and for experts that saw few or none."""

import pytest
import torch
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.decomposition import metrics
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.errors import CheckpointError, StatisticsError
from moesvd_core.planning import SIDES


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shrinkage and next to no ridge: what is left are the formulas."""
    monkeypatch.setattr(metrics, "PSEUDO_SHARE", 0.0)
    monkeypatch.setattr(metrics, "GRAM_RIDGE", 1e-13)
    monkeypatch.setattr(metrics, "GRADIENT_RIDGE", 1e-13)


def made(tiny: TinyLayer) -> LayerMetric:
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


@pytest.mark.usefixtures("exact")
def test_output_error_is_the_second_order_change_of_the_loss() -> None:
    tiny = tiny_layer()
    metric = made(tiny)
    delta_DM = torch.randn(10, 7, dtype=torch.float64)
    change_TD = tiny.p_TE[:, :1] * (tiny.h_TEM[:, 0] @ delta_DM.T)
    gamma_DD = tiny.g_TD.T @ tiny.g_TD / len(tiny.g_TD)
    wanted = 0.5 * torch.einsum("td,de,te->", change_TD, gamma_DD, change_TD) / len(change_TD)
    weighed_DM = metric.left("output", "output", 0).full() @ metric.right("output", "output", 0).times(delta_DM)
    got = metric.unit * (weighed_DM @ delta_DM.T).trace()
    torch.testing.assert_close(got, wanted)


@pytest.mark.usefixtures("exact")
def test_input_error_is_the_second_order_change_of_the_loss_of_one_neuron() -> None:
    tiny = tiny_layer(gated=False)
    metric = made(tiny)
    delta_ND = torch.zeros(7, 10, dtype=torch.float64)
    delta_ND[2] = torch.randn(10, dtype=torch.float64)
    change_TD = tiny.p_TE[:, :1] * (tiny.x_TD @ delta_ND.T @ tiny.weights.output_EDM[0].T)
    gamma_DD = tiny.g_TD.T @ tiny.g_TD / len(tiny.g_TD)
    wanted = 0.5 * torch.einsum("td,de,te->", change_TD, gamma_DD, change_TD) / len(change_TD)
    weighed_ND = metric.left("input", "output", 0).full() @ metric.right("input", "output", 0).times(delta_ND)
    got = metric.unit * (weighed_ND @ delta_ND.T).trace()
    torch.testing.assert_close(got, wanted)


def test_row_weights_follow_the_neurons_of_interleaved_rows() -> None:
    tiny = tiny_layer()
    order_N = torch.arange(14).view(2, 7).T.flatten()
    mixed = ExpertLayer(**{**tiny.layer.__dict__, "rows": "interleaved"})
    statistics = LayerStatistics(**{**tiny.statistics.__dict__, "slope_EN": tiny.statistics.slope_EN[:, order_N]})
    straight = made(tiny).left("input", "output", 1).full().diagonal()
    torch.testing.assert_close(LayerMetric(tiny.weights, mixed, statistics).left("input", "output", 1).full().diagonal(), straight[order_N])


def test_a_starved_expert_leans_on_the_average_token() -> None:
    tiny = tiny_layer(starved=2)
    metric = made(tiny)
    pooled_DD = tiny.statistics.input_gram_EDD.sum(0) / tiny.statistics.count_E.sum()
    gram_DD = metric.right_of_input("output", 2).full()
    torch.testing.assert_close(gram_DD, metric.pseudo_tokens * pooled_DD, rtol=1e-4, atol=1e-4)
    for side in SIDES:
        assert metric.energy(side, 2) > 0
        assert float(metric.left(side, "output", 2).full().diagonal().min()) > 0


def test_shrinkage_of_outputs_is_that_of_the_neurons_seen_through_the_matrix() -> None:
    metric = made(tiny_layer(starved=1))
    for expert in range(4):
        weight_DM = metric.weight("output", expert)
        through_DD = metric.right("output", "output", expert).quadratic(weight_DM)
        torch.testing.assert_close(metric.written_by("output", "output", expert), through_DD)


def test_a_narrow_intermediate_gram_is_recovered_from_the_outputs() -> None:
    collected, missing = made(tiny_layer(hidden=12, width=4)), made(tiny_layer(hidden=12, width=4, intermediate=False))
    for expert in range(4):
        wanted = collected.right("output", "output", expert).times(torch.eye(4, dtype=torch.float64))
        got = missing.right("output", "output", expert).times(torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_without_a_backward_pass_every_direction_of_the_output_counts_the_same() -> None:
    metric = made(tiny_layer(gradient=False))
    assert torch.equal(metric.left("output", "output", 0).full(), torch.eye(10, dtype=torch.float64))


def test_only_the_output_metric_looks_at_gradients_and_only_plain_at_no_token() -> None:
    tiny = tiny_layer()
    metric = made(tiny)
    for kind in ("plain", "scaled", "input"):
        assert torch.equal(metric.left("input", kind, 0).full(), torch.eye(14, dtype=torch.float64))
    assert torch.equal(metric.right_of_input("plain", 0).full(), torch.eye(10, dtype=torch.float64))
    scaled_D = metric.right_of_input("scaled", 0).full().diagonal()
    torch.testing.assert_close(scaled_D, tiny.statistics.input_mean_ED[0], rtol=1e-5, atol=1e-5)


def test_frequencies_add_up_to_the_active_experts() -> None:
    assert sum(made(tiny_layer()).frequencies) == pytest.approx(2)


@pytest.mark.parametrize("name", ["input_END", "output_EDM"])
def test_a_weight_that_is_not_finite_is_named(name: str) -> None:
    tiny = tiny_layer()
    getattr(tiny.weights, name)[2, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=f"layer 3, expert 2: NaN or Inf in the {name.split('_')[0]} matrix"):
        made(tiny)


@pytest.mark.parametrize("name", ["input_gram_EDD", "output_gram_EDD", "intermediate_gram_EMM", "slope_EN", "weight_square_E"])
def test_a_statistic_that_is_not_finite_is_named(name: str) -> None:
    tiny = tiny_layer()
    getattr(tiny.statistics, name)[1] = float("inf")
    with pytest.raises(StatisticsError, match=f"layer 3, expert 1: {name} holds NaN or Inf"):
        made(tiny)


def test_gradients_that_are_not_finite_are_named() -> None:
    tiny = tiny_layer()
    assert tiny.statistics.gradient_gram_DD is not None
    tiny.statistics.gradient_gram_DD[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="layer 3: the gradient Gram"):
        made(tiny)


def test_statistics_of_no_token_or_of_another_layer_are_refused() -> None:
    tiny = tiny_layer()
    tiny.statistics.gradient_tokens = 0
    with pytest.raises(StatisticsError, match="gradient_tokens must be > 0"):
        made(tiny)
    tiny = tiny_layer()
    tiny.statistics.count_E.zero_()
    with pytest.raises(StatisticsError, match="no calibration token"):
        made(tiny)
    tiny.statistics.layer = 5
    with pytest.raises(StatisticsError, match="of layer 5 cannot be used for layer 3"):
        made(tiny)


def test_products_that_are_kept_are_those_that_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = made(tiny_layer())
    first, again = metric.read_by("input", "output", 0), metric.read_by("input", "output", 0)
    monkeypatch.setattr(metrics, "MOST_KEPT", 0)
    fresh = made(tiny_layer()).read_by("input", "output", 0)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, fresh)
