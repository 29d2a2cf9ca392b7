"""Products and decompositions are those of the library that would be slower: however matrices lie in memory, with halves that are not made,
and with rows appended that leave no trace."""

from collections.abc import Callable

import pytest
import torch

from moesvd_core import linalg
from moesvd_core.linalg import (
    APPENDED,
    BLOCK,
    LEAST,
    SOLVED,
    back_substituted,
    cholesky_ex,
    cholesky_solve,
    eigh,
    eigvalsh,
    lower_product,
    lower_times,
    matmul,
    mirrored_,
    quadratic,
    symmetric_product,
    upper_times,
)

SIZE = 260
noise = torch.Generator().manual_seed(0)
ORDERS = {
    "rows": lambda: torch.randn(SIZE, SIZE, generator=noise),
    "columns": lambda: torch.randn(SIZE, SIZE, generator=noise).T,
    "part of wider rows": lambda: torch.randn(SIZE, SIZE + 40, generator=noise)[:, 40:],
    "part of longer columns": lambda: torch.randn(SIZE, SIZE + 40, generator=noise).T[40:],
    "every other number": lambda: torch.randn(2 * SIZE, 2 * SIZE, generator=noise)[::2, ::2],
    "one row again and again": lambda: torch.randn(1, SIZE, generator=noise).expand(SIZE, SIZE),
}


@pytest.mark.parametrize("left", ORDERS)
@pytest.mark.parametrize("right", ORDERS)
def test_a_product_is_right_in_every_order_of_memory(left: str, right: str) -> None:
    assert SIZE**3 >= LEAST
    a, b = ORDERS[left](), ORDERS[right]()
    torch.testing.assert_close(matmul(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_small_matrices_and_several_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_linear", None if linalg._linear is None else _refuse)
    large = torch.randn(SIZE, SIZE, generator=noise)
    for given in (large.to(dtype), large[:8, :8], torch.stack([large, large])):
        assert torch.equal(matmul(given, given), given @ given)


def test_without_the_library_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_linear", None)
    large = torch.randn(SIZE, SIZE, generator=noise)
    assert torch.equal(matmul(large, large), large @ large)


def _refuse(*_: object) -> torch.Tensor:
    raise AssertionError("the other library was asked")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5, 600])
def test_products_that_spare_a_half_are_those_that_do_not(size: int) -> None:
    left, other = random(size, 40), random(size, 30, seed=1)
    whole, skew = left @ left.T, random(size, size, seed=2)
    torch.testing.assert_close(symmetric_product(left, left.T), whole)
    assert torch.equal(symmetric_product(left, left.T), symmetric_product(left, left.T).T)
    torch.testing.assert_close(lower_product(left, left.T).tril(), whole.tril())
    torch.testing.assert_close(upper_times(whole.triu(), other), whole.triu() @ other)
    torch.testing.assert_close(lower_times(whole.tril(), other), whole.tril() @ other)
    torch.testing.assert_close(quadratic(other.T, whole), (other.T @ whole @ other).diagonal())
    torch.testing.assert_close(mirrored_(skew.clone()), skew.tril() + skew.tril(-1).T)


@pytest.mark.parametrize("size", [3, BLOCK + 1])
def test_several_matrices_at_once_are_what_each_is(size: int) -> None:
    left, skew, other = random(3, size, 40), random(3, size, size, seed=2), random(3, 30, size, seed=1)
    whole = torch.stack([each @ each.T for each in left])
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "symmetric product": lambda at: symmetric_product(left[at], left[at].mT),
        "lower product": lambda at: lower_product(left[at], left[at].mT).tril(),
        "upper": lambda at: upper_times(whole[at].triu(), other[at].mT),
        "quadratic": lambda at: quadratic(other[at], whole[at]),
        "mirrored": lambda at: mirrored_(skew[at].clone()),
    }
    for name, call in calls.items():
        each = torch.stack([call(place) for place in range(3)])
        assert torch.allclose(call(slice(None)), each, rtol=1e-9, atol=1e-9), name


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
    torch.testing.assert_close(eigvalsh(matrix), value, rtol=0, atol=50 * torch.finfo(dtype).eps * float(matrix.norm()))
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
    half = back_substituted(right, lower)
    assert half.dtype == dtype and torch.equal(right, before)
    torch.testing.assert_close(lower.double().T @ half.double(), right.double(), rtol=1e-4, atol=1e-4)
