"""From predicted losses to the size of measured ones: a power law, fitted to a few measured plans.

The prediction is of second order, on the text that the factors were fitted to. It ranks plans, and is too small: the more closely a
method fits that text, the smaller what it leaves out looks, and the more so the less it leaves out. So the law has a factor and a power,
and belongs to a method, a model and a text.

Losses of layers add up, so the law is one of layers: measured ≈ factor · Σ_layers predicted ** power. That makes a law fitted to plans of
the whole model hold for the cut of one layer, too.

Shapes: N plans, L layers, P powers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite
from statistics import median

import numpy as np

from moesvd_core.errors import InputError
from moesvd_core.planning.result import Plan

ENOUGH = 3
"""Measured plans that a law is fitted to, at least: two say nothing of its error."""
CLEAR = 2.0
"""Standard errors by which a measured loss has to differ from none to be told from it."""
POWERS = np.linspace(0.3, 1.5, 121)
"""Powers that are tried."""


@dataclass(frozen=True)
class LossLaw:
    """A fitted law.

    Attributes:
        factor, power: see the module's text.
        points: measured plans behind it.
        error: how far off it is, as a share of the measured loss: the median over the plans, each predicted by the law of the others.
    """

    factor: float
    power: float
    points: int
    error: float

    @classmethod
    def fit(cls, predicted: Sequence[Sequence[float]], measured: Sequence[float]) -> "LossLaw":
        """The law of least squares of logarithms: an error of a tenth counts the same at every size of loss.

        Args:
            predicted: of each plan, the predicted loss of every layer that it changes, nats a token.
            measured: the loss of each plan on held-out text, nats a token.

        Raises:
            InputError: fewer plans than `ENOUGH`, or a loss that is not above zero.
        """
        if len(predicted) != len(measured) or len(measured) < ENOUGH:
            raise InputError(f"a law needs at least {ENOUGH} plans, predicted and measured, got {len(predicted)} and {len(measured)}")
        layers = [_above_zero(plan) for plan in predicted]
        if not all(plan.size for plan in layers) or not all(isfinite(loss) and loss > 0 for loss in measured):
            raise InputError(f"a law is fitted to losses above 0 nats a token, got {list(measured)}: leave out plans that lose nothing")
        sum_PN = np.log([[float((plan**power).sum()) for plan in layers] for power in POWERS])
        loss_N = np.log(measured)
        factor, place = _fitted(sum_PN, loss_N)
        errors = []
        for left_out in range(len(loss_N)):
            own_factor, own_place = _fitted(np.delete(sum_PN, left_out, axis=1), np.delete(loss_N, left_out))
            errors.append(abs(exp(own_factor + sum_PN[own_place, left_out] - loss_N[left_out]) - 1))
        return cls(exp(factor), float(POWERS[place]), len(loss_N), median(errors))

    def loss(self, predicted: Sequence[float]) -> float:
        """What a plan will be measured to lose, nats a token.

        Args:
            predicted: the predicted loss of every layer that it changes.
        """
        return self.factor * float((_above_zero(predicted) ** self.power).sum())


def layer_losses(plan: Plan) -> list[float]:
    """Predicted loss of every layer that a plan changes, nats a token."""
    return [layer.predicted_loss for layer in plan.layers if layer.selected]


def _above_zero(predicted: Sequence[float]) -> np.ndarray:
    """Losses of the layers that lose anything."""
    loss_L = np.asarray(predicted, dtype=np.float64)
    return loss_L[loss_L > 0]


def _fitted(sum_PN: np.ndarray, loss_N: np.ndarray) -> tuple[float, int]:
    """Logarithm of the factor, and the place of the power, of least squares; at each power the best factor is known.

    Args:
        sum_PN: logarithm of Σ_layers predicted ** power, for every power that is tried.
        loss_N: logarithm of what was measured.
    """
    gap_PN = loss_N - sum_PN
    factor_P = gap_PN.mean(axis=1)
    best = int(((gap_PN - factor_P[:, None]) ** 2).sum(axis=1).argmin())
    return float(factor_P[best]), best
