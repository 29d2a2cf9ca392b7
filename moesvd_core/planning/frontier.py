"""The states of one side worth paying for, cheapest first.

Greedy allocation is optimal when losses are convex in what is spent. Within a slot they nearly are; the jump from the last rank below
break-even to the original matrix is not, and neither is the step from one structure to another. So each side is reduced to the lower convex
hull of its states (cost, loss), and states between two corners are kept for spending what is left of a budget.

Shapes: S slots, P ranks on offer, Q = P + 1 with the original matrix, F points of all slots one after the other, K steps, V corners,
N plans.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesvd_core.planning.curves import DENSE, SideCurve
from moesvd_core.planning.recipe import Budget

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)

PARAMETER_FLOPS = 1e-6
"""Multiply-adds that a stored parameter counts as under a FLOPs budget: experts that no token reached must cost something too."""


class Price(NamedTuple):
    """What a stored parameter costs, and a multiply-add a token."""

    parameter: float
    flop: float


PRICES: dict[Budget, Price] = {"parameters": Price(1.0, 0.0), "flops": Price(PARAMETER_FLOPS, 1.0)}


def lower_hull(cost_F: FloatArray, loss_F: FloatArray, first_F: BoolArray) -> tuple[IntArray, FloatArray]:
    """Corners of the lower convex hull of each run of points, and the slope that leads to each.

    A point on or above the chord of its neighbours is no corner, whatever else is there: all such points go at once, until none is left.

    Args:
        cost_F: strictly rising within a run.
        loss_F: the other coordinate.
        first_F: marks the first point of each run; a run's first and last point are always corners.

    Returns:
        Indices of the corners, ascending, and their slopes, strictly rising within a run, -inf for its first.
    """
    corner_V = np.arange(cost_F.size)
    while True:
        first_V = first_F[corner_V]
        slope_V = np.full(corner_V.size, -np.inf)
        slope_V[1:] = np.diff(loss_F[corner_V]) / np.where(first_V[1:], 1.0, np.diff(cost_F[corner_V]))
        slope_V[first_V] = -np.inf
        inner_V = ~first_V[:-1] & ~first_V[1:]
        above_V = np.append(inner_V & (slope_V[:-1] >= slope_V[1:]), False)
        if not above_V.any():
            return corner_V, slope_V
        corner_V = corner_V[~above_V]


@dataclass(frozen=True)
class Path:
    """The states of one structure on one side: state 0 keeps nothing, step k moves one slot to a higher rank, the last state is dense.

    Where something is stored whatever the rank (a base), state 0 keeps that, and the path ends where the original matrices are smaller.

    Attributes:
        curve: where it comes from; one slot where all have one rank.
        copies: slots of the structure that take the rank of each slot of the curve.
        slot_K, rank_K: slot that each step moves, and the rank that it gets (`max_rank + 1` for dense).
        slope_K: slope of the hull's edge that the step lies on, never falling.
        corner_K: the step reaches a corner of its slot's hull.
        cost_K, parameters_K, flops_K, loss_K: totals of every state, [K+1]; cost is in the unit of the price.
    """

    curve: SideCurve
    copies: int
    slot_K: IntArray
    rank_K: IntArray
    slope_K: FloatArray
    corner_K: BoolArray
    cost_K: FloatArray
    parameters_K: IntArray
    flops_K: FloatArray
    loss_K: FloatArray

    def ranks(self, state_N: IntArray) -> IntArray:
        """Rank of every slot in each of N states, [N, S]; DENSE for the original matrix."""
        order_N = np.argsort(state_N, kind="stable")
        seen_K = np.searchsorted(state_N[order_N], np.arange(1, self.slot_K.size + 1))
        inside_K = seen_K < state_N.size
        rank_NS = np.zeros((state_N.size, self.curve.slots), dtype=np.int64)
        np.maximum.at(rank_NS, (seen_K[inside_K], self.slot_K[inside_K]), self.rank_K[inside_K])
        rank_NS = np.maximum.accumulate(rank_NS, axis=0)
        rank_NS[rank_NS > self.curve.max_rank] = DENSE
        out_NS = np.empty_like(rank_NS)
        out_NS[order_N] = rank_NS
        return np.repeat(out_NS, self.copies, axis=1)


def path(curve: SideCurve, block: int, price: Price = PRICES["parameters"]) -> Path:
    """Order the states of a side by what their cost is worth: slots take turns, each along its own lower convex hull.

    Groups of "shared-v" move together: a side is stored in that form as a whole, or dense as a whole.
    """
    copies = curve.slots if curve.structure == "shared-v" else 1
    if copies > 1:
        curve = curve.as_one_slot()
    point = _points(curve, block, price)
    slot_F, first_F = point.slot_F, np.append(True, point.slot_F[1:] != point.slot_F[:-1])
    at_V = np.flatnonzero(point.candidate_F)
    corner_V, slope_V = lower_hull(point.cost_F[at_V], point.loss_F[at_V], first_F[at_V])
    corner_V = at_V[corner_V]
    edge_F = np.searchsorted(corner_V, np.arange(slot_F.size))  # the edge that ends at the next corner
    corner_F = np.zeros(slot_F.size, dtype=np.bool_)
    corner_F[corner_V] = True

    step_K = np.flatnonzero(~first_F)
    step_K = step_K[np.argsort(slope_V[edge_F[step_K]], kind="stable")]
    parameters_F, flops_F = point.parameters_F, point.flops_F
    avoided_K = point.loss_F[step_K - 1] - point.loss_F[step_K]
    cost_K = _totals(point.cost_F, step_K) + price.parameter * curve.fixed_cost + price.flop * curve.fixed_flops
    parameters_K = np.rint(_totals(parameters_F, step_K)).astype(np.int64) + curve.fixed_cost
    dense_cost = price.parameter * curve.dense_parameters + price.flop * curve.dense_flops
    end = step_K.size + 1
    if curve.fixed_cost:
        smaller_K = (cost_K < dense_cost) & (parameters_K < curve.dense_parameters)
        end = max(1, int(np.logical_and.accumulate(smaller_K).sum()))
    return Path(
        curve=curve,
        copies=copies,
        slot_K=slot_F[step_K[: end - 1]],
        rank_K=point.rank_F[step_K[: end - 1]],
        slope_K=slope_V[edge_F[step_K[: end - 1]]],
        corner_K=corner_F[step_K[: end - 1]],
        cost_K=cost_K[:end],
        parameters_K=parameters_K[:end],
        flops_K=_totals(flops_F, step_K)[:end] + curve.fixed_flops,
        loss_K=np.append(np.cumsum(avoided_K[::-1])[::-1], 0.0)[:end],  # from the dense end, so that it is 0 there
    )


class _Points(NamedTuple):
    """Ranks that the slots offer, slot after slot: below break-even, losing less than every smaller one; then the original matrix."""

    slot_F: IntArray
    rank_F: IntArray
    cost_F: FloatArray
    parameters_F: FloatArray
    flops_F: FloatArray
    loss_F: FloatArray
    candidate_F: BoolArray  # can be a corner


def _points(curve: SideCurve, block: int, price: Price) -> _Points:
    """Points of all slots; the rank of the original matrix is written max_rank + 1."""
    rank_P = curve.ranks_on_offer(block)
    loss_SP = np.maximum(curve.loss_SR[:, rank_P], 0.0)
    parameters_SP, flops_SP = curve.parameters_SP(rank_P).astype(np.float64), curve.flops_SP(rank_P)
    keep_SP = parameters_SP < curve.dense_cost_S[:, None]
    dense_cost_S = price.parameter * curve.dense_cost_S + price.flop * curve.dense_flops_S
    cost_SP = price.parameter * parameters_SP + price.flop * flops_SP
    room_SP = dense_cost_S[:, None] - cost_SP
    keep_SP &= room_SP > 0
    keep_SP[:, 1:] &= loss_SP[:, 1:] < np.minimum.accumulate(loss_SP, axis=1)[:, :-1]
    # The hull's last edge starts where the line to the original matrix is flattest: nothing beyond can be a corner.
    steepness_SP = np.divide(loss_SP, room_SP, where=keep_SP, out=np.full(loss_SP.shape, np.inf))
    candidate_SP = np.arange(rank_P.size) <= steepness_SP.argmin(axis=1)[:, None]

    keep_SQ = _with_dense(keep_SP, np.ones(curve.slots, dtype=np.bool_))
    slot_F, column_F = np.nonzero(keep_SQ)
    return _Points(
        slot_F=slot_F,
        rank_F=np.append(rank_P, curve.max_rank + 1)[column_F],
        cost_F=_with_dense(cost_SP, dense_cost_S)[keep_SQ],
        parameters_F=_with_dense(parameters_SP, curve.dense_cost_S.astype(np.float64))[keep_SQ],
        flops_F=_with_dense(flops_SP, curve.dense_flops_S)[keep_SQ],
        loss_F=_with_dense(loss_SP, np.zeros(curve.slots))[keep_SQ],
        candidate_F=_with_dense(candidate_SP, np.ones(curve.slots, dtype=np.bool_))[keep_SQ],
    )


def _with_dense(value_SP: NDArray[Scalar], dense_S: NDArray[Scalar]) -> NDArray[Scalar]:
    """One more column, for the original matrix."""
    return np.hstack([value_SP, dense_S[:, None]])


def _totals(value_F: FloatArray | IntArray, step_K: IntArray) -> FloatArray:
    """Total over the slots in every state, [K+1]: 0 at rank 0, then what each step adds."""
    return np.cumsum(np.append(0.0, value_F[step_K] - value_F[step_K - 1]))


@dataclass(frozen=True)
class Frontier:
    """Lower convex hull of a side's states over all structures on offer.

    Attributes:
        paths: one a structure.
        path_V, state_V: which state of which path each corner is.
        slope_V: slope of the edge that leads to each corner, never falling; -inf for the first.
        cost_V, loss_V: coordinates of the corners.
        parameters_V, flops_V: stored parameters and multiply-adds at the corners.
    """

    paths: tuple[Path, ...]
    path_V: IntArray
    state_V: IntArray
    slope_V: FloatArray
    cost_V: FloatArray
    loss_V: FloatArray
    parameters_V: IntArray
    flops_V: FloatArray


def frontier(paths: tuple[Path, ...]) -> Frontier:
    """What a side should store at any price of a parameter, whichever of its structures is best there."""
    return reduce(_merged, (_alone(each) for each in paths))


def _alone(path: Path) -> Frontier:
    """The hull of one structure: its corners."""
    state_V = np.append(0, 1 + np.flatnonzero(path.corner_K))
    slope_V = np.append(-np.inf, path.slope_K)[state_V]
    totals = (each[state_V] for each in (path.cost_K, path.loss_K, path.parameters_K, path.flops_K))
    return Frontier((path,), np.zeros_like(state_V), state_V, slope_V, *totals)


def _merged(a: Frontier, b: Frontier) -> Frontier:
    """Lower hull of two hulls, by their conjugates.

    Between two neighbouring prices (slopes of either) each has one best corner; the better of the two is a corner of the joint hull. Above
    all prices that is the first of either, whichever is cheaper.
    """
    price_J = np.unique(np.concatenate([-a.slope_V[1:], -b.slope_V[1:], [0.0]]))[::-1]
    a_J, b_J = (np.searchsorted(each.slope_V[1:], -price_J, side="right") for each in (a, b))
    picks = [np.array([0, a.cost_V.size])]
    for price, at_a, at_b in ((price_J, _before(a_J), _before(b_J)), (price_J, a_J, b_J)):  # both ends of every interval
        a_wins_J = a.loss_V[at_a] + price * a.cost_V[at_a] <= b.loss_V[at_b] + price * b.cost_V[at_b]
        picks.append(np.where(a_wins_J, at_a, a.cost_V.size + at_b))
    pick_V = np.unique(np.concatenate(picks))

    cost_V = np.concatenate([a.cost_V, b.cost_V])[pick_V]
    loss_V = np.concatenate([a.loss_V, b.loss_V])[pick_V]
    order_V = np.lexsort([loss_V, cost_V])
    order_V = order_V[np.append(True, np.diff(cost_V[order_V]) > 0)]  # of equal cost the smaller loss
    corner_V, slope_V = lower_hull(cost_V[order_V], loss_V[order_V], np.arange(order_V.size) == 0)
    order_V = order_V[corner_V]
    pick_V = pick_V[order_V]
    return Frontier(
        paths=(*a.paths, *b.paths),
        path_V=np.concatenate([a.path_V, b.path_V + len(a.paths)])[pick_V],
        state_V=np.concatenate([a.state_V, b.state_V])[pick_V],
        slope_V=slope_V,
        cost_V=cost_V[order_V],
        loss_V=loss_V[order_V],
        parameters_V=np.concatenate([a.parameters_V, b.parameters_V])[pick_V],
        flops_V=np.concatenate([a.flops_V, b.flops_V])[pick_V],
    )


def _before(index_J: IntArray) -> IntArray:
    """Best corner just above each price, from the best one just below: what it was one price higher, and the first at the start."""
    return np.append(0, index_J[:-1])
