"""Where a benchmark ran: what its figures cannot be compared without."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

PACKAGES = ("moesvd", "torch", "transformers", "numpy")
"""Whose versions decide figures."""


def machine() -> dict[str, str]:
    """Processor, memory, graphics card and versions, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": f"{cores} × {_processor()}, {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "graphics card": ", ".join(torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count())) or "none",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def place(device: torch.device | str) -> str:
    """Where work on a device runs, in words: the card's name, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else f"{torch.get_num_threads()} threads"


def _processor() -> str:
    """Name of the processor's model."""
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(encoding="utf-8"), re.MULTILINE) if facts.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
