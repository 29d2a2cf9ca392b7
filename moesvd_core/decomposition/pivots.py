"""Low-rank factors without what they say twice: an identity in place of some columns of the right one, which need not be stored.

`U V = (U T) (T⁻¹ V)` for every invertible T. With T some R columns of V, its pivots, T⁻¹ V is an identity there. What is left to store are
the product's own columns at the pivots, the coefficients that make all other columns of them, and which ones they are: R(N + C) − R² + R
numbers in place of R(N + C). Source: Zhao, Zhang and Cannistraci, Pivoting Factorization, ICML 2025.

Shapes: N rows and C columns of a matrix, R rank, S = C − R columns that are no pivots.
"""

import torch

SWAPS = 16
"""Exchanges of a pivot for another column, at most. On the demo model's factors these take a fifth to a half off what rounding to bfloat16
adds to the loss, and as many as it takes would take no more."""
LARGE = 1.1
"""Coefficients up to this are left as they are."""


def pivoted(left_NR: torch.Tensor, right_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The stored form of one matrix `left @ right`, computed in double precision and given in that of the factors.

    `right.T = P L U` with partial pivoting gives the first pivots, and coefficients `L₁⁻ᵀ L₂ᵀ` (L₁: the rows of the pivots) from which U
    has cancelled. L has a unit diagonal and no number beyond 1, so they are finite, and the form is exact, of whatever rank the factor is.
    Then the column with the largest coefficient takes the place of the pivot that it belongs to, a few times (`SWAPS`): each exchange makes
    the volume that pivots span that many times as large (Goreinov et al., "How to find a good submatrix", 2010), and small coefficients are
    what keeps rounding small.

    Returns:
        left [N, R]: the product's columns at the pivots; right [R, S]: the coefficients of the others; the pivots [R]. Pivots and others
        ascend, so that the form is as unique as the choice of pivots.

    Raises:
        ValueError: the rank is higher than there are columns to choose.
    """
    rank, columns = right_RC.shape
    if rank > columns:
        raise ValueError(f"rank must be at most {columns}, the columns of the right factor, got {rank}: keep the matrix itself")
    lu_CR, swap_R, _ = torch.linalg.lu_factor_ex(right_RC.double().T)
    order = list(range(columns))
    for place, other in enumerate((swap_R - 1).tolist()):
        order[place], order[other] = order[other], order[place]
    coefficient_RS = torch.linalg.solve_triangular(lu_CR[:rank].T, lu_CR[rank:].T, upper=True, unitriangular=True)
    for _ in range(SWAPS if coefficient_RS.numel() else 0):
        largest, at = coefficient_RS.abs().flatten().max(0)
        if float(largest) <= LARGE:
            break
        pivot, other = divmod(int(at), columns - rank)
        coefficient_RS = _exchanged(coefficient_RS, pivot, other)
        order[pivot], order[rank + other] = order[rank + other], order[pivot]
    pivot_R, of_pivot = torch.tensor(order[:rank], dtype=torch.int64).sort()
    of_other = torch.tensor(order[rank:], dtype=torch.int64).argsort()
    at_pivots_NR = left_NR.double() @ right_RC.double()[:, pivot_R]
    return at_pivots_NR.to(left_NR.dtype), coefficient_RS[of_pivot][:, of_other].to(right_RC.dtype), pivot_R


def _exchanged(coefficient_RS: torch.Tensor, pivot: int, other: int) -> torch.Tensor:
    """Coefficients after a pivot and another column have changed places (Sherman and Morrison's formula)."""
    along_S, across_R = coefficient_RS[pivot].clone(), coefficient_RS[:, other].clone()
    along_S[other] += 1
    across_R[pivot] -= 1
    return coefficient_RS - torch.outer(across_R, along_S) / coefficient_RS[pivot, other]
