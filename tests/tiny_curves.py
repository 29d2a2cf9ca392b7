"""Made-up curves for planning: what decomposition would give, without a model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from moesvd_core.planning import ModelShape, Side, SideCurve, Structure


def curve(
    losses: ArrayLike,
    *,
    layer: int = 0,
    side: Side = "input",
    structure: Structure = "per-expert",
    rank_cost: ArrayLike = 1,
    dense_cost: ArrayLike = 10,
    load: ArrayLike = 1.0,
) -> SideCurve:
    """A slot for each list of losses at rank 0, 1, 2 ...; multiply-adds are parameters times load."""
    loss_SR = np.array(losses, dtype=np.float64)
    slots = len(loss_SR)
    rank_cost_S, dense_cost_S = np.broadcast_to(rank_cost, slots).astype(np.int64), np.broadcast_to(dense_cost, slots).astype(np.int64)
    load_S = np.broadcast_to(load, slots).astype(np.float64)
    gain_SR = np.abs(np.diff(loss_SR, axis=1))
    flops = (load_S * rank_cost_S, load_S * dense_cost_S)
    return SideCurve(layer, side, structure, loss_SR, gain_SR, rank_cost_S, dense_cost_S, load_S, *flops)


def random_losses(rng: np.random.Generator, slots: int, ranks: int, *, convex: bool = True) -> np.ndarray:
    """Falling losses [slots, ranks + 1] that end above 0."""
    gain_SR = rng.random((slots, ranks)) + 0.01
    if convex:
        gain_SR = -np.sort(-gain_SR, axis=1)
    tail_S1 = rng.random((slots, 1))
    return np.hstack([gain_SR[:, ::-1].cumsum(axis=1)[:, ::-1] + tail_S1, tail_S1])


def model_curves(
    layers: int, experts: int, hidden: int, width: int, *, structures: Sequence[Structure] = ("per-expert",), active: int = 2, seed: int = 0
) -> list[SideCurve]:
    """Curves of a whole model: power-law spectra, uneven routing, every structure pruned to the same loss."""
    rng = np.random.default_rng(seed)
    curves = []
    for layer in range(layers):
        load_E = rng.dirichlet(np.full(experts, 2.0)) * active
        sides: list[tuple[Side, int, int]] = [("input", 2 * width, hidden), ("output", hidden, width)]
        for side, rows, columns in sides:
            ranks = min(rows, columns)
            gain_ER = np.arange(1, ranks + 1) ** -rng.uniform(0.4, 1.6, (experts, 1)) * load_E[:, None] * np.exp(rng.normal()) * 1e-3
            loss_ER = np.hstack([gain_ER[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((experts, 1))])
            own = rows if side == "input" else columns
            for structure in structures:
                where = {"layer": layer, "side": side, "structure": structure}
                if structure in ("per-expert", "pivoted", "base-delta"):
                    made = curve(loss_ER, **where, rank_cost=rows + columns, dense_cost=rows * columns, load=load_E)
                    base = rows * columns if structure == "base-delta" else 0
                    curves.append(replace(made, fixed_cost=base, fixed_flops=float(base), identities=int(structure == "pivoted")))
                    continue
                gain_R = np.arange(1, hidden + 1) ** -rng.uniform(0.2, 1.0)
                loss_R = np.append(gain_R[::-1].cumsum()[::-1], 0.0) / gain_R.sum() * loss_ER[:, 0].sum()
                sharers = experts if structure == "latent" else max(1, experts // 4)
                costs = {"rank_cost": hidden + sharers * own, "dense_cost": experts * rows * columns, "load": active / experts}
                curves.append(curve([loss_R], **where, **costs))
    return curves


def shape_of(curves: Sequence[SideCurve], *, other: int = 0) -> ModelShape:
    """A model whose routed experts are those of the curves, with `other` parameters beside them, stored in two bytes each."""
    sides = {(each.layer, each.side): each for each in curves}.values()
    experts = sum(each.dense_parameters for each in sides)
    active = min(experts, round(sum(each.dense_flops for each in sides)))
    return ModelShape(experts + other, active + other, 2 * (experts + other), experts, 2.0)
