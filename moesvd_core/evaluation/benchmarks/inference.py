"""Speed of the compressed model beside the original, in turns within one run: prefill, decoding, memory and operations."""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moesvd_core.architectures.files import resolve_model
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.decomposition.registry import method
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.synthetic import MixtralSize, write_random_mixtral
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.evaluation.speed import Speed, SpeedTest, measure_speed
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Recipe
from moesvd_core.progress import Report, silent


@dataclass(frozen=True)
class InferenceBenchmark:
    """Settings.

    Attributes:
        model: a folder or a hub id; None: a random model of `size`.
        size: of the random model.
        ratios, methods: what is compressed and timed, each with each.
        test: prompt, answer and repetitions.
        calibration: decides the ranks, not their number.
        device: where the models run.
    """

    model: str | None = None
    size: MixtralSize = field(default_factory=lambda: MixtralSize(width=3584, layers=2))
    ratios: tuple[float, ...] = (0.2, 0.4, 0.6)
    methods: tuple[str, ...] = ("latent", "auto", "fisher")
    test: SpeedTest = field(default_factory=SpeedTest)
    calibration: Calibration = field(default_factory=lambda: Calibration(samples=8, length=256))
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)
        if not self.ratios or not self.methods:
            raise InputError("at least one ratio and one method must be given to compare")

    def run(self, report: Report = silent) -> Table:
        """Compress and time.

        Raises:
            InputError: settings that the model does not allow.
        """
        with TemporaryDirectory() as folder:
            if self.model is None:
                write_random_mixtral(Path(folder), self.size)
            path = Path(folder) if self.model is None else resolve_model(self.model)
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval().to(self.device)
            pipeline = Pipeline(MemoryStream(model), calibrate(MemoryStream(model), tokenizer, self.calibration, report=report))
            models, stored = self._compressed(model, pipeline, report)
            speeds = measure_speed(models, self.test, report=report)
        rows = [_row(name, speed, stored[name], speeds["original"]) for name, speed in speeds.items()]
        where = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
        note = (
            f"on {where}, {str(model.dtype).removeprefix('torch.')}; prompt of {self.test.prompt_tokens} tokens, "
            f"{self.test.new_tokens} new ones; medians of {self.test.repeats} turns, quartiles in brackets"
        )
        title = "a random Mixtral" if self.model is None else Path(self.model).name
        return Table.of(f"Speed of the original and of compressed models: {title}", rows, [note])

    def _compressed(self, model: PreTrainedModel, pipeline: Pipeline, report: Report) -> tuple[dict[str, PreTrainedModel], dict[str, int]]:
        """The original and every compressed model, and the bytes of each."""
        models, stored = {"original": model}, {"original": pipeline.shape.bytes}
        for name in self.methods:
            for plan in pipeline.plans(Recipe(name), self.ratios, report):
                layers = [(layer, pipeline.factors(plan, layer.index)) for layer in pipeline.layers.values()]
                label = f"{name} {plan.asked_ratio:.0%}"
                models[label] = compressed(model, [(layer, factors) for layer, factors in layers if factors is not None])
                stored[label] = plan.bytes
        return models, stored


def _row(name: str, speed: Speed, stored: int, original: Speed) -> dict[str, Cell]:
    row: dict[str, Cell] = {"model": name, "bytes": stored}
    for kind in ("prefill", "decode"):
        rate, before = getattr(speed, kind), getattr(original, kind)
        row[f"{kind} tokens/s"] = rate.median
        row[f"{kind} quartiles"] = f"[{rate.low:.4g}, {rate.high:.4g}]"
        row[f"{kind} × original"] = rate.median / before.median
    row["MFLOP/token"] = speed.flops_per_token / 1e6
    row["peak bytes"] = speed.peak_bytes
    return row
