"""Statistics + recipe + ratio -> plan. Pure functions over numpy; no torch, no model, milliseconds.

Shapes: S slots, R ranks. A *side* is one of an expert's two matrices: "input" (gate and up, stacked) or "output" (down). A *slot* is what
gets a rank of its own: one expert's side (structure "per-expert"), one group's ("shared-v") or the whole layer's ("latent").
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Side = Literal["input", "output"]
SIDES: tuple[Side, Side] = ("input", "output")
Structure = Literal["per-expert", "shared-v", "latent"]
DENSE = -1
"""Rank of a slot that is stored as the original matrix."""


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


@dataclass(frozen=True)
class SidePlan:
    """What happens to one side of one layer.

    Attributes:
        structure: "dense" when every slot stays as it is.
        ranks: rank of each slot; DENSE (-1) for a slot stored as the original matrix; 0 prunes it.
        parameters: stored parameters of the side.
        predicted_loss: nats a token, from the curve.
    """

    structure: Literal["dense", "per-expert", "shared-v", "latent"]
    ranks: tuple[int, ...]
    parameters: int
    predicted_loss: float


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer, and why."""

    layer: int
    selected: bool
    reason: str
    input: SidePlan
    output: SidePlan
    original_parameters: int

    @property
    def parameters(self) -> int:
        """Stored parameters of both sides."""
        return self.input.parameters + self.output.parameters

    @property
    def predicted_loss(self) -> float:
        """Nats a token lost by this layer."""
        return self.input.predicted_loss + self.output.predicted_loss


@dataclass(frozen=True)
class Plan:
    """Ranks of every layer for one method and ratio; `as_dict` is its JSON.

    Attributes:
        ratio: 1 - parameters / original_parameters of the whole model, as reached (never below the ratio asked for).
        asked_ratio: what was asked for.
        expert_ratio: the same over routed experts only.
    """

    method: str
    asked_ratio: float
    ratio: float
    expert_ratio: float
    original_parameters: int
    parameters: int
    original_active_parameters: int
    active_parameters: int
    original_bytes: int
    bytes: int
    predicted_loss: float
    layers: tuple[LayerPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields above, layers as a list."""
        raise NotImplementedError
