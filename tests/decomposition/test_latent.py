"""Shared bases: as good as predicted, refitted at no loss, optimal where theory says so."""

from contextlib import nullcontext

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.decomposition import latent
from moesvd_core.decomposition.factors import DenseFactors, SharedLeftFactors, SharedRightFactors
from moesvd_core.decomposition.latent import LatentBasis
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.per_expert import PerExpertBasis
from moesvd_core.decomposition.projection import NestedFit
from moesvd_core.planning import DENSE, SIDES, Metric, Side


def of(tiny: TinyLayer) -> LayerMetric:
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def layer_metric(shape: str = "wide", **options: bool) -> LayerMetric:
    return of(tiny_layer(4, *SHAPES[shape], **options))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "scaled", "input", "output"])
@pytest.mark.parametrize("measured", [True, False])
def test_predicted_loss_is_the_measured_one(kind: Metric, shape: str, side: Side, measured: bool) -> None:
    metric = layer_metric(shape, measured=measured)
    basis = LatentBasis.both(metric, kind)[side]
    most = basis.curve.gain_SR.shape[1]
    for rank in {0, 1, most // 2, most}:
        wanted = measured_loss(metric, side, basis.factors([rank]).reconstruct())
        assert basis.curve.loss_SR[0, rank] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "scaled", "input", "output"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("measured", [True, False])
def test_experts_worked_on_together_lose_what_they_lose_one_after_the_other(
    kind: Metric, shape: str, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = layer_metric(shape, measured=measured)
    alone = LatentBasis.both(metric, kind)
    wanted = {side: alone[side].factors([3]).reconstruct() for side in SIDES}
    monkeypatch.setattr(LayerMetric, "together", [slice(0, 1), slice(1, 4)])
    for side, basis in LatentBasis.both(layer_metric(shape, measured=measured), kind).items():
        torch.testing.assert_close(torch.tensor(basis.curve.loss_SR), torch.tensor(alone[side].curve.loss_SR), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(basis.factors([3]).reconstruct(), wanted[side], rtol=1e-6, atol=1e-8)
        assert not basis.factors([0]).reconstruct().any()


@pytest.mark.parametrize("outlier", [False, True])
def test_experts_worked_on_together_use_double_precision_where_one_needs_it(outlier: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def metric() -> LayerMetric:
        tiny = tiny_layer(4, 128, 40, tokens=150, starved=2)
        if outlier:
            generator = torch.Generator().manual_seed(2)
            x_TD = torch.randn(30, 128, generator=generator, dtype=torch.float64) + 1e3 * torch.randn(128, generator=generator)
            tiny.statistics.weighted_input_gram_EDD[1] = x_TD.T @ x_TD
        tiny.weights.input_END, tiny.weights.output_EDM = tiny.weights.input_END.float(), tiny.weights.output_EDM.float()
        return of(tiny)

    alone = LatentBasis.both(metric(), "output")
    wanted = {side: alone[side].factors([20]).reconstruct() for side in SIDES}
    monkeypatch.setattr(LayerMetric, "together", [slice(0, 3), slice(3, 4)])
    for side, basis in LatentBasis.both(metric(), "output").items():
        torch.testing.assert_close(torch.tensor(basis.curve.loss_SR), torch.tensor(alone[side].curve.loss_SR), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(basis.factors([20]).reconstruct(), wanted[side], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_experts_that_use_one_small_subspace_are_kept_exactly(side: Side) -> None:
    tiny = tiny_layer(4, 10, 14)
    space = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    project = space @ torch.linalg.pinv(space)
    if side == "input":
        tiny.weights.input_END = tiny.weights.input_END @ project
    else:
        tiny.weights.output_EDM = project @ tiny.weights.output_EDM
        tiny.statistics.output_gram_EDD = project @ tiny.statistics.output_gram_EDD @ project.T
    factors = LatentBasis.both(of(tiny), "output")[side].factors([3])
    wanted = tiny.weights.input_END if side == "input" else tiny.weights.output_EDM
    torch.testing.assert_close(factors.reconstruct(), wanted, rtol=1e-4, atol=1e-4)


def test_no_other_shared_output_basis_of_the_same_rank_loses_less() -> None:
    metric = layer_metric()
    best = LatentBasis.both(metric, "output")["output"].curve.loss_SR[0, 3]
    gamma_DD = metric.left("output", "output", 0).full()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        p_DR = torch.randn(10, 3, dtype=torch.float64, generator=generator)
        project_DD = p_DR @ torch.linalg.solve(p_DR.T @ gamma_DD @ p_DR, p_DR.T @ gamma_DD)
        assert best <= measured_loss(metric, "output", project_DD @ metric.weights.output_EDM)


def test_left_factors_are_the_best_for_the_shared_right_one() -> None:
    metric = layer_metric()
    factors = LatentBasis.both(metric, "output")["input"].factors([4])
    assert isinstance(factors, SharedRightFactors)
    got_ENM = factors.reconstruct()
    best = measured_loss(metric, "input", got_ENM)
    (group,) = factors.groups
    for scale in (1e-3, -1e-3):
        other = (group.left_KNR + scale * torch.ones_like(group.left_KNR)) @ group.right_RM
        assert best < measured_loss(metric, "input", other)


def test_both_losses_fall_with_every_rank() -> None:
    metric = layer_metric()
    for side in SIDES:
        loss_R = LatentBasis.both(metric, "output")[side].curve.loss_SR[0]
        assert (loss_R[1:] <= loss_R[:-1]).all()
        assert loss_R[0] == pytest.approx(sum(metric.energy(side, expert) for expert in range(4)) * metric.unit)


def test_own_factors_lose_no_more_than_shared_ones_at_the_same_rank() -> None:
    metric = layer_metric()
    for side in SIDES:
        own = PerExpertBasis.made(metric, side, "output").curve.loss_SR.sum(0)
        shared = LatentBasis.both(metric, "output")[side].curve.loss_SR[0]
        most = min(len(own), len(shared))
        assert (own[:most] <= shared[:most] * (1 + 1e-9)).all()


def test_what_is_stored_is_what_the_curve_charges() -> None:
    metric = layer_metric()
    for side, form in zip(SIDES, (SharedRightFactors, SharedLeftFactors), strict=True):
        basis = LatentBasis.both(metric, "output")[side]
        factors = basis.factors([5])
        assert isinstance(factors, form)
        assert factors.parameters == 5 * basis.curve.rank_cost_S[0]
        rows, columns = metric.shape(side)
        assert basis.curve.rank_flops_S[0] == pytest.approx(10 + 2 * (rows if side == "input" else columns))
        assert basis.curve.dense_flops_S[0] == pytest.approx(2 * rows * columns)


def test_dense_is_the_original_tensor() -> None:
    metric = layer_metric()
    factors = LatentBasis.both(metric, "output")["input"].factors([DENSE])
    assert isinstance(factors, DenseFactors)
    assert factors.weight_ENM is metric.weights.input_END


def test_a_starved_expert_gets_finite_factors() -> None:
    metric = of(tiny_layer(starved=0))
    for side in SIDES:
        assert LatentBasis.both(metric, "output")[side].factors([4]).reconstruct().isfinite().all()


def test_few_tokens_with_one_direction_that_outweighs_all_others_are_predicted_as_measured() -> None:
    tiny = tiny_layer(4, 128, 40, tokens=150)
    generator = torch.Generator().manual_seed(2)
    x_ETD = torch.randn(4, 30, 128, generator=generator, dtype=torch.float64) + 1e3 * torch.randn(128, generator=generator)
    tiny.statistics.weighted_input_gram_EDD = (x_ETD.mT @ x_ETD).float()  # single precision leaves these indefinite
    tiny.weights.input_END, tiny.weights.output_EDM = tiny.weights.input_END.float(), tiny.weights.output_EDM.float()
    metric = of(tiny)
    basis = LatentBasis.both(metric, "output")["input"]
    for rank in (0, 5, 40):
        wanted = measured_loss(metric, "input", basis.factors([rank]).reconstruct())
        assert basis.curve.loss_SR[0, rank] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("few", [True, False])
def test_a_ratio_is_the_same_to_the_bit_whether_fits_were_kept_or_are_made_again(
    side: Side, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent, "SMALL", 1 << 24 if few else 0)
    tiny = tiny_layer(4, 300, 320)
    tiny.weights.input_END, tiny.weights.output_EDM = tiny.weights.input_END.float(), tiny.weights.output_EDM.float()
    made = LatentBasis.both(of(tiny), "output")[side]
    read = LatentBasis.loaded(of(tiny), side, "output", made.tensors())
    for rank in (200, 7):
        assert torch.equal(made.factors([rank]).reconstruct(), read.factors([rank]).reconstruct())
    monkeypatch.setattr(NestedFit, "of", None)
    monkeypatch.setattr(latent, "reader", None)
    for basis in (made, read):  # what serves a further ratio is there, as far as it is small
        with nullcontext() if few else pytest.raises(TypeError):
            basis.factors([100])
