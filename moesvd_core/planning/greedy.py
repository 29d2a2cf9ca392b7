"""Greedy allocation: best loss avoided per cost first, over all layers, sides, slots and structures at once.

Shapes: N plans.
"""

from collections.abc import Sequence

import numpy as np

from moesvd_core.planning.allocation import Allotment, Choice, LayerCurves, kept_text, spend
from moesvd_core.planning.curves import DENSE, Structure
from moesvd_core.planning.frontier import Frontier, IntArray, frontier, path
from moesvd_core.planning.recipe import Budget, Recipe


def greedy(layers: Sequence[LayerCurves], budget_N: IntArray, recipe: Recipe) -> Allotment:
    """Plans that avoid the most loss within their budgets.

    Optimal for losses that add up and are convex in cost; the last step, where the budget ends between two corners of a side's hull, is
    spent on that side's best state that still fits.
    """
    offers = [side for layer in layers for side in (layer.input, layer.output)]
    fronts = [frontier(tuple(path(curve, recipe.block, recipe.budget) for curve in side)) for side in offers]
    stored = [front.parameters_V for front in fronts]
    spending = spend([front.slope_V[1:] for front in fronts], [np.diff(each) for each in stored], 0, budget_N)
    picks = [(front.path_V[state_N], front.state_V[state_N]) for front, state_N in zip(fronts, spending.states, strict=True)]
    left_N = budget_N - sum(each[state_N] for each, state_N in zip(stored, spending.states, strict=True))
    for plan in np.flatnonzero(spending.next_side_N >= 0):
        side = spending.next_side_N[plan]
        corner = spending.states[side][plan]
        found = _best_state(fronts[side], int(stored[side][corner] + left_N[plan]), float(fronts[side].loss_V[corner]))
        if found is not None:
            picks[side][0][plan], picks[side][1][plan] = found
    choices = [_chosen(front, *pick) for front, pick in zip(fronts, picks, strict=True)]
    sides = list(zip(choices[::2], choices[1::2], strict=True))

    def reason(place: int, plan: int) -> str:
        if spending.next_side_N[plan] < 0:
            return "dense: the budget pays for everything"
        price = _price(-float(spending.next_key_N[plan]), recipe.budget)
        if _is_dense(sides[place], plan):
            return f"dense: every part of it saves at least {price}"
        return f"keeps {kept_text(layers[place], sides[place], plan)}: what is left out would save less than {price}"

    return Allotment(sides, reason)


def _best_state(front: Frontier, limit: int, loss: float) -> tuple[int, int] | None:
    """Path and state of least loss that stores at most `limit` parameters, if it loses less than `loss`."""
    found = None
    for number, each in enumerate(front.paths):
        state = int(np.searchsorted(each.parameters_K, limit, side="right")) - 1
        if each.loss_K[state] < loss:
            found, loss = (number, state), float(each.loss_K[state])
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


def _price(price: float, budget: Budget) -> str:
    """Loss per cost, for a person."""
    return f"{1e6 * price:.3g} nats a million {'parameters' if budget == 'parameters' else 'multiply-adds'}"
