"""Allocations that decide by the share of a matrix: uniform, OWL's, and the paper's selective decomposition.

Shapes: N plans, L layers, P states of a side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesvd_core.errors import InputError
from moesvd_core.planning.allocation import Allotment, Choice, LayerCurves, kept_text, spend
from moesvd_core.planning.curves import DENSE, SideCurve
from moesvd_core.planning.frontier import FloatArray, IntArray
from moesvd_core.planning.recipe import Recipe

OWL_SPREAD = 0.08
"""λ of OWL: the share that a layer keeps differs from the mean by at most about this."""

SELECTIVE_CUT = 0.875
"""Share of a layer's expert parameters that selective decomposition removes at most while other layers are left. Table 1's layer counts
with Table 10's sizes come to 0.76 (20 %) to 0.98 (60 %) of each decomposed layer of Mixtral-8x7B."""


@dataclass(frozen=True)
class Ladder:
    """States of a side whose slots all have one rank, smallest first; the original matrices may be the last.

    Attributes:
        whole: the side as one slot.
        slots: how many there are.
        rank_P: rank of every slot, DENSE for the original matrices.
        parameters_P, flops_P, loss_P: totals over the slots.
    """

    whole: SideCurve
    slots: int
    rank_P: IntArray
    parameters_P: IntArray
    flops_P: FloatArray
    loss_P: FloatArray

    def shares(self) -> FloatArray:
        """Share of the side's parameters that each state keeps, [P]."""
        return self.parameters_P / self.whole.dense_parameters

    def without_dense(self) -> "Ladder":
        """The states of a side that is to be decomposed.

        Raises:
            InputError: there are none.
        """
        if self.rank_P.size == 1:
            raise InputError(f"block must leave a rank below break-even in {self.whole.where}: choose a smaller one, or greedy allocation")
        return Ladder(self.whole, self.slots, self.rank_P[:-1], self.parameters_P[:-1], self.flops_P[:-1], self.loss_P[:-1])

    def choice(self, state_N: IntArray) -> Choice:
        """The side in N plans."""
        ranks = [(rank,) * self.slots for rank in self.rank_P[state_N].tolist()]
        return Choice([self.whole.structure] * state_N.size, ranks, self.parameters_P[state_N], self.flops_P[state_N], self.loss_P[state_N])


def ladder(curve: SideCurve, block: int) -> Ladder:
    """Ranks from one block to break-even, then the original matrices."""
    whole = curve.as_one_slot()
    cost = int(whole.rank_cost_S[0])
    rank_P = whole.ranks_on_offer(block)[1:]
    rank_P = rank_P[rank_P * cost < whole.dense_parameters]
    return Ladder(
        whole=whole,
        slots=curve.slots,
        rank_P=np.append(rank_P, DENSE),
        parameters_P=np.append(rank_P * cost, whole.dense_parameters),
        flops_P=np.append(rank_P * float(whole.rank_flops_S[0]), whole.dense_flops),
        loss_P=np.append(np.maximum(whole.loss_SR[0, rank_P], 0.0), 0.0),
    )


def ladders(layers: Sequence[LayerCurves], block: int) -> list[tuple[Ladder, Ladder]]:
    """Both sides of every layer.

    Raises:
        InputError: several structures are on offer for a side.
    """
    for layer in layers:
        for side in (layer.input, layer.output):
            if len(side) > 1:
                got = f"{' and '.join(curve.structure for curve in side)} for layer {layer.layer}"
                raise InputError(f"structure must be one unless allocation is greedy, which chooses between several; got {got}")
    return [(ladder(layer.input[0], block), ladder(layer.output[0], block)) for layer in layers]


def by_share(layers: Sequence[LayerCurves], budget_N: IntArray, recipe: Recipe, outliers: Mapping[int, float] | None) -> Allotment:
    """Every matrix keeps the same share ("uniform"), or one shifted by its layer's outlier ratio ("owl").

    Shares rise together, a block at a time; blocks that the budget cannot give to all go to the layers that are due first.

    Args:
        outliers: OWL's outlier ratio by layer; None for uniform.
    """
    rungs = ladders(layers, recipe.block)
    shift_L = np.zeros(len(layers)) if outliers is None else _owl_shift(np.array([outliers[layer.layer] for layer in layers]))
    flat = [(each, shift) for pair, shift in zip(rungs, shift_L, strict=True) for each in pair]
    start = sum(int(each.parameters_P[0]) for each, _ in flat)
    spending = spend([each.shares()[1:] - shift for each, shift in flat], [np.diff(each.parameters_P) for each, _ in flat], start, budget_N)
    choices = [each.choice(state_N) for (each, _), state_N in zip(flat, spending.states, strict=True)]
    sides = list(zip(choices[::2], choices[1::2], strict=True))

    def reason(place: int, plan: int) -> str:
        kept = kept_text(layers[place], sides[place], plan)
        if outliers is None:
            return f"keeps {kept}: every matrix keeps the same share"
        mean = sum(outliers[layer.layer] for layer in layers) / len(layers)
        return f"keeps {kept}: outlier ratio {outliers[layers[place].layer]:.3g}, mean of all layers {mean:.3g}"

    return Allotment(sides, reason)


def _owl_shift(outlier_L: FloatArray) -> FloatArray:
    """What OWL adds to each layer's share: linear in the outlier ratio, spread 2λ, mean 0."""
    spread = float(np.ptp(outlier_L))
    scaled_L = (outlier_L - outlier_L.min()) / spread if spread > 0 else np.zeros_like(outlier_L)
    shift_L: FloatArray = 2 * OWL_SPREAD * (scaled_L - scaled_L.mean())
    return shift_L


def selective(layers: Sequence[LayerCurves], budget_N: IntArray, recipe: Recipe, sensitivity: Mapping[int, float]) -> Allotment:
    """Decompose the layers of lowest S_L and leave the others dense (3.2, Table 1).

    As few layers as can give what has to be removed when each gives at most SELECTIVE_CUT; within them every matrix keeps the same share.
    """
    full = ladders(layers, recipe.block)
    rungs = [(pair[0].without_dense(), pair[1].without_dense()) for pair in full]
    rank_L = np.argsort(np.array([sensitivity[layer.layer] for layer in layers]), kind="stable")
    dense_L = np.array([layer.dense_parameters for layer in layers])
    room_L = dense_L - np.array([sum(int(each.parameters_P[0]) for each in pair) for pair in rungs])
    due_N = int(dense_L.sum()) - budget_N
    capacity_L = np.cumsum(np.minimum(SELECTIVE_CUT * dense_L, room_L)[rank_L])
    count_N = np.minimum(np.searchsorted(np.append(0.0, capacity_L), due_N), len(layers))

    state_LSN = np.full((len(layers), 2, budget_N.size), -1)  # a full ladder's last state is dense
    for count in np.unique(count_N[count_N > 0]):
        plans = np.flatnonzero(count_N == count)
        chosen = rank_L[:count]
        flat = [each for place in chosen for each in rungs[place]]
        start = int(dense_L.sum() - room_L[chosen].sum())
        states = spend([each.shares()[1:] for each in flat], [np.diff(each.parameters_P) for each in flat], start, budget_N[plans]).states
        for number, place in enumerate(chosen):
            state_LSN[place, 0, plans], state_LSN[place, 1, plans] = states[2 * number], states[2 * number + 1]
    sides = [(pair[0].choice(state_SN[0]), pair[1].choice(state_SN[1])) for pair, state_SN in zip(full, state_LSN, strict=True)]

    def reason(place: int, plan: int) -> str:
        score = sensitivity[layers[place].layer]
        if state_LSN[place, 0, plan] >= 0 and count_N[plan] == len(layers):
            return f"decomposed: sensitivity {score:.4g}, at this ratio every layer has to be"
        if count_N[plan] == 0:
            return f"dense: sensitivity {score:.4g}, nothing has to be removed"
        threshold = sensitivity[layers[rank_L[count_N[plan]]].layer]
        verdict, relation = ("decomposed", "below") if state_LSN[place, 0, plan] >= 0 else ("dense", "not below")
        return f"{verdict}: sensitivity {score:.4g} is {relation} the threshold {threshold:.4g}"

    return Allotment(sides, reason)
