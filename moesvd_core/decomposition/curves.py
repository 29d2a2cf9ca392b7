"""From losses to `SideCurve`: what a rank costs in each structure, in parameters and in multiply-adds.

Shapes: S slots, R ranks. A token reaches k = Σ_e f_e experts on average, with f_e as calibration measured it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import Side, SideCurve, Structure


class SharedGroup(NamedTuple):
    """A group's experts, its K stored left factors, and how many of them each expert sums."""

    experts: Sequence[int]
    stored: int
    summed: Sequence[int]


def break_even(dense: int, rank_cost: int, limit: int) -> int:
    """Largest rank that factors are worth: beyond it the original is smaller, and exact.

    Args:
        dense: parameters of the original.
        rank_cost: parameters of one rank.
        limit: rank at which the factors are exact.
    """
    return min(dense // rank_cost, limit)


def per_expert_curve(metric: LayerMetric, side: Side, loss_ER: torch.Tensor, gain_ER: torch.Tensor) -> SideCurve:
    """A slot an expert, each paying rows + columns a rank."""
    rows, columns = metric.shape(side)
    return _curve(
        metric, side, "per-expert", loss_ER, gain_ER,
        cost=[rows + columns] * metric.layer.experts,
        dense=[rows * columns] * metric.layer.experts,
        load=metric.frequencies,
        flops=[load * (rows + columns) for load in metric.frequencies],
        dense_flops=[load * rows * columns for load in metric.frequencies],
    )


def latent_curve(metric: LayerMetric, side: Side, loss_R: torch.Tensor, gain_R: torch.Tensor) -> SideCurve:
    """One slot for the layer: the shared basis once a token, the experts' own factors once an active expert."""
    rows, columns = metric.shape(side)
    hidden, own = metric.layer.hidden, rows if side == "input" else columns
    active = sum(metric.frequencies)
    return _curve(
        metric, side, "latent", loss_R[None], gain_R[None],
        cost=[hidden + metric.layer.experts * own],
        dense=[metric.layer.experts * rows * columns],
        load=[1.0],
        flops=[hidden + active * own],
        dense_flops=[active * rows * columns],
    )


def shared_curve(metric: LayerMetric, side: Side, groups: Sequence[SharedGroup], loss_GR: torch.Tensor, gain_GR: torch.Tensor) -> SideCurve:
    """A slot a group: one right factor, K left factors, and for each expert as many left products as it sums.

    On the input side the right factor is applied once a token and group, on the output side once an active expert, because its inputs
    are the expert's own neurons.

    Args:
        groups: in the order of the slots.
    """
    rows, columns = metric.shape(side)
    load = [sum(metric.frequencies[expert] for expert in experts) for experts, _, _ in groups]
    right = [min(1.0, each) if side == "input" else each for each in load]
    left = [sum(metric.frequencies[expert] * used for expert, used in zip(experts, uses, strict=True)) for experts, _, uses in groups]
    return _curve(
        metric, side, "shared-v", loss_GR, gain_GR,
        cost=[columns + stored * rows for _, stored, _ in groups],
        dense=[len(experts) * rows * columns for experts, _, _ in groups],
        load=[min(1.0, each) for each in load],
        flops=[once * columns + each * rows for once, each in zip(right, left, strict=True)],
        dense_flops=[each * rows * columns for each in load],
    )


def _curve(
    metric: LayerMetric,
    side: Side,
    structure: Structure,
    loss_SR: torch.Tensor,
    gain_SR: torch.Tensor,
    *,
    cost: list[int],
    dense: list[int],
    load: list[float],
    flops: list[float],
    dense_flops: list[float],
) -> SideCurve:
    return SideCurve(
        layer=metric.layer.index,
        side=side,
        structure=structure,
        loss_SR=loss_SR.double().cpu().numpy(),
        gain_SR=gain_SR.double().cpu().numpy(),
        rank_cost_S=np.array(cost, np.int64),
        dense_cost_S=np.array(dense, np.int64),
        load_S=np.array(load, np.float64),
        rank_flops_S=np.array(flops, np.float64),
        dense_flops_S=np.array(dense_flops, np.float64),
    )
