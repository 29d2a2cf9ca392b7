"""From predicted losses to the size of measured ones: a law with few numbers, fitted to a few measured plans.

The prediction is of second order, on the text that the factors were fitted to. It ranks plans, and is too small: the more closely a
method fits that text, the smaller what it leaves out looks, and the more so the less it leaves out. So a law has a factor and a power, and
belongs to a method, a model and a text. How much is missing depends on the layer as well: on the demo model the KL divergence is twice what
was predicted for a low layer and just that for the last one, above which no attention spreads an error to other tokens; and held-out text
loses twice the KL divergence there, and less than it in other layers. Plans of the whole model take from the layers in much the same shares
at every ratio, and cannot tell. Cuts of one layer alone can: a law that saw them has a factor for every layer.

The loss of layer l alone is T_l = factor · layers_l · predicted_l ** power. Layers together lose (Σ_l T_l ** (1/q)) ** q: at q = 1 their
losses add up, which is what is taken without cuts; at q = 2 their errors do.

Shapes: N plans, L layers, C cuts of one layer, P powers; K = L + 1 factors, the last one that of all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, expm1, isfinite
from statistics import median

import numpy as np
from numpy.typing import NDArray

from moesvd_core.errors import InputError
from moesvd_core.planning.result import Plan

ENOUGH = 3
"""Measured plans that a law is fitted to, at least: two say nothing of its error. As many cuts before layers get their own factors."""
CLEAR = 2.0
"""Standard errors by which a measured loss has to differ from none to be told from it."""
POWERS = np.linspace(0.3, 1.5, 121)
"""Powers that are tried."""
TOGETHER = np.linspace(0.5, 2.0, 76)
"""Values of q that are tried."""
MISFIT = 0.1
"""How far measured losses lie off a law beside their standard errors, as a share: no plan counts for more than that allows."""
SPREAD = 0.3
"""How far the factors of layers lie apart, in logarithms: one that was measured badly stays as near to 1 as that makes likely."""

_Table = NDArray[np.float64]


@dataclass(frozen=True)
class LossLaw:
    """A fitted law.

    Attributes:
        factor, power: see the module's text.
        points: measured plans behind it.
        error: how far off it is, as a share of the measured loss: the median over the plans of several layers, each predicted by the law of
            all others.
        together: q, how losses of layers come together.
        layers: factors of the layers that were cut alone; that of any other layer is 1.
        shared: whether the plans are of several methods, none of which has enough of its own here: the error then is that over all of them.
    """

    factor: float
    power: float
    points: int
    error: float
    together: float = 1.0
    layers: Mapping[int, float] = field(default_factory=dict)
    shared: bool = False

    @classmethod
    def fit(
        cls, predicted: Sequence[Mapping[int, float]], measured: Sequence[float], errors: Sequence[float | None] | None = None
    ) -> "LossLaw":
        """The law of least squares of logarithms: an error of a tenth counts the same at every size of loss.

        Args:
            predicted: of each plan, the predicted loss of every layer that it changes, nats a token. Where `ENOUGH` plans change one layer
                alone, they tell the factors of layers, and the others how layers come together.
            measured: the loss of each plan on held-out text, nats a token.
            errors: its standard error; None: not known.

        Raises:
            InputError: fewer plans than `ENOUGH`, or a loss that is not above zero.
        """
        if len(predicted) != len(measured) or len(measured) < ENOUGH:
            raise InputError(f"a law needs at least {ENOUGH} plans, predicted and measured, got {len(predicted)} and {len(measured)}")
        names = sorted({layer for plan in predicted for layer, loss in plan.items() if loss > 0})
        loss_NL = np.array([[max(plan.get(layer, 0.0), 0.0) for layer in names] for plan in predicted], dtype=np.float64)
        if not (loss_NL > 0).any(axis=1).all() or not all(isfinite(loss) and loss > 0 for loss in measured):
            raise InputError(f"a law is fitted to losses above 0 nats a token, got {list(measured)}: leave out plans that lose nothing")
        noise_N = np.array([error or 0.0 for error in errors or [None] * len(measured)]) / np.array(measured)
        seen = _Seen(_log(loss_NL), np.log(measured), 1 / (MISFIT**2 + noise_N**2))
        found = _fitted(seen)
        several_N = (loss_NL > 0).sum(axis=1) > 1
        asked = [n for n in range(len(measured)) if several_N[n] or not several_N.any()]
        misses = [abs(expm1(_fitted(seen.without(n)).predicted(seen.log_NL[[n]])[0] - seen.measured_N[n])) for n in asked]
        layers = {layer: exp(own) for layer, own in zip(names, found.own_L.tolist(), strict=True) if own}
        return cls(exp(found.factor), found.power, len(measured), median(misses), found.together, layers)

    def layer_loss(self, layer: int, predicted: float) -> float:
        """What a layer will be measured to lose when it is cut alone, nats a token."""
        return float(self.factor * self.layers.get(layer, 1.0) * max(predicted, 0.0) ** self.power)

    def loss(self, predicted: Mapping[int, float]) -> float:
        """What a plan will be measured to lose, nats a token.

        Args:
            predicted: the predicted loss of every layer that it changes.
        """
        alone = [self.layer_loss(layer, loss) for layer, loss in predicted.items()]
        return float(sum(loss ** (1 / self.together) for loss in alone) ** self.together)


def layer_losses(plan: Plan) -> dict[int, float]:
    """Predicted loss of every layer that a plan changes, nats a token."""
    return {layer.layer: layer.predicted_loss for layer in plan.layers if layer.selected}


@dataclass(frozen=True)
class _Seen:
    """Measured plans.

    Attributes:
        log_NL: logarithms of predicted losses; −∞ where a plan changes nothing.
        measured_N: logarithms of measured losses.
        weight_N: what each counts for, one over its variance.
    """

    log_NL: _Table
    measured_N: _Table
    weight_N: _Table

    def without(self, left_out: int) -> "_Seen":
        """All but one plan."""
        return self.of(np.arange(len(self.measured_N)) != left_out)

    def of(self, chosen_N: NDArray[np.bool_]) -> "_Seen":
        """Some of the plans."""
        return _Seen(self.log_NL[chosen_N], self.measured_N[chosen_N], self.weight_N[chosen_N])


@dataclass(frozen=True)
class _Fit:
    """A law in logarithms: factor, power, q, and the layers' own factors [L]."""

    factor: float
    power: float
    together: float
    own_L: _Table

    def predicted(self, log_NL: _Table) -> _Table:
        """Logarithms [N] of what plans will lose."""
        return self.factor + _together(self.own_L + self.power * log_NL, self.together)


def _fitted(seen: _Seen) -> _Fit:
    """Plans of several layers tell the power, cuts of one the factors, and then the plans again how layers come together.

    The power is none of the cuts' business: layers in which more is lost than predicted may be those in which less was predicted.
    """
    one_N = np.isfinite(seen.log_NL).sum(axis=1) == 1
    several, cuts = seen.of(~one_N), seen.of(one_N)
    if len(cuts.measured_N) < ENOUGH:
        return _simple(seen)
    power = _simple(several if len(several.measured_N) > 1 else seen).power
    factor, own_L = _of_cuts(cuts, power)
    if not len(several.measured_N):
        return _Fit(factor, power, 1.0, own_L)
    alone_NL = factor + own_L + power * several.log_NL
    costs = [float(several.weight_N @ (several.measured_N - _together(alone_NL, q)) ** 2) for q in TOGETHER]
    return _Fit(factor, power, float(TOGETHER[np.argmin(costs)]), own_L)


def _simple(seen: _Seen) -> _Fit:
    """The best law of layers that are alike and add up; at each power the best factor is known."""
    gap_PN = seen.measured_N - _together(POWERS[:, None, None] * seen.log_NL, 1.0)
    factor_P = np.average(gap_PN, axis=1, weights=seen.weight_N)
    best = int(((gap_PN - factor_P[:, None]) ** 2 @ seen.weight_N).argmin())
    return _Fit(float(factor_P[best]), float(POWERS[best]), 1.0, np.zeros(seen.log_NL.shape[1]))


def _of_cuts(cuts: _Seen, power: float) -> tuple[float, _Table]:
    """Logarithms of the factor and of the layers' own [L]: least squares, the layers' own drawn towards 0 by `SPREAD`."""
    count, width = cuts.log_NL.shape
    layer_C = np.isfinite(cuts.log_NL).argmax(axis=1)
    gap_C = cuts.measured_N - power * cuts.log_NL[np.arange(count), layer_C]
    design_CK = np.concatenate([np.eye(width)[layer_C], np.ones((count, 1))], axis=1)
    weighted_KC = design_CK.T * cuts.weight_N
    drawn_KK = np.diag(np.append(np.full(width, SPREAD**-2), 0.0))
    found_K = np.linalg.solve(weighted_KC @ design_CK + drawn_KK, weighted_KC @ gap_C)
    return float(found_K[-1]), found_K[:-1]


def _together(alone_NL: _Table, q: float) -> _Table:
    """Logarithms [..., N] of what layers lose together, from those of what each loses alone, [..., N, L]."""
    sum_N: _Table = np.exp(alone_NL / q).sum(axis=-1)
    return q * np.log(sum_N)


def _log(loss_NL: _Table) -> _Table:
    """Logarithms, −∞ of nothing."""
    return np.log(loss_NL, out=np.full_like(loss_NL, -np.inf), where=loss_NL > 0)
