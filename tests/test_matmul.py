"""Products by the faster library are those of the other one, however matrices lie in memory."""

import pytest
import torch

from moesvd_core import matmul as module
from moesvd_core.matmul import LEAST, matmul

SIZE = 260
noise = torch.Generator().manual_seed(0)
ORDERS = {
    "rows": lambda: torch.randn(SIZE, SIZE, generator=noise),
    "columns": lambda: torch.randn(SIZE, SIZE, generator=noise).T,
    "part of wider rows": lambda: torch.randn(SIZE, SIZE + 40, generator=noise)[:, 40:],
    "part of longer columns": lambda: torch.randn(SIZE, SIZE + 40, generator=noise).T[40:],
    "every other number": lambda: torch.randn(2 * SIZE, 2 * SIZE, generator=noise)[::2, ::2],
    "one row again and again": lambda: torch.randn(1, SIZE, generator=noise).expand(SIZE, SIZE),
}


@pytest.mark.parametrize("left", ORDERS)
@pytest.mark.parametrize("right", ORDERS)
def test_a_product_is_right_in_every_order_of_memory(left: str, right: str) -> None:
    assert SIZE**3 >= LEAST
    a, b = ORDERS[left](), ORDERS[right]()
    torch.testing.assert_close(matmul(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_small_matrices_and_several_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_linear", None if module._linear is None else _refuse)
    large = torch.randn(SIZE, SIZE, generator=noise)
    for given in (large.to(dtype), large[:8, :8], torch.stack([large, large])):
        assert torch.equal(matmul(given, given), given @ given)


def test_without_the_library_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_linear", None)
    large = torch.randn(SIZE, SIZE, generator=noise)
    assert torch.equal(matmul(large, large), large @ large)


def _refuse(*_: object) -> torch.Tensor:
    raise AssertionError("the other library was asked")
