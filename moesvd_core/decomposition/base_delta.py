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

from moesvd_core.decomposition.curves import base_curve, break_even
from moesvd_core.decomposition.factors import BaseDeltaFactors, DenseFactors, PerExpertFactors, SideFactors, balanced
from moesvd_core.decomposition.grams import symmetric_product
from moesvd_core.decomposition.losses import projection_losses, tail_losses
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.parallel import in_parallel
from moesvd_core.decomposition.projection import best_projection
from moesvd_core.planning import DENSE, Metric, Side, SideCurve

COMMON = 2.0
"""How many experts' squared entries a base must stand for to be on offer beside structures that do without (see `have_in_common`)."""


class BaseDeltaBasis:
    """The base of one side of a layer, and the directions that each expert's delta keeps, best first.

    Attributes:
        curve: predicted loss at every rank.
    """

    def __init__(
        self, metric: LayerMetric, side: Side, kind: Metric, base_NM: torch.Tensor, basis_ERS: torch.Tensor, curve: SideCurve
    ) -> None:
        self.curve = curve
        self._metric, self._side, self._kind, self._base_NM, self._basis_ERS = metric, side, kind, base_NM, basis_ERS

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric) -> "BaseDeltaBasis":
        """Decompose one side of a layer: one eigendecomposition an expert.

        Args:
            metric: the layer's inner products.
            side: which matrices.
            kind: the metric that the deltas minimise; losses are predicted in the output metric whichever it is.
        """
        rows, columns = metric.shape(side)
        ranks = break_even(rows * columns, rows + columns, min(rows, columns))
        base_NM = fisher_mean(metric, side)

        def decomposed(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            delta_NM = metric.weight(side, expert) - base_NM
            inner = metric.inner(side, kind, expert)
            found = best_projection(inner, _carried(metric, side, kind, expert, delta_NM), ranks)
            if kind == "output":
                loss_R = tail_losses(found.gain_R, found.rest)
            else:
                true_inner, true_outer_SS = metric.inner(side, "output", expert), _carried(metric, side, "output", expert, delta_NM)
                loss_R = projection_losses(inner.times(found.basis_RS), found.basis_RS, true_inner, true_outer_SS)
            return found.basis_RS.to(metric.dtype).cpu(), loss_R * metric.unit, found.gain_R

        bases, losses, gains = zip(*in_parallel(decomposed, metric.layer.experts, metric.device), strict=True)
        curve = base_curve(metric, side, torch.stack(losses), torch.stack(gains))
        return cls(metric, side, kind, base_NM.cpu(), torch.stack(bases), curve)

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """The base, and deltas at one rank an expert; DENSE keeps the original matrix."""
        stored = self._metric.stored(self._side)
        if all(rank == DENSE for rank in ranks):
            return DenseFactors(stored)
        pairs = [self._pair(expert, max(rank, 0)) for expert, rank in enumerate(ranks)]
        dense = {expert: stored[expert] for expert, rank in enumerate(ranks) if rank == DENSE}
        own = PerExpertFactors(tuple(ranks), tuple(left for left, _ in pairs), tuple(right for _, right in pairs), dense)
        return BaseDeltaFactors(self._base_NM, own)

    def _pair(self, expert: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Left [rows, rank] and right [rank, columns] factor of one expert's delta."""
        metric, side = self._metric, self._side
        delta_NM = metric.weight(side, expert) - self._base_NM.to(metric.device)
        basis_RS = self._basis_ERS[expert, :rank].to(metric.device, torch.float64)
        read_RS = metric.inner(side, self._kind, expert).times(basis_RS).to(metric.dtype)
        basis_RS = basis_RS.to(metric.dtype)
        right = metric.works_right(side)
        left_NR, right_RM = balanced(delta_NM @ read_RS.T, basis_RS) if right else balanced(basis_RS.T, read_RS @ delta_NM)
        return left_NR.cpu(), right_RM.cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can slice again."""
        curve = {"loss": torch.from_numpy(self.curve.loss_SR), "gain": torch.from_numpy(self.curve.gain_SR)}
        return {"base": self._base_NM, "basis": self._basis_ERS, **curve}

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
        return symmetric_product(metric.left(side, kind, expert).times(delta_NM.T), delta_NM)
    return symmetric_product(metric.right(side, kind, expert).times(delta_NM), delta_NM.T)
