"""The best nested projections in a weighted inner product: one eigendecomposition, every rank; and fits to directions that are given.

Shapes: S size of the space, R ranks. Fits are made for several inner products at once as well, in leading dimensions that are not named.
"""

from dataclasses import dataclass
from math import sqrt

import torch

from moesvd_core.decomposition.grams import Gram, RootedGram, cholesky, diagonal_of, trace_product
from moesvd_core.linalg import back_substituted, cholesky_ex, cholesky_solve, eigh, lower_product, quadratic, symmetric_product, upper_times

UNCERTAIN = 1e-4
"""Largest share of a row of V G Vᵀ that rounding may be in single precision: fits then lose less than a millionth more."""
ROUNDING = 1e-6
"""Largest error of a sum of gains, as a share of it, that single precision is allowed."""


@dataclass(frozen=True)
class Projection:
    """Leading directions of `outer` in the inner product G.

    Attributes:
        basis_RS: V = Qᵀ R^{-1} with R Rᵀ = G, best direction first, V G Vᵀ = 1; W ≈ W (G Vᵀ) V, cut after any row, is the best of its rank.
        gain_R: squared singular values of L^{1/2} W G^{1/2}, descending.
        rest: sum of those beyond R.
    """

    basis_RS: torch.Tensor
    gain_R: torch.Tensor
    rest: float


def best_projection(inner: RootedGram, outer_SS: torch.Tensor, ranks: int, dtype: torch.dtype = torch.float64) -> Projection:
    """The best `ranks` directions to keep of `outer` (Wᵀ L W, S × S) in the metric `inner` (G).

    Args:
        inner: G.
        outer_SS: Wᵀ L W.
        ranks: how many directions.
        dtype: precision of the eigendecomposition. Single is twice as fast and enough where gains are not what losses are summed from.
    """
    gain_S, vector_SS = whitened_directions(inner, outer_SS, dtype)
    # Contiguous, so that what is read from a file later multiplies to the same bits.
    return Projection(inner.inverse_root_times(vector_SS[:ranks]).contiguous(), gain_S[:ranks], float(gain_S[ranks:].sum()))


def whitened_directions(inner: RootedGram, outer_SS: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values [S] and right singular vectors Qᵀ [S, S] of L^{1/2} W R, best first, float64.

    They are the eigenpairs of Rᵀ Wᵀ L W R, which is as small as the smaller side of W. Signs are fixed (the largest entry of an eigenvector
    is positive), so that results do not depend on the library that made them.
    """
    value_S, vector_SS = eigh(inner.whitened(outer_SS.to(dtype)))
    peak_1S = vector_SS.gather(0, vector_SS.abs().argmax(0, keepdim=True))
    return value_S.double().flip(0).clamp(min=0), torch.where(peak_1S < 0, -vector_SS, vector_SS).T.flip(0).double()


def orthonormal(inner: Gram, basis_RS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """V̂ G and V̂ [R, S]: V made orthonormal in G from the top, so that W (V̂ G)ᵀ V̂, cut after any row, is fitted by least squares."""
    seen_RS, lower_RR = _seen(inner, basis_RS)
    read_RS = torch.linalg.solve_triangular(lower_RR, seen_RS, upper=False)
    return read_RS, torch.linalg.solve_triangular(lower_RR, basis_RS.to(lower_RR.dtype), upper=False)


def reader(inner: Gram, basis_RS: torch.Tensor) -> torch.Tensor:
    """(V G Vᵀ)^{-1} V G [R, S]: reads the coefficients of the rows of V off a vector, by least squares in G; its transpose fits W to V."""
    return cholesky_solve(*_seen(inner, basis_RS))


@dataclass(frozen=True)
class NestedFit:
    """How W is fitted by least squares in G to the leading rows of a given V, for any number of them.

    With V̂ = C^{-1} V orthonormal in G from the top (C Cᵀ = V G Vᵀ, nested, so one factor serves every rank), the fit is W G V̂ᵀ V̂, cut.

    Attributes:
        read_SS: V̂ G. V spans the whole space, so this is Cᵀ V^{-T}, which rounding spoils less than G does.
        lower_SS: C.
    """

    read_SS: torch.Tensor
    lower_SS: torch.Tensor

    @classmethod
    def of(cls, inner: Gram, basis_SS: torch.Tensor, dual_SS: torch.Tensor) -> "NestedFit":
        """
        Args:
            inner: G.
            basis_SS: V; orthonormal in a Gram like this one, so that C is well-conditioned.
            dual_SS: V^{-T}.
        """
        _, lower_SS = _seen(inner, basis_SS)
        return cls(upper_times(lower_SS.mT, dual_SS.to(lower_SS.dtype)), lower_SS)

    def reader(self, rank: int) -> torch.Tensor:
        """`reader` of the leading rows, [rank, S]: V_r is C_r V̂_r, so that only C_r has to be solved for."""
        return back_substituted(self.read_SS[..., :rank, :], self.lower_SS[..., :rank, :rank])

    def gains(self, outer_SS: torch.Tensor) -> torch.Tensor:
        """What each further row of V recovers, [S], float64: v̂ G Wᵀ L W G v̂ᵀ with `outer` = Wᵀ L W."""
        return quadratic(self.read_SS, outer_SS.to(self.read_SS.dtype)).double()


def fit_gains(fit: NestedFit, basis_SS: torch.Tensor, inner: RootedGram, outer_SS: torch.Tensor) -> torch.Tensor:
    """The gains of a fit, which have to add up to tr L W G Wᵀ. That tells whether its precision was enough; where it was not, all is done
    in double precision, for all matrices that are given.

    Args:
        fit: of V, in G.
        basis_SS: V.
        inner: G.
        outer_SS: Wᵀ L W.
    """
    gain_S = fit.gains(outer_SS)
    if basis_SS.dtype != torch.float64:
        total = trace_product(inner.full(), outer_SS.double())
        if not bool(((gain_S.sum(-1) - total).abs() <= ROUNDING * total).all()):
            exact_SS = basis_SS.double()
            return NestedFit.of(inner, exact_SS, torch.linalg.inv(exact_SS).T).gains(outer_SS)
    return gain_S


def _seen(inner: Gram, basis_RS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """V G [R, S], and Cholesky's factor of V G Vᵀ [R, R].

    In the precision of V where that is enough for all Grams that are given, else in double precision. A V that is orthonormal in a Gram
    like this one leaves V G Vᵀ well-conditioned, but rounding of the products counts by ε/2 ‖v‖² ‖G‖ / √S beside v G vᵀ, and that grows
    with the spread of G.
    """
    seen_RS = inner.times(basis_RS)
    if basis_RS.dtype == torch.float64 or not len(basis_RS):
        return seen_RS, cholesky(symmetric_product(seen_RS, basis_RS.T))
    own_RR = lower_product(seen_RS, basis_RS.T)
    norm_R = torch.linalg.vector_norm(basis_RS, dim=-1)
    stretch = (norm_R.square() / diagonal_of(own_RR).clamp(min=torch.finfo(torch.float32).tiny)).amax(-1)
    uncertain = torch.finfo(torch.float32).eps / 2 * stretch * inner.diagonal().sum(-1) / sqrt(basis_RS.shape[1])
    lower_RR, failed = cholesky_ex(own_RR)
    if bool(((failed > 0) | (uncertain > UNCERTAIN)).any()):
        return _seen(inner, basis_RS.double())
    return seen_RS, lower_RR
