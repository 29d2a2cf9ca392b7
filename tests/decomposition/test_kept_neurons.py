"""Narrower experts: the refit is least squares, its loss is known at every width, and both sides keep the same neurons."""

from dataclasses import replace

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.architectures.layout import ExpertWeights
from moesvd_core.decomposition.factors import DenseFactors, LayerFactors, NarrowFactors
from moesvd_core.decomposition.kept_neurons import KeptNeuronsBasis
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import DENSE, SIDES, Metric


def metric_of(tiny: TinyLayer) -> LayerMetric:
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def in_place(basis: KeptNeuronsBasis, factors: NarrowFactors, width: int) -> torch.Tensor:
    """The output side with every column where its neuron was, [E, D, M]."""
    full_EDM = factors.weight_ENM.new_zeros(*factors.weight_ENM.shape[:2], width)
    for expert, weight_DR in enumerate(factors.weight_ENM):
        full_EDM[expert][:, basis.neurons(expert, weight_DR.shape[1])] = weight_DR
    return full_EDM


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["input", "output"])
@pytest.mark.parametrize("intermediate", [True, False])
def test_predicted_loss_is_the_measured_one(kind: Metric, shape: str, intermediate: bool) -> None:
    hidden, width = SHAPES[shape]
    metric = metric_of(tiny_layer(3, hidden, width, intermediate=intermediate))
    basis = KeptNeuronsBasis.made(metric, "output", kind)
    for rank in {0, 1, width // 2, width - 1}:
        factors = basis.factors([rank])
        assert isinstance(factors, NarrowFactors)
        wanted = measured_loss(metric, "output", in_place(basis, factors, width))
        assert basis.curve.loss_SR[0, rank] == pytest.approx(wanted, rel=1e-6)
        assert factors.parameters == rank * int(basis.curve.rank_cost_S[0])
    assert not KeptNeuronsBasis.made(metric, "input", kind).curve.loss_SR.any()  # counted once


def test_no_other_output_matrix_of_the_neurons_loses_less() -> None:
    metric = metric_of(tiny_layer(3))
    basis = KeptNeuronsBasis.made(metric, "output", "input")
    factors = basis.factors([4])
    assert isinstance(factors, NarrowFactors)
    best = measured_loss(metric, "output", in_place(basis, factors, 7))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        nudge = 1e-2 * torch.randn(factors.weight_ENM.shape, generator=generator, dtype=torch.float64)
        other = NarrowFactors(factors.weight_ENM + nudge, 2, 1, 7)
        assert measured_loss(metric, "output", in_place(basis, other, 7)) > best
    cut = NarrowFactors(
        torch.stack([weight_DM[:, basis.neurons(expert, 4)] for expert, weight_DM in enumerate(metric.weights.output_EDM)]), 2, 1, 7
    )
    assert measured_loss(metric, "output", in_place(basis, cut, 7)) > 1.2 * best


def test_the_most_salient_neurons_stay() -> None:
    tiny = tiny_layer(3)
    tiny.weights.output_EDM[0, :, [1, 5]] *= 30
    tiny.statistics.output_gram_EDD = torch.einsum(
        "te,ted,tef->edf", tiny.p_TE.square(), *[torch.einsum("tem,edm->ted", tiny.h_TEM, tiny.weights.output_EDM)] * 2
    )
    assert KeptNeuronsBasis.made(metric_of(tiny), "input", "input").neurons(0, 2).tolist() == [1, 5]


@pytest.mark.parametrize("rows", ["concatenated", "interleaved", "plain"])
def test_a_narrow_expert_computes_with_the_neurons_that_it_keeps(rows: str) -> None:
    tiny = tiny_layer(3, gated=rows != "plain")
    tiny.layer = replace(tiny.layer, rows=rows, biased=True)
    generator = torch.Generator().manual_seed(1)
    bias_EN, bias_ED = (torch.randn(3, size, generator=generator, dtype=torch.float64) for size in (tiny.layer.input_rows, 10))
    tiny.weights = ExpertWeights(tiny.weights.input_END, tiny.weights.output_EDM, bias_EN, bias_ED)
    metric = metric_of(tiny)
    sides = {side: KeptNeuronsBasis.made(metric, side, "input") for side in SIDES}
    factors = LayerFactors(3, sides["input"].factors([4]), sides["output"].factors([4]), *sides["input"].biases((4,)))
    dense = factors.multiplied_out()

    def neurons(weights: ExpertWeights, x_D: torch.Tensor, expert: int) -> torch.Tensor:
        pre_N = weights.input_END[expert] @ x_D + weights.input_bias_EN[expert]
        if rows == "plain":
            return pre_N.relu()
        gate_M, up_M = (pre_N[::2], pre_N[1::2]) if rows == "interleaved" else pre_N.chunk(2)
        return gate_M.sigmoid() * up_M

    for expert in range(3):
        kept_R = sides["input"].neurons(expert, 4)
        h_M = neurons(tiny.weights, tiny.x_TD[0], expert)
        torch.testing.assert_close(neurons(dense, tiny.x_TD[0], expert)[:4], h_M[kept_R])
        torch.testing.assert_close(dense.output_EDM[expert] @ neurons(dense, tiny.x_TD[0], expert),
                                   sides["output"].factors([4]).weight_ENM[expert] @ h_M[kept_R])


def test_a_neuron_takes_its_biases_along_and_they_are_counted() -> None:
    tiny = tiny_layer(3)
    tiny.layer = replace(tiny.layer, biased=True)
    generator = torch.Generator().manual_seed(1)
    biases = [torch.randn(3, size, generator=generator, dtype=torch.float64) for size in (14, 10)]
    tiny.weights = ExpertWeights(tiny.weights.input_END, tiny.weights.output_EDM, *biases)
    bases = {side: KeptNeuronsBasis.made(metric_of(tiny), side, "input") for side in SIDES}
    factors = LayerFactors(3, bases["input"].factors([4]), bases["output"].factors([4]), *bases["input"].biases((4,)))
    counted = sum(4 * int(basis.curve.rank_cost_S[0]) for basis in bases.values())
    assert factors.parameters == counted + biases[1].numel()
    assert sum(basis.curve.dense_parameters for basis in bases.values()) == tiny.layer.parameters - biases[1].numel()


def test_dense_is_the_original_tensor() -> None:
    metric = metric_of(tiny_layer())
    for side in SIDES:
        factors = KeptNeuronsBasis.made(metric, side, "input").factors([DENSE])
        assert isinstance(factors, DenseFactors) and factors.weight_ENM is metric.stored(side)


def test_an_expert_without_tokens_gets_finite_weights() -> None:
    basis = KeptNeuronsBasis.made(metric_of(tiny_layer(3, starved=1)), "output", "input")
    assert basis.factors([3]).reconstruct().isfinite().all()
