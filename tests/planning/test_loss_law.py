"""A law is found where there is one, says how far it is off where there is none, and holds for one layer as for all."""

import numpy as np
import pytest

from moesvd_core.errors import InputError
from moesvd_core.planning import LossLaw

RNG = np.random.default_rng(0)
PLANS = [(scale * RNG.uniform(0.5, 2.0, 8)).tolist() for scale in (1e-4, 1e-3, 1e-2, 1e-1)]


def law_of(layers: list[float]) -> float:
    """Measured losses of a world where the law is right."""
    return 2.5 * sum(loss**0.8 for loss in layers)


def test_finds_the_law_that_made_the_figures() -> None:
    found = LossLaw.fit(PLANS[:3], [law_of(plan) for plan in PLANS[:3]])
    assert (found.factor, found.power, found.points) == (pytest.approx(2.5), pytest.approx(0.8), 3)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.loss(PLANS[3]) == pytest.approx(law_of(PLANS[3]))


def test_holds_for_the_cut_of_one_layer() -> None:
    found = LossLaw.fit(PLANS, [law_of(plan) for plan in PLANS])
    assert found.loss(PLANS[1][:1]) == pytest.approx(2.5 * PLANS[1][0] ** 0.8)
    assert sum(found.loss([loss]) for loss in PLANS[1]) == pytest.approx(found.loss(PLANS[1]))


def test_states_how_far_it_is_off_for_plans_that_it_has_not_seen() -> None:
    measured = [law_of(plan) for plan in PLANS]
    measured[2] *= 1.5
    found = LossLaw.fit(PLANS, measured)
    assert 0.1 < found.error < 1


def test_what_loses_nothing_is_predicted_to_lose_nothing() -> None:
    found = LossLaw.fit(PLANS, [law_of(plan) for plan in PLANS])
    assert found.loss([]) == 0
    assert found.loss([0.0, -1e-18, 0.3]) == found.loss([0.3])


def test_refuses_what_no_law_can_be_fitted_to() -> None:
    with pytest.raises(InputError, match="at least 3 plans"):
        LossLaw.fit(PLANS[:2], [0.1, 0.2])
    for wrong in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="above 0"):
            LossLaw.fit(PLANS[:3], [0.1, wrong, 0.3])
    with pytest.raises(InputError, match="above 0"):
        LossLaw.fit([PLANS[0], [0.0], PLANS[1]], [0.1, 0.2, 0.3])
