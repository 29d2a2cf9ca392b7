"""Every expert's own factors: W_e ≈ A_e V_e, optimal at every rank in the method's metric.

Shapes: E experts, S size of the smaller space of a side's matrices, R ranks worth storing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from moesvd_core.decomposition.curves import break_even, per_expert_curve
from moesvd_core.decomposition.factors import DenseFactors, PerExpertFactors, SideFactors, balanced
from moesvd_core.decomposition.losses import projection_losses, tail_losses
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.parallel import in_parallel
from moesvd_core.decomposition.projection import best_projection
from moesvd_core.devices import copy_to_host_, to_device
from moesvd_core.planning import DENSE, Metric, Side, SideCurve


class PerExpertBasis:
    """The directions that each expert of one side keeps, best first.

    Attributes:
        curve: predicted loss at every rank.
    """

    def __init__(self, metric: LayerMetric, side: Side, kind: Metric, basis_ERS: torch.Tensor, curve: SideCurve) -> None:
        self.curve = curve
        self._metric, self._side, self._kind, self._basis_ERS = metric, side, kind, basis_ERS

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric) -> "PerExpertBasis":
        """Decompose one side of a layer: one eigendecomposition an expert, in the smaller of its matrices' two spaces.

        Args:
            metric: the layer's inner products.
            side: which matrices.
            kind: the metric that the factors minimise; losses are predicted in the output metric whichever it is.
        """
        basis_ERS, loss_ER, gain_ER = best_directions(metric, side, kind, worth_storing(metric, side), partial(metric.outer, side))
        return cls(metric, side, kind, basis_ERS, per_expert_curve(metric, side, loss_ER, gain_ER))

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """Factors at one rank an expert; DENSE keeps the original matrix, 0 drops it."""
        stored = self._metric.stored(self._side)
        if all(rank == DENSE for rank in ranks):
            return DenseFactors(stored)
        pairs = list(in_parallel(lambda expert: self._pair(expert, max(ranks[expert], 0)), len(ranks), self._metric.device))
        dense = {expert: stored[expert] for expert, rank in enumerate(ranks) if rank == DENSE}
        return PerExpertFactors(tuple(ranks), tuple(left for left, _ in pairs), tuple(right for _, right in pairs), dense)

    def _pair(self, expert: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Left [rows, rank] and right [rank, columns] factor of one expert."""
        weight_NM = self._weight(expert)
        basis_RS = to_device(self._basis_ERS[expert, :rank], self._metric.device).double()
        read_RS = self._metric.inner(self._side, self._kind, expert).times(basis_RS)
        basis_RS, read_RS = basis_RS.to(weight_NM.dtype), read_RS.to(weight_NM.dtype)
        right = self._metric.works_right(self._side)
        return balanced(weight_NM @ read_RS.T, basis_RS) if right else balanced(basis_RS.T, read_RS @ weight_NM)

    def _weight(self, expert: int) -> torch.Tensor:
        """What an expert's factors stand for, [rows, columns]."""
        return self._metric.weight(self._side, expert)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can slice again."""
        return {"basis": self._basis_ERS, "loss": torch.from_numpy(self.curve.loss_SR), "gain": torch.from_numpy(self.curve.gain_SR)}

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, kind: Metric, tensors: Mapping[str, torch.Tensor]) -> "PerExpertBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        return cls(metric, side, kind, tensors["basis"], per_expert_curve(metric, side, tensors["loss"], tensors["gain"]))


def worth_storing(metric: LayerMetric, side: Side) -> int:
    """Ranks up to break-even of two whole factors and the original matrix."""
    rows, columns = metric.shape(side)
    return break_even(rows * columns, rows + columns, min(rows, columns))


def best_directions(
    metric: LayerMetric, side: Side, kind: Metric, ranks: int, outer: Callable[[Metric, int], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every expert the best directions [E, R, S], the loss at every rank [E, R+1] and the gains [E, R].

    Args:
        metric: the layer's inner products.
        side: which matrices.
        kind: the metric that is minimised; losses are predicted in the output metric whichever it is.
        ranks: how many directions.
        outer: what an expert's matrix carries into the smaller space in a metric (see `LayerMetric.outer`).
    """

    basis_ERS = torch.empty(metric.layer.experts, ranks, min(metric.shape(side)), dtype=metric.dtype)

    def found(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        inner = metric.inner(side, kind, expert)
        best = best_projection(inner, outer(kind, expert), ranks)
        if kind == "output":
            loss_R = tail_losses(best.gain_R, best.rest)
        else:
            true_inner, true_outer_SS = metric.inner(side, "output", expert), outer("output", expert)
            loss_R = projection_losses(inner.times(best.basis_RS), best.basis_RS, true_inner, true_outer_SS)
        copy_to_host_(basis_ERS[expert], best.basis_RS)
        return loss_R * metric.unit, best.gain_R

    losses, gains = zip(*in_parallel(found, metric.layer.experts, metric.device), strict=True)
    return basis_ERS, torch.stack(losses), torch.stack(gains)
