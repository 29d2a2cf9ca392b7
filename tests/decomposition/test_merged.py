"""Merged experts: those that are the same in another order become one for nothing, and losses are as predicted."""

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.decomposition.factors import DenseFactors, MergedFactors
from moesvd_core.decomposition.merged import MergedBasis, ordered
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import DENSE, SIDES, Metric


def metric_of(tiny: TinyLayer) -> LayerMetric:
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def same_in_another_order(tiny: TinyLayer, expert: int, of: int) -> None:
    """Make an expert compute what another one does, its neurons shuffled."""
    order_M = torch.randperm(tiny.layer.width, generator=torch.Generator().manual_seed(0))
    tiny.weights.input_END[expert] = tiny.weights.input_END[of, tiny.layer.rows_in_order(order_M)]
    tiny.weights.output_EDM[expert] = tiny.weights.output_EDM[of][:, order_M]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "input"])
def test_predicted_loss_is_the_measured_one(kind: Metric, shape: str) -> None:
    metric = metric_of(tiny_layer(5, *SHAPES[shape]))
    bases = MergedBasis.both(metric, kind)
    for groups in range(1, 6):
        for side, basis in bases.items():
            factors = basis.factors([groups])
            own_ENM = torch.empty_like(metric.stored(side))
            for members in basis.clusters(groups).values():
                for expert, order_M in members.items():
                    back_M = order_M.argsort()
                    merged_NM = factors.reconstruct()[expert]
                    own_ENM[expert] = merged_NM[:, back_M] if side == "output" else merged_NM[metric.layer.rows_in_order(back_M)]
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


def test_dense_is_the_original_tensor() -> None:
    metric = metric_of(tiny_layer())
    for side, basis in MergedBasis.both(metric, "input").items():
        factors = basis.factors([DENSE])
        assert isinstance(factors, DenseFactors) and factors.weight_ENM is metric.stored(side)


def test_an_expert_without_tokens_merges_too() -> None:
    bases = MergedBasis.both(metric_of(tiny_layer(4, starved=2)), "input")
    assert all(basis.factors([1]).reconstruct().isfinite().all() for basis in bases.values())
