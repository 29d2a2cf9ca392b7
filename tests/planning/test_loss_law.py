"""A law is found where there is one, says how far it is off where there is none, and learns from cuts what whole models cannot tell."""

from collections.abc import Mapping
from statistics import median

import numpy as np
import pytest

from moesvd_core.errors import InputError
from moesvd_core.planning import LossLaw

RNG = np.random.default_rng(0)
PLANS = [dict(enumerate((scale * RNG.uniform(0.5, 2.0, 8)).tolist())) for scale in (1e-4, 1e-3, 1e-2, 1e-1)]
OWN = dict(enumerate((0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6, 1.4)))
"""Factors of layers in a world where they differ; their product is about 1."""


def law_of(plan: Mapping[int, float]) -> float:
    """Measured losses of a world where layers are alike and their losses add up."""
    return 2.5 * sum(loss**0.8 for loss in plan.values())


def uneven(plan: Mapping[int, float]) -> float:
    """Measured losses of a world where layers differ, and lose more together than alone."""
    return float(2.5 * sum((OWN[layer] * loss**0.8) ** (1 / 1.1) for layer, loss in plan.items()) ** 1.1)


def cuts_of(plan: Mapping[int, float]) -> list[dict[int, float]]:
    return [{layer: loss} for layer, loss in plan.items()]


def test_finds_the_law_that_made_the_figures() -> None:
    found = LossLaw.fit(PLANS[:3], [law_of(plan) for plan in PLANS[:3]])
    assert (found.factor, found.power, found.points) == (pytest.approx(2.5), pytest.approx(0.8), 3)
    assert (found.together, found.layers) == (1, {})
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.loss(PLANS[3]) == pytest.approx(law_of(PLANS[3]))


def test_without_cuts_the_losses_of_layers_add_up() -> None:
    found = LossLaw.fit(PLANS, [law_of(plan) for plan in PLANS])
    assert found.loss({0: PLANS[1][0]}) == found.layer_loss(0, PLANS[1][0]) == pytest.approx(2.5 * PLANS[1][0] ** 0.8)
    assert sum(found.loss(cut) for cut in cuts_of(PLANS[1])) == pytest.approx(found.loss(PLANS[1]))


def test_cuts_tell_the_factors_of_layers_and_how_layers_come_together() -> None:
    """Sizes that were not seen, of layers and of whole models, are met."""
    seen = [*PLANS[:3], *cuts_of(PLANS[1]), *cuts_of(PLANS[2])]
    found = LossLaw.fit(seen, [uneven(plan) for plan in seen])
    assert (found.power, found.together, found.points) == (pytest.approx(0.8, abs=0.021), pytest.approx(1.1, abs=0.021), len(seen))
    for layer, own in OWN.items():
        assert found.layers[layer] == pytest.approx(own, rel=0.06)
    for plan in (PLANS[3], *cuts_of(PLANS[3]), *cuts_of(PLANS[0])):
        assert found.loss(plan) == pytest.approx(uneven(plan), rel=0.15)


def test_whole_models_alone_cannot_tell_layers_apart() -> None:
    found = LossLaw.fit(PLANS[:3], [uneven(plan) for plan in PLANS[:3]])
    learned = LossLaw.fit([*PLANS[:3], *cuts_of(PLANS[1])], [uneven(plan) for plan in (*PLANS[:3], *cuts_of(PLANS[1]))])

    def off(law: LossLaw) -> float:
        return median(abs(law.loss(cut) / uneven(cut) - 1) for cut in cuts_of(PLANS[3]))

    assert found.loss(PLANS[3]) == pytest.approx(uneven(PLANS[3]), rel=0.1)
    assert off(learned) < 0.15 < 0.2 < off(found)


def test_what_was_measured_badly_counts_for_little() -> None:
    cuts = cuts_of(PLANS[1])
    measured = [uneven(plan) for plan in (*PLANS[:3], *cuts)]
    wrong = [*measured[:3], 4 * measured[3], *measured[4:]]
    errors = [loss / 100 for loss in measured]
    sure = LossLaw.fit([*PLANS[:3], *cuts], wrong, errors)
    unsure = LossLaw.fit([*PLANS[:3], *cuts], wrong, [*errors[:3], wrong[3], *errors[4:]])
    assert sure.layers[0] > 1.5
    assert 0.9 < unsure.layers[0] < 1.2


def test_a_few_cuts_are_plans_like_others() -> None:
    seen = [*PLANS[:3], *cuts_of(PLANS[1])[:2]]
    found = LossLaw.fit(seen, [law_of(plan) for plan in seen])
    assert (found.factor, found.power, found.together, found.layers) == (pytest.approx(2.5), pytest.approx(0.8), 1, {})


def test_a_model_of_one_layer_has_cuts_only() -> None:
    seen = [{7: loss} for loss in (1e-3, 1e-2, 1e-1)]
    found = LossLaw.fit(seen, [law_of(plan) for plan in seen])
    assert found.loss({7: 0.03}) == pytest.approx(law_of({7: 0.03}))
    assert (found.together, found.error) == (1, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("cuts", [[], cuts_of(PLANS[1])])
def test_states_how_far_it_is_off_for_plans_that_it_has_not_seen(cuts: list[dict[int, float]]) -> None:
    """The law of the others misses the third plan, and is the one that it is held against."""
    measured = [law_of(plan) for plan in (*PLANS[:3], *cuts)]
    assert LossLaw.fit([*PLANS[:3], *cuts], measured).error < 0.02
    measured[2] *= 1.5
    found = LossLaw.fit([*PLANS[:3], *cuts], measured)
    misses = []
    for left_out in range(3):
        others = [place for place in range(len(measured)) if place != left_out]
        seen = [[*PLANS[:3], *cuts][place] for place in others]
        if len(seen) >= 3:
            law = LossLaw.fit(seen, [measured[place] for place in others])
            misses.append(abs(law.loss(PLANS[left_out]) / measured[left_out] - 1))
    assert 0.01 < found.error < 1
    assert not misses or found.error == pytest.approx(median(misses))


def test_what_loses_nothing_is_predicted_to_lose_nothing() -> None:
    found = LossLaw.fit(PLANS, [law_of(plan) for plan in PLANS])
    assert found.loss({}) == 0
    assert found.loss({0: 0.0, 1: -1e-18, 2: 0.3}) == pytest.approx(found.loss({2: 0.3}))


def test_refuses_what_no_law_can_be_fitted_to() -> None:
    with pytest.raises(InputError, match="at least 3 plans"):
        LossLaw.fit(PLANS[:2], [0.1, 0.2])
    for wrong in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="above 0"):
            LossLaw.fit(PLANS[:3], [0.1, wrong, 0.3])
    with pytest.raises(InputError, match="above 0"):
        LossLaw.fit([PLANS[0], {0: 0.0}, PLANS[1]], [0.1, 0.2, 0.3])
