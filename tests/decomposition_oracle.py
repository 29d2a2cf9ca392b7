"""What factors really lose: the trace written out, with no prefix sums and no shortcuts."""

import torch

from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import Side

SHAPES = {"wide": (10, 14), "narrow": (12, 4), "square": (8, 8)}
"""(hidden, width): the input side works right, left, right; the output side left, right, left."""


def measured_loss(metric: LayerMetric, side: Side, got_ENM: torch.Tensor, experts: list[int] | None = None) -> float:
    """½ Σ_e tr L_e ΔW G_e ΔWᵀ / tokens in the output metric."""
    total = 0.0
    for expert in experts if experts is not None else range(metric.layer.experts):
        delta_NM = (metric.stored(side)[expert] - got_ENM[expert]).double()
        left_NN = metric.left(side, "output", expert).full()
        total += float((left_NN @ metric.right(side, "output", expert).times(delta_NM) @ delta_NM.T).trace())
    return 0.5 * total / metric.statistics.tokens
