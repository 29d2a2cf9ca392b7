"""Is the process that wrote this still alive? A process number alone does not tell: numbers are given out again.

A process is named by its number, the moment at which it was born, and the machine (boot and process namespace) on which both mean
something. On another machine, as when a run folder lies on a shared disk, only the heartbeat can tell.
"""

import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

HEARTBEAT_SECONDS = 1.0
"""How often a worker touches its file."""
HANGING_SECONDS = 30.0
"""A live worker of this machine that has been silent for so long hangs: it was stopped, or waits for a disk that does not answer."""
SILENCE_SECONDS = 8.0
"""A worker on another machine that has been silent for so long is taken for dead."""


@dataclass(frozen=True)
class ProcessName:
    """A name that no other process has had or will have: its number, its birth (in clock ticks since boot, or seconds), its machine."""

    pid: int
    birth: float
    machine: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def this_process() -> ProcessName:
    """The name of the process that asks."""
    name = name_of(os.getpid())
    assert name is not None, "a process that runs this line is alive"  # noqa: S101 - not a check of input
    return name


def name_of(pid: int) -> ProcessName | None:
    """The full name of a live process of this machine, or None when it is dead."""
    birth = birth_of(pid)
    return None if birth is None else ProcessName(pid, birth, machine())


def birth_of(pid: int) -> float | None:
    """When process `pid` was born, or None when it is dead, or a zombie that its parent has not fetched."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])  # ticks since boot: unlike a date, they do not move with the clock
    except FileNotFoundError:
        pass
    except ProcessLookupError:
        return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def machine() -> str:
    """Name of the boot and process namespace in which process numbers are unique."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def is_alive(name: ProcessName, heartbeat: float) -> bool:
    """Whether that process still runs.

    Args:
        heartbeat: when it last gave a sign of life, seconds since 1970; decides only for processes of another machine.
    """
    if name.machine != machine():
        return time.time() - heartbeat < SILENCE_SECONDS
    return birth_of(name.pid) == name.birth
