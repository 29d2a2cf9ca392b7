"""Freed memory leaves the process, also from the middle of the heap."""

import sys

import psutil
import pytest
import torch

from moesvd_core.architectures.host_memory import return_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other allocators return memory by themselves")
def test_holes_in_the_heap_are_handed_back() -> None:
    blocks = [torch.ones(25_000) for _ in range(2_000)]  # 100 kB each: below the size that the system gives and takes apart
    del blocks[::2], blocks[: len(blocks) // 2]
    held = psutil.Process().memory_info().rss
    return_freed_memory()
    assert psutil.Process().memory_info().rss < held - 50_000_000
    assert all(float(block[0]) == 1 for block in blocks)


def test_it_may_be_called_at_any_time() -> None:
    return_freed_memory()
    return_freed_memory()
