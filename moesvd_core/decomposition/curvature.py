"""How the loss bends under an error of one layer's experts: the two sides of the output metric's inner products.

A token changes the loss by p·gᵀ ΔW h where the output matrix is off by ΔW, and by δᵀ ΔW x where the input matrix is (g: gradient of the
summed NLL at the experts' output, δ: at the pre-activations, p in it). Summed squares over the tokens are the second-order change (with
Fisher's matrix for the Hessian); taking the two factors of each product as independent leaves tr L ΔW G ΔWᵀ (as K-FAC does).

Measured, after a backward pass:
    output side: L_e = Σ p² g gᵀ / Σ p², each expert's own: tokens sent to different experts bend the loss in different directions.
    input side: L_e = Σ δ δᵀ / Σ ‖δ‖², and G_e = Σ ‖δ‖² x xᵀ: tokens count by what they can do to the loss. Both are sums over what really
    happened, where a product of averages, ρ_j = (Dᵀ Γ D)_jj · E[(∂h_j/∂pre_j)²], would take gradient, slope and input as independent of
    each other and every neuron as independent of the next. On the demo model that costs a quarter of the loss (ΔNLL .111 against .091
    at 22 % of the experts' parameters). Wide experts keep the diagonal of L_e only.
Estimated, without one: L = Γ of the layer (from a probe: a multiple of the identity), and ρ, with C_e for G_e.

Shapes: E experts, D hidden size, M width, N input rows. An expert may be several, a slice: then what is told has a leading dimension,
or none where it is the same for all experts.
"""

from abc import ABC, abstractmethod

import torch

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.decomposition.grams import DiagonalGram, FullGram, RootedGram, diagonal_of, ridged, ridged_, settled_, summed, symmetric
from moesvd_core.decomposition.parallel import MadeOnce
from moesvd_core.devices import to_device

GRADIENT_RIDGE = 1e-4
"""Ridge on Γ and ρ, as a share of their mean."""
ROW_RIDGE = 0.1
"""Ridge on Σ δ δᵀ, as a share of its mean diagonal: a neuron that calibration found idle is not free to be wrong elsewhere."""
GRAM_RIDGE = 1e-6
"""Ridge on input Grams, as a share of their mean diagonal, at least."""
PSEUDO_SHARE = 0.02
"""Pooled tokens lent to every expert, as a share of an average expert's tokens, so that a rare expert is never measured by noise."""

Which = int | slice
"""One expert, or several that follow one another and are worked on at once."""


class Curvature(ABC):
    """Left weights of both sides, and the input side's right one where it is another than the Gram of the tokens."""

    @abstractmethod
    def of_output(self, expert: Which) -> RootedGram:
        """L_e of the output matrix, [D, D], a mean over tokens."""

    @abstractmethod
    def of_rows(self, expert: Which) -> RootedGram:
        """L_e of the input matrix, [N, N], a mean over tokens."""

    @abstractmethod
    def input_gram(self, expert: Which) -> torch.Tensor | None:
        """G_e of the input matrix, [D, D], a sum over calibration tokens, ridged; None: the Gram of the tokens."""


def curvature_of(
    weights: ExpertWeights, layer: ExpertLayer, statistics: LayerStatistics, device: torch.device, lent: float
) -> Curvature:
    """As much as calibration found out.

    Args:
        lent: what every expert is lent of the layer's average (`PSEUDO_SHARE`), 0 for nothing.
    """
    if statistics.gradient_gram_EDD is None:
        return EstimatedCurvature(weights, layer, statistics, device, lent)
    return MeasuredCurvature(layer, statistics, device, lent)


class MeasuredCurvature(Curvature):
    """From the sums of a backward pass."""

    def __init__(self, layer: ExpertLayer, statistics: LayerStatistics, device: torch.device, lent: float) -> None:
        self._layer, self._device, self._lent = layer, device, lent
        self._to_all_tokens = statistics.tokens / statistics.gradient_tokens
        self._gradient_gram_EDD = _present(statistics.gradient_gram_EDD)
        self._weight_square_E = _present(statistics.gradient_weight_square_E)
        self._row_square_EN = _present(statistics.row_square_EN)
        self._row_gram_ENN = statistics.row_gram_ENN
        self._weighted_input_gram_EDD = _present(statistics.weighted_input_gram_EDD)

    def of_output(self, expert: Which) -> RootedGram:
        own_DD = self._own(self._gradient_gram_EDD, expert).add_(self._mean_gradient_gram, alpha=self._lent)
        weight_square = self._own(self._weight_square_E, expert) + self._lent * float(self._weight_square_E.double().mean())
        return FullGram(ridged_(own_DD.div_(_positive(weight_square)[..., None, None]), GRADIENT_RIDGE))

    def of_rows(self, expert: Which) -> RootedGram:
        lent_N = self._lent * self._mean_row_square
        square_N = self._own(self._row_square_EN, expert) + lent_N
        total_1 = _positive(square_N.sum(-1, keepdim=True))
        if self._row_gram_ENN is None:
            return DiagonalGram(square_N / total_1 + ROW_RIDGE / square_N.shape[-1])
        own_NN = self._own(self._row_gram_ENN, expert)
        diagonal_of(own_NN).add_(lent_N)
        return FullGram(ridged_(own_NN.div_(total_1[..., None]), ROW_RIDGE))

    def input_gram(self, expert: Which) -> torch.Tensor:
        own_DD = self._own(self._weighted_input_gram_EDD, expert).add_(self._mean_input_gram, alpha=self._lent)
        return settled_(own_DD.mul_(self._to_all_tokens), GRAM_RIDGE, self._weighted_input_gram_EDD.dtype)

    def _own(self, sum_E: torch.Tensor, expert: Which) -> torch.Tensor:
        """The expert's own sum, a copy in double precision."""
        return to_device(sum_E[expert], self._device).to(torch.float64, copy=True)

    @MadeOnce
    def _mean_gradient_gram(self) -> torch.Tensor:
        return summed(to_device(self._gradient_gram_EDD, self._device)) / self._layer.experts

    @MadeOnce
    def _mean_input_gram(self) -> torch.Tensor:
        return summed(to_device(self._weighted_input_gram_EDD, self._device)) / self._layer.experts

    @MadeOnce
    def _mean_row_square(self) -> torch.Tensor:
        """Neurons have no common order across experts: what experts can lend each other is the mean of gate rows and that of up rows."""
        return mean_by_kind(self._layer, self._row_square_EN.to(self._device, torch.float64))


class EstimatedCurvature(Curvature):
    """From the layer's Γ and the neurons' mean squared slopes; Γ is the identity when calibration found out nothing."""

    def __init__(
        self, weights: ExpertWeights, layer: ExpertLayer, statistics: LayerStatistics, device: torch.device, lent: float
    ) -> None:
        self._weights, self._layer, self._statistics, self._device, self._lent = weights, layer, statistics, device, lent

    def of_output(self, expert: Which) -> RootedGram:
        return self._gradient_gram

    def of_rows(self, expert: Which) -> RootedGram:
        return DiagonalGram(self._row_weight[expert])

    def input_gram(self, expert: Which) -> None:
        return None

    @MadeOnce
    def _gradient_gram(self) -> FullGram:
        """Γ a token, ridged."""
        gram_DD, tokens = self._statistics.gradient_gram_DD, self._statistics.gradient_tokens
        if gram_DD is None:
            return FullGram(torch.eye(self._layer.hidden, dtype=torch.float64, device=self._device))
        return FullGram(ridged(symmetric(gram_DD.to(self._device, torch.float64)) / tokens, GRADIENT_RIDGE))

    @MadeOnce
    def _row_weight(self) -> torch.Tensor:
        """ρ of every input row, [E, N], ridged: curvature of its neuron times the neuron's mean squared slope."""
        neuron_N = self._layer.neuron_of_row().to(self._device)
        curvature_EM = torch.stack([self._neuron_curvature(expert) for expert in range(self._layer.experts)])
        weight_EN = curvature_EM[:, neuron_N] * self._mean_slope
        mean = float(weight_EN.mean())
        return weight_EN + (GRADIENT_RIDGE * mean if mean > 0 else 1.0)

    def _neuron_curvature(self, expert: int) -> torch.Tensor:
        """(Dᵀ Γ D)_jj, [M]."""
        stored_DM = self._weights.output_EDM[expert]
        weight_DM = stored_DM.to(self._device, torch.float64 if stored_DM.dtype == torch.float64 else torch.float32)
        return (self._gradient_gram.times(weight_DM.T).T * weight_DM).sum(0).double()

    @MadeOnce
    def _mean_slope(self) -> torch.Tensor:
        """Mean squared slope of every input row, weighted by p², [E, N]; rare experts lean on the layer's mean of the kind of row.

        The Gram that it multiplies carries p² already, hence the division by Σ p² and not by the tokens.
        """
        slope_EN = self._statistics.slope_EN.to(self._device, torch.float64)
        square_E1 = self._statistics.weight_square_E.to(self._device, torch.float64)[:, None]
        lent_N = self._lent * mean_by_kind(self._layer, slope_EN)
        return (slope_EN + lent_N) / _positive(square_E1 + self._lent * square_E1.mean())


def mean_by_kind(layer: ExpertLayer, sum_EN: torch.Tensor) -> torch.Tensor:
    """The mean over experts and all rows of a kind (gate or up), for every row, [N]."""
    kind_N = _kind_of_row(layer).to(sum_EN.device)
    mean_N = torch.zeros_like(sum_EN[0])
    for kind in range(int(kind_N.max()) + 1):
        mean_N[kind_N == kind] = sum_EN[:, kind_N == kind].mean()
    return mean_N


def _kind_of_row(layer: ExpertLayer) -> torch.Tensor:
    """0 for gate rows and 1 for up rows, int64 [N]; all 0 without a gate."""
    row_N = torch.arange(layer.input_rows)
    if layer.rows == "interleaved":
        return row_N % 2
    return row_N // layer.width


def _positive(value: torch.Tensor) -> torch.Tensor:
    """The value, or next to nothing where it is zero, so that it can be divided by."""
    return value.clamp(min=torch.finfo(torch.float64).tiny)


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "sums of one backward pass come together"  # noqa: S101 - `LayerMetric` checked
    return tensor
