"""What this machine has: memory, disk, cores, graphics cards, and roughly how fast it multiplies matrices."""

import functools
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants

from moesvd_core.architectures.hub_download import cached_model
from moesvd_core.atomic import existing
from moesvd_core.live import free_for_models
from moesvd_core.runs.free_memory import free_memory

USED = 0.3
"""Share of a machine's speed in large matrix products that calibration reaches, as seen on the demo model; good to a factor of two."""


@dataclass(frozen=True)
class Machine:
    """Bytes are what is there now.

    Attributes:
        models_free: where models are put that answer at once; on the graphics card where there is one.
        disk_free: on the disk of the runs.
        gpus: names of graphics cards.
        hub_free: on the disk of the hub's cache, None where it is that of the runs.
    """

    cores: int
    memory_free: int
    memory_total: int
    models_free: int
    disk_free: int
    gpus: tuple[str, ...] = ()
    hub_free: int | None = None


def look(runs: Path) -> Machine:
    """This machine, now."""
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = free_memory(), psutil.virtual_memory().total, free_for_models()
    place = existing(Path(constants.HF_HUB_CACHE))
    apart = place.stat().st_dev != runs.stat().st_dev
    return Machine(cores, *memory, shutil.disk_usage(runs).free, gpus, shutil.disk_usage(place).free if apart else None)


def download_bytes(facts: Mapping[str, Any]) -> int:
    """Bytes of a model's weights that are to be fetched from the hub, as far as its cache lacks them; nobody is asked.

    Args:
        facts: `ModelFacts.as_dict()`.
    """
    if Path(facts["source"]).exists():
        return 0
    folder = cached_model(facts["source"])
    held = 0 if folder is None else sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return max(0, int(facts["bytes"]) - held)


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
