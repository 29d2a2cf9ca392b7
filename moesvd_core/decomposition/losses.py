"""What any pair of factors loses, at every rank at once, in the one unit that makes methods comparable.

Shapes: S size of the space, R ranks, N rows. A loss curve has R + 1 entries: the loss when the leading 0..R ranks are kept, in the unit of
tr L ΔW G ΔWᵀ with the inner products that are given (see `metrics`).
"""

import torch

from moesvd_core.decomposition.grams import RootedGram, symmetric_product


def tail_losses(gain_R: torch.Tensor, rest: float = 0.0) -> torch.Tensor:
    """Loss curve [R+1] of ranks whose gains simply add up: the sum of the gains not taken, plus what no rank on offer recovers.

    Summed from the small end, so that the loss of a high rank is not a difference of large numbers.
    """
    tail_R = gain_R.clamp(min=0).flip(0).cumsum(0).flip(0)
    return torch.cat([tail_R, tail_R.new_zeros(1)]) + max(rest, 0.0)


def pair_losses(total: float, cross_R: torch.Tensor, square_RR: torch.Tensor) -> torch.Tensor:
    """Loss curve [R+1] of W − Σ_i a_i v_i for any rank-one terms a_i v_i, by prefix sums.

    tr L (W−A_rV_r) G (W−A_rV_r)ᵀ = total − 2 Σ_{i<=r} cross_i + Σ_{i,j<=r} square_ij.

    Args:
        total: tr L W G Wᵀ.
        cross_R: a_iᵀ L W G v_iᵀ of each term.
        square_RR: (Aᵀ L A) ∘ (V G Vᵀ).
    """
    border_R = 2 * square_RR.tril(-1).sum(1) + square_RR.diagonal()
    change_R = (border_R - 2 * cross_R).cumsum(0)
    return torch.cat([change_R.new_zeros(1), change_R]).add(total).clamp(min=0)


def projection_losses(read_RS: torch.Tensor, basis_RS: torch.Tensor, inner: RootedGram, outer_SS: torch.Tensor) -> torch.Tensor:
    """Loss curve of W ≈ W X V in the metric of `inner` G and `outer` = Wᵀ L W, with X the rows of `read_RS` and V those of `basis_RS`.

    The same for W ≈ U K W, transposed: `inner` L, `outer` = W G Wᵀ, U the rows of `basis_RS` and K those of `read_RS`.
    """
    carried_RS = read_RS @ outer_SS
    seen_RS = inner.times(basis_RS)
    total = float((inner.full() * outer_SS).sum())
    square_RR = symmetric_product(carried_RS, read_RS.T) * symmetric_product(seen_RS, basis_RS.T)
    return pair_losses(total, (carried_RS * seen_RS).sum(1), square_RR)
