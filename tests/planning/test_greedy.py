"""Greedy allocation against brute force, and what it must never do."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from tiny_curves import curve, model_curves, random_losses, shape_of

from moesvd_core.errors import InputError
from moesvd_core.planning import DENSE, Plan, Recipe, SideCurve, plan, plans


def states(made: SideCurve) -> Iterator[tuple[int, float]]:
    """Parameters and loss of every way to store a side in one structure."""
    ranks = [[*range(made.max_rank + 1), DENSE]] * made.slots
    for chosen in product(*ranks):
        slots = list(enumerate(chosen))
        parameters = 0 if set(chosen) == {DENSE} else made.fixed_cost
        parameters += sum(int(made.dense_cost_S[s] if r == DENSE else r * made.rank_cost_S[s] - made.identities * r**2) for s, r in slots)
        yield parameters, sum(0.0 if r == DENSE else float(made.loss_SR[s, r]) for s, r in slots)


def best_by_brute_force(curves: list[SideCurve], total: int) -> np.ndarray:
    """Least loss for every number of stored parameters, [total + 1]: all structures, all ranks, all slots."""
    best_B = np.zeros(total + 1)
    for layer, side in sorted({(each.layer, each.side) for each in curves}):
        side_B = np.full(total + 1, np.inf)
        for each in curves:
            if (each.layer, each.side) == (layer, side):
                for parameters, loss in states(each):
                    if parameters <= total:
                        side_B[parameters] = min(side_B[parameters], loss)
        best_B = np.array([min(best_B[b - own] + side_B[own] for own in range(b + 1)) for b in range(total + 1)])
    return np.minimum.accumulate(best_B)


def problem(seed: int, *, auto: bool, base: bool = False, pivoted: bool = False) -> list[SideCurve]:
    """Two slots on the input side and two on the output side, small enough for brute force; break-even cuts some ranks off."""
    rng = np.random.default_rng(seed)
    inputs = curve(random_losses(rng, 2, 3), rank_cost=2, dense_cost=int(rng.integers(5, 10)))
    outputs = curve(random_losses(rng, 2, 3), side="output", rank_cost=3, dense_cost=int(rng.integers(7, 14)))
    if pivoted:  # ranks cost 5, 8 and 9, and 6, 10 and 12
        free = {"structure": "pivoted", "identities": 1}
        inputs = replace(inputs, rank_cost_S=np.full(2, 6), dense_cost_S=inputs.dense_cost_S + 3, **free)  # type: ignore[arg-type]
        outputs = replace(outputs, rank_cost_S=np.full(2, 7), dense_cost_S=outputs.dense_cost_S + 2, **free)  # type: ignore[arg-type]
    if not auto:
        return [inputs, outputs]
    shared = []
    for each in (inputs, outputs):
        total = float(each.loss_SR[:, 0].sum())
        losses = [total, *np.sort(rng.random(4) * total)[::-1].tolist()]
        shared.append(curve([losses], side=each.side, structure="latent", rank_cost=3, dense_cost=each.dense_parameters))
        if base:
            cost = {"rank_cost": each.rank_cost_S, "dense_cost": each.dense_cost_S}
            deltas = curve(each.loss_SR * rng.uniform(0.1, 0.6), side=each.side, structure="base-delta", **cost)
            shared.append(replace(deltas, fixed_cost=int(rng.integers(1, 6))))
    return [inputs, outputs, *shared]


@pytest.mark.parametrize(
    ("auto", "base", "pivoted"),
    [(False, False, False), (True, False, False), (True, True, False), (False, False, True), (True, True, True)],
)
@pytest.mark.parametrize("seed", range(8))
def test_reaches_what_brute_force_finds_wherever_losses_are_convex(seed: int, auto: bool, base: bool, pivoted: bool) -> None:
    """At every corner of the lower hull of the brute-force optimum the plan is optimal; in between it is no worse than the corner below."""
    curves = problem(seed, auto=auto, base=base, pivoted=pivoted)
    shape = shape_of(curves, other=1)
    total = shape.expert_parameters
    best_B = best_by_brute_force(curves, total)
    found = plans(curves, shape, Recipe(allocation="greedy", block=1), [(total - budget) / shape.parameters for budget in range(total + 1)])
    corner, corners = np.inf, 0
    for budget, each in enumerate(found):
        assert each.parameters <= budget + 1
        chords = [
            best_B[low] + (best_B[high] - best_B[low]) * (budget - low) / (high - low)
            for low in range(budget)
            for high in range(budget + 1, total + 1)
        ]
        if best_B[budget] < min(chords, default=np.inf) - 1e-9:
            corner, corners = best_B[budget], corners + 1
            assert each.predicted_loss == pytest.approx(best_B[budget])
        assert best_B[budget] - 1e-9 <= each.predicted_loss <= corner + 1e-9
    assert corners > 4


def _rank_rows(found: list[Plan]) -> np.ndarray:
    """Ranks of all slots of each plan, dense as the largest, [plans, slots]."""
    rows = [[rank for layer in each.layers for side in (layer.input, layer.output) for rank in side.ranks] for each in found]
    ranks = np.array(rows)
    return np.where(ranks == DENSE, 10**6, ranks)


def test_a_larger_ratio_is_a_prefix_of_a_smaller_one() -> None:
    curves = model_curves(3, 4, 48, 40)
    found = plans(curves, shape_of(curves), Recipe(allocation="greedy", block=4), [number / 100 for number in range(100)])
    ranks = _rank_rows(found)
    assert (np.diff(ranks, axis=0) <= 0).all()
    assert (ranks[0] == 10**6).all()
    assert len(np.unique(ranks, axis=0)) > 80


def test_no_order_of_the_ratios_changes_a_plan() -> None:
    curves = model_curves(2, 4, 32, 32, structures=("per-expert", "latent"))
    shape, recipe = shape_of(curves), Recipe(allocation="greedy")
    together = plans(curves, shape, recipe, [0.7, 0.1, 0.4])
    assert together == [plan(curves, shape, Recipe(allocation="greedy", ratio=ratio)) for ratio in (0.7, 0.1, 0.4)]


def test_ranks_are_multiples_of_the_block_or_dense() -> None:
    curves = model_curves(2, 4, 64, 64, structures=("per-expert", "latent"))
    for each in plans(curves, shape_of(curves), Recipe(allocation="greedy", block=8), [0.2, 0.5, 0.8]):
        ranks = _rank_rows([each])
        assert ((ranks % 8 == 0) | (ranks == 10**6)).all()


def test_offers_what_every_structure_alone_cannot_beat() -> None:
    curves = model_curves(4, 4, 64, 64, structures=("per-expert", "latent"), seed=3)
    shape = shape_of(curves)
    ratios = [number / 20 for number in range(1, 19)]
    auto = plans(curves, shape, Recipe(allocation="greedy"), ratios)
    for structure in ("per-expert", "latent"):
        alone = plans(curves, shape, Recipe(allocation="greedy", structure=structure), ratios)
        assert all(both.predicted_loss <= one.predicted_loss * 1.01 for both, one in zip(auto, alone, strict=True))
    assert len({side.structure for each in auto for layer in each.layers for side in (layer.input, layer.output)}) == 3


def test_an_expert_that_no_token_reached_goes_first_and_is_dense_at_ratio_zero() -> None:
    losses = [[4.0, 2.0, 1.0], [0.0, 0.0, 0.0]]
    curves = [curve(losses, dense_cost=3, load=[1.0, 0.0]), curve(losses, side="output", dense_cost=3, load=[1.0, 0.0])]
    for budget in ("parameters", "flops"):
        recipe = Recipe(allocation="greedy", block=1, budget=budget)
        none, half = plans(curves, shape_of(curves), recipe, [0.0, 0.5])
        assert none.layers[0].input.ranks == (DENSE, DENSE)
        assert (half.layers[0].input.ranks, half.layers[0].output.ranks) == ((DENSE, 0), (DENSE, 0))
        assert half.predicted_loss == 0.0


def test_a_flops_budget_takes_from_the_busy_expert() -> None:
    same = [[4.0, 3.0, 2.0, 1.0]] * 2
    curves = [curve(same, dense_cost=4, load=[0.9, 0.1]), curve([[0.0, 0.0]] * 2, side="output", dense_cost=4, load=[0.9, 0.1])]
    found = plan(curves, shape_of(curves), Recipe(allocation="greedy", block=1, budget="flops", ratio=0.75))
    assert found.layers[0].input.ranks == (0, DENSE)
    assert found.ratio >= 0.75


def test_groups_of_shared_v_are_stored_in_one_form() -> None:
    rng = np.random.default_rng(0)
    curves = [curve(random_losses(rng, 2, 5), side=side, structure="shared-v", dense_cost=8) for side in ("input", "output")]
    for each in plans(curves, shape_of(curves), Recipe(allocation="greedy", block=1), [number / 30 for number in range(30)]):
        for side in (each.layers[0].input, each.layers[0].output):
            assert len(side.ranks) == 2
            assert len(set(side.ranks)) == 1


def test_losses_that_rise_with_rank_are_never_paid_for() -> None:
    """A metric that is not the output metric may predict more loss for a higher rank."""
    curves = [curve([[5.0, 3.0, 4.0, 3.5, 1.0]], side=side, dense_cost=9) for side in ("input", "output")]
    ranks = _rank_rows(plans(curves, shape_of(curves), Recipe(allocation="greedy", block=1), [number / 18 for number in range(18)]))
    assert set(ranks.ravel().tolist()) <= {0, 1, 4, 10**6}


def test_reasons_state_the_price() -> None:
    curves = model_curves(2, 4, 32, 32)
    none, half = plans(curves, shape_of(curves), Recipe(allocation="greedy"), [0.0, 0.5])
    assert none.layers[0].reason == "dense: the budget pays for everything"
    assert all("nats a million parameters" in layer.reason for layer in half.layers)


@pytest.mark.parametrize("seed", range(6))
def test_keeps_both_bounds_and_loses_what_brute_force_would_with_a_step_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loads = rng.dirichlet([1.0, 1.0], 2)
    costs = rng.integers(5, 10), rng.integers(7, 14)
    curves = [
        curve(random_losses(rng, 2, 3), side=side, rank_cost=rank_cost, dense_cost=int(cost), load=load)
        for side, rank_cost, cost, load in zip(("input", "output"), (2, 3), costs, loads, strict=True)
    ]
    shape = shape_of(curves, other=1)
    dense_flops = sum(each.dense_flops for each in curves)
    everything = list(_everything(curves))
    for kept, flops_kept in product((0.3, 0.5, 0.7, 0.9), repeat=2):
        recipe = Recipe(allocation="greedy", block=1, ratio=(1 - kept) * shape.expert_parameters / shape.parameters)
        recipe = replace(recipe, flops_ratio=(1 - flops_kept) * dense_flops / shape.active_parameters)
        found = plan(curves, shape, recipe)
        flops = dense_flops - (found.original_active_parameters - found.active_parameters)
        assert found.parameters <= kept * shape.expert_parameters + 1 + 1e-9
        assert flops <= flops_kept * dense_flops + 0.5, "active parameters are whole numbers"
        most, most_flops = kept * shape.expert_parameters - max(costs), flops_kept * dense_flops - float(loads.max() * max(costs))
        fitting = [loss for own, own_flops, loss in everything if own == 0 or (own <= most and own_flops <= most_flops)]
        assert found.predicted_loss <= min(fitting) + 1e-12


def _everything(curves: list[SideCurve]) -> Iterator[tuple[int, float, float]]:
    """Parameters, multiply-adds and loss of every way to store sides of one structure each."""
    slots = [(each, slot) for each in curves for slot in range(each.slots)]
    for chosen in product(*([*range(each.max_rank + 1), DENSE] for each, _ in slots)):
        ranked = list(zip(slots, chosen, strict=True))
        yield (
            sum(int(each.dense_cost_S[s] if rank == DENSE else rank * each.rank_cost_S[s]) for (each, s), rank in ranked),
            sum(float(each.dense_flops_S[s] if rank == DENSE else rank * each.rank_flops_S[s]) for (each, s), rank in ranked),
            sum(0.0 if rank == DENSE else float(each.loss_SR[s, rank]) for (each, s), rank in ranked),
        )


def test_a_bound_on_operations_that_holds_already_changes_nothing() -> None:
    curves = model_curves(3, 4, 48, 40, structures=("per-expert", "latent"))
    free = plan(curves, shape_of(curves), Recipe(allocation="greedy", ratio=0.4))
    bound = plan(curves, shape_of(curves), Recipe(allocation="greedy", ratio=0.4, flops_ratio=0.01))
    assert bound.predicted_loss <= free.predicted_loss + 1e-12
    assert bound.parameters <= free.original_parameters * 0.6


def test_fewer_operations_can_be_asked_for_at_the_same_ratio() -> None:
    curves = model_curves(3, 4, 48, 40, structures=("per-expert", "latent"))
    free, tight = (plan(curves, shape_of(curves), Recipe(allocation="greedy", ratio=0.4, flops_ratio=share)) for share in (None, 0.45))
    assert tight.flops <= 0.55 * tight.original_flops + 1 < free.flops
    assert tight.ratio >= 0.4
    assert tight.predicted_loss > free.predicted_loss


@pytest.mark.parametrize("share", [None, 0.2, 0.3])
def test_a_base_is_counted_in_parameters_and_operations(share: float | None) -> None:
    made = model_curves(3, 4, 48, 40, structures=("per-expert", "latent", "base-delta"))
    curves = [replace(each, loss_SR=0.2 * each.loss_SR) if each.structure == "base-delta" else each for each in made]
    shape, recipe = shape_of(curves), Recipe(allocation="greedy", ratio=0.4, flops_ratio=share)
    found = plan(curves, shape, recipe)
    offered = {(each.layer, each.side, each.structure): each for each in curves}
    flops, based = 0.0, 0
    for layer in found.layers:
        for side, chosen in (("input", layer.input), ("output", layer.output)):
            structure = chosen.structure if chosen.structure != "dense" else "per-expert" if len(chosen.ranks) > 1 else "latent"
            its = offered[layer.layer, side, structure]  # type: ignore[index]
            ranks_S = np.array(chosen.ranks)
            dense_S = ranks_S == DENSE
            assert chosen.parameters == its.fixed_cost + np.where(dense_S, its.dense_cost_S, ranks_S * its.rank_cost_S).sum()
            flops += its.fixed_flops + float(np.where(dense_S, its.dense_flops_S, ranks_S * its.rank_flops_S).sum())
            based += structure == "base-delta"
    assert based
    assert found.active_parameters == round(flops)
    assert found.parameters <= 0.6 * shape.parameters
    assert share is None or found.flops <= (1 - share) * found.original_flops + 2


def test_a_bound_on_operations_says_what_it_needs() -> None:
    curves = model_curves(1, 4, 48, 40)
    with pytest.raises(InputError, match="flops_ratio needs greedy allocation"):
        plan(curves, shape_of(curves), Recipe(allocation="uniform", flops_ratio=0.3))
    with pytest.raises(InputError, match=r"flops_ratio must be in \[0, 0\.\d+\] on this model"):
        plan(curves, shape_of(curves, other=10000), Recipe(allocation="greedy", ratio=0.1, flops_ratio=0.9))
