"""What all allocations share: every one is an ordered list of steps, and the plan of a budget is a prefix of its list.

Greedy orders steps by loss avoided per cost; uniform and OWL by the share of a matrix that is kept; selective does the same over the layers
that it decomposes. So the plans of all ratios come from one sort.

Shapes: N plans, K steps, S slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesvd_core.planning.curves import SideCurve, Structure
from moesvd_core.planning.frontier import FloatArray, IntArray


@dataclass(frozen=True)
class LayerCurves:
    """What is on offer for one layer: for each side, one curve a structure."""

    layer: int
    input: tuple[SideCurve, ...]
    output: tuple[SideCurve, ...]

    @property
    def dense_parameters(self) -> int:
        """Parameters of the layer's original matrices."""
        return self.input[0].dense_parameters + self.output[0].dense_parameters


@dataclass(frozen=True)
class Choice:
    """One side in each of N plans: structure, rank of each slot [N][S], and what they come to, [N]."""

    structures: list[Structure]
    ranks: list[tuple[int, ...]]
    parameters_N: IntArray
    flops_N: FloatArray
    loss_N: FloatArray


@dataclass(frozen=True)
class Allotment:
    """N plans: for each layer both sides' choices, and `reason(layer's place in the list, plan)`."""

    sides: list[tuple[Choice, Choice]]
    reason: Callable[[int, int], str]


class Spending(NamedTuple):
    """State of each side in each plan [sides][N], and the first step that a plan could not afford, [N]: its side (-1: none) and key."""

    states: list[IntArray]
    next_side_N: IntArray
    next_key_N: FloatArray


class Limit(NamedTuple):
    """A second thing that every plan has to keep below a bound: what each side's steps add to it."""

    added: Sequence[FloatArray]
    most: float


def spend(keys: Sequence[FloatArray], added: Sequence[IntArray], start: int, budget_N: IntArray, limit: Limit | None = None) -> Spending:
    """Take steps of all sides in the order of their keys until the next would exceed the budget.

    Args:
        keys: of each side's steps, never falling within a side; equal keys keep the order of the list.
        added: parameters that each step adds.
        start: parameters before the first step.
        budget_N: parameters that each plan may store, at least `start`.
        limit: what else must not be exceeded.
    """
    key_K = np.concatenate([*keys, np.empty(0)])
    side_K = np.repeat(np.arange(len(keys)), [each.size for each in keys])
    order_K = np.argsort(key_K, kind="stable")
    spent_K = start + np.maximum.accumulate(np.cumsum(np.concatenate([*added, np.empty(0, dtype=np.int64)])[order_K]))
    taken_N = np.searchsorted(spent_K, budget_N, side="right")
    if limit is not None:
        also_K = np.maximum.accumulate(np.cumsum(np.concatenate([*limit.added, np.empty(0)])[order_K]))
        taken_N = np.minimum(taken_N, np.searchsorted(also_K, limit.most * (1 + 1e-12), side="right"))
    place_K = np.empty_like(order_K)
    place_K[order_K] = np.arange(order_K.size)
    ends = np.cumsum([each.size for each in keys], dtype=np.int64)
    states = [np.searchsorted(place_K[end - each.size : end], taken_N) for each, end in zip(keys, ends, strict=True)]
    next_side_N = np.append(side_K[order_K], -1)[taken_N]
    return Spending(states, next_side_N, np.append(key_K[order_K], np.inf)[taken_N])


def kept_text(layer: LayerCurves, sides: tuple[Choice, Choice], plan: int) -> str:
    """Share of the layer's parameters that a plan keeps, in words."""
    return f"{100 * sum(int(side.parameters_N[plan]) for side in sides) / layer.dense_parameters:.0f} %"
