"""Inner products: what a Gram matrix measures, a root of it, and what to do when it is singular.

Shapes: S size of the space, R vectors, always as rows. Grams are float64: they square the condition of what they came from. All of it works
for several matrices at once as well, in leading dimensions that are not named.

Gram matrices of activations are semi-definite and often singular (fewer tokens than channels, dead channels). Each gets a relative ridge;
where rounding leaves it indefinite all the same, Algorithm 5 shifts it. Any root R with R Rᵀ = G serves a truncated SVD as well as the
symmetric one: it is Cholesky's, which costs a tenth of an eigendecomposition. Nothing here forms a plain inverse.
"""

from abc import ABC, abstractmethod
from math import sqrt

import torch

from moesvd_core.decomposition.parallel import MadeOnce
from moesvd_core.devices import on_card
from moesvd_core.linalg import add_lower_product_, cholesky_ex, lower_times, matmul, mirrored_, symmetric_product, upper_times

PART = 1 << 20
"""Numbers of a matrix that a CPU scales and turns at a time: out of its caches that takes several times as long."""
EPSILON = 1e-10
"""Ridge, as a share of the mean diagonal, on matrices that are to be inverted on all that is not zero."""


class Gram(ABC):
    """A symmetric positive definite G, seen through what the methods need of it."""

    @abstractmethod
    def times(self, x_RS: torch.Tensor) -> torch.Tensor:
        """x G, [R, S], in the precision of x."""

    @abstractmethod
    def diagonal(self) -> torch.Tensor:
        """The diagonal, [S]."""

    def carried(self, x_SN: torch.Tensor) -> torch.Tensor:
        """xᵀ G x [N, N], exactly symmetric, in the precision of x."""
        return symmetric_product(self.times(x_SN.mT), x_SN)


class RootedGram(Gram):
    """A Gram matrix with a root R at hand, R Rᵀ = G."""

    @abstractmethod
    def full(self) -> torch.Tensor:
        """The matrix itself, [S, S]."""

    @abstractmethod
    def root_times(self, x_RS: torch.Tensor) -> torch.Tensor:
        """x R, in the precision of x."""

    @abstractmethod
    def inverse_root_times(self, x_RS: torch.Tensor) -> torch.Tensor:
        """x R^{-1}."""

    @abstractmethod
    def whitened(self, outer_SS: torch.Tensor) -> torch.Tensor:
        """Rᵀ outer R, exactly symmetric, in the precision of `outer`."""


class DiagonalGram(RootedGram):
    """diag(g), g > 0."""

    def __init__(self, diagonal_S: torch.Tensor) -> None:
        self.diagonal_S = diagonal_S

    def full(self) -> torch.Tensor:
        return self.diagonal_S.diag_embed()

    def diagonal(self) -> torch.Tensor:
        return self.diagonal_S

    def times(self, x_RS: torch.Tensor) -> torch.Tensor:
        return x_RS * self.diagonal_S.to(x_RS.dtype).unsqueeze(-2)

    def root_times(self, x_RS: torch.Tensor) -> torch.Tensor:
        return x_RS * self.diagonal_S.sqrt().to(x_RS.dtype).unsqueeze(-2)

    def inverse_root_times(self, x_RS: torch.Tensor) -> torch.Tensor:
        return x_RS * self.diagonal_S.rsqrt().unsqueeze(-2)

    def carried(self, x_SN: torch.Tensor) -> torch.Tensor:
        if on_card(x_SN.device):
            scaled_NS = self.root_times(x_SN.mT)
            return symmetric_product(scaled_NS, scaled_NS.mT)
        # In parts, so that no second matrix of this size is made, each in the order in which it multiplies fastest.
        root_S1 = self.diagonal_S.sqrt().to(x_SN.dtype).unsqueeze(-1)
        size = x_SN.shape[-1]
        total_NN, rows = x_SN.new_zeros(*x_SN.shape[:-2], size, size), max(1, PART // size)
        for x_RN, root_R1 in zip(x_SN.split(rows, -2), root_S1.split(rows, -2), strict=True):
            scaled_NR = (x_RN * root_R1).mT.contiguous()
            add_lower_product_(total_NN, scaled_NR, scaled_NR.mT)
        return mirrored_(total_NN)

    def whitened(self, outer_SS: torch.Tensor) -> torch.Tensor:
        return symmetric(self.root_times(self.root_times(outer_SS).mT))


class FullGram(RootedGram):
    """A full matrix; its Cholesky factor is made when a root is first asked for."""

    def __init__(self, gram_SS: torch.Tensor) -> None:
        self.gram_SS = gram_SS

    def full(self) -> torch.Tensor:
        return self.gram_SS

    def diagonal(self) -> torch.Tensor:
        return diagonal_of(self.gram_SS)

    def times(self, x_RS: torch.Tensor) -> torch.Tensor:
        return matmul(x_RS, self.gram_SS.to(x_RS.dtype))

    def root_times(self, x_RS: torch.Tensor) -> torch.Tensor:
        return upper_times(self._lower.to(x_RS.dtype).mT, x_RS.mT).mT

    def turned_root_times(self, x_RS: torch.Tensor) -> torch.Tensor:
        """x Rᵀ, in the precision of x."""
        return lower_times(self._lower.to(x_RS.dtype), x_RS.mT).mT

    def inverse_root_times(self, x_RS: torch.Tensor) -> torch.Tensor:
        solved_RS: torch.Tensor = torch.linalg.solve_triangular(self._lower, x_RS, upper=False, left=False)
        return solved_RS

    def whitened(self, outer_SS: torch.Tensor) -> torch.Tensor:
        return symmetric_product(self.root_times(outer_SS).mT, self._lower.to(outer_SS.dtype))

    @MadeOnce
    def _lower(self) -> torch.Tensor:
        return cholesky(self.gram_SS)


class ImpliedGram(Gram):
    """The Gram H of an output matrix's inputs when only O = W H Wᵀ was collected (wide experts).

    The part of H that reaches the output is known exactly: W⁺ O W⁺ᵀ. On the rest of the space, which W does not see, H is taken to be
    isotropic. No matrix of the size of H is formed.

    Args:
        weight_NM: W, N <= M.
        outer_NN: O.
        floor: mean square of an input, the isotropic part on the null space of W.
    """

    def __init__(self, weight_NM: torch.Tensor, outer_NN: torch.Tensor, floor: float) -> None:
        self._weight_NM = weight_NM.double()
        self._floor = floor
        self._pseudo_inverse_NM = least_squares(self._weight_NM)
        self._outer_NN = outer_NN

    def times(self, x_RM: torch.Tensor) -> torch.Tensor:
        seen_RN = x_RM @ self._pseudo_inverse_NM.T
        return seen_RN @ self._outer_NN @ self._pseudo_inverse_NM + self._floor * (x_RM - seen_RN @ self._weight_NM)

    def diagonal(self) -> torch.Tensor:
        known_M = (self._pseudo_inverse_NM * (self._outer_NN @ self._pseudo_inverse_NM)).sum(0)
        return known_M + self._floor * (1 - (self._pseudo_inverse_NM * self._weight_NM).sum(0))


def diagonal_of(matrix_SS: torch.Tensor) -> torch.Tensor:
    """The diagonal, [S], a view."""
    return matrix_SS.diagonal(dim1=-2, dim2=-1)


def trace_of(matrix_SS: torch.Tensor) -> torch.Tensor:
    """The sum of the diagonal, of every matrix."""
    return diagonal_of(matrix_SS).sum(-1)


def trace_product(one_SS: torch.Tensor, other_SS: torch.Tensor) -> torch.Tensor:
    """tr A Bᵀ, of every pair of matrices, or of several and one."""
    if one_SS.ndim == 2 and other_SS.ndim == 2:  # nothing is put into memory for one
        return torch.dot(one_SS.flatten(), other_SS.flatten())
    return (one_SS * other_SS).sum((-2, -1))


def summed(matrix_ESS: torch.Tensor) -> torch.Tensor:
    """The sum of several matrices, float64."""
    if on_card(matrix_ESS.device):
        return matrix_ESS.sum(0, dtype=torch.float64)
    total_SS = torch.zeros(matrix_ESS.shape[1:], dtype=torch.float64)
    for matrix_SS in matrix_ESS:  # a seventh of the time that a CPU takes to add up numbers of another precision along a dimension
        total_SS += matrix_SS
    return total_SS


def symmetric(matrix_SS: torch.Tensor) -> torch.Tensor:
    """The symmetric part: rounding alone makes a product of symmetric matrices slightly skew."""
    return (matrix_SS + matrix_SS.mT) / 2


def ridged(gram_SS: torch.Tensor, share: float) -> torch.Tensor:
    """The Gram matrix plus `share` of its mean diagonal on every diagonal entry (1 where all of it is zero)."""
    return ridged_(gram_SS.clone(), share)


def ridged_(gram_SS: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """`ridged`, in place; each of several matrices may have a share of its own."""
    mean = diagonal_of(gram_SS).mean(-1)
    diagonal_of(gram_SS).add_(torch.where(mean > 0, share * mean, 1.0).unsqueeze(-1))
    return gram_SS


def settled_(gram_SS: torch.Tensor, share: float, summed: torch.dtype) -> torch.Tensor:
    """A Gram ridged in place, at least by what the precision that it was summed up in leaves uncertain, so that it is positive definite.

    Rounding moves every entry by up to ε/2 of itself, which changes eigenvalues by about ε/2 ‖G‖_F / √S. Where one direction outweighs all
    others that is more than the smallest eigenvalues, and a multiple of their mean does not cover it.
    """
    norm = trace_product(gram_SS, gram_SS).sqrt()
    mean = diagonal_of(gram_SS).mean(-1)
    uncertain = 2 * torch.finfo(summed).eps * norm / sqrt(gram_SS.shape[-1]) / mean
    return ridged_(gram_SS, torch.where(mean > 0, uncertain.clamp(min=share), share))


def least_squares(weight_NM: torch.Tensor) -> torch.Tensor:
    """(W Wᵀ)^{-1} W [N, M], the transposed pseudo-inverse of a W with N <= M."""
    solved_NM: torch.Tensor = torch.cholesky_solve(weight_NM, cholesky(ridged(weight_NM @ weight_NM.mT, EPSILON)))
    return solved_NM


def cholesky(gram_SS: torch.Tensor) -> torch.Tensor:
    """Lower triangular L with L Lᵀ = gram, shifting the gram by Algorithm 5 where rounding has made it indefinite."""
    factor_SS, failed = cholesky_ex(gram_SS)
    for place in failed.nonzero().tolist():  # of one matrix, an empty list names it
        factor_SS[tuple(place)] = torch.linalg.cholesky(make_positive_definite(gram_SS[tuple(place)]))
    return factor_SS


def make_positive_definite(matrix_SS: torch.Tensor, tolerance: float = 1e-10) -> torch.Tensor:
    """The symmetric part of a matrix with its eigenvalues shifted above zero (Algorithm 5).

    The paper adds `min(λ) + tolerance`, which makes a negative eigenvalue more negative; what it means, and what is done here, is to
    subtract `min(λ)`. The tolerance is relative to the largest eigenvalue.
    """
    value_S, vector_SS = torch.linalg.eigh(symmetric(matrix_SS))
    floor = tolerance * float(value_S[-1].abs().clamp(min=torch.finfo(value_S.dtype).tiny))
    if float(value_S[0]) < floor:
        value_S = value_S - value_S[0] + floor
    return symmetric((vector_SS * value_S) @ vector_SS.T)
