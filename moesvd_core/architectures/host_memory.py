"""Giving freed memory back to the system, so that the peak of a long job is that of its largest layer and not of all of them.

glibc's allocator keeps freed blocks for later use. Layers are loaded, worked on and freed in blocks of many sizes, and each round leaves
the heap a little more fragmented: after forty layers it had grown to several times what was in use.
"""

import ctypes
from collections.abc import Callable


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
