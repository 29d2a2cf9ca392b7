"""A base weighted by Fisher's information and low-rank deltas: as good as predicted, and no worse for having a base."""

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.decomposition.base_delta import COMMON, BaseDeltaBasis, fisher_mean, have_in_common
from moesvd_core.decomposition.factors import BaseDeltaFactors, DenseFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.per_expert import PerExpertBasis
from moesvd_core.planning import DENSE, SIDES, Metric, Side


def metric_of(tiny: TinyLayer) -> LayerMetric:
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "input", "output"])
@pytest.mark.parametrize("intermediate", [True, False])
def test_predicted_loss_is_the_measured_one(kind: Metric, shape: str, side: Side, intermediate: bool) -> None:
    metric = metric_of(tiny_layer(3, *SHAPES[shape], intermediate=intermediate))
    basis = BaseDeltaBasis.made(metric, side, kind)
    most = basis.curve.max_rank
    for ranks in ([0, 0, 0], [1, most // 2, most], [most, 0, DENSE]):
        factors = basis.factors(ranks)
        predicted = sum(float(basis.curve.loss_SR[expert, rank]) for expert, rank in enumerate(ranks) if rank != DENSE)
        assert predicted == pytest.approx(measured_loss(metric, side, factors.reconstruct()), rel=1e-6, abs=1e-14)
        own = sum(int(basis.curve.dense_cost_S[0] if rank == DENSE else rank * basis.curve.rank_cost_S[0]) for rank in ranks)
        assert factors.parameters == basis.curve.fixed_cost + own


@pytest.mark.parametrize("side", SIDES)
def test_the_base_is_the_mean_weighted_by_fishers_information(side: Side) -> None:
    """With gradient and input of a product independent, F_ij is the product of their mean squares times the tokens."""
    tiny = tiny_layer(3, tokens=4000)
    metric = metric_of(tiny)
    p_TE1 = tiny.p_TE[:, :, None]
    left_TEN = tiny.delta_TEN if side == "input" else p_TE1 * tiny.g_TD[:, None]
    right_TEM = (tiny.p_TE[:, :, None] > 0) * tiny.x_TD[:, None] if side == "input" else (p_TE1 > 0) * tiny.h_TEM
    exact_ENM = torch.einsum("ten,tem->enm", left_TEN.square(), right_TEM.square())
    wanted_NM = (exact_ENM * metric.stored(side)).sum(0) / exact_ENM.sum(0)
    plain_NM = metric.stored(side).mean(0)
    found_NM = fisher_mean(metric, side)
    assert (found_NM - wanted_NM).norm() < 0.5 * (plain_NM - wanted_NM).norm()


def test_an_expert_without_tokens_does_not_spoil_the_base() -> None:
    tiny = tiny_layer(4, starved=1)
    full = fisher_mean(metric_of(tiny), "input")
    tiny.weights.input_END[1] += 100.0
    moved = fisher_mean(metric_of(tiny), "input") - full
    assert moved.isfinite().all()
    assert moved.abs().mean() < 10.0  # an equal share would move it by 25


def test_experts_that_are_alike_need_a_base_only() -> None:
    tiny = tiny_layer(4)
    noise = 1e-3 * torch.randn(tiny.weights.input_END.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tiny.weights.input_END[:] = tiny.weights.input_END[:1] + noise
    metric = metric_of(tiny)
    basis, alone = BaseDeltaBasis.made(metric, "input", "input"), PerExpertBasis.made(metric, "input", "input")
    rank = 2
    assert basis.curve.loss_SR[:, 0].sum() < 1e-4 * alone.curve.loss_SR[:, rank].sum()
    assert (basis.curve.loss_SR[:, rank] <= basis.curve.loss_SR[:, 0]).all()


def test_dense_is_the_original_tensor() -> None:
    metric = metric_of(tiny_layer())
    basis = BaseDeltaBasis.made(metric, "output", "input")
    dense, base, mixed = basis.factors([DENSE] * 4), basis.factors([0] * 4), basis.factors([0, DENSE, 2, 0])
    assert isinstance(dense, DenseFactors) and dense.weight_ENM is metric.weights.output_EDM
    assert isinstance(base, BaseDeltaFactors) and torch.equal(base.reconstruct()[0], base.reconstruct()[3])
    assert torch.equal(mixed.reconstruct()[1], metric.weights.output_EDM[1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_a_base_is_on_offer_where_it_stands_for_the_entries_of_two_experts(share: float) -> None:
    """Of 8 experts that have a share s of their squares in common a base stands for 8 s + (1 - s)."""
    generator = torch.Generator().manual_seed(0)
    common_NM, own_ENM = (torch.randn(*size, 40, 60, generator=generator) for size in ((), (8,)))
    weight_ENM = share**0.5 * common_NM + (1 - share) ** 0.5 * own_ENM
    assert have_in_common(weight_ENM) == (8 * share + 1 - share >= COMMON)
    assert have_in_common(1e-3 * weight_ENM.bfloat16()) == have_in_common(weight_ENM)
