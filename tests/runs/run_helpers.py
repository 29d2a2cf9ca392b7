"""What several tests of runs need: a run without a model, and a launcher of workers whose actions need none."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moesvd_core.runs.folder import Identity, RunFolder


def new_run(root: Path, name: str = "tiny-00000001") -> RunFolder:
    """A run that is about nothing."""
    return RunFolder.create(root / name, Identity(name, "tiny", {"samples": 1}, "2026-01-01T00:00:00+00:00"))


def launch_fake(run: RunFolder) -> None:
    """Start a worker whose actions need no model."""
    launched(run, str(Path(__file__).with_name("fake_worker.py")), str(run.path))


def launched(run: RunFolder, *words: str) -> None:
    """Start a worker of one thread by what follows "python"; these tests' own modules are at hand."""
    folders = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], start_new_session=True, env=environment)
    threading.Thread(target=process.wait, daemon=True).start()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition, and fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not come within {seconds} s"
        time.sleep(0.02)
