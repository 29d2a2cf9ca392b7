"""How much memory it takes to compress a model that is larger than the memory would be.

A random checkpoint is written layer by layer, then analysed and compressed in a process of its own. What counts is that process's peak of
resident memory above an interpreter that has torch and transformers imported; the process reads both figures itself (`memory_probe`).
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moesvd_core.calibration import Calibration
from moesvd_core.calibration.text import window_length
from moesvd_core.decomposition.registry import method
from moesvd_core.errors import ResourceError
from moesvd_core.evaluation.benchmarks.memory_probe import ProbeResult, ProbeSettings
from moesvd_core.evaluation.benchmarks.synthetic import ModelSize, write_random_mixtral
from moesvd_core.evaluation.benchmarks.table import Table
from moesvd_core.planning import Recipe
from moesvd_core.progress import Progress, Report, silent

BOUND = 1_500_000_000
"""Bytes above the interpreter that a 4 GB checkpoint may take."""
SHAPE: dict[str, Any] = {"hidden": 768, "width": 2688}
"""Mixtral's proportions (experts 3.5 times as wide as the hidden states), and as many layers as a large model has."""


@dataclass(frozen=True)
class MemoryBenchmark:
    """Settings.

    Attributes:
        size: of the random checkpoint.
        probe: what is done with it.
        folder: where checkpoint, statistics and export are written; None: a temporary folder.
    """

    size: ModelSize = field(default_factory=lambda: ModelSize(**SHAPE))
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    folder: Path | None = None

    def __post_init__(self) -> None:
        # Here, and not in the settings: the measured process, which makes them too, must import nothing before it reads its first figure.
        probe = self.probe
        method(probe.method)
        Recipe(probe.method, probe.ratio)
        Calibration(probe.dataset, probe.samples, probe.length)
        window_length(probe.length, self.size.context)

    def run(self, report: Report = silent) -> Table:
        """Write, compress, and report the peak.

        Raises:
            ResourceError: the process did not finish; the message ends with what it said last.
        """
        with TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            write_random_mixtral(folder / "model", self.size)
            stored = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
            report(Progress("benchmark", 1, 2, f"{stored / 1e9:.2f} GB written"))
            result = _probe(folder, self.probe, report)
        report(Progress("benchmark", 2, 2, "compressed"))
        above = result.peak_bytes - result.interpreter_bytes
        rows = [{"what": what, "MB": bytes / 1e6, "seconds": seconds} for what, bytes, seconds in (
            ("checkpoint", stored, None),
            ("interpreter with torch and transformers", result.interpreter_bytes, None),
            ("peak above it while analysing", result.analysed_bytes - result.interpreter_bytes, result.analyse_seconds),
            ("peak above it in all", above, result.analyse_seconds + result.compress_seconds),
        )]
        config = self.size.config()
        notes = [
            f"random Mixtral: d {config.hidden_size}, m {config.intermediate_size}, {config.num_local_experts} experts, "
            f"{config.num_hidden_layers} layers, bfloat16",
            f"{self.probe.method} at {self.probe.ratio:.0%}, {self.probe.samples} windows of {self.probe.length} tokens",
            f"bound for a checkpoint of 4 GB: {BOUND / 1e6:,.0f} MB; reached {above / 1e6:,.0f} MB",
        ]
        return Table.of("Memory that compression takes", rows, notes)


def _probe(folder: Path, settings: ProbeSettings, report: Report) -> ProbeResult:
    """Run the probe in a fresh interpreter, so that nothing of this process counts, and pass on how far it is."""
    command = [sys.executable, "-m", "moesvd_core.evaluation.benchmarks.memory_probe", str(folder), json.dumps(vars(settings))]
    told: dict[str, Any] = {}
    said = folder / "said.txt"
    with said.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:  # noqa: S603 - our own module, no shell
        for line in process.stdout or ():
            told = json.loads(line)
            if "stage" in told:
                report(Progress(**told))
    if process.returncode:
        lines = said.read_text().strip().splitlines() or [f"exit status {process.returncode}"]
        raise ResourceError(f"the measured process did not finish: {lines[-1]}")
    return ProbeResult(**told)
