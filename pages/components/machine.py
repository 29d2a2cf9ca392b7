"""What this machine has: memory, disk, cores, graphics cards, and roughly how fast it multiplies matrices."""

import functools
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moesvd_core.runs.free_memory import free_memory

USED = 0.3
"""Share of a machine's speed in large matrix products that calibration reaches, as seen on the demo model; good to a factor of two."""


@dataclass(frozen=True)
class Machine:
    """Bytes are what is there now.

    Attributes:
        disk_free: on the disk of the runs.
        gpus: names of graphics cards.
    """

    cores: int
    memory_free: int
    memory_total: int
    disk_free: int
    gpus: tuple[str, ...] = ()


def look(runs: Path) -> Machine:
    """This machine, now."""
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cores, free_memory(), psutil.virtual_memory().total, shutil.disk_usage(runs).free, gpus)


@functools.cache
def speed() -> float:
    """Floating-point operations a second in matrix products, measured once in some tens of milliseconds.

    The best of many short ones: on a busy machine some of them are left alone.
    """
    device, size, times = ("cuda", 4096, 6) if torch.cuda.is_available() else ("cpu", 384, 40)
    matrix = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a number waits for the card
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def seconds(flops: float) -> float:
    """Roughly how long calibration takes for so many operations."""
    return flops / (USED * speed())
