"""Neuron pruning: every expert keeps its most salient neurons, and its output matrix is fitted anew to them.

A neuron is a row of gate and of up and a column of down; what is left of an expert is a narrower one. Neurons are kept by the energy that
they add to the output, E[p² h_j²]·‖D_j‖² (as CAMERA-P ranks them; in the output metric with D_jᵀ L D_j). The refit is D' = D H_:S H_SS⁻¹,
least squares on the expert's own tokens, so that neurons which stay answer for those that go.

With neurons in order of salience and H = Λ Λᵀ (Cholesky, nested), the fit of D to the first r neurons explains the first r rows of Λᵀ Dᵀ:
one factor gives the loss at every number of neurons, exactly. It falls on the output side alone, the rows that stay are the original ones.

Shapes: E experts, M width, N input rows, D hidden size, R neurons kept, K the same of all experts' rows or columns.
"""

from collections.abc import Mapping, Sequence

import torch

from moesvd_core.decomposition.curves import neuron_curve
from moesvd_core.decomposition.factors import DenseFactors, NarrowFactors, SideFactors
from moesvd_core.decomposition.grams import EPSILON, FullGram, Gram, cholesky, ridged, symmetric
from moesvd_core.decomposition.losses import tail_losses
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import DENSE, Metric, Side, SideCurve


class KeptNeuronsBasis:
    """The neurons of every expert, the most salient first; both sides of a layer say the same.

    Attributes:
        curve: predicted loss at every number of neurons kept; one slot.
    """

    def __init__(self, metric: LayerMetric, side: Side, order_EM: torch.Tensor, curve: SideCurve) -> None:
        self.curve = curve
        self._metric, self._side, self._order_EM = metric, side, order_EM

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric) -> "KeptNeuronsBasis":
        """Rank the neurons of a layer; on the output side one Cholesky factor of width size an expert tells the losses.

        Args:
            kind: "input" or "output", the metric in which an output counts.
        """
        orders, saliences, gains = [], [], []
        for expert in range(metric.layer.experts):
            gram = metric.right_of_output("output", expert)
            weight_DM = metric.weight("output", expert).double()
            left = metric.left("output", kind, expert)
            column_M = (left.times(weight_DM.T).T * weight_DM).sum(0)
            salience_M, order_M = (gram.diagonal() * column_M).sort(descending=True, stable=True)
            orders.append(order_M)
            saliences.append(salience_M)
            if side == "output":
                explained_MD = cholesky(_ordered(gram, order_M)).T @ weight_DM[:, order_M].T
                gains.append((metric.left("output", "output", expert).times(explained_MD) * explained_MD).sum(1))
        gain_M = torch.stack(gains).sum(0) * metric.unit if gains else torch.zeros(metric.layer.width, dtype=torch.float64)
        curve = neuron_curve(metric, side, tail_losses(gain_M), torch.stack(saliences).sum(0))
        return cls(metric, side, torch.stack(orders).cpu(), curve)

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """The matrices of the neurons kept, so many in every expert; DENSE keeps the original matrices."""
        (rank,) = ranks
        metric, side, layer = self._metric, self._side, self._metric.layer
        if rank == DENSE:
            return DenseFactors(metric.stored(side))
        experts = range(layer.experts)
        if side == "output":
            weight_EDR = torch.stack([self._refitted(expert, rank) for expert in experts])
            return NarrowFactors(weight_EDR, 2, 1, layer.width)
        weight_ERD = torch.stack([metric.weight(side, expert)[self.rows(expert, rank).to(metric.device)] for expert in experts])
        return NarrowFactors(weight_ERD, 1, 2 if layer.rows == "concatenated" else 1, layer.input_rows)

    def neurons(self, expert: int, rank: int) -> torch.Tensor:
        """Neurons that an expert keeps, ascending: they stay in the order of the family's layout."""
        return self._order_EM[expert, :rank].sort().values

    def rows(self, expert: int, rank: int) -> torch.Tensor:
        """Their rows of the input matrix, ascending."""
        return torch.isin(self._metric.layer.neuron_of_row(), self.neurons(expert, rank)).nonzero()[:, 0]

    def biases(self, ranks: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The input bias of the rows that stay, and the output bias."""
        (rank,) = ranks
        bias_EN = self._metric.weights.input_bias_EN
        if bias_EN is not None and rank != DENSE:
            bias_EN = torch.stack([bias_N[self.rows(expert, rank)] for expert, bias_N in enumerate(bias_EN.cpu())])
        return bias_EN, self._metric.weights.output_bias_ED

    def _refitted(self, expert: int, rank: int) -> torch.Tensor:
        """D H_:S H_SS⁻¹, [D, R]."""
        metric = self._metric
        kept_R = self.neurons(expert, rank).to(metric.device)
        gram = metric.right_of_output("output", expert)
        seen_DR = gram.times(metric.weight("output", expert).double())[:, kept_R]
        fitted_RD: torch.Tensor = torch.cholesky_solve(seen_DR.T, cholesky(_ordered(gram, kept_R)))
        return fitted_RD.T.to(metric.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can cut again."""
        return {"order": self._order_EM, "loss": torch.from_numpy(self.curve.loss_SR), "gain": torch.from_numpy(self.curve.gain_SR)}

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, tensors: Mapping[str, torch.Tensor]) -> "KeptNeuronsBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        return cls(metric, side, tensors["order"], neuron_curve(metric, side, tensors["loss"][0], tensors["gain"][0]))


def _ordered(gram: Gram, index_R: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a Gram matrix, [R, R]; of one that is implied they are made for this (wide experts: the square of the width)."""
    if isinstance(gram, FullGram):
        return gram.gram_SS[index_R][:, index_R]
    diagonal_S = gram.diagonal()
    chosen_RS = torch.zeros(len(index_R), len(diagonal_S), dtype=torch.float64, device=diagonal_S.device)
    chosen_RS[torch.arange(len(index_R), device=diagonal_S.device), index_R] = 1
    return ridged(symmetric(gram.times(chosen_RS)[:, index_R]), EPSILON)
