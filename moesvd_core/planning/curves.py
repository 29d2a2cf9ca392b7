"""What planning starts from: how much each side of each layer loses at every rank, in one unit for all of them.

Shapes: S slots, R ranks. A *side* is one of an expert's two matrices: "input" (gate and up, stacked) or "output" (down). A *slot* is what
gets a rank of its own: one expert's side ("per-expert", "pivoted", "base-delta"), one group's ("shared-v") or the whole layer's ("latent").

A *rank* is the number of units that are kept, whatever the structure's unit: directions of a factor, neurons of every expert
("kept-neurons"), sets of weights for all experts together ("merged-experts"), or the expert itself, 0 or dense ("kept-experts").
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesvd_core.errors import InputError, StatisticsError

Side = Literal["input", "output"]
SIDES: tuple[Side, Side] = ("input", "output")
Structure = Literal["per-expert", "pivoted", "shared-v", "latent", "base-delta", "kept-neurons", "kept-experts", "merged-experts"]
COUPLED: tuple[Structure, ...] = ("kept-neurons", "kept-experts", "merged-experts")
"""Structures that change both sides of a layer together: their two curves have the same ranks, and a plan gives both the same one."""
DENSE = -1
"""Rank of a slot that is stored as the original matrix."""

MANY = 32
"""So many different ranks at most for "pivoted", where there are more slots: experts of one rank are computed together, and no others."""
NEGATIVE_NOISE = 1e-6
"""Losses are differences of large sums: one below zero by this share of the curve's largest is rounding, a larger one is a fault."""


@dataclass(frozen=True)
class SideCurve:
    """What one method's factors lose on one side of one layer, at every rank.

    Attributes:
        layer: index of the decoder layer.
        side: "input" or "output".
        structure: what is shared (see the module's text).
        loss_SR: predicted loss [slots, R+1] when the leading r = 0..R ranks are kept, in nats a calibration token (second-order
            change of the NLL, output metric, the same unit for every method, layer and side).
        gain_SR: squared singular values in the method's own metric, [slots, R], descending.
        rank_cost_S: parameters that one more rank stores, by slot, but for identities.
        dense_cost_S: parameters of the slot's original matrices.
        load_S: share of (token, expert) pairs that use the slot, Σ over per-expert slots = k; shared slots: 1.
        rank_flops_S: multiply-adds a token, on average, that one more rank costs.
        dense_flops_S: the same for the original matrices.
        fixed_cost: parameters that the side stores at every rank short of the original matrices (the base of "base-delta").
        fixed_flops: multiply-adds a token that come with every rank.
        least: smallest rank that allocation by share may choose, rounded up to one on offer; of "kept-experts": experts to keep.
        identities: matrices of rank × rank in each slot's factors that are an identity and so neither stored nor computed ("pivoted").

    Raises:
        InputError: arrays whose shapes do not fit together, or a cost that is not positive.
        StatisticsError: a loss that is not finite or is negative; the message names layer, side and slot.
    """

    layer: int
    side: Side
    structure: Structure
    loss_SR: NDArray[np.float64]
    gain_SR: NDArray[np.float64]
    rank_cost_S: NDArray[np.int64]
    dense_cost_S: NDArray[np.int64]
    load_S: NDArray[np.float64]
    rank_flops_S: NDArray[np.float64]
    dense_flops_S: NDArray[np.float64]
    fixed_cost: int = 0
    fixed_flops: float = 0.0
    least: int = 1
    identities: int = 0

    def __post_init__(self) -> None:
        if self.loss_SR.ndim != 2 or self.loss_SR.shape[0] < 1 or self.loss_SR.shape[1] < 2:
            raise InputError(f"loss of {self.where} must be [slots, ranks + 1] with a slot and a rank, got {self.loss_SR.shape}")
        slots, ranks = self.loss_SR.shape[0], self.loss_SR.shape[1] - 1
        if self.gain_SR.shape != (slots, ranks):
            raise InputError(f"gain of {self.where} must be [{slots}, {ranks}] to fit its loss, got {self.gain_SR.shape}")
        for name in ("rank_cost_S", "dense_cost_S", "load_S", "rank_flops_S", "dense_flops_S"):
            shape = getattr(self, name).shape
            if shape != (slots,):
                raise InputError(f"{name} of {self.where} must have one value for each of {slots} slots, got {shape}")
        for name in ("rank_cost_S", "dense_cost_S"):
            if (getattr(self, name) <= 0).any():
                raise InputError(f"{name} of {self.where} must be at least 1 parameter, got {int(getattr(self, name).min())}")
        self._check_losses()

    def _check_losses(self) -> None:
        """No slot may hide a fault of its statistics behind a plan that looks fine."""
        bad_S = ~np.isfinite(self.loss_SR).all(axis=1)
        if bad_S.any():
            slot = int(bad_S.argmax())
            raise StatisticsError(f"loss of {self.where}, slot {slot} is not finite: check the layer's statistics for NaN or Inf")
        floor = -NEGATIVE_NOISE * float(self.loss_SR.max())
        negative_S = (self.loss_SR < min(floor, 0.0)).any(axis=1)
        if negative_S.any():
            slot = int(negative_S.argmax())
            raise StatisticsError(f"loss of {self.where}, slot {slot} must be >= 0 nats a token, got {float(self.loss_SR[slot].min()):.3g}")

    @property
    def where(self) -> str:
        """Which curve, for messages."""
        return f"layer {self.layer}, {self.side} side, {self.structure}"

    @property
    def slots(self) -> int:
        """S."""
        return int(self.loss_SR.shape[0])

    @property
    def max_rank(self) -> int:
        """R, the largest rank there is."""
        return int(self.loss_SR.shape[1]) - 1

    @property
    def dense_parameters(self) -> int:
        """Parameters of the side's original matrices."""
        return int(self.dense_cost_S.sum())

    @property
    def dense_flops(self) -> float:
        """Multiply-adds a token, on average, of the side's original matrices."""
        return float(self.dense_flops_S.sum())

    def parameters_SP(self, rank_P: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: N802 - an array, named by its shape
        """Parameters that every slot stores at ranks short of the original matrix, [S, P]; what comes with every rank is not in it."""
        stored_SP: NDArray[np.int64] = rank_P * self.rank_cost_S[:, None] - self.identities * rank_P**2
        return stored_SP

    def flops_SP(self, rank_P: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: N802 - an array, named by its shape
        """The same in multiply-adds a token, on average; an identity spares them whenever its slot is used."""
        spared_SP = self.load_S[:, None] * rank_P**2 if self.identities else 0.0
        computed_SP: NDArray[np.float64] = rank_P * self.rank_flops_S[:, None] - spared_SP
        return computed_SP

    def ranks_on_offer(self, block: int) -> NDArray[np.int64]:
        """Ranks that a plan may choose from, [P]: 0, block, 2·block ...; 0 and the largest of a matrix that is smaller than a block.

        Experts are counted one by one: blocks are for the ranks of matrices.
        """
        step = 1 if self.structure in ("kept-experts", "merged-experts") else min(block, self.max_rank)
        if self.structure == "pivoted" and self.slots > MANY:
            step *= -(-self.max_rank // (MANY * step))
        return np.arange(0, self.max_rank + 1, step)

    def as_one_slot(self) -> "SideCurve":
        """The side as a whole: all slots at one rank; of "kept-experts" the rank is how many are kept, the best first."""
        loss_R, gain_R = self.loss_SR.sum(axis=0), self.gain_SR.sum(axis=0)
        cost_S, flops_S = self.rank_cost_S.sum(keepdims=True), self.rank_flops_S.sum(keepdims=True)
        if self.structure == "kept-experts":
            order_S = self._best_first()
            gain_R = self.gain_SR[order_S, 0]
            loss_R = np.append(np.cumsum(self.loss_SR[order_S[::-1], 0])[::-1], 0.0)
            cost_S, flops_S = self.rank_cost_S[:1], self.rank_flops_S[:1]
        return replace(
            self,
            loss_SR=loss_R[None],
            gain_SR=gain_R[None],
            rank_cost_S=cost_S,
            dense_cost_S=self.dense_cost_S.sum(keepdims=True),
            load_S=self.load_S.sum(keepdims=True),
            rank_flops_S=flops_S,
            dense_flops_S=self.dense_flops_S.sum(keepdims=True),
            identities=self.identities * self.slots,
        )

    def slot_ranks(self, rank: int) -> tuple[int, ...]:
        """Rank of every slot when the side as a whole has this one."""
        if self.structure != "kept-experts" or rank == DENSE:
            return (rank,) * self.slots
        kept = set(self._best_first()[:rank].tolist())
        return tuple(DENSE if slot in kept else 0 for slot in range(self.slots))

    def _best_first(self) -> NDArray[np.int64]:
        """Slots by what their first rank is worth to the method, [S]; equal ones in their order."""
        return np.argsort(-self.gain_SR[:, 0], kind="stable")
