"""Inner products: roots of singular matrices, what is assumed where nothing was measured, and Algorithm 5."""

from collections.abc import Callable

import pytest
import torch

from moesvd_core.decomposition.grams import (
    DiagonalGram,
    FullGram,
    ImpliedGram,
    cholesky,
    make_positive_definite,
    ridged,
    settled_,
    trace_product,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_root_of_a_singular_gram_stays_finite_and_squares_back() -> None:
    thin = random(6, 2)
    gram = FullGram(ridged(thin @ thin.T, 1e-6))
    identity = torch.eye(6, dtype=torch.float64)
    root = gram.root_times(identity)
    torch.testing.assert_close(root @ root.T, gram.full())
    torch.testing.assert_close(gram.inverse_root_times(gram.root_times(identity)), identity)


def test_ridge_is_a_share_of_the_mean_diagonal() -> None:
    gram = torch.diag(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(ridged(gram, 0.1).diagonal(), torch.tensor([1.2, 3.2]))


def test_ridge_makes_an_empty_gram_the_identity() -> None:
    assert torch.equal(ridged(torch.zeros(3, 3), 1e-6), torch.eye(3))


def test_diagonal_and_full_agree() -> None:
    weight_S, x_RS = random(5).abs() + 0.1, random(3, 5, seed=1)
    diagonal, full = DiagonalGram(weight_S), FullGram(weight_S.diag())
    for name in ("times", "root_times", "inverse_root_times"):
        torch.testing.assert_close(getattr(diagonal, name)(x_RS), getattr(full, name)(x_RS))


def test_products_keep_the_precision_of_what_they_multiply() -> None:
    assert FullGram(torch.eye(3, dtype=torch.float64)).times(torch.ones(1, 3)).dtype == torch.float32


def test_implied_gram_shows_the_outputs_that_were_collected() -> None:
    weight_NM, half = random(3, 8), random(8, 8, seed=1)
    outer_NN = weight_NM @ half @ half.T @ weight_NM.T
    implied = ImpliedGram(weight_NM, outer_NN, 0.5)
    torch.testing.assert_close(implied.times(weight_NM) @ weight_NM.T, outer_NN, rtol=1e-6, atol=1e-6)


def test_implied_gram_is_isotropic_where_the_matrix_sees_nothing() -> None:
    weight_NM = random(3, 8)
    unseen_M = torch.linalg.svd(weight_NM).Vh[-1:]
    torch.testing.assert_close(ImpliedGram(weight_NM, random(3, 3), 0.5).times(unseen_M), 0.5 * unseen_M, rtol=1e-6, atol=1e-6)


def test_cholesky_of_a_definite_matrix_is_left_alone() -> None:
    half = random(4, 4)
    torch.testing.assert_close(cholesky(half @ half.T), torch.linalg.cholesky(half @ half.T))


def test_algorithm_5_rescues_cholesky_from_an_indefinite_matrix() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1e-9, 2.0], dtype=torch.float64))
    lower = cholesky(matrix)
    torch.testing.assert_close(lower @ lower.T, matrix, atol=1e-8, rtol=0)


def test_algorithm_5_leaves_alone_what_stands_beside_an_indefinite_matrix() -> None:
    broken, whole = torch.diag(torch.tensor([1.0, -1e-9, 2.0], dtype=torch.float64)), ridged(random(3, 5) @ random(3, 5).T, 1e-6)
    lower = cholesky(torch.stack([whole, broken, whole]))
    assert torch.equal(lower[1], cholesky(broken))
    for place in (0, 2):
        assert torch.equal(lower[place], cholesky(whole))


def test_algorithm_5_shifts_eigenvalues_above_zero_and_symmetrises() -> None:
    matrix = torch.tensor([[1.0, 4.0], [2.0, 1.0]], dtype=torch.float64)
    fixed = make_positive_definite(matrix)
    assert torch.equal(fixed, fixed.T)
    assert float(torch.linalg.eigvalsh(fixed)[0]) > 0


@pytest.mark.parametrize("tolerance", [1e-10, 1e-3])
def test_algorithm_5_leaves_a_definite_matrix_as_it_is(tolerance: float) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(make_positive_definite(matrix, tolerance), matrix)


def test_a_direction_that_outweighs_all_others_in_single_precision_leaves_a_gram_positive_definite() -> None:
    x_TS = random(100, 256) + 1e3 * random(256)
    rounded_SS = (x_TS.T @ x_TS).float().double()
    assert torch.linalg.eigvalsh(ridged(rounded_SS, 1e-9))[0] < 0
    assert torch.linalg.eigvalsh(settled_(rounded_SS, 1e-9, torch.float32))[0] > 0


def test_a_gram_without_such_a_direction_keeps_its_ridge() -> None:
    x_TS = random(1000, 256)
    assert torch.equal(settled_(x_TS.T @ x_TS, 1e-6, torch.float32), ridged(x_TS.T @ x_TS, 1e-6))


@pytest.mark.parametrize("size", [3, 129])
def test_several_matrices_at_once_are_what_each_is(size: int) -> None:
    left, skew, other = random(3, size, 40), random(3, size, size, seed=2), random(3, 30, size, seed=1)
    whole = torch.stack([each @ each.T for each in left])
    grams = whole.clone()
    grams[1] = 0
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "ridged": lambda at: ridged(grams[at], 1e-3),
        "settled": lambda at: settled_(grams[at].clone(), 1e-9, torch.float32),
        "trace": lambda at: trace_product(whole[at], skew[at]),
    }
    for made in (lambda at: DiagonalGram(left[at, :, 0].abs()), lambda at: FullGram(settled_(grams[at].clone(), 1e-9, torch.float32))):
        kind = type(made(0)).__name__
        calls[f"{kind} full"] = lambda at, made=made: made(at).full()
        calls[f"{kind} diagonal"] = lambda at, made=made: made(at).diagonal()
        calls[f"{kind} times"] = lambda at, made=made: made(at).times(other[at])
        calls[f"{kind} root"] = lambda at, made=made: made(at).root_times(other[at])
        calls[f"{kind} inverse root"] = lambda at, made=made: made(at).inverse_root_times(other[at])
        calls[f"{kind} whitened"] = lambda at, made=made: made(at).whitened(whole[at])
    for name, call in calls.items():
        each = torch.stack([call(at) for at in range(3)])
        torch.testing.assert_close(call(slice(None)), each, rtol=1e-8, atol=1e-8, msg=name)
