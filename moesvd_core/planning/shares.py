"""Allocations that decide by the share of a matrix: uniform, OWL's, and the paper's selective decomposition.

Shapes: N plans, L layers, P states of a side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesvd_core.errors import InputError
from moesvd_core.planning.allocation import Allotment, Choice, LayerCurves, kept_text, spend
from moesvd_core.planning.curves import COUPLED, DENSE, SideCurve
from moesvd_core.planning.frontier import FloatArray, IntArray
from moesvd_core.planning.recipe import Recipe

OWL_SPREAD = 0.08
"""λ of OWL: the share that a layer keeps differs from the mean by at most about this."""

SELECTIVE_CUT = 0.875
"""Share of a layer's expert parameters that selective decomposition removes at most while other layers are left. Table 1's layer counts
with Table 10's sizes come to 0.76 (20 %) to 0.98 (60 %) of each decomposed layer of Mixtral-8x7B."""

_WHOLE = {"kept-experts": "experts", "merged-experts": "groups"}
"""What structures cannot cut through."""


@dataclass(frozen=True)
class Ladder:
    """States of a side whose slots all have one rank, smallest first; the original matrices may be the last.

    Attributes:
        curve: the side.
        rank_P: rank of the side as a whole, DENSE for the original matrices.
        parameters_P, flops_P, loss_P: totals over the slots.
    """

    curve: SideCurve
    rank_P: IntArray
    parameters_P: IntArray
    flops_P: FloatArray
    loss_P: FloatArray

    def without_dense(self) -> "Ladder":
        """The states of a side that is to be decomposed.

        Raises:
            InputError: there are none.
        """
        if self.rank_P.size == 1:
            raise InputError(f"block must leave a rank below break-even in {self.curve.where}: choose a smaller one, or greedy allocation")
        return Ladder(self.curve, self.rank_P[:-1], self.parameters_P[:-1], self.flops_P[:-1], self.loss_P[:-1])

    def choice(self, state_N: IntArray) -> Choice:
        """The side in N plans."""
        ranks = [self.curve.slot_ranks(rank) for rank in self.rank_P[state_N].tolist()]
        return Choice([self.curve.structure] * state_N.size, ranks, self.parameters_P[state_N], self.flops_P[state_N], self.loss_P[state_N])


def ladder(curve: SideCurve, block: int) -> Ladder:
    """Ranks from the least that there may be to break-even, then the original matrices."""
    whole = curve.as_one_slot()
    rank_P = whole.ranks_on_offer(block)
    rank_P = rank_P[(rank_P >= whole.least) & (whole.fixed_cost + whole.parameters_SP(rank_P)[0] < whole.dense_parameters)]
    return Ladder(
        curve=curve,
        rank_P=np.append(rank_P, DENSE),
        parameters_P=np.append(whole.fixed_cost + whole.parameters_SP(rank_P)[0], whole.dense_parameters),
        flops_P=np.append(whole.fixed_flops + whole.flops_SP(rank_P)[0], whole.dense_flops),
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


def _spent(
    rungs: Sequence[tuple[Ladder, Ladder]], shift_L: FloatArray, start: int, budget_N: IntArray
) -> list[tuple[IntArray, IntArray]]:
    """States of both sides of every layer when shares rise together; sides of a coupled structure move as one.

    Args:
        shift_L: by how much each layer's share is ahead of the others.
        start: parameters when every side is in its first state.
    """
    movers: list[tuple[Ladder, ...]] = []
    shifts = []
    for pair, shift in zip(rungs, shift_L, strict=True):
        together: list[tuple[Ladder, ...]] = [pair] if pair[0].curve.structure in COUPLED else [(each,) for each in pair]
        movers += together
        shifts += [shift] * len(together)
    stored = [np.sum([each.parameters_P for each in mover], axis=0) for mover in movers]
    dense = [sum(each.curve.dense_parameters for each in mover) for mover in movers]
    keys = [parameters_P[1:] / whole - shift for parameters_P, whole, shift in zip(stored, dense, shifts, strict=True)]
    spending = spend(keys, [np.diff(parameters_P) for parameters_P in stored], start, budget_N)
    states = [state_N for mover, state_N in zip(movers, spending.states, strict=True) for _ in mover]
    return list(zip(states[::2], states[1::2], strict=True))


def by_share(layers: Sequence[LayerCurves], budget_N: IntArray, recipe: Recipe, outliers: Mapping[int, float] | None) -> Allotment:
    """Every matrix keeps the same share ("uniform"), or one shifted by its layer's outlier ratio ("owl").

    Shares rise together, a block at a time; blocks that the budget cannot give to all go to the layers that are due first.

    Args:
        outliers: OWL's outlier ratio by layer; None for uniform.
    """
    rungs = ladders(layers, recipe.block)
    shift_L = np.zeros(len(layers)) if outliers is None else _owl_shift(np.array([outliers[layer.layer] for layer in layers]))
    start = sum(int(each.parameters_P[0]) for pair in rungs for each in pair)
    states = _spent(rungs, shift_L, start, budget_N)
    sides = [(pair[0].choice(state[0]), pair[1].choice(state[1])) for pair, state in zip(rungs, states, strict=True)]

    def reason(place: int, plan: int) -> str:
        kept = kept_text(layers[place], sides[place], plan)
        if outliers is None:
            whole = _WHOLE.get(sides[place][1].structures[plan])
            if whole is not None:
                return f"keeps {kept}: the same share of every layer, as nearly as whole {whole} allow"
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
        start = int(dense_L.sum() - room_L[chosen].sum())
        states = _spent([rungs[place] for place in chosen], np.zeros(count), start, budget_N[plans])
        for place, state in zip(chosen, states, strict=True):
            state_LSN[place, 0, plans], state_LSN[place, 1, plans] = state
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
