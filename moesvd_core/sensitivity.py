"""Which layers bear decomposition: the paper's S_L, OWL's outlier ratio, what the spectra predict, and what measuring says.

Measured is the ground truth that the others are judged against, by Spearman's rank correlation.

Shapes: E experts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.errors import InputError, StatisticsError
from moesvd_core.progress import Progress, Report, silent

PARTS = ("f", "r", "a")
"""Columns of `layer_table` that S_L is made of."""
METRICS = ("S_L", "OWL", "predicted")
"""Columns of `layer_table` that claim to rank layers without measuring."""
TRUTHS = ("measured_nll", "measured_kl")


@dataclass(frozen=True)
class LayerSensitivity:
    """The sensitivity of one layer and its parts, from calibration alone.

    Attributes:
        layer: index of the decoder layer.
        frequency_E: f_e, share of the tokens that are routed to the expert (Eq. 9); sums to the active experts.
        rank_E: r_e, principal rank of its weights (D.1, Algorithm 1).
        outlier_E: a_e, outlier ratio of its activations (Eq. 10).
        saliency_E: mean of routing weight times output norm (REAP), the pruning rival's score.
        owl: OWL's outlier ratio of the layer (Table 3).
    """

    layer: int
    frequency_E: NDArray[np.float64]
    rank_E: NDArray[np.float64]
    outlier_E: NDArray[np.float64]
    saliency_E: NDArray[np.float64]
    owl: float

    @classmethod
    def of(cls, statistics: LayerStatistics) -> "LayerSensitivity":
        """Read off what calibration collected.

        Raises:
            StatisticsError: no tokens, or a value that is not finite; the message names layer and expert.
        """
        routed = int(statistics.count_E.sum())
        if routed < 1:
            raise StatisticsError(f"experts of layer {statistics.layer} saw {routed} tokens, at least 1 is needed: calibrate on more text")
        parts = {
            "frequency_E": statistics.count_E.double().cpu().numpy() / statistics.tokens,
            "rank_E": statistics.principal_rank_E.double().cpu().numpy(),
            "outlier_E": statistics.outlier_E.double().cpu().numpy(),
            "saliency_E": statistics.saliency_E.double().cpu().numpy(),
        }
        for name, value_E in parts.items():
            if not np.isfinite(value_E).all():
                expert = int(np.argmin(np.isfinite(value_E)))
                raise StatisticsError(f"{name[:-2]} of layer {statistics.layer}, expert {expert} is {value_E[expert]}: calibrate again")
        if not isfinite(statistics.input_outlier):
            raise StatisticsError(f"OWL's outlier ratio of layer {statistics.layer} is {statistics.input_outlier}: calibrate again")
        return cls(statistics.layer, **parts, owl=float(statistics.input_outlier))

    @property
    def score_E(self) -> NDArray[np.float64]:  # noqa: N802 - shape suffix
        """What each expert adds to S_L: f_e · r_e · a_e."""
        return self.frequency_E * self.rank_E * self.outlier_E

    @property
    def score(self) -> float:
        """S_L = Σ_e f_e · r_e · a_e (Eq. 4)."""
        return float(self.score_E.sum())


def sensitivities(layers: Mapping[int, LayerStatistics]) -> list[LayerSensitivity]:
    """One for each layer, in the model's order; every layer's statistics are read once.

    Raises:
        StatisticsError: as `LayerSensitivity.of`.
    """
    return [LayerSensitivity.of(layers[index]) for index in sorted(layers)]


def scores(layers: Iterable[LayerSensitivity], allocation: str) -> dict[int, float] | None:
    """The score by layer that `planning.plan` needs for an allocation: S_L for "selective", OWL's ratio for "owl", None for the others."""
    if allocation == "selective":
        return {each.layer: each.score for each in layers}
    if allocation == "owl":
        return {each.layer: each.owl for each in layers}
    return None


@dataclass(frozen=True)
class Effect:
    """What decomposing one layer does to the model on held-out text, everything else original.

    Attributes:
        delta_nll: change of the mean NLL, nats a token.
        kl: mean KL divergence from the original, nats a token.
    """

    delta_nll: float
    kl: float


def measure(layers: Iterable[int], evaluate: Callable[[int], Effect], report: Report = silent) -> dict[int, Effect]:
    """Measure every layer alone (Figures 1 left and 6).

    Args:
        layers: indices of the decoder layers to measure.
        evaluate: decomposes this one layer at the reference ratio (`planning.layer_plans`) and evaluates the model.
        report: called after each layer.

    Raises:
        StatisticsError: an effect that is not finite; the message names the layer.
    """
    indices = sorted(layers)
    effects: dict[int, Effect] = {}
    for done, index in enumerate(indices, start=1):
        effect = evaluate(index)
        if not isfinite(effect.delta_nll) or not isfinite(effect.kl):
            raise StatisticsError(f"layer {index} decomposed alone gives ΔNLL {effect.delta_nll} and KL {effect.kl}: decompose it again")
        effects[index] = effect
        report(Progress("sensitivity", done, len(indices), f"layer {index}: ΔNLL {effect.delta_nll:+.4f}, KL {effect.kl:.4f}"))
    return effects


def layer_table(
    layers: Iterable[LayerSensitivity], predicted: Mapping[int, float] | None = None, measured: Mapping[int, Effect] | None = None
) -> pd.DataFrame:
    """One row a layer: layer, f, r, a, S_L, OWL, predicted, measured_nll, measured_kl.

    f is the largest frequency in the layer, r and a are means over routed tokens; what is not known is NaN.

    Args:
        predicted: loss by layer of the reference cut, nats a token (`predicted_loss` of `planning.layer_plans`).
        measured: from `measure`.
    """
    rows = []
    for each in layers:
        share_E = each.frequency_E / each.frequency_E.sum()
        effect = (measured or {}).get(each.layer, Effect(nan, nan))
        rows.append(
            {
                "layer": each.layer,
                "f": float(each.frequency_E.max()),
                "r": float(share_E @ each.rank_E),
                "a": float(share_E @ each.outlier_E),
                "S_L": each.score,
                "OWL": each.owl,
                "predicted": (predicted or {}).get(each.layer, nan),
                "measured_nll": effect.delta_nll,
                "measured_kl": effect.kl,
            }
        )
    return pd.DataFrame(rows, columns=["layer", *PARTS, *METRICS, *TRUTHS])


def expert_table(layers: Iterable[LayerSensitivity]) -> pd.DataFrame:
    """One row an expert: layer, expert, f, r, a, score (its part of S_L), saliency."""
    frames = [
        pd.DataFrame(
            {
                "layer": each.layer,
                "expert": np.arange(each.frequency_E.size),
                "f": each.frequency_E,
                "r": each.rank_E,
                "a": each.outlier_E,
                "score": each.score_E,
                "saliency": each.saliency_E,
            }
        )
        for each in layers
    ]
    return pd.concat(frames, ignore_index=True)


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """How well each metric ranks the layers, and each part of S_L alone: Spearman's correlation with each measured effect, one row each.

    Args:
        table: from `layer_table`; layers that were not measured are left out.

    Returns:
        Columns metric, measured_nll, measured_kl, layers (how many were compared); NaN where there is nothing to compare.
    """
    rows: list[dict[str, float | str]] = []
    for metric in (*PARTS, *METRICS):
        known = table.dropna(subset=[metric, *TRUTHS])
        row: dict[str, float | str] = {"metric": metric}
        for truth in TRUTHS:
            row[truth] = rank_correlation(known[metric], known[truth])
        rows.append(row | {"layers": len(known)})
    return pd.DataFrame(rows)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN for fewer than two values or a constant.

    Raises:
        InputError: not two lists of equally many finite numbers.
    """
    first_N, second_N = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first_N.ndim != 1 or first_N.shape != second_N.shape or not (np.isfinite(first_N).all() and np.isfinite(second_N).all()):
        shapes = f"{first_N.shape} and {second_N.shape}"
        raise InputError(f"rank correlation needs two equally long lists of finite numbers, got shapes {shapes}: leave out what is unknown")
    centred = [each - each.mean() for each in (_ranks(first_N), _ranks(second_N)) if each.size]
    size = np.sqrt(np.prod([each @ each for each in centred]))
    return float(centred[0] @ centred[1] / size) if centred and size > 0 else nan


def _ranks(value_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each value, counted from 0; equal values share the mean of their ranks."""
    _, group_N, count_G = np.unique(value_N, return_inverse=True, return_counts=True)
    last_G = np.cumsum(count_G) - 1
    rank_N: NDArray[np.float64] = (last_G - (count_G - 1) / 2)[group_N]
    return rank_N
