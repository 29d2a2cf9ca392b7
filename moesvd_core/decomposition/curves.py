"""From losses to `SideCurve`: what a rank costs in each structure, in parameters and in multiply-adds.

Shapes: S slots, R ranks. A token reaches k = Σ_e f_e experts on average, with f_e as calibration measured it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.kept_router import enough_left
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


def pivoted_curve(metric: LayerMetric, side: Side, loss_ER: torch.Tensor, gain_ER: torch.Tensor) -> SideCurve:
    """A slot an expert, each paying rows + columns a rank and one more for its pivot's index, without the identity of all of them."""
    own = per_expert_curve(metric, side, loss_ER, gain_ER)
    return replace(own, structure="pivoted", rank_cost_S=own.rank_cost_S + 1, identities=1)


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


def base_curve(metric: LayerMetric, side: Side, loss_ER: torch.Tensor, gain_ER: torch.Tensor) -> SideCurve:
    """The base whatever the ranks, applied once a token, and a slot an expert for its delta."""
    rows, columns = metric.shape(side)
    own = per_expert_curve(metric, side, loss_ER, gain_ER)
    return replace(own, structure="base-delta", fixed_cost=rows * columns, fixed_flops=float(rows * columns), least=0)


def neuron_curve(metric: LayerMetric, side: Side, loss_R: torch.Tensor, gain_R: torch.Tensor) -> SideCurve:
    """One slot for the layer, a rank for every neuron that each expert keeps: its rows of the input matrix, its column of the output's.

    The biases of a neuron's rows go with it, so they are counted here as parameters of the input side.
    """
    rows, columns = metric.shape(side)
    experts, width, active = metric.layer.experts, metric.layer.width, sum(metric.frequencies)
    stored = rows * (columns + (metric.layer.biased and side == "input"))
    return _curve(
        metric, side, "kept-neurons", loss_R[None], gain_R[None],
        cost=[experts * stored // width],
        dense=[experts * stored],
        load=[1.0],
        flops=[active * rows * columns / width],
        dense_flops=[active * rows * columns],
    )


def merged_curve(metric: LayerMetric, side: Side, loss_R: torch.Tensor, gain_R: torch.Tensor) -> SideCurve:
    """One slot for the layer, a rank for every set of weights; a token is answered by as many experts as before."""
    rows, columns = metric.shape(side)
    active = sum(metric.frequencies) * rows * columns
    return _curve(
        metric, side, "merged-experts", loss_R[None], gain_R[None],
        cost=[rows * columns],
        dense=[metric.layer.experts * rows * columns],
        load=[1.0],
        flops=[0.0],
        dense_flops=[active],
        fixed_flops=active,
    )


def kept_curve(metric: LayerMetric, side: Side, loss_E: torch.Tensor, score_E: torch.Tensor) -> SideCurve:
    """A slot an expert, which is there or not; a token is answered by as many experts as before, so at least those stay.

    Where the router looks for groups of experts first, as many stay as leave it enough in every group that it may take.

    Args:
        loss_E: what dropping each expert loses, output metric.
        score_E: what the method keeps experts by; the same for both sides.
    """
    rows, columns = metric.shape(side)
    experts, active = metric.layer.experts, sum(metric.frequencies) * rows * columns
    return _curve(
        metric, side, "kept-experts", torch.stack([loss_E, torch.zeros_like(loss_E)], 1), score_E[:, None],
        cost=[rows * columns] * experts,
        dense=[rows * columns] * experts,
        load=metric.frequencies,
        flops=[0.0] * experts,
        dense_flops=[load * rows * columns for load in metric.frequencies],
        fixed_flops=active,
        least=_fewest_kept(metric.layer, score_E),
    )


def _fewest_kept(layer: ExpertLayer, score_E: torch.Tensor) -> int:
    """The fewest experts, best first, from which on every number of them leaves the router enough; one more than there are if none does.

    One more expert is not always better: a group that had too few to be taken becomes one that may be taken, and has little else.
    """
    order = np.argsort(-score_E.double().cpu().numpy(), kind="stable").tolist()  # that of `SideCurve.slot_ranks`
    fewest = layer.experts + 1
    while fewest > layer.active and enough_left(order[: fewest - 1], layer.experts, layer.groups, layer.chosen_groups, layer.active):
        fewest -= 1
    return fewest


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
    fixed_cost: int = 0,
    fixed_flops: float = 0.0,
    least: int = 1,
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
        fixed_cost=fixed_cost,
        fixed_flops=fixed_flops,
        least=least,
    )
