"""Freed memory leaves the process, also from the middle of the heap, and kernels of shapes that never come back are not kept."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from moesvd_core.architectures.host_memory import bound_kernel_caches, return_freed_memory


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


GROWTH = """
import psutil, sys, torch
from moesvd_core.architectures.host_memory import bound_kernel_caches
torch.set_num_threads(1)
if sys.argv[1] == "bounded":
    bound_kernel_caches()
weight = torch.zeros(256, 256, dtype=torch.bfloat16)
sizes = []
for rows in range(1, 1501):
    torch.nn.functional.linear(torch.zeros(rows, 256, dtype=torch.bfloat16), weight)
    if rows in (100, 1500):
        sizes.append(psutil.Process().memory_info().rss)
print(sizes[1] - sizes[0])
"""


def _growth(caches: str) -> int:
    """Bytes that 1,400 products of ever new shapes leave in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    return int(subprocess.run([sys.executable, "-c", GROWTH, caches], capture_output=True, text=True, check=True, env=clean).stdout)


def test_products_of_ever_new_shapes_leave_no_kernels_behind() -> None:
    # A kernel's size depends on the processor (on some there are none), so the measure is what the same products leave without a bound.
    assert _growth("bounded") < max(0.25 * _growth("unbounded"), 25_000_000)


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    bound_kernel_caches()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "64")
