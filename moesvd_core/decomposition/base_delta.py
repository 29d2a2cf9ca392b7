"""One base for all experts of a layer and a low-rank delta for each (D²-MoE).

The base is the experts' mean, every entry weighted by Fisher's information about it: W_b = Σ_e F_e ∘ W_e / Σ_e F_e. D²-MoE takes F from
the squared gradients of single samples. Calibration does not keep those of whole matrices; it keeps both sides of every expert's products
(see `curvature`), and with gradient and input taken as independent F_ij = (L_e)_ii · (G_e)_jj, summed over the tokens, so that it carries
how often the expert is used. What is left, Δ_e = W_e − W_b, is truncated in the method's metric; D²-MoE gives all experts one rank. Neurons
are not aligned first, as they are not there.

A base takes as many parameters as one expert. It is worth them where experts have much in common, as those that grew out of one dense
network have; where their matrices are independent, it says no more than any one of them does (`have_in_common`).

The semi-dynamic pruning of the base is left out. Its dynamic half skips columns of the base for a batch at a time: that saves
multiplications, and no stored byte. The static half would store a narrower base for a further loss.

Shapes: E experts, N rows and M columns of a side's matrices, S size of the smaller of their two spaces, R ranks.
"""

from collections.abc import Mapping, Sequence

import torch

from moesvd_core.decomposition.curves import base_curve
from moesvd_core.decomposition.factors import BaseDeltaFactors, PerExpertFactors, SideFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.per_expert import PerExpertBasis, best_directions, worth_storing
from moesvd_core.planning import Metric, Side, SideCurve

COMMON = 2.0
"""How many experts' squared entries a base must stand for to be on offer beside structures that do without (see `have_in_common`)."""


class BaseDeltaBasis(PerExpertBasis):
    """The base of one side of a layer, and the directions that each expert's delta keeps, best first.

    Attributes:
        curve: predicted loss at every rank.
    """

    def __init__(
        self, metric: LayerMetric, side: Side, kind: Metric, base_NM: torch.Tensor, basis_ERS: torch.Tensor, curve: SideCurve
    ) -> None:
        super().__init__(metric, side, kind, basis_ERS, curve)
        self._base_NM = base_NM

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric) -> "BaseDeltaBasis":
        """Decompose one side of a layer: one eigendecomposition an expert.

        Args:
            metric: the layer's inner products.
            side: which matrices.
            kind: the metric that the deltas minimise; losses are predicted in the output metric whichever it is.
        """
        base_NM = fisher_mean(metric, side)

        def carried(kind: Metric, expert: int) -> torch.Tensor:
            return _carried(metric, side, kind, expert, metric.weight(side, expert) - base_NM)

        basis_ERS, loss_ER, gain_ER = best_directions(metric, side, kind, worth_storing(metric, side), carried)
        return cls(metric, side, kind, base_NM.cpu(), basis_ERS, base_curve(metric, side, loss_ER, gain_ER))

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """The base, and deltas at one rank an expert; DENSE keeps the original matrix."""
        own = super().factors(ranks)
        return BaseDeltaFactors(self._base_NM.to(self._metric.device), own) if isinstance(own, PerExpertFactors) else own

    def _weight(self, expert: int) -> torch.Tensor:
        return super()._weight(expert) - self._base_NM.to(self._metric.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can slice again."""
        return {"base": self._base_NM, **super().tensors()}

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, kind: Metric, tensors: Mapping[str, torch.Tensor]) -> "BaseDeltaBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        curve = base_curve(metric, side, tensors["loss"], tensors["gain"])
        return cls(metric, side, kind, tensors["base"], tensors["basis"], curve)


def have_in_common(weight_ENM: torch.Tensor) -> bool:
    """Whether ‖Σ W_e‖² ≥ COMMON · Σ ‖W_e‖²: once the right side's sum where experts are independent, E times where they are alike."""
    summed_NM = weight_ENM.sum(0, dtype=torch.float32)
    held = sum(float(weight_NM.float().square().sum()) for weight_NM in weight_ENM)
    return float(summed_NM.square().sum()) >= COMMON * held


def fisher_mean(metric: LayerMetric, side: Side) -> torch.Tensor:
    """W_b, every entry the experts' mean by Fisher's information [N, M]; never 0/0, because Grams are ridged."""
    total_NM = torch.zeros(metric.shape(side), dtype=torch.float64, device=metric.device)
    weighed_NM = torch.zeros_like(total_NM)
    for expert in range(metric.layer.experts):
        left_N1 = metric.left(side, "output", expert).diagonal()[:, None]
        fisher_NM = left_N1 * metric.right(side, "output", expert).diagonal().clamp(min=torch.finfo(torch.float64).tiny)
        total_NM += fisher_NM
        weighed_NM += fisher_NM * metric.weight(side, expert)
    return (weighed_NM / total_NM).to(metric.dtype)


def _carried(metric: LayerMetric, side: Side, kind: Metric, expert: int, delta_NM: torch.Tensor) -> torch.Tensor:
    """What a delta carries into the smaller space: Δᵀ L Δ or Δ G Δᵀ, float64."""
    delta_NM = delta_NM.double()
    if metric.works_right(side):
        return metric.left(side, kind, expert).carried(delta_NM)
    return metric.right(side, kind, expert).carried(delta_NM.T)
