"""Whether a ratio is what it says: asked for, planned, and counted again from the files that the export wrote."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import AutoTokenizer

from moesvd_core.architectures.files import ModelFiles, resolve_model
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress, Report, silent

SLIDER = tuple(percent / 100 for percent in range(81))
"""Every ratio that the explorer's slider has."""


@dataclass(frozen=True)
class RatiosBenchmark:
    """Settings: model, ratios of the whole model, methods, and what to calibrate on (its quality does not matter here)."""

    model: str
    ratios: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6)
    methods: tuple[str, ...] = tuple(METHODS)
    calibration: Calibration = field(default_factory=lambda: Calibration(samples=16))

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)
        if not self.ratios or not self.methods:
            raise InputError("at least one ratio and one method must be given to compare")

    def run(self, report: Report = silent) -> Table:
        """Plan and export every method at every ratio it reaches, and count what lies on the disk."""
        files = ModelFiles.open(resolve_model(self.model))
        stream = LayerStream(files)
        statistics = calibrate(stream, AutoTokenizer.from_pretrained(files.folder), self.calibration, report=report)
        pipeline = Pipeline(stream, statistics)
        rows, notes = [], []
        for number, name in enumerate(self.methods):
            reach = pipeline.max_ratio(Recipe(name))
            seconds = _planning_seconds(pipeline, name, reach)
            notes.append(f"{name}: reaches a ratio of {reach:.3f}; all of the slider's plans up to there in {seconds:.2f} s")
            for plan in pipeline.plans(Recipe(name), [ratio for ratio in self.ratios if ratio <= reach]):
                rows.append(_row(name, plan, _exported(files, pipeline, plan), files))
            report(Progress("benchmark", number + 1, len(self.methods), name))
        return Table.of(f"Ratios asked for, planned, and counted in files: {Path(self.model).name}", rows, notes)


def _planning_seconds(pipeline: Pipeline, name: str, reach: float) -> float:
    """Time of all plans, once the curves are there."""
    start = time.perf_counter()
    pipeline.plans(Recipe(name), [ratio for ratio in SLIDER if ratio <= reach])
    return time.perf_counter() - start


def _exported(files: ModelFiles, pipeline: Pipeline, plan: Plan) -> tuple[int, int]:
    """Parameters and bytes in the files of a factored export."""

    def factors(layer: ExpertLayer) -> LayerFactors | None:
        with pipeline.stream.layer(layer.index):
            return pipeline.factors(plan, layer.index)

    with TemporaryDirectory() as folder:
        export_streamed(files, factors, Path(folder) / "export")
        return _counted(ModelFiles.open(Path(folder) / "export"))


def _counted(files: ModelFiles) -> tuple[int, int]:
    """Parameters and bytes of all tensors."""
    return sum(int(np.prod(files.header(key)[1], dtype=np.int64)) for key in files.weight_map), files.bytes


def _row(name: str, plan: Plan, written: tuple[int, int], original: ModelFiles) -> dict[str, Cell]:
    parameters, stored = written
    return {
        "method": name,
        "asked": plan.asked_ratio,
        "planned": plan.ratio,
        "in files": 1 - parameters / _counted(original)[0],
        "planned bytes": plan.bytes,
        "bytes in files": stored,
        "difference %": 100 * (stored / plan.bytes - 1),
    }
