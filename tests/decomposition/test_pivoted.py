"""Factors without their identities: the factors of `per_expert` at every rank, for fewer parameters."""

import numpy as np
import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import tiny_layer

from moesvd_core.decomposition.factors import DenseFactors, PerExpertFactors, PivotedFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.per_expert import PerExpertBasis
from moesvd_core.decomposition.pivoted import PivotedBasis
from moesvd_core.planning import DENSE, SIDES, Side


def layer_metric(shape: str = "wide") -> LayerMetric:
    tiny = tiny_layer(3, *SHAPES[shape])
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_those_of_two_whole_factors_and_go_on_beyond(shape: str, side: Side) -> None:
    metric = layer_metric(shape)
    plain, pivoted = (made.made(metric, side, "output") for made in (PerExpertBasis, PivotedBasis))
    most = plain.curve.max_rank
    assert most < pivoted.curve.max_rank == min(metric.shape(side))
    for expert in range(3):
        assert pivoted.curve.loss_SR[expert, : most + 1] == pytest.approx(plain.curve.loss_SR[expert], rel=1e-9)
    torch.testing.assert_close(pivoted.factors([most] * 3).reconstruct(), plain.factors([most] * 3).reconstruct())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_loss_is_the_measured_one_beyond_break_even_of_whole_factors(shape: str, side: Side) -> None:
    metric = layer_metric(shape)
    basis = PivotedBasis.made(metric, side, "output")
    rank = basis.curve.max_rank - 1
    got_ENM = basis.factors([rank] * 3).reconstruct()
    for expert in range(3):
        assert basis.curve.loss_SR[expert, rank] == pytest.approx(measured_loss(metric, side, got_ENM, [expert]), rel=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_a_rank_stores_its_factors_and_indices_without_the_identity(side: Side) -> None:
    metric = layer_metric()
    rows, columns = metric.shape(side)
    basis = PivotedBasis.made(metric, side, "output")
    factors, ranks = basis.factors([3, 0, DENSE]), np.array([3])
    assert isinstance(factors, PivotedFactors)
    assert factors.parameters == 3 * (rows + columns) - 3 * 3 + 3 + rows * columns
    assert basis.curve.parameters_SP(ranks)[0, 0] == 3 * (rows + columns) - 3 * 3 + 3
    assert basis.curve.flops_SP(ranks)[0, 0] == pytest.approx(metric.frequencies[0] * (3 * (rows + columns) - 3 * 3))
    assert isinstance(basis.factors([DENSE] * 3), DenseFactors)


@pytest.mark.parametrize("side", SIDES)
def test_every_rank_below_the_full_one_is_smaller_than_the_matrix_but_for_its_indices(side: Side) -> None:
    curve = PivotedBasis.made(layer_metric(), side, "output").curve
    ranks = np.arange(curve.max_rank + 1)
    stored_SP = curve.parameters_SP(ranks) - ranks
    assert (stored_SP[:, :-1] < curve.dense_cost_S[:, None]).all()
    assert (stored_SP[:, -1] == curve.dense_cost_S).all()


def test_the_side_as_a_whole_costs_what_its_experts_do() -> None:
    curve = PivotedBasis.made(layer_metric(), "input", "output").curve
    ranks, whole = np.arange(curve.max_rank + 1), curve.as_one_slot()
    assert (whole.parameters_SP(ranks)[0] == curve.parameters_SP(ranks).sum(0)).all()
    assert whole.flops_SP(ranks)[0] == pytest.approx(curve.flops_SP(ranks).sum(0))


def test_a_file_gives_the_same_factors() -> None:
    metric = layer_metric()
    basis = PivotedBasis.made(metric, "input", "output")
    again = PivotedBasis.loaded(metric, "input", "output", basis.tensors())
    assert torch.equal(again.factors([4, 2, 1]).reconstruct(), basis.factors([4, 2, 1]).reconstruct())
    assert again.curve.identities == 1


def test_what_is_stored_multiplies_out_to_the_factors() -> None:
    noise = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 2, generator=noise), torch.randn(2, 7, generator=noise)
    made = PivotedFactors(PerExpertFactors((2, 0), (left, left[:, :0]), (right, right[:0]), {}))
    assert made.parameters == 2 * 5 + 2 * 7 - 4 + 2 == sum(each.numel() for expert in made.stored for each in expert)
    at_pivots_NR, _, pivot_R = made.stored[0]
    torch.testing.assert_close(at_pivots_NR, made.reconstruct()[0][:, pivot_R])
