"""Expert pruning: some experts stay as they are, the others go, and the router chooses among those that stay (REAP).

That the router no longer sees the pruned ones is half of the method: its next choices answer in their place, where an expert that is merely
zero would leave a hole. The predicted loss knows nothing of them: it is that of the hole, an upper bound as far as second order goes. An
expert's output bias is part of its answer, and goes with it.

Shapes: E experts.
"""

from collections.abc import Mapping, Sequence

import torch

from moesvd_core.decomposition.curves import kept_curve
from moesvd_core.decomposition.factors import DenseFactors, PerExpertFactors, SideFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import DENSE, Metric, Side, SideCurve


class KeptExpertsBasis:
    """Which experts of a layer are worth keeping; both sides of a layer say the same.

    Attributes:
        curve: what each expert's absence loses, on the output side (counting it on both would count it twice); a slot an expert.
    """

    def __init__(self, metric: LayerMetric, side: Side, curve: SideCurve) -> None:
        self.curve = curve
        self._metric, self._side = metric, side

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric) -> "KeptExpertsBasis":
        """Score the experts of a layer.

        Args:
            kind: "saliency", mean(p·‖y‖) over an expert's tokens (REAP); "frequency", how many they are; "output", what its absence loses.
        """
        experts = range(metric.layer.experts)
        absence_E = torch.tensor([metric.absence(expert) for expert in experts], dtype=torch.float64) * metric.unit
        score_E = {"saliency": metric.statistics.saliency_E, "frequency": metric.statistics.count_E, "output": absence_E}[kind].double()
        loss_E = absence_E if side == "output" else torch.zeros_like(absence_E)
        return cls(metric, side, kept_curve(metric, side, loss_E, score_E))

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """The matrices of the experts whose rank is DENSE; those of rank 0 are gone."""
        stored = self._metric.stored(self._side)
        if all(rank == DENSE for rank in ranks):
            return DenseFactors(stored)
        rows, columns = self._metric.shape(self._side)
        nothing = torch.empty(0, dtype=self._metric.dtype, device=self._metric.device)
        return PerExpertFactors(
            tuple(ranks),
            tuple(nothing.reshape(rows, 0) for _ in ranks),
            tuple(nothing.reshape(0, columns) for _ in ranks),
            {expert: stored[expert] for expert, rank in enumerate(ranks) if rank == DENSE},
        )

    def biases(self, ranks: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Those of all experts: they are not worth a form of their own."""
        return self._metric.weights.input_bias_EN, self._metric.weights.output_bias_ED

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can choose again."""
        return {"loss": torch.from_numpy(self.curve.loss_SR), "score": torch.from_numpy(self.curve.gain_SR).clone()}

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, tensors: Mapping[str, torch.Tensor]) -> "KeptExpertsBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        return cls(metric, side, kept_curve(metric, side, tensors["loss"][:, 0], tensors["score"][:, 0]))
