"""What any pair of factors loses, at every rank at once, in the one unit that makes methods comparable.

Shapes: S size of the space, R ranks, N rows. A loss curve has R + 1 entries: the loss when the leading 0..R ranks are kept, in the unit of
tr L ΔW G ΔWᵀ with the inner products that are given (see `metrics`). Curves of several matrices are made at once as well, in leading
dimensions that are not named.
"""

import torch
from torch.nn import functional

from moesvd_core.decomposition.grams import RootedGram, diagonal_of, trace_product
from moesvd_core.linalg import symmetric_product


def tail_losses(gain_R: torch.Tensor, rest: float = 0.0) -> torch.Tensor:
    """Loss curve [R+1] of ranks whose gains simply add up: the sum of the gains not taken, plus what no rank on offer recovers.

    Summed from the small end, so that the loss of a high rank is not a difference of large numbers.
    """
    tail_R = gain_R.clamp(min=0).flip(-1).cumsum(-1).flip(-1)
    return functional.pad(tail_R, (0, 1)) + max(rest, 0.0)


def pair_losses(total: float | torch.Tensor, cross_R: torch.Tensor, square_RR: torch.Tensor) -> torch.Tensor:
    """Loss curve [R+1] of W − Σ_i a_i v_i for any rank-one terms a_i v_i, by prefix sums.

    tr L (W−A_rV_r) G (W−A_rV_r)ᵀ = total − 2 Σ_{i<=r} cross_i + Σ_{i,j<=r} square_ij.

    Args:
        total: tr L W G Wᵀ, of every matrix.
        cross_R: a_iᵀ L W G v_iᵀ of each term.
        square_RR: (Aᵀ L A) ∘ (V G Vᵀ).
    """
    border_R = 2 * square_RR.tril(-1).sum(-1) + diagonal_of(square_RR)
    change_R = (border_R - 2 * cross_R).cumsum(-1)
    total_1 = torch.as_tensor(total, dtype=change_R.dtype, device=change_R.device).unsqueeze(-1)
    return functional.pad(change_R, (1, 0)).add_(total_1).clamp(min=0)


def projection_losses(read_RS: torch.Tensor, basis_RS: torch.Tensor, inner: RootedGram, outer_SS: torch.Tensor) -> torch.Tensor:
    """Loss curve of W ≈ W X V in the metric of `inner` G and `outer` = Wᵀ L W, with X the rows of `read_RS` and V those of `basis_RS`.

    The same for W ≈ U K W, transposed: `inner` L, `outer` = W G Wᵀ, U the rows of `basis_RS` and K those of `read_RS`.
    """
    carried_RS = read_RS @ outer_SS
    seen_RS = inner.times(basis_RS)
    square_RR = symmetric_product(carried_RS, read_RS.mT) * symmetric_product(seen_RS, basis_RS.mT)
    return pair_losses(trace_product(inner.full(), outer_SS), (carried_RS * seen_RS).sum(-1), square_RR)
