"""How well losses are predicted without measuring: over methods, ratios and single layers, beside S_L and OWL.

For every method a few plans are measured and its law is fitted to them (`planning.loss_law`): the whole model at three ratios, and each
layer cut alone at one of these. Everything else, plans at other ratios and other cuts of one layer, is predicted by that law and then
measured. Beside it stands a law that saw the whole models only. S_L and OWL claim no size of a loss and know no ratio: they are held
against the measured losses of the layers in one cut at a time, and so is the prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from statistics import fmean, median

from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.bench import CalibratedBench, QualitySettings
from moesvd_core.evaluation.benchmarks.checks import require_ratios
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.evaluation.perplexity import Evaluation
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import LossLaw, Plan, Recipe
from moesvd_core.planning.loss_law import CLEAR, ENOUGH, layer_losses
from moesvd_core.progress import Progress, Report, silent
from moesvd_core.sensitivity import rank_correlation


@dataclass(frozen=True)
class Point:
    """One plan, predicted and measured.

    Attributes:
        method, asked: what was asked for; of a single layer, the ratio of its own experts.
        layer: the layer that was cut alone; None: a plan of the whole model.
        predicted: loss of every layer, nats a token, as planning has it.
        evaluation: what was measured.
        fitted: what the method's law makes of it; None for the plans that the law was fitted to, or without a law.
        by_whole: the same of the law that saw whole models only.
    """

    method: str
    asked: float
    layer: int | None
    predicted: Mapping[int, float]
    evaluation: Evaluation
    fitted: float | None = None
    by_whole: float | None = None

    @property
    def raw(self) -> float:
        """Predicted loss as planning has it."""
        return sum(self.predicted.values())

    @property
    def measured(self) -> float:
        """Log-perplexity lost."""
        return lost(self.evaluation)

    @property
    def stderr(self) -> float:
        """Standard error of that."""
        return self.evaluation.delta_nll_stderr or 0.0

    @property
    def clear(self) -> bool:
        """Whether measuring can tell the loss from none."""
        return self.measured > CLEAR * self.stderr


@dataclass(frozen=True)
class PredictionBenchmark(QualitySettings):
    """Settings, beside those of every benchmark of quality.

    Attributes:
        methods: names of the registry.
        ratios: of the whole model.
        fitted: ratios among them that each method's law is fitted to.
        layer_ratios: of one layer's own experts, each layer alone.
        layers_fitted: ratios among them that each method's law is fitted to; none: laws are those of whole models.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    fitted: tuple[float, ...] = (0.2, 0.4, 0.6)
    layer_ratios: tuple[float, ...] = (0.4, 0.6)
    layers_fitted: tuple[float, ...] = (0.4,)

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)
        if not self.methods:
            raise InputError("at least one method must be given to predict")
        require_ratios("ratios", self.ratios)
        require_ratios("layer_ratios", self.layer_ratios, "a layer's experts")
        for name, given, fitted in (("ratios", self.ratios, self.fitted), ("layer_ratios", self.layer_ratios, self.layers_fitted)):
            if missing := [ratio for ratio in fitted if ratio not in given]:
                words = ", ".join(f"{ratio:g}" for ratio in missing)
                raise InputError(f"{name} must hold those that laws are fitted to, got none of {words}")

    def run(self, report: Report = silent) -> Table:
        """Plan and measure everything, and hold predictions against it.

        Raises:
            InputError: settings that the model or the text do not allow. Ratios out of a method's reach are left out.
        """
        bench = self.bench(report)
        calibrated = bench.calibrated(self.calibration, report)
        points: list[Point] = []
        laws: dict[str, LossLaw | None] = {}
        for done, name in enumerate(self.methods):
            report(Progress("benchmark", done, len(self.methods), name))
            laws[name], found = self._judged(self._measured(calibrated, name, report))
            points.extend(found)
            calibrated.pipeline.cache.clear()
        report(Progress("benchmark", len(self.methods), len(self.methods), "all methods"))
        scores = {each.layer: {"S_L": each.score, "OWL": each.owl} for each in calibrated.pipeline.sensitivities}
        details = {
            "points": Table.of("Every plan, predicted and measured", [_point_row(point, scores) for point in points]),
            "laws": Table.of("The law of each method", [_law_row(name, law) for name, law in laws.items()]),
        }
        return Table.of(f"Loss predicted and measured: {Path(self.model).name}", _summary(points, scores), [
            self.measured_on(bench, (self.calibration.seed,)),
            f"laws are fitted, method by method, to the whole model at {_percents(self.fitted)}"
            + (f", and to each layer cut alone at {_percents(self.layers_fitted)}" if self.layers_fitted else "")
            + "; those plans are left out below; no plan is compensated, since predictions are made before that",
            "whole models alone: laws without those cuts; all that it did not see: the cuts of its own as well",
            "of each cut: rank correlation over the layers in one cut (method and ratio), and the mean over cuts",
            f"clear: measured losses above {CLEAR:g} of their standard errors; standard error: that of the measured loss as a share of it, "
            "the median: two thirds of it is the median error of a prediction that is right",
        ], details)

    def _measured(self, calibrated: CalibratedBench, name: str, report: Report) -> list[Point]:
        """All of a method's points."""
        pipeline = calibrated.pipeline
        reach = pipeline.max_ratio(Recipe(name), report)
        plans = pipeline.plans(Recipe(name), [ratio for ratio in self.ratios if ratio <= reach], report)
        alone = [cut for ratio in self.layer_ratios for cut in _alone(pipeline, name, ratio).items()]
        return [
            Point(plan.method, plan.asked_ratio, layer, layer_losses(plan), calibrated.measured(plan))
            for layer, plan in [*((None, plan) for plan in plans), *alone]
        ]

    def _judged(self, points: Sequence[Point]) -> tuple[LossLaw | None, list[Point]]:
        """A method's law, and its points with what laws that did not see them make of them."""
        whole = [point for point in points if point.layer is None and point.asked in self.fitted and point.clear]
        seen = [*whole, *(point for point in points if point.layer is not None and point.asked in self.layers_fitted and point.clear)]
        law, by_whole = _law(seen), _law(whole)
        return law, [replace(point, fitted=_claim(law, seen, point), by_whole=_claim(by_whole, whole, point)) for point in points]


def _law(seen: Sequence[Point]) -> LossLaw | None:
    if len(seen) < ENOUGH:
        return None
    return LossLaw.fit([point.predicted for point in seen], [point.measured for point in seen], [point.stderr for point in seen])


def _claim(law: LossLaw | None, seen: Sequence[Point], point: Point) -> float | None:
    """What a law makes of a point that it did not see. Two ratios may come to one plan: that was seen, whichever was asked for."""
    known = law is None or any((point.layer, point.predicted) == (each.layer, each.predicted) for each in seen)
    return None if law is None or known else law.loss(point.predicted)


def _alone(pipeline: Pipeline, name: str, ratio: float) -> dict[int, Plan]:
    """Plans that cut one layer; none where the method cannot reach the ratio within a layer."""
    try:
        return pipeline.layer_plans(Recipe(name, ratio))
    except InputError:
        return {}


def lost(evaluation: Evaluation) -> float:
    """Log-perplexity lost; it was measured with a reference."""
    if evaluation.delta_nll is None:
        raise ValueError("the loss of an evaluation without a reference is not known")
    return evaluation.delta_nll


_Scores = dict[int, dict[str, float]]


def _summary(points: Sequence[Point], scores: _Scores) -> list[dict[str, Cell]]:
    """How good each predictor is, over what."""
    judged = [point for point in points if point.fitted is not None]
    scopes = _scopes(judged)
    both = [point for point in judged if point.by_whole is not None]
    if judged != both:
        scopes["all that both predict"] = both
    rows = [_judged("fitted", scope, found, [point.fitted or 0.0 for point in found]) for scope, found in scopes.items() if found]
    others = {**_scopes(both), "all that it did not see": [point for point in points if point.by_whole is not None]}
    rows += [
        _judged("whole models alone", scope, found, [point.by_whole or 0.0 for point in found]) for scope, found in others.items() if found
    ]
    if judged:
        rows.append(_judged("as planned", "all", judged, [point.raw for point in judged]))
    if cuts := _cuts(points):
        rows += [_ranked(name, cuts, scores) for name in ("predicted", "S_L", "OWL")]
    return rows


def _scopes(judged: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by what they are of."""
    return {
        "all": list(judged),
        "all, clear": [point for point in judged if point.clear],
        "whole models": [point for point in judged if point.layer is None],
        "single layers": [point for point in judged if point.layer is not None],
        "single layers, clear": [point for point in judged if point.layer is not None and point.clear],
    }


def _judged(predictor: str, scope: str, points: Sequence[Point], claimed: Sequence[float]) -> dict[str, Cell]:
    """Rank correlation, and the error as a share of what was measured; None where there is nothing to tell it by."""
    measured = [point.measured for point in points]
    errors = sorted(abs(claim / loss - 1) for claim, loss in zip(claimed, measured, strict=True) if loss != 0)
    noise = [point.stderr / abs(point.measured) for point in points if point.measured != 0]
    kl = [point.evaluation.kl_mean or 0.0 for point in points]
    correlations = _known(rank_correlation(claimed, measured)), _known(rank_correlation(claimed, kl))
    shares = (median(errors), errors[int(0.9 * (len(errors) - 1))], median(noise)) if errors else ()
    return _row(predictor, scope, len(points), *correlations, *shares)


def _row(
    predictor: str, scope: str, points: int, nll: float | None, kl: float | None, middle: float | None = None, large: float | None = None,
    noise: float | None = None,
) -> dict[str, Cell]:
    return {
        "predictor": predictor, "over": scope, "points": points, "Spearman with delta_nll": nll, "Spearman with KL": kl,
        "median error": middle, "90 % within": large, "standard error": noise,
    }


def _cuts(points: Sequence[Point]) -> list[list[Point]]:
    """The layers that were cut alone, by method and ratio."""
    found: dict[tuple[str, float], list[Point]] = {}
    for point in points:
        if point.layer is not None:
            found.setdefault((point.method, point.asked), []).append(point)
    return list(found.values())


def _ranked(predictor: str, cuts: Sequence[Sequence[Point]], scores: _Scores) -> dict[str, Cell]:
    """How well a predictor ranks the layers of a cut: mean rank correlation over cuts."""
    nll, kl = [], []
    for cut in cuts:
        claimed = [point.raw if predictor == "predicted" else scores[point.layer or 0][predictor] for point in cut]
        nll.append(rank_correlation(claimed, [point.measured for point in cut]))
        kl.append(rank_correlation(claimed, [point.evaluation.kl_mean or 0.0 for point in cut]))
    return _row(predictor, f"layers of each cut, {len(cuts)} cuts", sum(map(len, cuts)), _mean(nll), _mean(kl))


def _mean(correlations: Sequence[float]) -> float | None:
    """Mean of those that there are: layers that all lose the same have none."""
    known = [each for each in correlations if not isnan(each)]
    return fmean(known) if known else None


def _known(correlation: float) -> float | None:
    """A rank correlation, None where there is none: of a single point, or of points that are all alike."""
    return None if isnan(correlation) else correlation


def _point_row(point: Point, scores: _Scores) -> dict[str, Cell]:
    own = scores.get(-1 if point.layer is None else point.layer, {})
    return {
        "method": point.method, "asked": point.asked, "layer": point.layer, "as planned": point.raw, "fitted": point.fitted,
        "whole models alone": point.by_whole, "delta_nll": point.measured, "delta_nll_stderr": point.evaluation.delta_nll_stderr,
        "kl_mean": point.evaluation.kl_mean, "S_L": own.get("S_L"), "OWL": own.get("OWL"),
    }


def _law_row(name: str, law: LossLaw | None) -> dict[str, Cell]:
    if law is None:
        return {"method": name, **dict.fromkeys(("factor", "power", "together", "points", "error", "layers"))}
    layers = ", ".join(f"{layer}: {own:.3f}" for layer, own in law.layers.items())
    figures = {"factor": law.factor, "power": law.power, "together": law.together, "points": law.points, "error": law.error}
    return {"method": name, **figures, "layers": layers}


def _percents(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:.0%}" for ratio in ratios)
