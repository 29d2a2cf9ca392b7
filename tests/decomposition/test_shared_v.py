"""The paper's structure against a transcription of its algorithm, and the refitted variant against least squares."""

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import tiny_layer

from moesvd_core.decomposition.factors import DenseFactors, SharedRightFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.shared_v import SharedVBasis, sharings
from moesvd_core.errors import InputError
from moesvd_core.planning import DENSE, SIDES, Side

FALLING = torch.arange(100, 0, -1)


def layer_metric(experts: int = 8, shape: str = "wide", **options: object) -> LayerMetric:
    tiny = tiny_layer(experts, *SHAPES[shape], **options)  # type: ignore[arg-type]
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def algorithm_3(weights: torch.Tensor, grams: torch.Tensor, count_E: torch.Tensor, k: int, rank: int) -> torch.Tensor:
    """Algorithm 3 with the sum of Eq. 8 and V un-whitened by the source's S; signs as the engine fixes them."""
    decomposed = []
    for weight_NM, gram_MM in zip(weights, grams, strict=True):
        s_MM = torch.linalg.cholesky(gram_MM)
        u_NR, sigma_R, v_RM = torch.linalg.svd(weight_NM @ s_MM, full_matrices=False)
        sign_R = v_RM.gather(1, v_RM.abs().argmax(1, keepdim=True)).sign()[:, 0]
        decomposed.append((u_NR[:, :rank] * sign_R[:rank], sigma_R[:rank].diag(), v_RM[:rank] * sign_R[:rank, None], s_MM))
    source = int(count_E.argmax())
    shared_RM = torch.linalg.solve(decomposed[source][3], decomposed[source][2], left=False)
    order = count_E.argsort(descending=True).tolist()
    compressed = []
    for expert in range(len(weights)):
        chosen = [other for other in order if count_E[other] > count_E[expert]][:k]
        if len(chosen) < k:
            chosen = [*chosen, expert]
        compressed.append(sum(decomposed[other][0] @ decomposed[other][1] for other in chosen) @ shared_RM)
    return torch.stack(compressed)


def test_as_written_it_is_algorithm_3() -> None:
    metric = layer_metric()
    assert len(set(metric.statistics.count_E.tolist())) == 8
    grams = torch.stack([metric.right_of_input("input", expert).full() for expert in range(8)])
    wanted = algorithm_3(metric.weights.input_END, grams, metric.statistics.count_E, 2, 4)
    got = SharedVBasis.made(metric, "input", "input", refit=False).factors([4]).reconstruct()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("experts", "groups", "stored"), [(3, 1, 1), (8, 1, 2), (16, 1, 4), (60, 1, 15), (64, 8, 2), (128, 8, 4)])
def test_how_many_left_factors_are_stored(experts: int, groups: int, stored: int) -> None:
    """D.4: 2 of 8, 4 of 16, and of 64 in eight groups the 6 rarest of each trimmed."""
    made = sharings(torch.arange(experts), refit=False)
    assert [len(made), *{each.stored for each in made}] == [groups, stored]
    assert [expert for each in made for expert in each.experts] == list(range(experts))
    assert all(each.source == max(each.experts) for each in made)


def test_rare_experts_sum_the_most_frequent_and_frequent_ones_add_their_own() -> None:
    (made,) = sharings(FALLING[:8], refit=False)
    assert made.keepers == (0, 1)
    assert made.sums == ((0,), *((0, 1),) * 7)


def test_equal_frequencies_are_ordered_by_number() -> None:
    (made,) = sharings(torch.ones(8, dtype=torch.int64), refit=False)
    assert (made.source, made.keepers) == (0, (0, 1))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("intermediate", [False, True])
def test_predicted_loss_is_the_measured_one(refit: bool, shape: str, side: Side, intermediate: bool) -> None:
    metric = layer_metric(8, shape, intermediate=intermediate)
    basis = SharedVBasis.made(metric, side, "input", refit=refit)
    most = basis.curve.gain_SR.shape[1]
    for rank in {0, 1, most // 2, most}:
        wanted = measured_loss(metric, side, basis.factors([rank]).reconstruct())
        assert basis.curve.loss_SR[0, rank] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_refitting_never_loses_more(side: Side) -> None:
    metric = layer_metric()
    written = SharedVBasis.made(metric, side, "input", refit=False).curve.loss_SR[0]
    fitted = SharedVBasis.made(metric, side, "input", refit=True).curve.loss_SR[0]
    most = min(len(written), len(fitted))
    assert (fitted[1:most] < written[1:most]).all()
    assert (fitted[1:] <= fitted[:-1]).all()


def test_the_source_is_as_good_as_on_its_own_after_a_refit() -> None:
    metric = layer_metric()
    source = int(metric.statistics.count_E.argmax())
    factors = SharedVBasis.made(metric, "input", "input", refit=True).factors([4]).reconstruct()
    half = torch.linalg.cholesky(metric.right_of_input("input", source).full())
    dropped = torch.linalg.svdvals(metric.weight("input", source) @ half)[4:].square().sum()
    torch.testing.assert_close(((metric.weight("input", source) - factors[source]) @ half).square().sum(), dropped)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_what_is_stored_is_what_the_curve_charges(side: Side, refit: bool) -> None:
    basis = SharedVBasis.made(layer_metric(), side, "input", refit=refit)
    factors = basis.factors([3])
    assert isinstance(factors, SharedRightFactors)
    assert factors.parameters == 3 * basis.curve.rank_cost_S[0]


def test_groups_have_a_slot_and_a_rank_each() -> None:
    metric = layer_metric(64, "square", tokens=200)
    basis = SharedVBasis.made(metric, "input", "input", refit=False)
    assert basis.curve.loss_SR.shape[0] == 8
    factors = basis.factors([1, 2, 3, 4, 5, 6, 7, 8])
    assert isinstance(factors, SharedRightFactors)
    assert [len(group.right_RM) for group in factors.groups] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert basis.curve.loss_SR[2, 3] == pytest.approx(measured_loss(metric, "input", factors.reconstruct(), list(range(16, 24))), rel=1e-6)


def test_a_side_is_dense_as_a_whole_or_not_at_all() -> None:
    metric = layer_metric(64, "square", tokens=200)
    basis = SharedVBasis.made(metric, "output", "input", refit=False)
    assert isinstance(basis.factors([DENSE] * 8), DenseFactors)
    with pytest.raises(InputError, match="all dense or all factored"):
        basis.factors([DENSE, *[2] * 7])


def test_directions_that_carry_nothing_do_not_blow_up() -> None:
    metric = layer_metric(8, "wide")
    source = int(metric.statistics.count_E.argmax())
    metric.weights.output_EDM[source, 3:] = 0
    metric.statistics.output_gram_EDD[source, 3:] = 0
    metric.statistics.output_gram_EDD[source, :, 3:] = 0
    basis = SharedVBasis.made(metric, "output", "input", refit=False)
    ceiling = 100 * basis.curve.loss_SR[0, 0]
    assert (basis.curve.loss_SR < ceiling).all()


def without(metric: LayerMetric, expert: int, rank: int) -> None:
    """Leave an expert's output matrix so many directions, and its statistics what these carry."""
    weight_DM = metric.weights.output_EDM[expert]
    left_DR, value_R, right_RM = torch.linalg.svd(weight_DM, full_matrices=False)
    weight_DM.copy_(left_DR[:, :rank] * value_R[:rank] @ right_RM[:rank])
    if metric.statistics.intermediate_gram_EMM is None:
        project_DD = left_DR[:, :rank] @ left_DR[:, :rank].T
        metric.statistics.output_gram_EDD[expert] = project_DD @ metric.statistics.output_gram_EDD[expert] @ project_DD
    else:
        metric.statistics.output_gram_EDD[expert] = weight_DM @ metric.statistics.intermediate_gram_EMM[expert] @ weight_DM.T


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("intermediate", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_ranks_that_the_source_has_not_are_not_offered(rank: int, intermediate: bool, refit: bool) -> None:
    metric = layer_metric(8, "wide", intermediate=intermediate)
    without(metric, int(metric.statistics.count_E.argmax()), rank)
    basis = SharedVBasis.made(metric, "output", "input", refit=refit)
    assert basis.curve.max_rank == max(1, rank)
    for kept in range(basis.curve.max_rank + 1):
        factors = basis.factors([kept]).reconstruct()
        assert factors.isfinite().all()
        assert basis.curve.loss_SR[0, kept] == pytest.approx(measured_loss(metric, "output", factors), rel=1e-6)
    assert torch.equal(basis.factors([1]).reconstruct(), torch.zeros_like(metric.weights.output_EDM)) == (rank == 0)


def test_in_single_precision_what_is_left_of_missing_directions_is_measured_as_it_was_predicted() -> None:
    metric = layer_metric(8, "wide")
    source = int(metric.statistics.count_E.argmax())
    without(metric, source, 2)
    metric.weights.output_EDM, metric.weights.input_END = metric.weights.output_EDM.float(), metric.weights.input_END.float()
    generator = torch.Generator().manual_seed(5)
    noise_DD = 1e-8 * torch.randn(10, 10, generator=generator, dtype=torch.float64) * metric.statistics.output_gram_EDD[source].abs().max()
    metric.statistics.output_gram_EDD[source] += noise_DD @ noise_DD.T / noise_DD.abs().max()
    basis = SharedVBasis.made(metric, "output", "input", refit=True)
    assert basis.curve.max_rank > 2
    for kept in range(basis.curve.max_rank + 1):
        wanted = measured_loss(metric, "output", basis.factors([kept]).reconstruct())
        assert basis.curve.loss_SR[0, kept] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("refit", [False, True])
def test_a_group_without_directions_takes_none_from_the_others(refit: bool) -> None:
    metric = layer_metric(64, "wide", tokens=400)
    first = sharings(metric.statistics.count_E, refit=refit)[0]
    without(metric, first.source, 0)
    basis = SharedVBasis.made(metric, "output", "input", refit=refit)
    most = basis.curve.max_rank
    assert most > 1
    factors = basis.factors([most] * 8)
    assert isinstance(factors, SharedRightFactors)
    assert not factors.groups[0].right_RM.any()
    assert factors.parameters == most * basis.curve.rank_cost_S.sum()
    rebuilt = factors.reconstruct()
    assert not rebuilt[list(first.experts)].any()
    for group in range(8):
        wanted = measured_loss(metric, "output", rebuilt, list(range(8 * group, 8 * group + 8)))
        assert basis.curve.loss_SR[group, most] == pytest.approx(wanted, rel=1e-6)
