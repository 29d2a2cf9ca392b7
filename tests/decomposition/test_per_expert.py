"""Each expert's own factors: optimal by direct SVD, and as good as predicted."""

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import tiny_layer

from moesvd_core.decomposition.factors import DenseFactors, PerExpertFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.per_expert import PerExpertBasis
from moesvd_core.planning import DENSE, SIDES, Metric, Side

KINDS: tuple[Metric, ...] = ("plain", "scaled", "input", "output")


def layer_metric(shape: str = "wide", **options: object) -> LayerMetric:
    hidden, width = SHAPES[shape]
    tiny = tiny_layer(3, hidden, width, **options)  # type: ignore[arg-type]
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def root(matrix_SS: torch.Tensor) -> torch.Tensor:
    value_S, vector_SS = torch.linalg.eigh(matrix_SS)
    return (vector_SS * value_S.sqrt()) @ vector_SS.T


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measured", [True, False])
def test_predicted_loss_is_the_measured_one(kind: Metric, shape: str, side: Side, measured: bool) -> None:
    metric = layer_metric(shape, measured=measured)
    basis = PerExpertBasis.made(metric, side, kind)
    most = basis.curve.gain_SR.shape[1]
    for rank in {0, 1, most // 2, most}:
        got_ENM = basis.factors([rank] * 3).reconstruct()
        for expert in range(3):
            wanted = measured_loss(metric, side, got_ENM, [expert])
            assert basis.curve.loss_SR[expert, rank] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_the_truncated_svd_of_the_weighted_matrix(kind: Metric, shape: str, side: Side) -> None:
    metric = layer_metric(shape)
    factors = PerExpertBasis.made(metric, side, kind).factors([2, 2, 2]).reconstruct()
    for expert in range(3):
        left_NN = root(metric.left(side, kind, expert).full())
        right_MM = root(metric.right(side, kind, expert).times(torch.eye(metric.shape(side)[1], dtype=torch.float64)))
        u_NR, s_R, v_RM = torch.linalg.svd(left_NN @ metric.weight(side, expert) @ right_MM)
        wanted_NM = torch.linalg.solve(left_NN, u_NR[:, :2] * s_R[:2]) @ torch.linalg.solve(right_MM, v_RM[:2].T).T
        torch.testing.assert_close(factors[expert], wanted_NM, rtol=1e-5, atol=1e-6)


def test_cholesky_whitening_of_the_paper_gives_the_same_factors() -> None:
    """Eq. 11-12: SVD(W S) S⁻¹ with S the Cholesky factor; any square root of the Gram serves."""
    metric = layer_metric()
    factors = PerExpertBasis.made(metric, "input", "input").factors([3, 3, 3]).reconstruct()
    s_DD = torch.linalg.cholesky(metric.right_of_input("input", 0).full())
    u_NR, sigma_R, v_RD = torch.linalg.svd(metric.weight("input", 0) @ s_DD, full_matrices=False)
    wanted_ND = torch.linalg.solve_triangular(s_DD, (u_NR[:, :3] * sigma_R[:3]) @ v_RD[:3], upper=False, left=False)
    torch.testing.assert_close(factors[0], wanted_ND)


@pytest.mark.parametrize("side", SIDES)
def test_gains_are_squared_singular_values_and_descend(side: Side) -> None:
    metric = layer_metric()
    curve = PerExpertBasis.made(metric, side, "plain").curve
    sigma_ER = torch.linalg.svdvals(metric.stored(side))
    most = curve.gain_SR.shape[1]
    torch.testing.assert_close(torch.from_numpy(curve.gain_SR), sigma_ER[:, :most].square())


@pytest.mark.parametrize("side", SIDES)
def test_no_metric_beats_the_output_metric_in_its_own_unit(side: Side) -> None:
    metric = layer_metric()
    curves = {kind: PerExpertBasis.made(metric, side, kind).curve.loss_SR for kind in KINDS}
    for kind in KINDS:
        assert (curves["output"] <= curves[kind] * (1 + 1e-9) + 1e-12).all()
    assert (curves["plain"][:, 1:] > curves["output"][:, 1:]).any()


def test_dense_slots_share_the_original_and_rank_zero_drops() -> None:
    metric = layer_metric()
    factors = PerExpertBasis.made(metric, "input", "output").factors([DENSE, 0, 2])
    assert isinstance(factors, PerExpertFactors)
    assert factors.dense[0].data_ptr() == metric.weights.input_END[0].data_ptr()
    assert torch.equal(factors.reconstruct()[1], torch.zeros_like(metric.weights.input_END[1]))
    rows, columns = metric.shape("input")
    assert factors.parameters == rows * columns + 2 * (rows + columns)


def test_all_dense_is_the_original_tensor() -> None:
    metric = layer_metric()
    factors = PerExpertBasis.made(metric, "output", "output").factors([DENSE] * 3)
    assert isinstance(factors, DenseFactors)
    assert factors.weight_ENM is metric.weights.output_EDM


def test_factors_are_nested() -> None:
    basis = PerExpertBasis.made(layer_metric(), "input", "output")
    small, large = basis.factors([2, 2, 2]), basis.factors([4, 4, 4])
    assert isinstance(small, PerExpertFactors) and isinstance(large, PerExpertFactors)
    torch.testing.assert_close(small.left[1], large.left[1][:, :2])
    torch.testing.assert_close(small.right[1], large.right[1][:2])


def test_curve_offers_no_rank_beyond_break_even() -> None:
    curve = PerExpertBasis.made(layer_metric(), "input", "output").curve
    most = curve.gain_SR.shape[1]
    assert most * curve.rank_cost_S[0] <= curve.dense_cost_S[0] < (most + 1) * curve.rank_cost_S[0]
    assert curve.loss_SR.shape == (3, most + 1)


def test_a_starved_expert_and_a_dead_output_get_finite_factors() -> None:
    tiny = tiny_layer(3, starved=1)
    tiny.weights.output_EDM[2] = 0
    tiny.statistics.output_gram_EDD[2] = 0
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics)
    for side in SIDES:
        for kind in KINDS:
            assert PerExpertBasis.made(metric, side, kind).factors([3, 3, 3]).reconstruct().isfinite().all()


def test_bfloat16_weights_give_float32_factors() -> None:
    metric = layer_metric()
    weights = metric.weights
    weights.input_END, weights.output_EDM = weights.input_END.bfloat16(), weights.output_EDM.bfloat16()
    narrow = LayerMetric(weights, metric.layer, metric.statistics)
    basis = PerExpertBasis.made(narrow, "output", "output")
    factors = basis.factors([3, DENSE, 3])
    assert isinstance(factors, PerExpertFactors)
    assert factors.left[0].dtype == torch.float32
    assert factors.dense[1].dtype == torch.bfloat16
    assert basis.curve.loss_SR[0, 3] == pytest.approx(measured_loss(narrow, "output", factors.reconstruct(), [0]), rel=1e-3)
