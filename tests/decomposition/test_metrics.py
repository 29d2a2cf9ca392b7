"""Inner products of a layer: against the tokens that they were collected from, and for experts that saw few or none."""

from dataclasses import replace

import pytest
import torch
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.decomposition import curvature, metrics
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.errors import CheckpointError, StatisticsError
from moesvd_core.planning import SIDES, Metric, Side


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shrinkage and next to no ridge: what is left are the formulas."""
    for module in (metrics, curvature):
        monkeypatch.setattr(module, "PSEUDO_SHARE", 0.0)
        monkeypatch.setattr(module, "GRAM_RIDGE", 1e-13)
    monkeypatch.setattr(curvature, "GRADIENT_RIDGE", 1e-13)
    monkeypatch.setattr(curvature, "ROW_RIDGE", 1e-13)


def made(tiny: TinyLayer) -> LayerMetric:
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def lost(metric: LayerMetric, side: Side, expert: int, delta_NM: torch.Tensor) -> torch.Tensor:
    """Predicted loss of an error, nats a token."""
    weighed_NM = metric.left(side, "output", expert).full() @ metric.right(side, "output", expert).times(delta_NM)
    return metric.unit * (weighed_NM @ delta_NM.T).trace()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("gated", [True, False])
def test_the_error_of_a_single_token_is_half_the_square_of_what_it_does_to_the_loss(gated: bool) -> None:
    """Nothing is taken as independent where there is one token; all that is left are scales, positions and weights."""
    tiny = tiny_layer(tokens=1, gated=gated)
    metric = made(tiny)
    for expert in tiny.p_TE[0].nonzero()[:, 0].tolist():
        for side, left_N, right_M in (
            ("input", tiny.delta_TEN[0, expert], tiny.x_TD[0]),
            ("output", tiny.p_TE[0, expert] * tiny.g_TD[0], tiny.h_TEM[0, expert]),
        ):
            delta_NM = torch.randn(metric.shape(side), dtype=torch.float64)
            wanted = 0.5 * (left_N @ delta_NM @ right_M).square()
            torch.testing.assert_close(lost(metric, side, expert, delta_NM), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rows", ["gram", "squares"])
def test_an_experts_own_tokens_weigh_its_errors(rows: str) -> None:
    tiny = tiny_layer()
    if rows == "squares":
        tiny.statistics.row_gram_ENN = None
    metric = made(tiny)
    for expert in range(4):
        p_T, delta_TN = tiny.p_TE[:, expert], tiny.delta_TEN[:, expert]
        gamma_DD = (p_T[:, None] * tiny.g_TD).T @ (p_T[:, None] * tiny.g_TD) / p_T.square().sum()
        torch.testing.assert_close(metric.left("output", "output", expert).full(), gamma_DD)
        row_NN = delta_TN.T @ delta_TN / delta_TN.square().sum()
        torch.testing.assert_close(metric.left("input", "output", expert).full(), row_NN if rows == "gram" else row_NN.diagonal().diag())
        weighted_TD = delta_TN.norm(dim=1, keepdim=True) * tiny.x_TD
        torch.testing.assert_close(metric.right_of_input("output", expert).full(), weighted_TD.T @ weighted_TD)
        plain_TD = p_T[:, None] * tiny.x_TD
        torch.testing.assert_close(metric.right_of_input("input", expert).full(), plain_TD.T @ plain_TD)


@pytest.mark.parametrize("side", SIDES)
def test_a_backward_pass_over_a_part_of_the_text_stands_for_all_of_it(side: Side) -> None:
    tiny = tiny_layer()
    delta_NM = torch.randn(made(tiny).shape(side), dtype=torch.float64)
    over_all = lost(made(tiny), side, 1, delta_NM)
    tiny.statistics.tokens *= 2
    for name in ("count_E", "weight_square_E", "input_gram_EDD", "output_gram_EDD", "intermediate_gram_EMM", "slope_EN"):
        setattr(tiny.statistics, name, 2 * getattr(tiny.statistics, name))
    torch.testing.assert_close(lost(made(tiny), side, 1, delta_NM), over_all)


@pytest.mark.usefixtures("exact")
def test_without_sums_of_each_expert_output_errors_are_weighed_by_the_layers_gradients() -> None:
    tiny = tiny_layer(measured=False)
    metric = made(tiny)
    delta_DM = torch.randn(10, 7, dtype=torch.float64)
    change_TD = tiny.p_TE[:, :1] * (tiny.h_TEM[:, 0] @ delta_DM.T)
    gamma_DD = tiny.g_TD.T @ tiny.g_TD / len(tiny.g_TD)
    wanted = 0.5 * torch.einsum("td,de,te->", change_TD, gamma_DD, change_TD) / len(change_TD)
    torch.testing.assert_close(lost(metric, "output", 0, delta_DM), wanted)


@pytest.mark.usefixtures("exact")
def test_without_sums_of_each_expert_input_errors_are_weighed_by_slopes_and_the_layers_gradients() -> None:
    tiny = tiny_layer(gated=False, measured=False)
    metric = made(tiny)
    delta_ND = torch.zeros(7, 10, dtype=torch.float64)
    delta_ND[2] = torch.randn(10, dtype=torch.float64)
    change_TD = tiny.p_TE[:, :1] * (tiny.x_TD @ delta_ND.T @ tiny.weights.output_EDM[0].T)
    gamma_DD = tiny.g_TD.T @ tiny.g_TD / len(tiny.g_TD)
    wanted = 0.5 * torch.einsum("td,de,te->", change_TD, gamma_DD, change_TD) / len(change_TD)
    torch.testing.assert_close(lost(metric, "input", 0, delta_ND), wanted)


def test_row_weights_follow_the_neurons_of_interleaved_rows() -> None:
    tiny = tiny_layer(measured=False)
    order_N = torch.arange(14).view(2, 7).T.flatten()
    mixed = ExpertLayer(**{**tiny.layer.__dict__, "rows": "interleaved"})
    statistics = LayerStatistics(**{**tiny.statistics.__dict__, "slope_EN": tiny.statistics.slope_EN[:, order_N]})
    straight = made(tiny).left("input", "output", 1).full().diagonal()
    torch.testing.assert_close(LayerMetric(tiny.weights, mixed, statistics).left("input", "output", 1).full().diagonal(), straight[order_N])


def test_a_starved_expert_leans_on_the_average_token() -> None:
    tiny = tiny_layer(starved=2)
    metric = made(tiny)
    pooled_DD = tiny.statistics.input_gram_EDD.sum(0) / tiny.statistics.count_E.sum()
    gram_DD = metric.right_of_input("input", 2).full()
    torch.testing.assert_close(gram_DD, metric.pseudo_tokens * pooled_DD, rtol=1e-4, atol=1e-4)
    weighted_DD = curvature.PSEUDO_SHARE * tiny.statistics.weighted_input_gram_EDD.mean(0)
    torch.testing.assert_close(metric.right_of_input("output", 2).full(), weighted_DD, rtol=1e-4, atol=1e-4)
    pooled_DD = tiny.statistics.gradient_gram_EDD.sum(0) / tiny.statistics.gradient_weight_square_E.sum()
    torch.testing.assert_close(metric.left("output", "output", 2).full(), pooled_DD, rtol=1e-3, atol=1e-3)
    for side in SIDES:
        assert metric.energy(side, 2) > 0
        assert float(metric.left(side, "output", 2).full().diagonal().min()) > 0


def test_without_shrinkage_an_expert_is_measured_by_its_own_tokens_alone() -> None:
    tiny = tiny_layer(starved=2)
    alone = LayerMetric(tiny.weights, tiny.layer, tiny.statistics, shrink=False)
    own_DD = tiny.statistics.input_gram_EDD[1].double()
    torch.testing.assert_close(alone.right_of_input("input", 1).full(), own_DD, rtol=1e-4, atol=1e-4)
    empty_DD = alone.right_of_input("input", 2).full()
    torch.testing.assert_close(empty_DD, float(empty_DD[0, 0]) * torch.eye(len(empty_DD), dtype=torch.float64))
    weighted_DD = tiny.statistics.weighted_input_gram_EDD[1].double()
    torch.testing.assert_close(alone.right_of_input("output", 1).full(), weighted_DD, rtol=1e-4, atol=1e-4)


def test_shrinkage_of_outputs_is_that_of_the_neurons_seen_through_the_matrix() -> None:
    metric = made(tiny_layer(starved=1))
    for expert in range(4):
        weight_DM = metric.weight("output", expert)
        through_DD = metric.right("output", "output", expert).times(weight_DM) @ weight_DM.T
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


@pytest.mark.parametrize("name", [*metrics.EXPERT_SUMS, *metrics.BACKWARD_SUMS, "row_gram_ENN"])
def test_a_statistic_that_is_not_finite_is_named(name: str) -> None:
    tiny = tiny_layer()
    getattr(tiny.statistics, name)[1] = float("inf")
    with pytest.raises(StatisticsError, match=f"layer 3, expert 1: {name} holds NaN or Inf"):
        made(tiny)


def test_a_sum_of_answers_that_is_not_finite_is_named() -> None:
    tiny = tiny_layer()
    tiny.statistics.output_sum_ED = torch.full((4, 10), torch.nan)
    with pytest.raises(StatisticsError, match="layer 3, expert 0: output_sum_ED holds NaN or Inf"):
        made(tiny)


def test_gradients_that_are_not_finite_are_named() -> None:
    tiny = tiny_layer()
    assert tiny.statistics.gradient_gram_DD is not None
    tiny.statistics.gradient_gram_DD[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="layer 3: the gradient Gram"):
        made(tiny)


def test_half_a_backward_pass_is_refused() -> None:
    tiny = tiny_layer()
    tiny.statistics.weighted_input_gram_EDD = None
    with pytest.raises(StatisticsError, match="layer 3: weighted_input_gram_EDD is missing beside other sums"):
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


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("kind", ["plain", "scaled", "input", "output"])
def test_several_experts_at_once_are_told_what_each_is_told(kind: Metric, measured: bool) -> None:
    tiny = tiny_layer(4, starved=2, measured=measured)
    metric, alone, some = made(tiny), made(tiny), slice(1, 4)
    metric.read_by("input", kind, 1)  # kept, but of one expert only

    def told(metric: LayerMetric, which: curvature.Which) -> list[torch.Tensor]:
        grams = [metric.right_of_input(kind, which), *(metric.left(side, kind, which) for side in SIDES)]
        products = [metric.read_by(side, kind, which) for side in SIDES] + [metric.written_by(side, kind, which) for side in SIDES]
        return [gram.full() for gram in grams] + products

    for _ in range(2):  # made, and kept
        for together, *each in zip(told(metric, some), *(told(alone, expert) for expert in (1, 2, 3)), strict=True):
            torch.testing.assert_close(together.expand(3, *together.shape[-2:]), torch.stack(each), rtol=1e-10, atol=1e-12)


def test_a_card_gets_as_many_experts_at_once_as_take_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = made(tiny_layer(5))  # 10 × 14 numbers of an input matrix
    assert metric.together == [0, 1, 2, 3, 4]
    monkeypatch.setattr(metrics, "on_card", lambda device: True)
    for rows, most, free, first in (
        (False, 1000, 10**9, slice(0, 5)), (False, 300, 10**9, slice(0, 2)), (False, 1, 10**9, slice(0, 1)),
        (False, 1000, 300 * metrics.WORKING, slice(0, 2)), (False, 1000, 0, slice(0, 1)), (True, 600, 10**9, slice(0, 3)),
    ):
        monkeypatch.setattr(metrics, "TOGETHER", most)
        monkeypatch.setattr(metrics, "unused", lambda device, free=free: free)
        tiny = tiny_layer(5)
        if not rows:
            tiny.statistics.row_gram_ENN = None  # with them the largest are 14 × 14
        vars(metric).pop("together")
        metric.statistics = tiny.statistics
        parts = metric.together
        assert parts[0] == first and [expert for part in parts for expert in range(5)[part]] == [0, 1, 2, 3, 4]


def test_what_lies_on_a_card_is_let_go_and_taken_from_the_host_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerStatistics, "on", lambda self, device: replace(self, input_gram_EDD=self.input_gram_EDD.clone()))
    monkeypatch.setattr(metrics, "on_card", lambda device: True)
    tiny = tiny_layer()
    metric = made(tiny)
    assert metric.statistics is not tiny.statistics

    def products() -> list[torch.Tensor]:
        grams = [metric.right_of_input(kind, 1).full() for kind in ("input", "output")]  # type: ignore[arg-type]
        return [*grams, metric.read_by("input", "output", 1), metric.written_by("output", "output", 1)]

    before = products()
    metric.release()
    assert metric.statistics is tiny.statistics
    assert not metric._read and not metric._written and "_pooled_gram" not in vars(metric)
    for first, second in zip(before, products(), strict=True):
        assert torch.equal(first, second)
