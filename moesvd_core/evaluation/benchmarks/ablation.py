"""What each ingredient of `auto` brings: the method with that one ingredient switched off, on the same text at the same ratios.

A new ingredient gets a line in `VARIANTS`: what is asked for without it, by a recipe, by another method under the same name, by other
settings of calibration, or by statistics that lack something.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from moesvd_core.calibration import Calibration, Statistics
from moesvd_core.decomposition.metrics import BACKWARD_SUMS
from moesvd_core.decomposition.registry import METHODS, Method
from moesvd_core.errors import InputError, require_seed
from moesvd_core.evaluation.benchmarks.bench import Bench, QualitySettings, with_seed
from moesvd_core.evaluation.benchmarks.checks import require_ratios
from moesvd_core.evaluation.benchmarks.table import Cell, Table, shown
from moesvd_core.evaluation.perplexity import Evaluation
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress, Report, silent

WHOLE = "auto"
"""Name of the variant that lacks nothing."""


def _recipe(**choices: Any) -> Recipe:
    """`auto` as it is recommended, but for some choices."""
    return Recipe(**{"method": WHOLE, "compensate": METHODS[WHOLE].compensate, **choices})


@dataclass(frozen=True)
class Variant:
    """One thing left out.

    Attributes:
        name: what is used instead.
        lacks: the ingredient.
        recipe: what is asked for; its ratio is not looked at.
        methods: what the recipe's method stands for, where it is another than the registry's.
        calibrated: with which calibration in place of the benchmark's.
        without: sums that are taken out of each layer's statistics.
        beside: the variant that has the ingredient and differs in nothing else.
    """

    name: str
    lacks: str
    recipe: Recipe = field(default_factory=lambda: _recipe())
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    calibrated: Callable[[Calibration], Calibration] = lambda usual: usual
    without: tuple[str, ...] = ()
    beside: str = WHOLE


def _with(**options: Any) -> Mapping[str, Method]:
    """The registry, in which `auto` has other options."""
    return {**METHODS, WHOLE: replace(METHODS[WHOLE], **options)}


VARIANTS = (
    Variant(WHOLE, "nothing"),
    Variant("not compensated", "compensation", _recipe(compensate=False)),
    Variant("router refitted", "the original's routers", _recipe(refit_router=True)),
    Variant("input metric", "the output metric", _recipe(metric="input")),
    Variant("estimated curvature", "each expert's own measured curvature", without=(*BACKWARD_SUMS, "row_gram_ENN")),
    Variant(
        "the text's labels alone", "labels drawn from the model's predictions",
        calibrated=lambda usual: replace(usual, drawn_labels=0),
    ),
    Variant(
        "gradients of a quarter", "the backward pass of the other windows",
        calibrated=lambda usual: replace(usual, gradient_samples=-(-usual.samples // 4)),
    ),
    Variant("no backward pass", "gradients: a probe gives their scale", calibrated=lambda usual: replace(usual, gradient=False)),
    Variant("diagonal of the rows' Gram", "what neurons have to do with each other", without=("row_gram_ENN",)),
    Variant("rare experts by themselves", "leaning on the layer's average", methods=_with(shrink=False)),
    Variant("whole factors", "leaving out their identities", methods=_with(structures=("per-expert", "latent", "base-delta"))),
    Variant("no common base", "the choice of a base, where it is on offer", methods=_with(structures=("pivoted", "latent"))),
    Variant("pivoted alone", "the choice of latent", _recipe(structure="pivoted")),
    Variant("latent alone", "the choice of pivoted", _recipe(structure="latent")),
    Variant("uniform ranks, pivoted", "greedy allocation", _recipe(structure="pivoted", allocation="uniform"), beside="pivoted alone"),
    Variant(
        "latent, bases as they slide", "alternating bases", _recipe(structure="latent"), methods=_with(alternate=False),
        beside="latent alone",
    ),
    Variant("uniform ranks, latent", "greedy allocation", _recipe(structure="latent", allocation="uniform"), beside="latent alone"),
)


@dataclass(frozen=True)
class AblationBenchmark(QualitySettings):
    """Settings, beside those of every benchmark of quality.

    Attributes:
        ratios: shares of the whole model's parameters to remove.
        variants: names of `VARIANTS`; what they are held against is measured too.
        seeds: one calibration each; the calibration's own seed is not looked at.
    """

    ratios: tuple[float, ...] = (0.2, 0.4, 0.6)
    variants: tuple[str, ...] = tuple(variant.name for variant in VARIANTS)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        known = [variant.name for variant in VARIANTS]
        for name in self.variants:
            if name not in known:
                raise InputError(f"variant must be one of {', '.join(known)}, got {name!r}")
        if not self.ratios or not self.variants or not self.seeds:
            raise InputError("at least one ratio, one variant and one seed must be given to compare")
        require_ratios("ratios", self.ratios)
        for seed in self.seeds:
            require_seed(seed)

    def run(self, report: Report = silent) -> Table:
        """Calibrate, plan, factor and measure every variant at every ratio.

        Raises:
            InputError: settings that the model or the text do not allow.
        """
        bench = self.bench(report)
        chosen = [variant for variant in VARIANTS if variant.name in _with_compared(self.variants)]
        found: _Found = {}
        for done, variant in enumerate(chosen):
            for seed in self.seeds:
                report(Progress("benchmark", done, len(chosen), f"{variant.name}, seed {seed}"))
                for ratio, sample in _samples(variant, bench, self, seed, report):
                    found.setdefault((variant.name, ratio), []).append(sample)
        report(Progress("benchmark", len(chosen), len(chosen), "all variants"))
        rows = [_row(variant, ratio, found) for variant in chosen for ratio in self.ratios]
        notes = [self.measured_on(bench, self.seeds), *_conclusions(chosen, self.ratios, found)]
        return Table.of(f"What each ingredient of {WHOLE} brings: {Path(self.model).name}", rows, notes)


_Found = dict[tuple[str, float], list[tuple[Plan, Evaluation]]]


def _with_compared(names: Sequence[str]) -> set[str]:
    """Variants with those that they are held against."""
    beside = {variant.name: variant.beside for variant in VARIANTS}
    wanted = set(names)
    while not wanted >= (more := {beside[name] for name in wanted}):
        wanted |= more
    return wanted


def _samples(
    variant: Variant, bench: Bench, settings: AblationBenchmark, seed: int, report: Report
) -> Iterator[tuple[float, tuple[Plan, Evaluation]]]:
    """A variant at every ratio that it reaches."""
    calibration = with_seed(variant.calibrated(settings.calibration), seed)
    changed = _lacking(variant.without) if variant.without else None
    calibrated = bench.calibrated(calibration, report, methods=variant.methods, changed=changed, variant=variant.name)
    reach = calibrated.pipeline.max_ratio(variant.recipe, report)
    for ratio in [each for each in settings.ratios if each <= reach]:
        plan = calibrated.pipeline.plan(replace(variant.recipe, ratio=ratio))
        yield ratio, (plan, calibrated.measured(plan))


def _lacking(names: Sequence[str]) -> Callable[[Statistics], Statistics]:
    """Statistics as a calibration would leave them that does not collect some sums."""

    nothing: dict[str, Any] = dict.fromkeys(names)

    def without(statistics: Statistics) -> Statistics:
        return replace(statistics, layers={index: replace(layer, **nothing) for index, layer in statistics.layers.items()})

    return without


def _row(variant: Variant, ratio: float, found: _Found) -> dict[str, Cell]:
    """Means over calibrations, beside the variant that has the ingredient; no times of one that lost nothing."""
    samples, whole = found.get((variant.name, ratio), []), found.get((variant.beside, ratio), [])
    nll, kl = (_losses(samples, figure) for figure in ("delta_nll", "kl_mean"))
    times = [
        fmean(own) / fmean(compared) if own and fsum(compared) else None
        for own, compared in ((nll, _losses(whole, "delta_nll")), (kl, _losses(whole, "kl_mean")))
    ]
    return {
        "variant": variant.name,
        "lacks": variant.lacks,
        "asked": ratio,
        "bytes": round(fmean(plan.bytes for plan, _ in samples)) if samples else None,
        "delta_nll": fmean(nll) if nll else None,
        "delta_nll_spread": stdev(nll) if len(nll) > 1 else None,
        "kl_mean": fmean(kl) if kl else None,
        "beside": variant.beside,
        "times its delta_nll": times[0],
        "times its kl_mean": times[1],
    }


def _losses(samples: Sequence[tuple[Plan, Evaluation]], figure: str) -> list[float]:
    """A figure after every calibration."""
    return [getattr(evaluation, figure) for _, evaluation in samples]


def _conclusions(variants: Sequence[Variant], ratios: Sequence[float], found: _Found) -> list[str]:
    """One sentence a variant."""
    sentences = []
    for variant in variants:
        if variant.name == variant.beside:
            continue
        times = " / ".join(shown(_row(variant, ratio, found)["times its delta_nll"]) for ratio in ratios)
        at = " / ".join(f"{ratio:.0%}" for ratio in ratios)
        sentences.append(f"without {variant.lacks} ({variant.name}): {times} times the loss of {variant.beside} at {at}")
    return sentences
