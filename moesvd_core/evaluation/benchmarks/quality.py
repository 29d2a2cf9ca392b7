"""Every method at the same ratios in one table, measured on the same held-out text, beside the original, over several calibrations.

The conclusion is one figure a ratio: what `auto` loses, divided by the least that a published low-rank method loses with the same stored
bytes or more, in log-perplexity and in KL. Where the published method stored fewer bytes, `auto` is planned and measured again at that
method's ratio. Beside it, whether anything at all loses less.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError, require_seed
from moesvd_core.evaluation.benchmarks.bench import Bench, CalibratedBench, QualitySettings, with_seed
from moesvd_core.evaluation.benchmarks.checks import require_ratios
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.evaluation.perplexity import Evaluation
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress, Report, silent

OURS = "auto"
LOSSES = {"delta_nll": "log-perplexity", "kl_mean": "KL"}
"""Figures by which methods are ranked, and what they are called."""
FIGURES = ("perplexity", "delta_nll", "kl_mean", "kl_p95", "top1_agreement")
SPREAD = ("perplexity", "delta_nll", "kl_mean")
"""Figures whose spread over calibrations is shown."""


@dataclass(frozen=True)
class Sample:
    """One method at one ratio after one calibration."""

    seed: int
    plan: Plan
    evaluation: Evaluation


@dataclass(frozen=True)
class QualityBenchmark(QualitySettings):
    """Settings, beside those of every benchmark of quality.

    Attributes:
        ratios: shares of the whole model's parameters to remove.
        methods: names of the registry.
        seeds: one calibration each; the calibration's own seed is not looked at.
    """

    ratios: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)
        if not self.ratios or not self.methods or not self.seeds:
            raise InputError("at least one ratio, one method and one seed must be given to compare")
        require_ratios("ratios", self.ratios)
        for seed in self.seeds:
            require_seed(seed)
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds must differ, got {', '.join(map(str, self.seeds))}: a calibration repeated has no spread")

    def run(self, report: Report = silent) -> Table:
        """Calibrate once a seed, then plan, factor and measure every method at every ratio.

        Raises:
            InputError: settings that the model or the text do not allow. A method that cannot reach a ratio is no error: its row says so.
        """
        bench = self.bench(report)
        runs = _Runs(self, bench, report)
        samples, unreached = runs.all()
        rows = [_original(bench, runs.calibrated[self.seeds[0]].pipeline.shape.bytes)]
        for ratio in self.ratios:
            rows.extend(_row(name, ratio, samples.get((name, ratio), [])) for name in self.methods)
        notes = [self.measured_on(bench, self.seeds), *unreached]
        for done, ratio in enumerate(self.ratios, start=1):
            notes += _verdict(runs, ratio, samples)
            report(Progress("compare", done, len(self.ratios), f"{OURS} beside the others at {ratio:.0%}"))
        flat = [_seed_row(name, ratio, sample) for (name, ratio), found in samples.items() for sample in found]
        details = {"seeds": Table.of("Each calibration by itself", flat)}
        return Table.of(f"Quality by method and ratio: {Path(self.model).name}", rows, notes, details)


_Samples = dict[tuple[str, float], list[Sample]]


class _Runs:
    """All calibrations of one benchmark."""

    def __init__(self, settings: QualityBenchmark, bench: Bench, report: Report) -> None:
        self.settings, self._report = settings, report
        self.calibrated: dict[int, CalibratedBench] = {
            seed: bench.calibrated(with_seed(settings.calibration, seed), report) for seed in settings.seeds
        }

    def all(self) -> tuple[_Samples, list[str]]:
        """Every method at every ratio after every calibration, and what could not be reached."""
        samples: _Samples = {}
        unreached: dict[tuple[str, float], str] = {}
        total, done = len(self.calibrated) * len(self.settings.methods) * len(self.settings.ratios), 0
        for seed in self.calibrated:
            for name in self.settings.methods:
                for ratio in self.settings.ratios:
                    try:
                        samples.setdefault((name, ratio), []).append(self.sample(seed, name, ratio))
                    except InputError as error:
                        unreached[name, ratio] = f"{name} at {ratio:.0%}: {error}"
                    done += 1
                    self._report(Progress("benchmark", done, total, f"{name} at {ratio:.0%}, seed {seed}"))
            self.calibrated[seed].pipeline.cache.clear()
        return samples, list(unreached.values())

    def sample(self, seed: int, name: str, ratio: float) -> Sample:
        """One method at one ratio after one calibration."""
        calibrated = self.calibrated[seed]
        plan = calibrated.pipeline.plan(Recipe(name, ratio, compensate=method(name).compensate))
        return Sample(seed, plan, calibrated.measured(plan))

    def ours_within(self, rival: Sequence[Sample], ours: Sequence[Sample], ratio: float) -> list[Sample]:
        """`auto` with at most the bytes of a rival at a ratio, calibration by calibration; measured again where it had more."""
        within = []
        for mine, other in zip(ours, rival, strict=True):
            again = mine.plan.bytes > other.plan.bytes
            if again:  # takes as long as one of the measurements before, and nothing else is told meanwhile
                what = f"{OURS} again, at the bytes of {other.plan.method} at {ratio:.0%}, seed {mine.seed}"
                self._report(Progress("compare", self.settings.ratios.index(ratio), len(self.settings.ratios), what))
            within.append(self.sample(mine.seed, OURS, other.plan.ratio) if again else mine)
        return within


def _verdict(runs: _Runs, ratio: float, samples: _Samples) -> Iterator[str]:
    """What `auto` loses beside the best published low-rank method at the same stored bytes, and beside everything else."""
    found = {name: samples.get((name, ratio), []) for name in runs.settings.methods}
    found = {name: each for name, each in found.items() if len(each) == len(runs.calibrated)}
    rivals = {name: each for name, each in found.items() if method(name).published and method(name).low_rank}
    if OURS not in found or not rivals:
        return
    for figure, title in LOSSES.items():
        loss = _mean_of(figure)
        best = min(rivals, key=lambda name: loss(rivals[name]))
        if loss(rivals[best]) == 0:
            continue  # a ratio of 0 leaves every model as it is, and nothing is no measure of anything
        ours = runs.ours_within(rivals[best], found[OURS], ratio)
        better = [f"{name} ({loss(each):.4f})" for name, each in found.items() if name != OURS and loss(each) < loss(found[OURS])]
        yield (
            f"at {ratio:.0%}, {title}: {OURS} loses {_within(ours, figure)} nats a token with {_bytes(ours):,} bytes, the best published "
            f"low-rank method ({best}) {_within(rivals[best], figure)} with {_bytes(rivals[best]):,}: "
            f"{loss(ours) / loss(rivals[best]):.3f} times as much; "
            + (f"behind {' and '.join(better)}" if better else f"first of all {len(found)}")
        )


def _mean_of(figure: str) -> Callable[[Sequence[Sample]], float]:
    """Mean of a figure over calibrations."""
    return lambda samples: fmean(getattr(sample.evaluation, figure) for sample in samples)


def _within(samples: Sequence[Sample], figure: str) -> str:
    """Mean of a figure, and its standard deviation where there are several calibrations."""
    values = [float(getattr(sample.evaluation, figure)) for sample in samples]
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _bytes(samples: Sequence[Sample]) -> int:
    """Bytes that are stored, mean over calibrations (plans differ by less than a block of ranks)."""
    return round(fmean(sample.plan.bytes for sample in samples))


def _original(bench: Bench, stored: int) -> dict[str, Cell]:
    """The model before compression, under the columns of `_row`."""
    original = bench.original
    row: dict[str, Cell] = {"method": "original", "asked": 0.0, "ratio": None, "bytes": stored}
    for figure in FIGURES:
        row[figure] = getattr(original, figure)
        row |= {f"{figure}_spread": None} if figure in SPREAD else {}
    return row


def _row(name: str, asked: float, samples: Sequence[Sample]) -> dict[str, Cell]:
    """Means over calibrations, and standard deviations where there are several."""
    row: dict[str, Cell] = {"method": name, "asked": asked, "ratio": None, "bytes": None}
    if samples:
        row |= {"ratio": fmean(sample.plan.ratio for sample in samples), "bytes": _bytes(samples)}
    for figure in FIGURES:
        values = [getattr(sample.evaluation, figure) for sample in samples]
        row[figure] = fmean(values) if values else None
        if figure in SPREAD:
            row[f"{figure}_spread"] = stdev(values) if len(values) > 1 else None
    return row


def _seed_row(name: str, asked: float, sample: Sample) -> dict[str, Cell]:
    """One calibration's figures, with the standard errors over windows of the held-out text."""
    row: dict[str, Cell] = {"method": name, "asked": asked, "seed": sample.seed, "ratio": sample.plan.ratio, "bytes": sample.plan.bytes}
    figures = ("perplexity", "perplexity_stderr", "delta_nll", "delta_nll_stderr", "kl_mean", "kl_p95", "top1_agreement")
    return row | {figure: getattr(sample.evaluation, figure) for figure in figures}
