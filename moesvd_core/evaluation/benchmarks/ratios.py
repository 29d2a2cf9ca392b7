"""Whether a ratio is what it says (asked for, planned, and counted again from the files that the export wrote), and what a new one costs.

The model is in memory, as in the explorer: a layer is decomposed once for each metric and structure, whatever methods and ratios ask for
it, and a new ratio is slices of that beside the original.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moesvd_core.architectures.files import ModelFiles, resolve_model
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.checks import require_ratios
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
        require_ratios("ratios", self.ratios)

    def run(self, report: Report = silent) -> Table:
        """Plan, apply and export every method at every ratio it reaches, and count what lies on the disk."""
        files = ModelFiles.open(resolve_model(self.model))
        model = AutoModelForCausalLM.from_pretrained(files.folder, dtype="auto").eval()
        stream = MemoryStream(model)
        statistics = calibrate(stream, AutoTokenizer.from_pretrained(files.folder), self.calibration, report=report)
        pipeline = Pipeline(stream, statistics)
        rows, notes = [], []
        for number, name in enumerate(self.methods):
            reach = pipeline.max_ratio(Recipe(name))
            seconds = _planning_seconds(pipeline, name, reach)
            notes.append(f"{name}: reaches a ratio of {reach:.3f}; all of the slider's plans up to there in {seconds:.2f} s")
            for ratio in [ratio for ratio in self.ratios if ratio <= reach]:
                start = time.perf_counter()
                plan = pipeline.plan(Recipe(name, ratio))
                made = _applied(model, pipeline, plan)
                seconds = time.perf_counter() - start
                rows.append(_row(name, plan, _exported(files, pipeline, plan), files, seconds, _added_bytes(model, made)))
            report(Progress("benchmark", number + 1, len(self.methods), name))
        decomposed = len({key for key, _ in pipeline.cache})
        notes.append(f"{decomposed} decompositions of every layer served {len(self.methods)} methods and all of their ratios")
        return Table.of(f"Ratios asked for, planned, and counted in files: {Path(self.model).name}", rows, notes)


def _planning_seconds(pipeline: Pipeline, name: str, reach: float) -> float:
    """Time of all plans, once the curves are there."""
    start = time.perf_counter()
    pipeline.plans(Recipe(name), [ratio for ratio in SLIDER if ratio <= reach])
    return time.perf_counter() - start


def _applied(model: PreTrainedModel, pipeline: Pipeline, plan: Plan) -> PreTrainedModel:
    """The model as the plan makes it, beside the original."""
    layers = [(layer, pipeline.factors(plan, layer.index)) for layer in pipeline.layers.values()]
    return compressed(model, [(layer, factors) for layer, factors in layers if factors is not None])


def _added_bytes(model: PreTrainedModel, made: PreTrainedModel) -> int:
    """What a compressed model holds that the original does not."""
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    own = [tensor.untyped_storage() for tensor in (*made.parameters(), *made.buffers())]
    return sum({each.data_ptr(): each.nbytes() for each in own if each.data_ptr() not in shared}.values())


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


def _row(name: str, plan: Plan, written: tuple[int, int], original: ModelFiles, seconds: float, added: int) -> dict[str, Cell]:
    parameters, stored = written
    return {
        "method": name,
        "asked": plan.asked_ratio,
        "planned": plan.ratio,
        "in files": 1 - parameters / _counted(original)[0],
        "planned bytes": plan.bytes,
        "bytes in files": stored,
        "difference %": 100 * (stored / plan.bytes - 1),
        "ready in, s": seconds,
        "bytes beside the original": added,
    }
