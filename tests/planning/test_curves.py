"""Curves refuse what would make a plan that only looks fine."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_curves import curve

from moesvd_core.errors import InputError, StatisticsError


def test_names_layer_side_and_slot_of_a_loss_that_is_not_finite() -> None:
    with pytest.raises(StatisticsError, match=r"layer 3, output side, latent, slot 1 is not finite"):
        curve([[2.0, 1.0], [1.0, float("nan")]], layer=3, side="output", structure="latent")


def test_refuses_a_negative_loss_but_not_rounding() -> None:
    curve([[2.0, -1e-9]])
    with pytest.raises(StatisticsError, match=r"slot 0 must be >= 0 nats a token, got -0.5"):
        curve([[2.0, -0.5]])


def test_refuses_arrays_that_do_not_fit_together() -> None:
    good = curve([[2.0, 1.0, 0.0]])
    with pytest.raises(InputError, match=r"gain .* must be \[1, 2\]"):
        replace(good, gain_SR=np.ones((1, 3)))
    with pytest.raises(InputError, match=r"load_S .* one value for each of 1 slots, got \(2,\)"):
        replace(good, load_S=np.ones(2))
    with pytest.raises(InputError, match=r"rank_cost_S .* at least 1 parameter, got 0"):
        replace(good, rank_cost_S=np.zeros(1, dtype=np.int64))
    with pytest.raises(InputError, match=r"must be \[slots, ranks \+ 1\]"):
        replace(good, loss_SR=np.ones((1, 1)), gain_SR=np.ones((1, 0)))


def test_offers_multiples_of_the_block_and_a_small_matrix_its_largest_rank() -> None:
    assert curve([[1.0] * 21]).ranks_on_offer(8).tolist() == [0, 8, 16]
    assert curve([[1.0] * 6]).ranks_on_offer(8).tolist() == [0, 5]


def test_one_slot_sums_all() -> None:
    whole = curve([[2.0, 1.0], [5.0, 3.0]], rank_cost=[2, 3], dense_cost=[10, 20]).as_one_slot()
    assert whole.loss_SR.tolist() == [[7.0, 4.0]]
    assert (whole.rank_cost_S.tolist(), whole.dense_cost_S.tolist()) == ([5], [30])


def test_many_experts_without_identities_share_few_ranks() -> None:
    losses = [np.linspace(1.0, 0.0, 2049).tolist()]
    for slots, count in ((1, 257), (32, 257), (33, 33), (128, 33)):
        made = curve(losses * slots, structure="pivoted", rank_cost=4097, dense_cost=2048**2)
        assert made.ranks_on_offer(8).size == count
        assert made.ranks_on_offer(8)[-1] == 2048
    assert curve(losses * 128, rank_cost=4096, dense_cost=2048**2).ranks_on_offer(8).size == 257
