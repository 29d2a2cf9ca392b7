"""One input basis and one output basis for all experts of a layer, and each expert's own small matrices in between.

Gate and up of all experts read the same input, and down writes the same output space, so these two spaces can be shared; the neurons
between them have no common order across experts, so nothing there is. At run time an ordinary, narrower mixture is left.

Shapes: E experts, D hidden size, N rows of an input matrix, M width, R rank.
"""

from collections.abc import Mapping, Sequence

import torch

from moesvd_core.decomposition.curves import break_even, latent_curve
from moesvd_core.decomposition.factors import DenseFactors, RightGroup, SharedLeftFactors, SharedRightFactors, SideFactors, balanced
from moesvd_core.decomposition.grams import FullGram, cholesky, ridged, symmetric
from moesvd_core.decomposition.losses import fit_gains, projection_losses, tail_losses
from moesvd_core.decomposition.metrics import GRAM_RIDGE, LayerMetric
from moesvd_core.decomposition.projection import best_projection
from moesvd_core.planning import DENSE, Metric, Side, SideCurve


class LatentBasis:
    """The shared directions of one side of a layer, best first.

    Attributes:
        curve: predicted loss at every rank; one slot.
    """

    def __init__(self, metric: LayerMetric, side: Side, kind: Metric, basis_RD: torch.Tensor, curve: SideCurve) -> None:
        self.curve = curve
        self._metric, self._side, self._kind, self._basis_RD = metric, side, kind, basis_RD

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric) -> "LatentBasis":
        """Find the shared basis of one side: two eigendecompositions of hidden size for the whole layer."""
        rows, columns = metric.shape(side)
        own = metric.layer.experts * (rows if side == "input" else columns)
        ranks = break_even(metric.layer.experts * rows * columns, metric.layer.hidden + own, min(metric.layer.hidden, own))
        basis_RD, loss_R, gain_R = (_input_basis if side == "input" else _output_basis)(metric, kind, ranks)
        curve = latent_curve(metric, side, loss_R * metric.unit, gain_R)
        return cls(metric, side, kind, basis_RD.to(metric.dtype).cpu(), curve)

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """Factors at one rank for the layer; DENSE keeps the original matrices."""
        (rank,) = ranks
        if rank == DENSE:
            return DenseFactors(self._metric.stored(self._side))
        basis_RD = self._basis_RD[:rank].to(self._metric.device, torch.float64)
        return self._input_factors(basis_RD) if self._side == "input" else self._output_factors(basis_RD)

    def _input_factors(self, basis_RD: torch.Tensor) -> SideFactors:
        """V and A_e = W_e C_e Vᵀ (V C_e Vᵀ)^{-1}: the shared basis, refitted to each expert's own tokens."""
        metric, experts = self._metric, range(self._metric.layer.experts)
        left_ENR = torch.stack([fitted(metric, "input", expert, basis_RD) for expert in experts])
        left_ENR, right_RD = balanced(left_ENR, basis_RD.to(metric.dtype))
        return SharedRightFactors((RightGroup(tuple(experts), right_RD.cpu(), left_ENR.cpu(), tuple((expert,) for expert in experts)),))

    def _output_factors(self, basis_RD: torch.Tensor) -> SideFactors:
        """P = Γ^{-1/2} Q and B_e = Qᵀ Γ^{1/2} D_e; exact optimum, nothing to refit."""
        metric = self._metric
        read_RD = metric.left("output", self._kind, 0).times(basis_RD).to(metric.dtype)
        right_ERM = torch.stack([read_RD @ metric.weight("output", expert) for expert in range(metric.layer.experts)])
        left_DR, right_ERM = balanced(basis_RD.T.to(metric.dtype), right_ERM)
        return SharedLeftFactors(left_DR.cpu(), right_ERM.cpu())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can slice again."""
        return {"basis": self._basis_RD, "loss": torch.from_numpy(self.curve.loss_SR), "gain": torch.from_numpy(self.curve.gain_SR)}

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, kind: Metric, tensors: Mapping[str, torch.Tensor]) -> "LatentBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        return cls(metric, side, kind, tensors["basis"], latent_curve(metric, side, tensors["loss"][0], tensors["gain"][0]))


def fitted(metric: LayerMetric, side: Side, expert: int, basis_RM: torch.Tensor) -> torch.Tensor:
    """The least-squares left factor for a given right factor V, W G Vᵀ (V G Vᵀ)^{-1} [N, R], with the expert's own token Gram G."""
    seen_RM = metric.right(side, "output", expert).times(basis_RM)
    lower_RR = cholesky(symmetric(seen_RM @ basis_RM.T))
    reader_RM = torch.cholesky_solve(seen_RM, lower_RR)
    return metric.weight(side, expert) @ reader_RM.T.to(metric.dtype)


def _input_basis(metric: LayerMetric, kind: Metric, ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V = Q_rᵀ C̄^{-1/2} from the eigenvectors Q of C̄^{1/2} (Σ_e w_e W_eᵀ ρ_e W_e) C̄^{1/2}; loss after each expert's own refit; gains.

    w_e is the expert's share of the layer's energy: C_e ≈ w_e C̄, which the refit then puts right. The losses are in the output metric,
    whatever metric found the basis.
    """
    experts = range(metric.layer.experts)
    pooled_DD = torch.zeros(metric.layer.hidden, metric.layer.hidden, dtype=torch.float64, device=metric.device)
    summed_DD = torch.zeros_like(pooled_DD)
    for expert in experts:
        gram_DD = metric.right_of_input(kind, expert).full()
        pooled_DD += gram_DD
        summed_DD += gram_DD.trace() * metric.read_by("input", kind, expert)
    summed_DD /= pooled_DD.trace()
    found = best_projection(FullGram(ridged(pooled_DD, GRAM_RIDGE)), summed_DD, ranks)

    gain_R, total = torch.zeros(ranks, dtype=torch.float64, device=metric.device), 0.0
    for expert in experts:
        gain_R += fit_gains(found.basis_RS, metric.right_of_input("output", expert), metric.read_by("input", "output", expert))
        total += metric.energy("input", expert)
    return found.basis_RS, tail_losses(gain_R, total - float(gain_R.sum())), found.gain_R


def _output_basis(metric: LayerMetric, kind: Metric, ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P = Γ^{-1/2} Q_r from the eigenvectors of Γ^{1/2} (Σ_e O_e) Γ^{1/2}; loss; gains. Rows of the basis are the columns of P."""
    inner = metric.left("output", kind, 0)
    found = best_projection(inner, _written(metric, kind), ranks)
    if kind == "output":
        return found.basis_RS, tail_losses(found.gain_R, found.rest), found.gain_R
    true_inner, true_outer_DD = metric.left("output", "output", 0), _written(metric, "output")
    return found.basis_RS, projection_losses(inner.times(found.basis_RS), found.basis_RS, true_inner, true_outer_DD), found.gain_R


def _written(metric: LayerMetric, kind: Metric) -> torch.Tensor:
    """Σ_e D_e G_e D_eᵀ [D, D]."""
    summed_DD = metric.written_by("output", kind, 0)
    for expert in range(1, metric.layer.experts):
        summed_DD += metric.written_by("output", kind, expert)
    return summed_DD
