"""Products and decompositions of matrices, each in the way that is fast where the matrices are.

On CPUs torch multiplies float32 matrices by its BLAS, which is MKL in the wheels for x86, and lower precisions by oneDNN. MKL takes the
widest vector instructions on Intel's processors alone; oneDNN takes them wherever they are. On an AMD EPYC (Zen 4) it is 1.1 to 1.6 times
as fast for matrices of hidden size whose rows stand in order, and no faster where the left one would have to be turned first. MKL solves
at half the speed of products.

LAPACK is slow at sizes whose rows take a multiple of 2 KiB of memory, as they do for most hidden sizes: the numbers of a column crowd into
few places of a processor's caches, and decompositions of 1024 take up to 1.7 times as long as those of 1032. So a few rows and columns are
appended that have nothing to do with the rest, and are cut off again.

Cards have none of these troubles; what holds everywhere is that half of a product that is known to be symmetric, or with a triangle, need
not be made.

Shapes: S size of the space, R and N vectors; leading dimensions that are not named are several matrices.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moesvd_core.devices import on_card

LEAST = 1 << 24
"""Multiplications from which on the other library's call is paid for."""
BLOCK = 128
"""Rows or columns of a symmetric or triangular product that a CPU makes at a time: enough for full speed, few enough to spare most of the
needless half. As few take `LEAST` multiplications with a matrix of hidden size."""
CARD_BLOCK = 2048
"""The same on a graphics card, whose full speed takes more rows."""
SOLVED = 96
"""Rows that are solved for at a time."""
CROWDED = 2048
"""Bytes of a row whose multiples crowd."""
CROWDED_LEAST = 512
"""Size from which it matters."""
APPENDED = 8
_linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; on CPUs no gradient comes back through it."""
    if _linear is None or not _suits(left, right):
        return left @ right
    product: Tensor = _linear(left, _without_gaps(right).mT, None, "none", [], "")
    return product


def _suits(left: Tensor, right: Tensor) -> bool:
    """Two large matrices of float32 on the host, the left one's rows in order."""
    return (
        left.ndim == right.ndim == 2
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and left.stride(1) == 1
        and left.numel() * right.shape[1] >= LEAST
    )


def _without_gaps(right: Tensor) -> Tensor:
    """A part of a wider matrix is copied: for one, oneDNN has nothing but a loop of single numbers."""
    return right if right.is_contiguous() or right.mT.is_contiguous() else right.contiguous()


# -- products with a half that need not be made --------------------------------------------------------------------------------------


def symmetric_product(left_SN: Tensor, right_NS: Tensor) -> Tensor:
    """left @ right [S, S], which the caller knows to be symmetric: what is above the diagonal is mirrored, not multiplied."""
    return mirrored_(lower_product(left_SN, right_NS))


def lower_product(left_SN: Tensor, right_NS: Tensor) -> Tensor:
    """The lower triangle of left @ right, [S, S]; above the diagonal it holds some of the product and some zeros."""
    size, step = left_SN.shape[-2], _block(left_SN)
    if size <= step:
        return matmul(left_SN, right_NS)
    product_SS = left_SN.new_zeros(*torch.broadcast_shapes(left_SN.shape[:-2], right_NS.shape[:-2]), size, size)
    return add_lower_product_(product_SS, left_SN, right_NS)


def add_lower_product_(sum_SS: Tensor, left_SN: Tensor, right_NS: Tensor) -> Tensor:
    """Add the lower triangle of left @ right to what is there."""
    step = _block(left_SN)
    for start in range(0, sum_SS.shape[-1], step):
        end = start + step
        sum_SS[..., start:, start:end] += matmul(left_SN[..., start:, :], right_NS[..., start:end])
    return sum_SS


def mirrored_(matrix_SS: Tensor) -> Tensor:
    """The lower triangle put in the place of the upper one: rounding alone makes sums of symmetric matrices slightly skew."""
    size, step = matrix_SS.shape[-1], _block(matrix_SS)
    for start in range(0, size, step):
        end = start + step
        block_SS = matrix_SS[..., start:end, start:end].tril_()
        block_SS += block_SS.tril(-1).mT
        matrix_SS[..., start:end, end:] = matrix_SS[..., end:, start:end].mT
    return matrix_SS


def quadratic(x_RS: Tensor, matrix_SS: Tensor) -> Tensor:
    """diag(x M xᵀ) [R] of a symmetric M: what is above its diagonal counts twice below, and is not multiplied."""
    total_R = x_RS.new_zeros(x_RS.shape[-2])
    step = _block(matrix_SS)
    for start in range(0, matrix_SS.shape[-1], step):
        end = start + step
        below_SB = matrix_SS[..., start:, start:end].clone()
        below_SB[..., step:, :] *= 2
        total_R = total_R + (matmul(x_RS[..., start:], below_SB) * x_RS[..., start:end]).sum(-1)
    return total_R


def upper_times(upper_SS: Tensor, right_SN: Tensor) -> Tensor:
    """upper @ right [S, N] of an upper triangular matrix, sparing the products with zeros: faster than solving with its inverse."""
    return _triangle_times(upper_SS, right_SN, lambda start, _: slice(start, None))


def lower_times(lower_SS: Tensor, right_SN: Tensor) -> Tensor:
    """lower @ right [S, N] of a lower triangular matrix, likewise."""
    return _triangle_times(lower_SS, right_SN, lambda _, end: slice(end))


def _triangle_times(triangle_SS: Tensor, right_SN: Tensor, columns: Callable[[int, int], slice]) -> Tensor:
    """
    Args:
        columns: which are not zero of the rows from a first one up to a last.
    """
    size, step = triangle_SS.shape[-1], _block(triangle_SS)
    if size <= step:
        return triangle_SS @ right_SN
    product_SN = right_SN.new_empty(*torch.broadcast_shapes(triangle_SS.shape[:-2], right_SN.shape[:-2]), size, right_SN.shape[-1])
    for start in range(0, size, step):
        end = start + step
        filled = columns(start, end)
        torch.matmul(triangle_SS[..., start:end, filled], right_SN[..., filled, :], out=product_SN[..., start:end, :])
    return product_SN


def _block(matrix: Tensor) -> int:
    return CARD_BLOCK if on_card(matrix.device) else BLOCK


# -- solutions and decompositions ----------------------------------------------------------------------------------------------------


def cholesky_ex(gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex`: lower triangular L with L Lᵀ = gram, and whether there is none (an order that is not positive)."""
    if not _crowds(gram_SS):
        lower_SS, failed = torch.linalg.cholesky_ex(gram_SS)
        return lower_SS, failed
    wide, failed = torch.linalg.cholesky_ex(_widened(gram_SS, 1.0))
    return wide[..., :-APPENDED, :-APPENDED], failed


def cholesky_solve(right_SN: Tensor, lower_SS: Tensor) -> Tensor:
    """`torch.cholesky_solve`: X [S, N] with L Lᵀ X = right, of well-conditioned L.

    Several L are inverted: cards solve for many right-hand sides at a tenth of the speed of their products. Of one, the blocks on the
    diagonal are, on a CPU.
    """
    if lower_SS.ndim > 2:
        inverse_SS = _inverse(lower_SS)
        return inverse_SS.mT @ (inverse_SS @ right_SN)
    if not _by_blocks(right_SN, lower_SS):
        return torch.cholesky_solve(right_SN, lower_SS)
    inverses, solved_SN = _inverted_blocks(lower_SS), right_SN.clone()
    for start, inverse_BB in zip(range(0, len(lower_SS), SOLVED), inverses, strict=True):
        of_BN = solved_SN[start : start + SOLVED]
        of_BN.copy_(matmul(inverse_BB, of_BN - matmul(lower_SS[start : start + SOLVED, :start], solved_SN[:start])))
    return _back_substituted_(solved_SN, lower_SS, inverses)


def back_substituted(right_SN: Tensor, lower_SS: Tensor) -> Tensor:
    """X [S, N] with Lᵀ X = right, in the way of `cholesky_solve`, of which it is the second half."""
    if lower_SS.ndim > 2:
        return _inverse(lower_SS).mT @ right_SN
    if not _by_blocks(right_SN, lower_SS):
        solved_SN: Tensor = torch.linalg.solve_triangular(lower_SS.mT, right_SN, upper=True)
        return solved_SN
    return _back_substituted_(right_SN.clone(), lower_SS, _inverted_blocks(lower_SS))


def _by_blocks(right_SN: Tensor, lower_SS: Tensor) -> bool:
    return len(lower_SS) > SOLVED and right_SN.dtype == torch.float32 and not on_card(right_SN.device)


def _inverted_blocks(lower_SS: Tensor) -> list[Tensor]:
    """The inverses of the blocks on the diagonal."""
    starts = range(0, len(lower_SS), SOLVED)
    return [_inverse(lower_SS[start : start + SOLVED, start : start + SOLVED]) for start in starts]


def _inverse(lower_SS: Tensor) -> Tensor:
    one_SS = torch.eye(lower_SS.shape[-1], dtype=lower_SS.dtype, device=lower_SS.device).expand_as(lower_SS)
    inverse_SS: Tensor = torch.linalg.solve_triangular(lower_SS, one_SS, upper=False)
    return inverse_SS


def _back_substituted_(solved_SN: Tensor, lower_SS: Tensor, inverses: list[Tensor]) -> Tensor:
    for start, inverse_BB in zip(reversed(range(0, len(lower_SS), SOLVED)), reversed(inverses), strict=True):
        of_BN, after = solved_SN[start : start + SOLVED], start + SOLVED
        across_BR = lower_SS[after:, start : start + SOLVED].mT.contiguous()  # in the order in which `matmul` has the faster library
        of_BN.copy_(matmul(inverse_BB.mT, of_BN - matmul(across_BR, solved_SN[after:])))
    return solved_SN


def eigh(matrix_SS: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of a matrix without negative eigenvalues: ascending eigenvalues [S], eigenvectors [S, S] as columns."""
    if not _crowds(matrix_SS):
        value_S, vector_SS = torch.linalg.eigh(matrix_SS)
        return value_S, vector_SS
    value, vector = torch.linalg.eigh(_widened(matrix_SS, _below_all(matrix_SS)))
    return value[..., APPENDED:], vector[..., :-APPENDED, APPENDED:]


def eigvalsh(matrix_SS: Tensor) -> Tensor:
    """The eigenvalues alone."""
    crowds = _crowds(matrix_SS)
    value: Tensor = torch.linalg.eigvalsh(_widened(matrix_SS, _below_all(matrix_SS)) if crowds else matrix_SS)
    return value[..., APPENDED:] if crowds else value


def _crowds(matrix_SS: Tensor) -> bool:
    size = matrix_SS.shape[-1]
    return matrix_SS.device.type == "cpu" and size >= CROWDED_LEAST and size * matrix_SS.element_size() % CROWDED == 0


def _below_all(matrix_SS: Tensor) -> Tensor:
    """An eigenvalue for what is appended, of the others' size and below them all, so that no eigenvector mixes the two."""
    mean_1 = matrix_SS.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    return torch.where(mean_1 > 0, -mean_1, -1.0)


def _widened(matrix_SS: Tensor, appended: float | Tensor) -> Tensor:
    """The matrix with rows and columns appended that are zero but for the diagonal."""
    size = matrix_SS.shape[-1]
    wide = matrix_SS.new_zeros(*matrix_SS.shape[:-2], size + APPENDED, size + APPENDED)
    wide[..., :size, :size] = matrix_SS
    wide.diagonal(dim1=-2, dim2=-1)[..., size:] = appended
    return wide
