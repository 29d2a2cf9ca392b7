"""A worker with actions that need no model: started by the tests as a process of its own, `python fake_worker.py RUN`."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesvd_core import atomic
from moesvd_core.errors import InputError
from moesvd_core.progress import Progress, Report
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.worker import Action, work


def count(run: RunFolder, arguments: Mapping[str, Any], report: Report) -> Mapping[str, Any]:
    """Count to `to`, one file a number; numbers whose file is there are not counted again."""
    for number in range(arguments["to"]):
        path = run.station("factors") / f"{number}.txt"
        if not path.exists():
            time.sleep(arguments.get("pause", 0.0))
            atomic.write_text(path, f"{number} {time.monotonic()}")
        report(Progress("count", number + 1, arguments["to"], f"counted {number}"))
    return {"counted": arguments["to"]}


def fail(run: RunFolder, arguments: Mapping[str, Any], report: Report) -> Mapping[str, Any]:
    """End as the arguments say."""
    match arguments["how"]:
        case "input":
            raise InputError("samples must be >= 1, got 0")
        case "memory":
            raise MemoryError
        case "hungry":
            import torch  # seconds that the others are spared

            torch.zeros(2**33, dtype=torch.uint8)
        case "disk":
            raise OSError(28, "No space left on device", "layer-003.safetensors")
        case "deaf":
            time.sleep(60)
        case "die":
            os._exit(9)
    raise ZeroDivisionError("a bug")


ACTIONS: dict[str, Action] = {"analyze": count, "evaluate": fail}

if __name__ == "__main__":
    work(RunFolder.open(Path(sys.argv[1])), lambda: ACTIONS)
