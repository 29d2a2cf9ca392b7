"""Whole experts: who stays by which score, and what the others' absence is predicted to lose."""

import pytest
import torch
from decomposition_oracle import measured_loss
from tiny_layer import tiny_layer

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
