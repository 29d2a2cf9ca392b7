"""Fits to given directions against least squares, and what single precision may cost."""

import pytest
import torch

from moesvd_core.decomposition.grams import FullGram
from moesvd_core.decomposition.projection import NestedFit, fit_gains, reader


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(size: int = 5, decay: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [7, S]; G [S, S], whose eigenvalues fall by `decay` from one to the next; V [S, S], orthonormal in a Gram near G; V^{-T}."""
    turn_SS = torch.linalg.qr(random(size, size, seed=1))[0]
    gram_SS = (turn_SS * decay ** torch.arange(size)) @ turn_SS.T
    near_SS = gram_SS + 0.1 * (turn_SS * gram_SS.diagonal().min()) @ turn_SS.T
    basis_SS = torch.linalg.qr(random(size, size, seed=2))[0] @ torch.linalg.inv(torch.linalg.cholesky(near_SS))
    return random(7, size, seed=3), gram_SS, basis_SS, torch.linalg.inv(basis_SS).T


def gains(basis_MM: torch.Tensor, dual_MM: torch.Tensor, gram_MM: torch.Tensor, outer_MM: torch.Tensor) -> torch.Tensor:
    inner = FullGram(gram_MM)
    return fit_gains(NestedFit.of(inner, basis_MM, dual_MM), basis_MM, inner, outer_MM)


def test_gains_are_those_of_least_squares_at_every_rank() -> None:
    weight_NM, gram_MM, basis_MM, dual_MM = problem(decay=0.7)
    gain_M = gains(basis_MM, dual_MM, gram_MM, weight_NM.T @ weight_NM)
    half_MM = torch.linalg.cholesky(gram_MM)
    total = float((weight_NM @ half_MM).square().sum())
    for rank in range(1, 6):
        fit = torch.linalg.lstsq((basis_MM[:rank] @ half_MM).T, (weight_NM @ half_MM).T).solution.T
        lost = float(((weight_NM - fit @ basis_MM[:rank]) @ half_MM).square().sum())
        torch.testing.assert_close(total - float(gain_M[:rank].sum()), lost)


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5])
def test_single_precision_costs_next_to_nothing_of_the_total(decay: float) -> None:
    weight_NM, gram_MM, basis_MM, dual_MM = problem(40, decay)
    outer_MM = weight_NM.T @ weight_NM
    exact_M = gains(basis_MM.float().double(), torch.linalg.inv(basis_MM.float().double()).T, gram_MM, outer_MM)
    got_M = gains(basis_MM.float(), dual_MM.float(), gram_MM, outer_MM)
    assert float((got_M.cumsum(0) - exact_M.cumsum(0)).abs().max()) < 2e-6 * float(exact_M.sum())


def test_gains_that_do_not_add_up_are_made_again_in_double_precision() -> None:
    weight_NM, gram_MM, basis_MM, dual_MM = problem(decay=0.7)
    outer_MM = weight_NM.T @ weight_NM
    wrong_MM = dual_MM.float() * 1.01  # stands for rounding: the gains of single precision are 2 % too large
    got_M = gains(basis_MM.float(), wrong_MM, gram_MM, outer_MM)
    torch.testing.assert_close(got_M, gains(basis_MM, dual_MM, gram_MM, outer_MM), rtol=1e-5, atol=1e-7)


def test_a_gram_that_single_precision_makes_indefinite_is_read_in_double_precision() -> None:
    gram_MM, basis_RM = torch.eye(3, dtype=torch.float64), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1e-5, 0.0]])
    read_RM = reader(FullGram(gram_MM), basis_RM)
    assert read_RM.dtype == torch.float64
    torch.testing.assert_close(read_RM @ basis_RM.double().T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [5, 300])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("several", [False, True])
def test_one_fit_reads_what_is_read_for_any_number_of_leading_rows(size: int, precision: torch.dtype, several: bool) -> None:
    _, gram_MM, basis_MM, dual_MM = problem(size, decay=0.99)
    grams = torch.stack([gram_MM, 2 * gram_MM.diag().diag_embed() + gram_MM]) if several else gram_MM
    fit = NestedFit.of(FullGram(grams), basis_MM.to(precision), dual_MM.to(precision))
    for rank in (0, 1, size // 2, size):
        read_RM, wanted_RM = fit.reader(rank), reader(FullGram(grams), basis_MM[:rank])
        torch.testing.assert_close(read_RM.double(), wanted_RM, rtol=1e-9, atol=1e-9 if precision == torch.float64 else 2e-5)
