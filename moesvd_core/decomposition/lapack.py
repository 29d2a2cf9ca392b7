"""Decompositions and solutions by LAPACK, spared what it is slow at.

Where a row takes a multiple of 2 KiB of memory, as it does for most hidden sizes, the numbers of a column crowd into few places of a
processor's caches: decompositions of 1024 take up to 1.7 times as long as those of 1032. So a few rows and columns are appended that have
nothing to do with the rest, and are cut off again. And it solves at half the speed of products (`matmul`). Cards have no such trouble.

Shapes: S size of the space, N right-hand sides; leading dimensions that are not named are several matrices.
"""

import torch
from torch import Tensor

from moesvd_core.devices import on_card
from moesvd_core.matmul import matmul

CROWDED = 2048
"""Bytes of a row whose multiples crowd."""
LEAST = 512
"""Size from which it matters."""
APPENDED = 8
SOLVED = 96
"""Rows that are solved for at a time."""


def cholesky_ex(gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex`: lower triangular L with L Lᵀ = gram, and whether there is none (an order that is not positive)."""
    if not _crowds(gram_SS):
        lower_SS, failed = torch.linalg.cholesky_ex(gram_SS)
        return lower_SS, failed
    wide, failed = torch.linalg.cholesky_ex(_widened(gram_SS, 1.0))
    return wide[..., :-APPENDED, :-APPENDED], failed


def eigh(matrix_SS: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of a matrix without negative eigenvalues: ascending eigenvalues [S], eigenvectors [S, S] as columns."""
    if not _crowds(matrix_SS):
        value_S, vector_SS = torch.linalg.eigh(matrix_SS)
        return value_S, vector_SS
    # What is appended has eigenvalues of its own, of the others' size and below them all, so that no eigenvector mixes the two.
    mean = matrix_SS.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    value, vector = torch.linalg.eigh(_widened(matrix_SS, torch.where(mean > 0, -mean, -1.0)))
    return value[..., APPENDED:], vector[..., :-APPENDED, APPENDED:]


def cholesky_solve(right_SN: Tensor, lower_SS: Tensor) -> Tensor:
    """`torch.cholesky_solve`: X [S, N] with L Lᵀ X = right, of one well-conditioned L: its blocks on the diagonal are inverted."""
    size = len(lower_SS)
    if size <= SOLVED or right_SN.dtype != torch.float32 or on_card(right_SN.device):
        return torch.cholesky_solve(right_SN, lower_SS)
    solved_SN, starts = right_SN.clone(), range(0, size, SOLVED)
    one_BB = torch.eye(SOLVED, dtype=lower_SS.dtype)
    blocks = [lower_SS[start : start + SOLVED, start : start + SOLVED] for start in starts]
    inverses = [torch.linalg.solve_triangular(block_BB, one_BB[: len(block_BB), : len(block_BB)], upper=False) for block_BB in blocks]
    for start, inverse_BB in zip(starts, inverses, strict=True):
        of_BN = solved_SN[start : start + SOLVED]
        of_BN.copy_(matmul(inverse_BB, of_BN - matmul(lower_SS[start : start + SOLVED, :start], solved_SN[:start])))
    for start, inverse_BB in zip(reversed(starts), reversed(inverses), strict=True):
        of_BN, after = solved_SN[start : start + SOLVED], start + SOLVED
        of_BN.copy_(matmul(inverse_BB.mT, of_BN - matmul(lower_SS[after:, start : start + SOLVED].mT, solved_SN[after:])))
    return solved_SN


def _crowds(matrix_SS: Tensor) -> bool:
    size = matrix_SS.shape[-1]
    return matrix_SS.device.type == "cpu" and size >= LEAST and size * matrix_SS.element_size() % CROWDED == 0


def _widened(matrix_SS: Tensor, appended: float | Tensor) -> Tensor:
    """The matrix with rows and columns appended that are zero but for the diagonal."""
    size = matrix_SS.shape[-1]
    wide = matrix_SS.new_zeros(*matrix_SS.shape[:-2], size + APPENDED, size + APPENDED)
    wide[..., :size, :size] = matrix_SS
    wide.diagonal(dim1=-2, dim2=-1)[..., size:] = appended
    return wide
