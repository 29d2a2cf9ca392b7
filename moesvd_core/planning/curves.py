"""What planning starts from: how much each side of each layer loses at every rank, in one unit for all of them.

Shapes: S slots, R ranks. A *side* is one of an expert's two matrices: "input" (gate and up, stacked) or "output" (down). A *slot* is what
gets a rank of its own: one expert's side (structure "per-expert"), one group's ("shared-v") or the whole layer's ("latent").
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesvd_core.errors import InputError, StatisticsError

Side = Literal["input", "output"]
SIDES: tuple[Side, Side] = ("input", "output")
Structure = Literal["per-expert", "shared-v", "latent"]
DENSE = -1
"""Rank of a slot that is stored as the original matrix."""

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
        rank_cost_S: parameters that one more rank stores, by slot.
        dense_cost_S: parameters of the slot's original matrices.
        load_S: share of (token, expert) pairs that use the slot, Σ over per-expert slots = k; shared slots: 1.
        rank_flops_S: multiply-adds a token, on average, that one more rank costs.
        dense_flops_S: the same for the original matrices.

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

    def ranks_on_offer(self, block: int) -> NDArray[np.int64]:
        """Ranks that a plan may choose from, [P]: 0, block, 2·block ...; 0 and the largest of a matrix that is smaller than a block."""
        return np.arange(0, self.max_rank + 1, min(block, self.max_rank))

    def as_one_slot(self) -> "SideCurve":
        """The side as a whole: all slots at one rank."""
        return SideCurve(
            layer=self.layer,
            side=self.side,
            structure=self.structure,
            loss_SR=self.loss_SR.sum(axis=0, keepdims=True),
            gain_SR=self.gain_SR.sum(axis=0, keepdims=True),
            rank_cost_S=self.rank_cost_S.sum(keepdims=True),
            dense_cost_S=self.dense_cost_S.sum(keepdims=True),
            load_S=self.load_S.sum(keepdims=True),
            rank_flops_S=self.rank_flops_S.sum(keepdims=True),
            dense_flops_S=self.dense_flops_S.sum(keepdims=True),
        )
