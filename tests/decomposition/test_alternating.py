"""Bases refined at one rank: they lose less than the nested ones, never more, and end where no small step helps."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from decomposition_oracle import SHAPES, measured_loss
from tiny_layer import tiny_layer

from moesvd_core.decomposition.alternating import refined
from moesvd_core.decomposition.factors import DenseFactors, SharedLeftFactors, SharedRightFactors
from moesvd_core.decomposition.grams import FullGram
from moesvd_core.decomposition.latent import LatentBasis
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.projection import reader
from moesvd_core.planning import DENSE, SIDES, Metric, Side

Pair = tuple[FullGram, torch.Tensor]


def layer_metric(shape: str = "wide", **options: bool) -> LayerMetric:
    tiny = tiny_layer(4, *SHAPES[shape], **options)
    return LayerMetric(tiny.weights, tiny.layer, tiny.statistics)


def random_pairs(experts: int = 5, size: int = 8) -> list[Pair]:
    """Inner products and what is carried, of experts that have little in common."""
    generator = torch.Generator().manual_seed(2)
    made = [torch.randn(size, 2 * size, generator=generator, dtype=torch.float64) for _ in range(2 * experts)]
    grams = [each @ each.T for each in made]
    return [(FullGram(inner), outer) for inner, outer in zip(grams[::2], grams[1::2], strict=True)]


def start(rank: int = 3, size: int = 8) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, rank, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q.T


def loss(pairs: list[Pair], basis_RD: torch.Tensor) -> float:
    """Σ tr L (W − A V) G (W − A V)ᵀ with the best A of each expert."""
    total = 0.0
    for inner, outer in pairs:
        left_DD = torch.eye(len(outer), dtype=torch.float64) - reader(inner, basis_RD).T @ basis_RD  # W − A V = W left
        total += float((left_DD @ inner.full() @ left_DD.T * outer).sum())
    return total


@pytest.mark.parametrize("kind", ["plain", "input", "output"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_refined_factors_lose_less_in_their_metric_at_the_same_size(kind: Metric, side: Side, shape: str) -> None:
    metric = layer_metric(shape)
    basis = LatentBasis.both(metric, kind)[side]
    sliced, better = basis.factors([3]), basis.refined([3])
    assert type(better) is type(sliced)
    assert better.parameters == sliced.parameters
    if kind != "output":  # the oracle measures the output metric; it need not fall where another is made small
        assert not torch.equal(better.reconstruct(), sliced.reconstruct())
        return
    before, after = (measured_loss(metric, side, each.reconstruct()) for each in (sliced, better))
    assert after < 0.999 * before


def test_no_round_and_no_step_loses_more() -> None:
    pairs = random_pairs()
    by_rounds = [loss(pairs, refined(start(), lambda: iter(pairs), rounds, 3)) for rounds in range(6)]
    assert all(later < earlier for earlier, later in pairwise(by_rounds))
    by_steps = [loss(pairs, refined(start(), lambda: iter(pairs), 1, steps)) for steps in range(5)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise([loss(pairs, start()), *by_steps]))


def test_in_the_end_no_small_change_of_the_basis_helps() -> None:
    pairs = random_pairs()
    basis_RD = refined(start(), lambda: iter(pairs), 300, 30)
    least, generator = loss(pairs, basis_RD), torch.Generator().manual_seed(4)
    for _ in range(20):
        change_RD = torch.randn(basis_RD.shape, generator=generator, dtype=torch.float64)
        assert loss(pairs, basis_RD + 1e-3 * change_RD) > least


def test_where_experts_share_their_inner_product_the_nested_basis_is_the_best_already() -> None:
    metric = layer_metric(measured=False)  # one Γ for all experts
    basis = LatentBasis.both(metric, "output")["output"]
    before, after = (measured_loss(metric, "output", each.reconstruct()) for each in (basis.factors([3]), basis.refined([3])))
    assert after == pytest.approx(before, rel=1e-6)


def test_an_exact_basis_stays_exact() -> None:
    pairs, basis_RD = random_pairs(), start()
    exact: list[Pair] = []
    for inner, outer in pairs:  # nothing is carried but by the rows of the basis
        project_DD = basis_RD.T @ basis_RD
        exact.append((inner, project_DD @ outer @ project_DD))
    made = refined(basis_RD, lambda: iter(exact))
    assert made.isfinite().all()
    assert loss(exact, made) < 1e-9 * loss(pairs, basis_RD)


@pytest.mark.parametrize("side", SIDES)
def test_where_nothing_is_carried_the_basis_stays(side: Side) -> None:
    silent = [(inner, torch.zeros_like(outer)) for inner, outer in random_pairs()]
    assert torch.equal(refined(start(), lambda: iter(silent)), start())
    metric = layer_metric()
    metric.weights.input_END.zero_()
    metric.weights.output_EDM.zero_()
    metric.statistics.output_gram_EDD.zero_()
    refitted = LatentBasis.both(metric, "input")[side].refined([3])
    assert not refitted.reconstruct().any()


def test_pairs_are_asked_for_anew_and_none_is_kept() -> None:
    asked = 0

    def pairs() -> Iterator[Pair]:
        nonlocal asked
        asked += 1
        yield from random_pairs()

    refined(start(), pairs, rounds=2, steps=3)
    assert asked == 2 * (1 + 1 + 3)


@pytest.mark.parametrize("side", SIDES)
def test_dense_and_nothing_at_all_are_what_they_were(side: Side) -> None:
    basis = LatentBasis.both(layer_metric(), "output")[side]
    assert isinstance(basis.refined([DENSE]), DenseFactors)
    nothing = basis.refined([0])
    assert isinstance(nothing, SharedLeftFactors | SharedRightFactors)
    assert not nothing.reconstruct().any()
