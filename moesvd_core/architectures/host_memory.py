"""Keeping a long job's memory at that of its largest layer: two things grow with the number of layers though nothing of ours is kept.

glibc's allocator keeps freed blocks for later use. Layers are loaded, worked on and freed in blocks of many sizes, and each round leaves
the heap a little more fragmented: after forty layers it had grown to several times what was in use.

On CPUs torch makes a kernel for every new shape of a bfloat16 product and keeps a thousand of them, in two caches. Each expert gets another
number of tokens in every layer and batch, so almost every product has a new shape: hundreds of megabytes of kernels that never serve again.
"""

import ctypes
import os
from collections.abc import Callable

KERNELS = "64"
"""Kernels that each cache keeps: more than the shapes that decoding repeats."""
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def _system_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None with other allocators (musl, macOS, Windows), which return memory by themselves."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


_TRIM = _system_trim()


def return_freed_memory() -> None:
    """Hand every page that is in no use back to the system; costs next to nothing when there is little to hand back."""
    if _TRIM is not None:
        _TRIM(0)


def bound_kernel_caches() -> None:
    """Bound torch's caches of CPU kernels, unless the environment says how. They read it at the first product: call it before."""
    for name in _CACHES:
        os.environ.setdefault(name, KERNELS)
