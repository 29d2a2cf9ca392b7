"""The best nested projections in a weighted inner product: one eigendecomposition, every rank; and fits to directions that are given.

Shapes: S size of the space, R ranks.
"""

from dataclasses import dataclass

import torch

from moesvd_core.decomposition.grams import Gram, RootedGram, cholesky, symmetric


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


def best_projection(inner: RootedGram, outer_SS: torch.Tensor, ranks: int) -> Projection:
    """The best `ranks` directions to keep of `outer` (Wᵀ L W, S × S) in the metric `inner` (G).

    The squared singular values and right singular vectors of L^{1/2} W R are the eigenpairs of Rᵀ Wᵀ L W R, which is as small as the
    smaller side of W. Signs are fixed (the largest entry of an eigenvector is positive), so that results do not depend on
    the library that made them.
    """
    value_S, vector_SS = torch.linalg.eigh(inner.whitened(outer_SS))
    gain_S = value_S.flip(0).clamp(min=0)
    vector_RS = vector_SS.T.flip(0)[:ranks]
    peak_R1 = vector_RS.gather(1, vector_RS.abs().argmax(1, keepdim=True))
    vector_RS = vector_RS * torch.where(peak_R1 < 0, -1.0, 1.0)
    # Contiguous, so that what is read from a file later multiplies to the same bits.
    return Projection(inner.inverse_root_times(vector_RS).contiguous(), gain_S[:ranks], float(gain_S[ranks:].sum()))


def orthonormal(inner: Gram, basis_RS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """V̂ G and V̂ [R, S]: V made orthonormal in G from the top, so that W (V̂ G)ᵀ V̂, cut after any row, is fitted by least squares."""
    seen_RS = inner.times(basis_RS)
    lower_RR = cholesky(symmetric(seen_RS @ basis_RS.T))
    read_RS = torch.linalg.solve_triangular(lower_RR, seen_RS, upper=False)
    return read_RS, torch.linalg.solve_triangular(lower_RR, basis_RS, upper=False)


def reader(inner: Gram, basis_RS: torch.Tensor) -> torch.Tensor:
    """(V G Vᵀ)^{-1} V G [R, S]: reads the coefficients of the rows of V off a vector, by least squares in G; its transpose fits W to V."""
    seen_RS = inner.times(basis_RS)
    reader_RS: torch.Tensor = torch.cholesky_solve(seen_RS, cholesky(symmetric(seen_RS @ basis_RS.T)))
    return reader_RS
