"""Merged experts: those that are the same in another order become one for nothing, and losses are as predicted."""

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.decomposition import curvature
from moesvd_core.decomposition.factors import DenseFactors, MergedFactors
from moesvd_core.decomposition.merged import MergedBasis, ordered
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import DENSE, SIDES, Metric, Side


def metric_of(tiny: TinyLayer) -> LayerMetric:
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def same_in_another_order(tiny: TinyLayer, expert: int, of: int) -> None:
    """Make an expert compute what another one does, its neurons shuffled."""
    order_M = torch.randperm(tiny.layer.width, generator=torch.Generator().manual_seed(0))
    tiny.weights.input_END[expert] = tiny.weights.input_END[of, tiny.layer.rows_in_order(order_M)]
    tiny.weights.output_EDM[expert] = tiny.weights.output_EDM[of][:, order_M]


def in_own_order(metric: LayerMetric, side: Side, basis: MergedBasis, groups: int) -> torch.Tensor:
    """The merged matrices of so many groups, each with its neurons in its expert's own order, [E, rows, columns]."""
    own_ENM = basis.factors([groups]).reconstruct().clone()
    for members in basis.clusters(groups).values():
        for expert, order_M in members.items():
            back_M, merged_NM = order_M.argsort(), own_ENM[expert].clone()
            own_ENM[expert] = merged_NM[:, back_M] if side == "output" else merged_NM[metric.layer.rows_in_order(back_M)]
    return own_ENM


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "input"])
def test_predicted_loss_is_the_measured_one(kind: Metric, shape: str) -> None:
    metric = metric_of(tiny_layer(5, *SHAPES[shape]))
    bases = MergedBasis.both(metric, kind)
    for groups in range(1, 6):
        for side, basis in bases.items():
            factors, own_ENM = basis.factors([groups]), in_own_order(metric, side, basis, groups)
            assert basis.curve.loss_SR[0, groups] == pytest.approx(measured_loss(metric, side, own_ENM), rel=1e-6, abs=1e-9)
            assert factors.parameters == groups * int(basis.curve.rank_cost_S[0])


@pytest.mark.parametrize("kind", ["plain", "input"])
def test_equal_experts_in_another_order_merge_first_and_for_nothing(kind: Metric) -> None:
    tiny = tiny_layer(4)
    same_in_another_order(tiny, 3, of=1)
    metric = metric_of(tiny)
    bases = MergedBasis.both(metric, kind)
    merged = {side: basis.factors([3]) for side, basis in bases.items()}
    for side in SIDES:
        assert isinstance(merged[side], MergedFactors) and merged[side].groups == (0, 1, 2, 1)
        assert bases[side].curve.loss_SR[0, 3] < 1e-9 * bases[side].curve.loss_SR[0, 1]
        torch.testing.assert_close(merged[side].reconstruct()[[0, 1, 2]], metric.stored(side)[[0, 1, 2]])


def test_a_group_is_the_mean_by_frequency_of_its_aligned_experts() -> None:
    tiny = tiny_layer(3)
    metric = metric_of(tiny)
    bases = MergedBasis.both(metric, "input")
    members = bases["input"].clusters(1)[0]
    count_E = tiny.statistics.count_E.double() + 1
    for side, basis in bases.items():
        wanted_NM = sum(count_E[expert] * ordered(metric, side, expert, order_M) for expert, order_M in members.items()) / count_E.sum()
        torch.testing.assert_close(basis.factors([1]).reconstruct()[2], wanted_NM)


def test_alignment_loses_less_than_averaging_neurons_as_they_stand() -> None:
    tiny = tiny_layer(4, 12, 10)
    for expert in (1, 2, 3):
        same_in_another_order(tiny, expert, of=0)
    generator = torch.Generator().manual_seed(2)
    tiny.weights.input_END += 0.1 * torch.randn(tiny.weights.input_END.shape, generator=generator, dtype=torch.float64)
    metric = metric_of(tiny)
    for side, basis in MergedBasis.both(metric, "input").items():
        plain_ENM = metric.stored(side).mean(0, keepdim=True).expand_as(metric.stored(side))
        assert basis.curve.loss_SR[0, 1] < 0.2 * measured_loss(metric, side, plain_ENM)


@pytest.mark.parametrize("rows", ["concatenated", "interleaved", "plain"])
def test_rows_move_with_their_neurons_and_stay_of_their_kind(rows: str) -> None:
    layer = ExpertLayer(0, "experts", 2, 4, 5, 1, rows=rows)  # type: ignore[arg-type]
    order_M = torch.tensor([3, 0, 4, 1, 2])
    neuron_N = layer.neuron_of_row()
    moved_N = layer.rows_in_order(order_M)
    assert torch.equal(neuron_N[moved_N], order_M[neuron_N])
    if rows != "plain":
        kind_N = torch.arange(10) % 2 if rows == "interleaved" else torch.arange(10) // 5
        assert torch.equal(kind_N[moved_N], kind_N)


def test_biases_are_those_of_the_group() -> None:
    tiny = tiny_layer(3)
    generator = torch.Generator().manual_seed(1)
    bias_EN, bias_ED = (torch.randn(3, size, generator=generator, dtype=torch.float64) for size in (14, 10))
    tiny.weights = ExpertWeights(tiny.weights.input_END, tiny.weights.output_EDM, bias_EN, bias_ED)
    same_in_another_order(tiny, 2, of=0)
    basis = MergedBasis.both(metric_of(tiny), "input")["input"]
    order_M = basis.clusters(2)[0][2]
    bias_EN[2] = bias_EN[0, tiny.layer.rows_in_order(order_M.argsort())]
    bias_ED[2] = bias_ED[0]
    merged_EN, merged_ED = basis.biases((2,))
    torch.testing.assert_close(merged_EN[[0, 1, 2]], bias_EN[[0, 1, 0]].float())
    torch.testing.assert_close(merged_ED[[0, 1, 2]], bias_ED[[0, 1, 0]].float())


def with_biases(tiny: TinyLayer, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the experts random biases, [E, N] and [E, D], exact in float32; what merging asks the statistics for does not depend on them."""
    generator = torch.Generator().manual_seed(1)
    shapes = tiny.weights.input_END.shape[:2], tiny.weights.output_EDM.shape[:2]
    bias_EN, bias_ED = ((scale * torch.randn(shape, generator=generator)).double() for shape in shapes)
    tiny.weights = ExpertWeights(tiny.weights.input_END, tiny.weights.output_EDM, bias_EN, bias_ED)
    return bias_EN, bias_ED


def missed_by_biases(tiny: TinyLayer, basis: MergedBasis, groups: int) -> dict[Side, float]:
    """½ Σ (δᵀ Δb)² and ½ Σ p² (gᵀ Δc)² a token, from the tokens: what the stored biases miss of each expert's own, in its own order."""
    merged_EN, merged_ED = basis.biases((groups,))
    weights = tiny.weights
    assert merged_EN is not None and merged_ED is not None and weights.input_bias_EN is not None and weights.output_bias_ED is not None
    total: dict[Side, float] = {"input": 0.0, "output": 0.0}
    for members in basis.clusters(groups).values():
        for expert, order_M in members.items():
            error_N = weights.input_bias_EN[expert] - merged_EN[expert, tiny.layer.rows_in_order(order_M.argsort())]
            error_D = weights.output_bias_ED[expert] - merged_ED[expert]
            total["input"] += 0.5 * float((tiny.delta_TEN[:, expert] @ error_N).square().mean())
            total["output"] += 0.5 * float((tiny.p_TE[:, expert] * (tiny.g_TD @ error_D)).square().mean())
    return total


@pytest.fixture
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left weights are what the tokens say, and nothing else."""
    for name in ("ROW_RIDGE", "GRADIENT_RIDGE"):
        monkeypatch.setattr(curvature, name, 0.0)


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("kind", ["plain", "input"])
def test_equal_matrices_with_opposite_biases_lose_what_the_tokens_say(kind: Metric) -> None:
    tiny = tiny_layer(2)
    same_in_another_order(tiny, 1, of=0)
    _, bias_ED = with_biases(tiny, 0.1)
    bias_ED[0], bias_ED[1] = 3.0, -3.0
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics, shrink=False)
    for side, basis in MergedBasis.both(metric, kind).items():
        wanted = missed_by_biases(tiny, basis, 1)[side]
        assert wanted > 1e-6
        assert basis.curve.loss_SR[0, 1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_of_biases_are_added_to_those_of_the_matrices(shape: str) -> None:
    tiny = tiny_layer(5, *SHAPES[shape])
    with_biases(tiny, 0.5)
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics, shrink=False)
    for side, basis in MergedBasis.both(metric, "input").items():
        for groups in range(1, 6):
            wanted = measured_loss(metric, side, in_own_order(metric, side, basis, groups)) + missed_by_biases(tiny, basis, groups)[side]
            assert basis.curve.loss_SR[0, groups] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_without_a_backward_pass_input_biases_are_weighed_as_tokens_are() -> None:
    tiny = tiny_layer(2, measured=False)
    same_in_another_order(tiny, 1, of=0)
    bias_EN, _ = with_biases(tiny, 0.1)
    metric = metric_of(tiny)
    basis = MergedBasis.both(metric, "input")["input"]
    merged_EN, _ = basis.biases((1,))
    assert merged_EN is not None
    wanted, mean_square = 0.0, float(tiny.statistics.weight_square_E.mean())
    for expert, order_M in basis.clusters(1)[0].items():
        error_N = bias_EN[expert] - merged_EN[expert, tiny.layer.rows_in_order(order_M.argsort())]
        bent = float(error_N @ metric.left("input", "output", expert).full() @ error_N)
        wanted += (float(tiny.statistics.weight_square_E[expert]) + 0.02 * mean_square) * bent  # with the tokens that it is lent
    assert basis.curve.loss_SR[0, 1] == pytest.approx(0.5 * wanted / 400, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "input"])
@pytest.mark.parametrize("side", SIDES)
def test_experts_that_differ_in_biases_alone_are_not_the_same(side: Side, kind: Metric) -> None:
    """Expert 1 is 0 with other biases, 2 is 0 with its matrices a little off: that one merges first."""
    tiny = tiny_layer(3)
    for expert in (1, 2):
        tiny.weights.input_END[expert], tiny.weights.output_EDM[expert] = tiny.weights.input_END[0], tiny.weights.output_EDM[0]
    tiny.weights.input_END[2] *= 1.01
    bias_EN, bias_ED = with_biases(tiny, 0.0)
    (bias_EN if side == "input" else bias_ED)[1] = 30.0
    factors = MergedBasis.both(metric_of(tiny), kind)["input"].factors([2])
    assert isinstance(factors, MergedFactors) and factors.groups == (0, 1, 0)


def test_dense_is_the_original_tensor() -> None:
    metric = metric_of(tiny_layer())
    for side, basis in MergedBasis.both(metric, "input").items():
        factors = basis.factors([DENSE])
        assert isinstance(factors, DenseFactors) and factors.weight_ENM is metric.stored(side)


def test_an_expert_without_tokens_merges_too() -> None:
    bases = MergedBasis.both(metric_of(tiny_layer(4, starved=2)), "input")
    assert all(basis.factors([1]).reconstruct().isfinite().all() for basis in bases.values())
