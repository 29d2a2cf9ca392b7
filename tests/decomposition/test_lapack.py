"""Decompositions of sizes that crowd into the caches, where appended rows leave no trace, and solving by blocks."""

import pytest
import torch

from moesvd_core.decomposition.lapack import APPENDED, SOLVED, cholesky_ex, cholesky_solve, eigh

SIZES = {torch.float32: 512, torch.float64: 512}


def gram(dtype: torch.dtype, rank: int | None = None) -> torch.Tensor:
    """A Gram of 512, whose rows take a multiple of 2 KiB, of a falling spectrum."""
    size = SIZES[dtype]
    x = torch.randn(rank or 2 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
    return (x.T @ x).to(dtype)


@pytest.mark.parametrize("dtype", SIZES)
def test_cholesky_is_the_one_of_the_matrix_alone(dtype: torch.dtype) -> None:
    matrix = gram(dtype)
    lower, failed = cholesky_ex(matrix)
    assert lower.shape == matrix.shape and int(failed) == 0
    torch.testing.assert_close(lower @ lower.mT, matrix)
    assert torch.equal(lower, lower.tril())


def test_cholesky_tells_which_order_is_not_positive() -> None:
    several = torch.stack([gram(torch.float64), gram(torch.float64)])
    several[1, 3, 3] = -1.0
    assert cholesky_ex(several)[1].tolist() == torch.linalg.cholesky_ex(several)[1].tolist() == [0, 4]


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("rank", [None, 40])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_eigenvectors_are_of_the_matrix_alone(dtype: torch.dtype, rank: int | None, scale: float) -> None:
    matrix = gram(dtype, rank) * scale
    value, vector = eigh(matrix)
    assert vector.shape == matrix.shape and value.shape == matrix.shape[:1]
    norm, epsilon = float(matrix.norm()), torch.finfo(dtype).eps
    torch.testing.assert_close(value, torch.linalg.eigvalsh(matrix), rtol=0, atol=50 * epsilon * norm)
    torch.testing.assert_close(vector.mT @ vector, torch.eye(len(matrix), dtype=dtype), rtol=0, atol=500 * epsilon)
    torch.testing.assert_close((vector * value) @ vector.mT, matrix, rtol=0, atol=50 * epsilon * norm)


def test_nothing_is_appended_to_zeros_that_could_be_taken_for_them() -> None:
    value, vector = eigh(torch.zeros(512, 512))
    assert torch.equal(value, torch.zeros(512)) and APPENDED > 0
    torch.testing.assert_close(vector.mT @ vector, torch.eye(512))


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("size", [1, SOLVED, SOLVED + 1, 3 * SOLVED, 300])
def test_solved_by_blocks_is_as_near_as_solved_at_once(dtype: torch.dtype, size: int) -> None:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2 * size, size, generator=noise, dtype=torch.float64)
    lower = torch.linalg.cholesky(x.T @ x / size).to(dtype)
    right = torch.randn(size, 70, generator=noise, dtype=torch.float64).to(dtype)
    before = right.clone()
    solved, exact = cholesky_solve(right, lower), torch.cholesky_solve(right.double(), lower.double())
    assert solved.dtype == dtype and torch.equal(right, before)
    assert float((solved - exact).norm() / exact.norm()) <= 4 * float((torch.cholesky_solve(right, lower) - exact).norm() / exact.norm())
