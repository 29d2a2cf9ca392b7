"""Factors without their identities: exact, of any rank, with coefficients that stay small."""

import pytest
import torch

from moesvd_core.decomposition.pivots import pivoted

torch.set_num_threads(1)


def multiplied_out(left_NR: torch.Tensor, right_RS: torch.Tensor, pivot_R: torch.Tensor) -> torch.Tensor:
    """The matrix that a stored form stands for."""
    columns = right_RS.shape[0] + right_RS.shape[1]
    other_S = torch.tensor([column for column in range(columns) if column not in set(pivot_R.tolist())], dtype=torch.int64)
    full_NC = left_NR.new_empty(len(left_NR), columns)
    full_NC[:, pivot_R], full_NC[:, other_S] = left_NR, left_NR @ right_RS
    return full_NC


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "rank", "columns"), [(30, 7, 40), (12, 40, 41), (30, 1, 9), (5, 3, 3), (8, 0, 6)])
def test_the_product_is_what_it_was(rows: int, rank: int, columns: int) -> None:
    left_NR, right_RC = random(rows, rank), random(rank, columns, seed=1)
    stored = pivoted(left_NR, right_RC)
    assert [tuple(each.shape) for each in stored] == [(rows, rank), (rank, columns - rank), (rank,)]
    assert stored[2].tolist() == sorted(set(stored[2].tolist()))
    product_NC = left_NR @ right_RC
    assert (multiplied_out(*stored) - product_NC).norm() <= 1e-12 * product_NC.norm()
    assert torch.allclose(stored[0], product_NC[:, stored[2]], rtol=1e-12, atol=1e-12)


def test_single_factors_stay_single_and_are_rounded_once() -> None:
    left_NR, right_RC = random(50, 20).float(), random(20, 60, seed=1).float()
    stored = pivoted(left_NR, right_RC)
    assert [each.dtype for each in stored] == [torch.float32, torch.float32, torch.int64]
    exact = pivoted(left_NR.double(), right_RC.double())
    assert all(torch.equal(each, one.to(each.dtype)) for each, one in zip(stored, exact, strict=True))


@pytest.mark.parametrize("decay", [0.0, 3.0, 12.0])
def test_coefficients_stay_small_however_much_singular_values_differ(decay: float) -> None:
    right_RC = random(150, 256) * torch.logspace(0, -decay, 150, dtype=torch.float64)[:, None]
    _, coefficient_RS, _ = pivoted(random(64, 150, seed=1), right_RC)
    assert coefficient_RS.abs().max() < 20


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_factor_of_lower_rank_than_its_shape_is_exact_too(rank: int) -> None:
    left_NR = random(20, 9)
    for right_RC in (random(9, rank, seed=1) @ random(rank, 15, seed=2), random(9, 15, seed=1) * (torch.arange(9) < rank)[:, None]):
        stored = pivoted(left_NR, right_RC)
        assert all(torch.isfinite(each).all() for each in stored)
        assert stored[1].abs().max() < 20
        assert torch.allclose(multiplied_out(*stored), left_NR @ right_RC, rtol=1e-12, atol=1e-12)


def test_equal_columns_at_the_front_are_no_two_pivots() -> None:
    right_RC = torch.tensor([[1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 3.0, 0.0]])
    stored = pivoted(torch.eye(2), right_RC)
    assert not {0, 1} <= set(stored[2].tolist())
    assert torch.allclose(multiplied_out(*stored), right_RC, atol=1e-6)


def test_gives_the_same_every_time_whatever_the_left_factor_is() -> None:
    right_RC = random(6, 20)
    first, again, other = pivoted(random(4, 6), right_RC), pivoted(random(4, 6), right_RC), pivoted(random(4, 6, seed=3), right_RC)
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    assert all(torch.equal(one, same) for one, same in zip(first[1:], other[1:], strict=True))


def test_more_ranks_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at most 4, the columns of the right factor, got 5"):
        pivoted(random(3, 5), random(5, 4))
