"""Gram products and counts of eigenvalues, as fast as the device does them.

What a bfloat16 or float16 model computes is known to 8 or 11 bits, and a card multiplies numbers of 11 bits ten times as fast as those of
24. There, a Gram is that of its vectors rounded to 11 bits, summed up in float32: symmetric and positive semi-definite like any, and off
by less than the vectors are. Numbers are scaled first, so that float16's range is no bound: what is below 2^-28 of the largest loses bits.
(The switch for TF32, which rounds alike at half the speed, is one for the whole process, whose other threads may be serving a model.)
float32 models, and CPUs, multiply in float32; everyone in float64 where a sum is singular still, of fewer vectors than their size.

Shapes: S size of the space; n vectors, as rows.
"""

import torch
from torch import Tensor

from moesvd_core.devices import on_card, to_host
from moesvd_core.linalg import eigvalsh, symmetric_product

LEAST = 1e-30
"""What that is divided by at least: rows of zeros stay zeros, whatever they weigh."""
TOP = 2.0**14
"""What the largest number is scaled to: its square, summed a million times, is far from float32's bound."""
STEPS = 64
"""Of Lanczos' method towards a largest eigenvalue."""
AT_ONCE = 1 << 27
"""Entries of matrices in float64 whose eigenvalues are counted at once (1 GiB)."""
GROWTH = 1e7
"""Growth of entries in an elimination without pivots beyond which its signs are not trusted."""


def add_gram_(sum_SS: Tensor, x_nS: Tensor, weight_n1: Tensor | None = None, *, rows: int | None = None, rounded: bool = False) -> None:
    """Add Σ w² x xᵀ over the rows to a sum in float64.

    Args:
        x_nS: rows [..., n, S], in the model's precision or float32.
        weight_n1: w, which is not negative, float32; None: 1.
        rows: of which the sum is made by now, these included; None: of these alone.
        rounded: of rows w·x rounded to 11 bits (`multiplies_rounded`).
    """
    rows = x_nS.numel() // x_nS.shape[-1] if rows is None else rows
    if not rounded:
        own_nS = x_nS.float() if weight_n1 is None else weight_n1 * x_nS.float()
        sum_SS += _summed(own_nS.flatten(0, -2), rows)
        return
    weight_n1 = x_nS.new_ones(1, 1, dtype=torch.float32) if weight_n1 is None else weight_n1
    largest = (torch.linalg.vector_norm(x_nS, torch.inf, dim=-1, keepdim=True) * weight_n1).max()
    unit = (largest / TOP).clamp(min=LEAST)
    half_nS = torch.mul(x_nS, weight_n1 / unit, out=torch.empty_like(x_nS, dtype=torch.float16))
    sum_SS.addcmul_(_summed(half_nS.flatten(0, -2), rows), unit.double().square())


def _summed(x_nS: Tensor, rows: int) -> Tensor:
    """Σ x xᵀ of rows, summed in float32. A sum of fewer rows than columns is singular, and would have eigenvalues so far below zero then
    that no ridge for the rounding of what is kept covers them: until there are as many, it is made in float64."""
    if rows < x_nS.shape[1]:
        x_nS = x_nS.double()
    if on_card(x_nS.device):
        return _summed_halves(x_nS) if x_nS.dtype == torch.float16 else x_nS.T @ x_nS
    return symmetric_product(x_nS.T, x_nS)


def _summed_halves(x_nS: Tensor) -> Tensor:
    """The same of 16-bit rows, whose products are exact in float32."""
    return torch.mm(x_nS.T, x_nS, out_dtype=torch.float32)


def multiplies_rounded(weight: Tensor) -> bool:
    """Whether Grams of a model with such weights are made of rounded rows: 16-bit weights on a graphics card."""
    return on_card(weight.device) and weight.dtype in (torch.bfloat16, torch.float16)


def counts_above(gram_ESS: Tensor, share: float) -> list[int]:
    """How many eigenvalues of each Gram, float64, are above a share of its largest; of those at that bound rounding decides.

    On a card, where eigenvalues take most of a second for a large matrix: the largest by Lanczos' method, then the signs of an elimination
    without pivots, which are those of the eigenvalues less the bound (Sylvester's law of inertia).
    """
    if not on_card(gram_ESS.device):
        return [_counted(gram_SS, share) for gram_SS in gram_ESS]
    bound_E = share * largest(gram_ESS)
    shifted_ESS = gram_ESS - bound_E[:, None, None] * torch.eye(gram_ESS.shape[1], dtype=gram_ESS.dtype, device=gram_ESS.device)
    pivot_ES = eliminated(shifted_ESS).diagonal(dim1=1, dim2=2)
    grown_E = pivot_ES.abs().amax(1) <= GROWTH * shifted_ESS.abs().amax((1, 2))  # not so where they are NaN, either
    found = torch.stack([(pivot_ES > 0).sum(1), grown_E.long()]).tolist()
    return [count if trusted else _counted(gram_SS, share) for count, trusted, gram_SS in zip(*found, gram_ESS, strict=True)]


def _counted(gram_SS: Tensor, share: float) -> int:
    value_S = eigvalsh(gram_SS)
    return int((value_S > share * value_S[-1]).sum())


def eliminated(matrix_ESS: Tensor) -> Tensor:
    """L and U of symmetric matrices, without pivots; cards only."""
    lu_ESS: Tensor = torch.linalg.lu_factor_ex(matrix_ESS, pivot=False)[0]
    return lu_ESS


def largest(gram_ESS: Tensor) -> Tensor:
    """The largest eigenvalue of each Gram [E], by Lanczos' method from one random vector for all."""
    experts, size = gram_ESS.shape[:2]
    noise = torch.randn(size, 1, dtype=gram_ESS.dtype, generator=torch.Generator().manual_seed(0)).to(gram_ESS.device)
    vector_ES1 = (noise / noise.norm()).expand(experts, size, 1)
    before_ES1, off_E11 = torch.zeros_like(vector_ES1), gram_ESS.new_zeros(experts, 1, 1)
    diagonal, beside = [], []
    for _ in range(min(STEPS, size)):
        next_ES1 = gram_ESS @ vector_ES1 - off_E11 * before_ES1
        along_E11 = vector_ES1.mT @ next_ES1
        next_ES1 = next_ES1 - along_E11 * vector_ES1
        off_E11 = next_ES1.norm(dim=1, keepdim=True)
        diagonal.append(along_E11[:, 0, 0])
        beside.append(off_E11[:, 0, 0])
        before_ES1, vector_ES1 = vector_ES1, next_ES1 / off_E11.clamp(min=torch.finfo(gram_ESS.dtype).tiny)
    beside_EK = torch.stack(beside[:-1], 1) if len(beside) > 1 else gram_ESS.new_zeros(experts, 0)
    small_EKK = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(beside_EK, 1) + torch.diag_embed(beside_EK, -1)
    found_E: Tensor = torch.linalg.eigvalsh(to_host(small_EKK))[:, -1].to(gram_ESS.device)
    return found_E
