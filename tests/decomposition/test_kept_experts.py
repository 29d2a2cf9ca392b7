"""Whole experts: who stays by which score, and what the others' absence is predicted to lose."""

import pytest
import torch
from decomposition_oracle import measured_loss
from tiny_layer import TinyLayer, tiny_layer
from tiny_models import TINY, tiny_tokenizer

from moesvd_core.architectures.experts_io import gate_function, read_experts, routed_tokens
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertWeights
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.calibration.moments import pre_activations
from moesvd_core.decomposition import metrics
from moesvd_core.decomposition.kept_experts import KeptExpertsBasis
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import DENSE, Metric


@pytest.mark.parametrize("kind", ["saliency", "frequency", "output"])
def test_predicted_loss_is_that_of_experts_that_are_zero(kind: Metric) -> None:
    tiny = tiny_layer(5)
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics)
    basis = KeptExpertsBasis.made(metric, "output", kind)
    whole = basis.curve.as_one_slot()
    for kept in range(2, 6):
        ranks = basis.curve.slot_ranks(kept)
        factors = basis.factors(ranks)
        assert ranks.count(DENSE) == kept
        assert whole.loss_SR[0, kept] == pytest.approx(measured_loss(metric, "output", factors.reconstruct()), rel=1e-6, abs=1e-12)
        assert factors.parameters == kept * int(whole.rank_cost_S[0])
    assert not KeptExpertsBasis.made(metric, "input", kind).curve.loss_SR.any()  # counted once


def test_each_score_keeps_whom_it_says() -> None:
    tiny = tiny_layer(4)
    tiny.statistics.saliency_E = torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64)
    tiny.statistics.count_E = torch.tensor([40, 10, 30, 20])
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics)
    kept = {kind: KeptExpertsBasis.made(metric, "input", kind).curve.slot_ranks(2) for kind in ("saliency", "frequency")}
    assert kept == {"saliency": (0, DENSE, 0, DENSE), "frequency": (DENSE, 0, DENSE, 0)}


def test_as_many_stay_as_answer_a_token() -> None:
    tiny = tiny_layer(4)
    curve = KeptExpertsBasis.made(LayerMetric(tiny.weights, tiny.layer, tiny.statistics), "input", "saliency").curve
    assert curve.least == tiny.layer.active == 2
    assert curve.as_one_slot().fixed_flops == pytest.approx(curve.dense_flops)


def biased(tiny: TinyLayer, *, summed: bool) -> torch.Tensor:
    """Give the experts output biases, and statistics their Σ p² y; answers [T, E, D] without biases."""
    y_TED = torch.einsum("tem,edm->ted", tiny.h_TEM, tiny.weights.output_EDM)
    bias_EN, bias_ED = torch.zeros(4, 14, dtype=torch.float64), torch.linspace(-9, 15, 40, dtype=torch.float64).reshape(4, 10)
    tiny.weights = ExpertWeights(tiny.weights.input_END, tiny.weights.output_EDM, bias_EN, bias_ED)
    tiny.statistics.output_sum_ED = torch.einsum("te,ted->ed", tiny.p_TE.square(), y_TED) if summed else None
    return y_TED


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_an_experts_absence_takes_its_output_bias_along(summed: bool, measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """tr L Σ p² (y + c)(y + c)ᵀ from the tokens; without Σ p² y, of an older calibration, as if answers and biases were unrelated."""
    monkeypatch.setattr(metrics, "GRAM_RIDGE", 0.0)
    tiny = tiny_layer(4, measured=measured)
    y_TED = biased(tiny, summed=summed)
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics, shrink=False)
    loss_E = KeptExpertsBasis.made(metric, "output", "output").curve.loss_SR[:, 0]
    bias_ED = tiny.weights.output_bias_ED
    assert bias_ED is not None
    for expert in range(4):
        left_DD, p_T1 = metric.left("output", "output", expert).full(), tiny.p_TE[:, expert, None]
        answers = [p_T1 * (y_TED[:, expert] + bias_ED[expert])] if summed else [p_T1 * y_TED[:, expert], p_T1 * bias_ED[expert]]
        wanted = sum(float((answer_TD @ left_DD * answer_TD).sum()) for answer_TD in answers)
        assert loss_E[expert] == pytest.approx(0.5 * wanted / 400, rel=1e-6)


def test_an_expert_without_tokens_is_lent_some_that_answer_with_its_bias() -> None:
    tiny = tiny_layer(4, starved=2)
    biased(tiny, summed=True)
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics)
    bias_D = metric.bias("output", 2)
    lent = 0.02 * float(tiny.statistics.weight_square_E.mean())
    wanted = metric.energy("output", 2) + lent * float(bias_D @ metric.left("output", "output", 2).full() @ bias_D)
    assert metric.absence(2) == pytest.approx(wanted)


def test_a_bias_that_cancels_the_answers_leaves_nothing_to_lose() -> None:
    tiny = tiny_layer(4)
    biased(tiny, summed=True)
    assert tiny.weights.output_bias_ED is not None and tiny.statistics.output_sum_ED is not None
    bias_D, weight_square = tiny.weights.output_bias_ED[1], float(tiny.statistics.weight_square_E[1])
    tiny.statistics.output_gram_EDD[1] = (1 - 1e-6) * weight_square * torch.outer(bias_D, bias_D)  # as if rounded
    tiny.statistics.output_sum_ED[1] = -weight_square * bias_D
    tiny.statistics.intermediate_gram_EMM = None
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics, shrink=False)
    whole = weight_square * float(bias_D @ metric.left("output", "output", 1).full() @ bias_D)
    assert 0 <= metric.absence(1) < 1e-3 * whole


def test_an_expert_that_answers_by_its_bias_alone_is_not_the_first_to_go() -> None:
    """The whole way from tokens, in the family whose experts have biases."""
    model = TINY["gpt_oss"]()
    layer = expert_layers(model)[0]
    weights = read_experts(model.get_submodule(layer.name), layer)
    assert weights.output_bias_ED is not None
    weights.output_EDM[2] *= 1e-3
    weights.output_bias_ED[2] = 3.0
    calls: list[tuple[torch.Tensor, ...]] = []
    handle = model.get_submodule(layer.name).register_forward_pre_hook(lambda _, args: calls.append(args))
    statistics = calibrate(MemoryStream(model), tiny_tokenizer(), Calibration(samples=4, length=32, batch=4))
    handle.remove()
    metric = LayerMetric(weights, layer, statistics.layers[layer.index], shrink=False)
    curve = KeptExpertsBasis.made(metric, "output", "output").curve
    for expert, _, x_nD, p_n in routed_tokens(layer, calls[0]):
        h_nM = gate_function(model.get_submodule(layer.name), layer)(pre_activations(weights, expert, x_nD))
        answer_nD = (p_n[:, None] * (h_nM @ weights.output_EDM[expert].T + weights.output_bias_ED[expert])).double()
        wanted = 0.5 * float((answer_nD @ metric.left("output", "output", expert).full() * answer_nD).sum()) / statistics.tokens
        assert curve.loss_SR[expert, 0] == pytest.approx(wanted, rel=1e-4)  # sums are kept in float32, Grams get a ridge
    assert curve.slot_ranks(3)[2] == DENSE
