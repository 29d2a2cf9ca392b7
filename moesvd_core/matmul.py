"""One matrix product, by whichever of torch's libraries is faster at it.

On CPUs torch multiplies float32 matrices by its BLAS, which is MKL in the wheels for x86, and lower precisions by oneDNN. MKL takes the
widest vector instructions on Intel's processors alone; oneDNN takes them wherever they are. On an AMD EPYC (Zen 4) it is 1.1 to 1.6 times
as fast for matrices of hidden size.
"""

import torch
from torch import Tensor

LEAST = 1 << 24
"""Multiplications from which on the other library's call is paid for."""
_linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; on CPUs no gradient comes back through it."""
    if _linear is None or not _suits(left, right):
        return left @ right
    product: Tensor = _linear(_rows_in_order(left), _without_gaps(right).mT, None, "none", [], "")
    return product


def _suits(left: Tensor, right: Tensor) -> bool:
    """Two large matrices of float32 on the host."""
    return (
        left.ndim == right.ndim == 2
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and left.numel() * right.shape[1] >= LEAST
    )


def _rows_in_order(left: Tensor) -> Tensor:
    return left if left.stride(1) == 1 else left.contiguous()


def _without_gaps(right: Tensor) -> Tensor:
    """A part of a wider matrix is copied: for one, oneDNN has nothing but a loop of single numbers."""
    return right if right.is_contiguous() or right.mT.is_contiguous() else right.contiguous()
