"""Fitted output factors: they find what least squares finds, at the rank that they had, and leave alone what the tokens cannot tell."""

from dataclasses import replace

import pytest
import torch
from tiny_layer import TinyLayer, tiny_layer

from moesvd_core.decomposition.compensation import OutputFit, can_compensate, fitted_tensors, is_changed, with_fitted
from moesvd_core.decomposition.decompose import decompose
from moesvd_core.decomposition.factors import BaseDeltaFactors, DenseFactors, LayerFactors, PerExpertFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.registry import method
from moesvd_core.planning import DENSE, LayerPlan, SidePlan

WIDTH = 7  # of the tiny layer


def factors(tiny: TinyLayer, structure: str, rank: int, *, dense: int | None = None, empty: int | None = None) -> LayerFactors:
    """The tiny layer with factored output matrices, and the input side as it was."""
    slots = 1 if structure == "latent" else tiny.layer.experts
    ranks = tuple(DENSE if slot == dense else 0 if slot == empty else rank for slot in range(slots))
    offered = replace(method("auto"), structures=("per-expert", "pivoted", "latent", "base-delta"), screen=False)
    made = decompose(tiny.weights, tiny.layer, tiny.statistics, offered)
    side = SidePlan("dense", (DENSE,) * tiny.layer.experts, 0, 0.0)
    return made.materialise(LayerPlan(tiny.layer.index, True, "", side, SidePlan(structure, ranks, 0, 0.0), 1))  # type: ignore[arg-type]


def whole(tiny: TinyLayer) -> LayerFactors:
    """Output matrices in factors that leave nothing out."""
    experts, eye_MM = tiny.layer.experts, torch.eye(WIDTH, dtype=torch.float64)
    output = PerExpertFactors((WIDTH,) * experts, tuple(tiny.weights.output_EDM), (eye_MM,) * experts, {})
    return LayerFactors(tiny.layer.index, DenseFactors(tiny.weights.input_END), output)


def fit(
    tiny: TinyLayer, planned: LayerFactors, wanted_EDM: torch.Tensor, *, narrow: bool = True, tokens: int | None = None
) -> LayerFactors:
    """Fitted to answers `wanted` of the tiny layer's neurons."""
    made = OutputFit(LayerMetric(tiny.weights, tiny.layer, tiny.statistics), planned, "output", narrow=narrow)
    for expert in range(tiny.layer.experts):
        routed = tiny.p_TE[:, expert].nonzero()[:tokens, 0]
        for part in routed.split(50):
            h_nM = tiny.h_TEM[part, expert]
            made.add(expert, h_nM, h_nM @ wanted_EDM[expert].T, tiny.p_TE[part, expert])
    return made.factors()


def wanted(tiny: TinyLayer) -> torch.Tensor:
    noise = torch.randn(tiny.weights.output_EDM.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return tiny.weights.output_EDM + 0.5 * noise


def error(tiny: TinyLayer, made: LayerFactors, wanted_EDM: torch.Tensor) -> float:
    """Σ p² (t − D̃ h)ᵀ L (t − D̃ h), what the fit is to make small."""
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics)
    total = 0.0
    for expert, matrix_DM in enumerate(made.output.reconstruct().double()):
        off_TD = tiny.p_TE[:, expert, None] * (tiny.h_TEM[:, expert] @ (wanted_EDM[expert] - matrix_DM).T)
        total += float((metric.left("output", "output", expert).times(off_TD) * off_TD).sum())
    return total


def test_at_full_rank_the_wanted_matrices_are_found() -> None:
    tiny = tiny_layer(tokens=4000)
    made = fit(tiny, whole(tiny), wanted(tiny))
    torch.testing.assert_close(made.output.reconstruct(), wanted(tiny), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("structure", ["per-expert", "pivoted", "latent", "base-delta"])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("rank", [2, 4])
def test_fitted_factors_come_closer_at_the_same_rank(structure: str, narrow: bool, rank: int) -> None:
    tiny = tiny_layer(tokens=1000)
    planned, target = factors(tiny, structure, rank), wanted(tiny)
    made = fit(tiny, planned, target, narrow=narrow)
    assert type(made.output) is type(planned.output)
    assert made.output.parameters == planned.output.parameters
    assert error(tiny, made, target) < 0.95 * error(tiny, planned, target)
    assert made.input is planned.input


@pytest.mark.parametrize("width", [WIDTH, 12], ids=["narrower than the hidden size", "wider"])
def test_the_fit_of_whole_matrices_is_the_best_of_its_rank(width: int) -> None:
    tiny = tiny_layer(width=width, tokens=4000)
    metric, target = LayerMetric(tiny.weights, tiny.layer, tiny.statistics), wanted(tiny)
    made = fit(tiny, factors(tiny, "per-expert", 3), target)
    best = 0.0
    for expert, target_DM in enumerate(target):
        weighed_TM = tiny.p_TE[:, expert, None] * tiny.h_TEM[:, expert]
        root_DD = torch.linalg.cholesky(metric.left("output", "output", expert).full())
        root_MM = torch.linalg.cholesky(weighed_TM.T @ weighed_TM)
        best += float(torch.linalg.svdvals(root_DD.T @ target_DM @ root_MM)[3:].square().sum())
    assert best * (1 - 1e-9) <= error(tiny, made, target) <= 1.01 * best


def test_experts_that_are_whole_or_gone_stay_as_they_are() -> None:
    tiny = tiny_layer(tokens=1000)
    planned = factors(tiny, "per-expert", 3, dense=1, empty=2)
    made = fit(tiny, planned, wanted(tiny))
    assert isinstance(made.output, PerExpertFactors)
    assert isinstance(planned.output, PerExpertFactors)
    assert made.output.ranks == planned.output.ranks
    assert torch.equal(made.output.dense[1], planned.output.dense[1])
    assert made.output.left[2].shape == (10, 0)
    assert not torch.equal(made.output.left[0], planned.output.left[0])


def test_a_base_stays_while_what_is_beside_it_is_fitted() -> None:
    """Deltas become the best of their rank for what the base leaves of the target, and a file gives them again."""
    tiny = tiny_layer(tokens=4000)
    planned = factors(tiny, "base-delta", 3, dense=1, empty=2)
    assert isinstance(planned.output, BaseDeltaFactors)
    target = wanted(tiny)
    made = fit(tiny, planned, target)
    assert isinstance(made.output, BaseDeltaFactors)
    assert made.output.base_NM is planned.output.base_NM
    assert torch.equal(made.output.reconstruct()[1:3], planned.output.reconstruct()[1:3])
    metric = LayerMetric(tiny.weights, tiny.layer, tiny.statistics)
    least = 0.0
    for expert in range(4):
        h_TM = tiny.p_TE[:, expert, None] * tiny.h_TEM[:, expert]
        off_DM = (target - (made.output.reconstruct() if expert in (1, 2) else planned.output.base_NM))[expert]
        left_DD = torch.linalg.cholesky(metric.left("output", "output", expert).full())
        whitened_DM = left_DD.T @ off_DM @ torch.linalg.cholesky(h_TM.T @ h_TM)
        least += float(torch.linalg.svdvals(whitened_DM)[0 if expert in (1, 2) else 3 :].square().sum())
    assert error(tiny, made, target) == pytest.approx(least, rel=0.02)
    again = with_fitted(planned, fitted_tensors(made))
    assert torch.equal(again.output.reconstruct(), made.output.reconstruct())


def test_too_few_tokens_tell_nothing() -> None:
    tiny = tiny_layer(tokens=400)
    planned = factors(tiny, "per-expert", 3)
    made = fit(tiny, planned, wanted(tiny), tokens=WIDTH)
    assert torch.equal(made.output.reconstruct(), planned.output.reconstruct())


def test_noise_is_not_fitted() -> None:
    """Targets off by noise that no neuron explains: what the fit changes is little beside what plain least squares would change."""
    tiny = tiny_layer(tokens=100)
    made = OutputFit(LayerMetric(tiny.weights, tiny.layer, tiny.statistics), whole(tiny), "output", narrow=True)
    noise = torch.Generator().manual_seed(3)
    plain = 0.0
    for expert in range(tiny.layer.experts):
        routed = tiny.p_TE[:, expert].nonzero()[:, 0]
        h_nM, p_n1 = tiny.h_TEM[routed, expert], tiny.p_TE[routed, expert, None]
        off_nD = torch.randn(len(routed), 10, generator=noise, dtype=torch.float64)
        made.add(expert, h_nM, h_nM @ tiny.weights.output_EDM[expert].T + off_nD, p_n1[:, 0])
        plain += float(torch.linalg.lstsq(p_n1 * h_nM, p_n1 * off_nD).solution.square().sum())
    changed = float((made.factors().output.reconstruct() - tiny.weights.output_EDM).square().sum())
    assert changed < 0.2 * plain


@pytest.mark.parametrize("structure", ["per-expert", "pivoted", "latent"])
def test_fitted_factors_go_through_a_file(structure: str) -> None:
    tiny = tiny_layer(tokens=1000)
    planned = factors(tiny, structure, 3)
    made = fit(tiny, planned, wanted(tiny))
    again = with_fitted(planned, fitted_tensors(made))
    assert type(again.output) is type(planned.output)
    assert torch.equal(again.output.reconstruct(), made.output.reconstruct())


def test_refined_input_bases_go_through_a_file() -> None:
    tiny = tiny_layer(tokens=1000)
    made = decompose(tiny.weights, tiny.layer, tiny.statistics, method("auto"))
    latent, dense = SidePlan("latent", (3,), 0, 0.0), SidePlan("dense", (DENSE,) * tiny.layer.experts, 0, 0.0)
    for output in (latent, dense):
        plan = LayerPlan(tiny.layer.index, True, "", latent, output, 1)
        planned, refined = (made.materialise(plan, refined=refined) for refined in (False, True))
        assert is_changed(plan)
        assert not torch.equal(planned.input.reconstruct(), refined.input.reconstruct())
        again = with_fitted(planned, fitted_tensors(refined))
        for side in ("input", "output"):
            assert torch.equal(getattr(again, side).reconstruct(), getattr(refined, side).reconstruct())
    assert not is_changed(LayerPlan(tiny.layer.index, True, "", dense, dense, 1))


def test_dense_outputs_are_left_alone() -> None:
    tiny = tiny_layer()
    planned = factors(tiny, "per-expert", 3)
    assert can_compensate(planned)
    assert not can_compensate(replace(planned, output=DenseFactors(tiny.weights.output_EDM)))
