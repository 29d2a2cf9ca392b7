"""Greedy allocation: best loss avoided per cost first, over all layers, sides, slots and structures at once.

Shapes: N plans.
"""

from collections.abc import Sequence

import numpy as np

from moesvd_core.planning.allocation import Allotment, Choice, LayerCurves, Limit, kept_text, spend
from moesvd_core.planning.curves import DENSE, Structure
from moesvd_core.planning.frontier import PARAMETER_FLOPS, PRICES, Frontier, IntArray, Price, frontier, path
from moesvd_core.planning.recipe import Recipe

MIXES = 8
"""Steps from a price on parameters alone to one on multiply-adds alone, where both are bounded."""


def greedy(layers: Sequence[LayerCurves], budget_N: IntArray, recipe: Recipe, most_flops: float = np.inf) -> Allotment:
    """Plans that avoid the most loss within their budgets.

    Optimal for losses that add up and are convex in cost; the last step, where the budget ends between two corners of a side's hull, is
    spent on that side's best state that still fits. With a second bound, on multiply-adds, one price for both is what decides (Lagrange's
    multipliers): every plan takes the mix that loses least within both bounds.

    Args:
        most_flops: multiply-adds a token that all sides together may come to.
    """
    if most_flops == np.inf:
        return _at_price(layers, budget_N, recipe, PRICES[recipe.budget], most_flops)
    mixed = [_at_price(layers, budget_N, recipe, price, most_flops) for price in _mixes(layers)]
    loss_MN = np.array([[choice.loss_N for pair in each.sides for choice in pair] for each in mixed]).sum(axis=1)
    best_N = loss_MN.argmin(axis=0)
    sides = [
        (_picked([pair[0] for pair in pairs], best_N), _picked([pair[1] for pair in pairs], best_N))
        for pairs in zip(*(each.sides for each in mixed), strict=True)
    ]
    return Allotment(sides, lambda place, plan: mixed[best_N[plan]].reason(place, plan))


def _mixes(layers: Sequence[LayerCurves]) -> list[Price]:
    """Prices from parameters alone to multiply-adds alone, in units in which the original matrices cost alike."""
    parameters = sum(layer.dense_parameters for layer in layers)
    flops = sum(side[0].dense_flops for layer in layers for side in (layer.input, layer.output))
    return [
        Price((1 - step / MIXES) + PARAMETER_FLOPS, step / MIXES * parameters / flops if flops > 0 else 0.0) for step in range(MIXES + 1)
    ]


def _picked(choices: Sequence[Choice], best_N: IntArray) -> Choice:
    """For each plan the side that the best mix gave it."""
    chosen = list(zip(best_N.tolist(), range(best_N.size), strict=True))
    return Choice(
        structures=[choices[mix].structures[plan] for mix, plan in chosen],
        ranks=[choices[mix].ranks[plan] for mix, plan in chosen],
        parameters_N=np.array([choices[mix].parameters_N[plan] for mix, plan in chosen], dtype=np.int64),
        flops_N=np.array([choices[mix].flops_N[plan] for mix, plan in chosen]),
        loss_N=np.array([choices[mix].loss_N[plan] for mix, plan in chosen]),
    )


def _at_price(layers: Sequence[LayerCurves], budget_N: IntArray, recipe: Recipe, price: Price, most_flops: float) -> Allotment:
    """Plans that spend their budgets at one price, until either bound is reached."""
    offers = [side for layer in layers for side in (layer.input, layer.output)]
    fronts = [frontier(tuple(path(curve, recipe.block, price) for curve in side)) for side in offers]
    stored = [front.parameters_V for front in fronts]
    limit = None if most_flops == np.inf else Limit([np.diff(front.flops_V) for front in fronts], most_flops)
    spending = spend([front.slope_V[1:] for front in fronts], [np.diff(each) for each in stored], 0, budget_N, limit)
    picks = [(front.path_V[state_N], front.state_V[state_N]) for front, state_N in zip(fronts, spending.states, strict=True)]
    left_N = budget_N - sum(each[state_N] for each, state_N in zip(stored, spending.states, strict=True))
    computed_N = np.sum([front.flops_V[state_N] for front, state_N in zip(fronts, spending.states, strict=True)], axis=0)
    for plan in np.flatnonzero(spending.next_side_N >= 0):
        side = spending.next_side_N[plan]
        corner = spending.states[side][plan]
        room = most_flops - (computed_N[plan] - fronts[side].flops_V[corner])
        found = _best_state(fronts[side], int(stored[side][corner] + left_N[plan]), room, float(fronts[side].loss_V[corner]))
        if found is not None:
            picks[side][0][plan], picks[side][1][plan] = found
    choices = [_chosen(front, *pick) for front, pick in zip(fronts, picks, strict=True)]
    sides = list(zip(choices[::2], choices[1::2], strict=True))

    def reason(place: int, plan: int) -> str:
        if spending.next_side_N[plan] < 0:
            return "dense: the budget pays for everything"
        worth = _worth(-float(spending.next_key_N[plan]), price)
        if _is_dense(sides[place], plan):
            return f"dense: every part of it saves at least {worth}"
        return f"keeps {kept_text(layers[place], sides[place], plan)}: what is left out would save less than {worth}"

    return Allotment(sides, reason)


def _best_state(front: Frontier, limit: int, most_flops: float, loss: float) -> tuple[int, int] | None:
    """Path and state of least loss with at most `limit` parameters and `most_flops` multiply-adds, if it loses less than `loss`."""
    found = None
    for number, each in enumerate(front.paths):
        affordable_K = each.parameters_K <= limit
        if most_flops < np.inf:
            affordable_K &= each.flops_K <= most_flops
        states = np.flatnonzero(affordable_K)
        if states.size and each.loss_K[states[-1]] < loss:
            found, loss = (number, int(states[-1])), float(each.loss_K[states[-1]])
    return found


def _chosen(front: Frontier, path_N: IntArray, state_N: IntArray) -> Choice:
    """Look up what the picked states of a side come to."""
    structures: list[Structure] = [front.paths[number].curve.structure for number in path_N]
    ranks: list[tuple[int, ...]] = [()] * path_N.size
    parameters_N = np.empty(path_N.size, dtype=np.int64)
    flops_N, loss_N = np.empty(path_N.size), np.empty(path_N.size)
    for number, each in enumerate(front.paths):
        plans = np.flatnonzero(path_N == number)
        states = state_N[plans]
        parameters_N[plans], flops_N[plans], loss_N[plans] = each.parameters_K[states], each.flops_K[states], each.loss_K[states]
        for plan, row in zip(plans, each.ranks(states).tolist(), strict=True):
            ranks[plan] = tuple(row)
    return Choice(structures, ranks, parameters_N, flops_N, loss_N)


def _is_dense(sides: tuple[Choice, Choice], plan: int) -> bool:
    return all(rank == DENSE for side in sides for rank in side.ranks[plan])


def _worth(slope: float, price: Price) -> str:
    """Loss per cost, for a person; of a mixed price by what a parameter costs in it."""
    if price.parameter > PARAMETER_FLOPS:
        return f"{1e6 * slope * price.parameter:.3g} nats a million parameters"
    return f"{1e6 * slope * price.flop:.3g} nats a million multiply-adds"
