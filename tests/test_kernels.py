"""What decides whether and how kernels for GPUs are used; none is started here."""

import accelerate
import pytest
import torch

from moesvd_core import kernels, tiles
from moesvd_core.factor_sides import DenseSide


def test_experts_answer_without_kernels_where_none_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "launch", launch)
    with pytest.warns(UserWarning, match="cannot start kernels on cpu.*C compiler"):
        assert not kernels._starts.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("most_rows", [256, 14336])
def test_the_largest_tiles_are_for_gpus_with_memory_enough(most_rows: int) -> None:
    assert tiles._tile(128, most_rows, 232_448)["COLUMNS"] == 256
    assert tiles._tile(128, most_rows, 101_376)["COLUMNS"] == 128  # a consumer's card


def test_matrices_that_are_offloaded_are_not_kept() -> None:
    side = DenseSide(2, 8, 8, True)
    assert not side._comes_and_goes
    accelerate.cpu_offload(side, torch.device("cpu"))
    assert side._comes_and_goes and side.tiled() is None
