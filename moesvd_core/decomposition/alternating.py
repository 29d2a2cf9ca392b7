"""A shared basis refined at its rank: cores by least squares for the basis, the basis by least squares for the cores, in turns.

The nested basis of `latent` needs one pair of inner products for all experts, and takes Σ_e I_e ⊗ O_e for the product of its marginals. At
one rank that is not needed. With W_e ≈ A_e V, I_e the inner product of V's space and O_e = W_eᵀ L_e W_e, the loss is least

    in all A_e for A_e = W_e T_eᵀ,  T_e = (V I_e Vᵀ)^{-1} V I_e  (`projection.reader`),
    in V where Σ_e K_e V I_e = Σ_e T_e O_e I_e,  K_e = T_e O_e T_eᵀ,

alternating least squares, as for Tucker's decomposition (De Lathauwer et al., "On the best rank-1 and rank-(R1, ..., RN) approximation of
higher-order tensors", 2000), in a metric of each expert's own. The linear system has R·D unknowns: a few steps of conjugate gradients from
where V is, preconditioned by (Σ K_e) ⊗ (Σ tr K_e · I_e). Either half only lowers the loss, however early it is stopped. The result is the
best of its rank and no longer nested, so it is made when a model is finished, not for every position of a slider.

Shapes: E experts, D size of the shared space, R rank.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from moesvd_core.decomposition.grams import EPSILON, RootedGram, cholesky, ridged
from moesvd_core.decomposition.projection import reader
from moesvd_core.linalg import symmetric_product

ROUNDS = 3
"""Turns of cores and basis. Where 40 % of the demo model's experts are kept, 3 take 9.3 and 5.1 % off the losses of input and output sides,
and 8 take 9.9 and 5.3 %."""
STEPS = 4
"""Steps of conjugate gradients in each round."""

Pairs = Callable[[], Iterator[tuple[RootedGram, torch.Tensor]]]
"""Gives I_e and O_e [D, D] of every expert, each time anew: for many experts they do not fit the memory together."""


def refined(basis_RD: torch.Tensor, pairs: Pairs, rounds: int = ROUNDS, steps: int = STEPS) -> torch.Tensor:
    """A basis [R, D] of the same rank for which the refitted experts lose less or the same; orthonormal in a mean of the I_e.

    Where no expert carries anything, every basis is exact, and the one to start from is given back.

    Args:
        basis_RD: where to start, float64.
    """
    for _ in range(rounds):
        core_ERR, wanted_RD = [], torch.zeros_like(basis_RD)
        pooled_DD = basis_RD.new_zeros(basis_RD.shape[1], basis_RD.shape[1])
        for inner, outer_DD in pairs():
            read_RD = reader(inner, basis_RD)
            carried_RD = read_RD @ outer_DD
            core_ERR.append(symmetric_product(carried_RD, read_RD.T))
            wanted_RD += inner.times(carried_RD)
            pooled_DD += core_ERR[-1].trace() * inner.full()
        carried = sum(float(core_RR.trace()) for core_RR in core_ERR)
        if carried <= 0:
            return basis_RD
        lower_RR = cholesky(ridged(torch.stack(core_ERR).sum(0), EPSILON))
        pooled_DD = ridged(pooled_DD / carried, EPSILON)
        divided = partial(_divided, lower_RR, cholesky(pooled_DD))
        moved_RD = _solved(partial(_weighed, pairs, core_ERR), wanted_RD, basis_RD, divided, steps)
        seen_RR = symmetric_product(moved_RD @ pooled_DD, moved_RD.T)
        basis_RD = torch.linalg.solve_triangular(cholesky(seen_RR), moved_RD, upper=False)
    return basis_RD


def _weighed(pairs: Pairs, core_ERR: list[torch.Tensor], basis_RD: torch.Tensor) -> torch.Tensor:
    """Σ_e K_e V I_e."""
    total_RD = torch.zeros_like(basis_RD)
    for core_RR, (inner, _) in zip(core_ERR, pairs(), strict=True):
        total_RD += inner.times(core_RR @ basis_RD)
    return total_RD


def _divided(lower_RR: torch.Tensor, lower_DD: torch.Tensor, rest_RD: torch.Tensor) -> torch.Tensor:
    divided_DR: torch.Tensor = torch.cholesky_solve(torch.cholesky_solve(rest_RD, lower_RR).T, lower_DD)
    return divided_DR.T


def _solved(
    weighed: Callable[[torch.Tensor], torch.Tensor],
    wanted_RD: torch.Tensor,
    start_RD: torch.Tensor,
    divided: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """`start` after some steps of preconditioned conjugate gradients towards weighed(V) = wanted."""
    found_RD, rest_RD = start_RD, wanted_RD - weighed(start_RD)
    step_RD = divided(rest_RD)
    square = float((rest_RD * step_RD).sum())
    direction_RD = step_RD
    for _ in range(steps):
        against_RD = weighed(direction_RD)
        bend = float((direction_RD * against_RD).sum())
        if square <= 0 or bend <= 0:  # there already, but for rounding
            break
        found_RD = found_RD + square / bend * direction_RD
        rest_RD = rest_RD - square / bend * against_RD
        step_RD = divided(rest_RD)
        square, before = float((rest_RD * step_RD).sum()), square
        direction_RD = step_RD + square / before * direction_RD
    return found_RD
