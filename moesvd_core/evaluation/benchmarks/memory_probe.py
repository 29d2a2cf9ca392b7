"""The process that `memory` measures: analyses and compresses a model folder, and prints the peaks of its own resident memory as JSON."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
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
    """Calibrate and decompose `folder/model`, then plan and export it to `folder/export`, noting the peaks."""
    import torch
    import transformers  # the interpreter that everything is measured above

    interpreter = resident_bytes()
    start = time.perf_counter()
    from moesvd_core.architectures.files import ModelFiles
    from moesvd_core.architectures.layout import ExpertLayer
    from moesvd_core.architectures.streaming import LayerStream
    from moesvd_core.calibration import Calibration, calibrate
    from moesvd_core.checkpoint.export import export_streamed
    from moesvd_core.decomposition.factors import LayerFactors
    from moesvd_core.decomposition.registry import method
    from moesvd_core.pipeline import Pipeline
    from moesvd_core.planning import Recipe

    files = ModelFiles.open(folder / "model")
    stream = LayerStream(files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder)
    calibration = Calibration(settings.dataset, settings.samples, settings.length)
    statistics = calibrate(stream, tokenizer, calibration, folder=folder / "run" / "statistics")
    pipeline = Pipeline(stream, statistics, folder / "run")
    pipeline.curves(method(settings.method))
    analysed, middle = peak_bytes(), time.perf_counter()

    plan = pipeline.plan(Recipe(settings.method, settings.ratio))

    def factors(layer: ExpertLayer) -> LayerFactors | None:
        with stream.layer(layer.index), torch.no_grad():
            return pipeline.factors(plan, layer.index)

    export_streamed(files, factors, folder / "export")
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
