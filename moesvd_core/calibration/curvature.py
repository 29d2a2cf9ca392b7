"""Sums of one layer's backward pass: how the loss bends under an error of each expert's matrices, measured where the error is made.

With g the gradient of the summed NLL at the experts' output, a token changes the loss by p·gᵀ ΔW h when the output matrix is off by ΔW,
and by δᵀ ΔW x when the input matrix is, where δ = p·(Oᵀ g) ⊙ ∂h/∂pre is the gradient at the pre-activations. The second moments of the
two sides of these products, kept apart, are what the output metric is made of (as in K-FAC). They belong to the expert: the tokens that
one is sent to bend the loss in directions of their own, and the tokens with a large gradient are not the average ones.

Products are made a batch at a time, mostly in float32 (`products`), and summed in float64.

Shapes: E experts, d hidden size (D), m expert width (M), n input rows (N), K labels a position; lower-case n in a name: the tokens of one
expert in one batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesvd_core.architectures.experts_io import gate_function, read_experts, routed_tokens
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.calibration.fused import fuses, row_squares
from moesvd_core.calibration.gathering import Gathering
from moesvd_core.calibration.moments import on_host, pre_activations, slopes, symmetric_on_host
from moesvd_core.calibration.products import add_gram_, multiplies_rounded
from moesvd_core.devices import on_card
from moesvd_core.errors import StatisticsError


class LayerCurvature:
    """Running sums for one loaded experts module.

    Args:
        module: the native experts module, with weights.
        layer: its description.
        row_gram: collect Σ δ δᵀ, [E, n, n]; its diagonal is collected in any case.
    """

    def __init__(self, module: nn.Module, layer: ExpertLayer, *, row_gram: bool) -> None:
        self.layer = layer
        self.weights = read_experts(module, layer)
        self.gate: Callable[[Tensor], Tensor] = gate_function(module, layer)
        self._fuses = fuses(self.weights.input_END, self.gate) and not row_gram
        self._add_gram_ = partial(add_gram_, rounded=multiplies_rounded(self.weights.input_END))
        self._on_card = on_card(self.weights.input_END.device)
        self._neuron_of_row = layer.neuron_of_row().to(self.weights.input_END.device)
        device = self.weights.input_END.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._gathering = Gathering(layer, device, (0, 0, 0, 1))
        self._rows = [0] * layer.experts  # of each expert so far, labels not counted
        self.tokens = 0
        self.gram_DD = zeros(layer.hidden, layer.hidden)
        self.weight_square_E = zeros(layer.experts)
        self.gram_EDD = zeros(layer.experts, layer.hidden, layer.hidden)
        self.row_square_EN = zeros(layer.experts, layer.input_rows)
        self.row_gram_ENN = zeros(layer.experts, layer.input_rows, layer.input_rows) if row_gram else None
        self.weighted_input_gram_EDD = zeros(layer.experts, layer.hidden, layer.hidden)

    def add(self, args: Sequence[Tensor], gradient_KTD: Tensor) -> None:
        """Add one call of the experts module.

        Args:
            args: its positional arguments.
            gradient_KTD: gradients of the summed NLL at its output, of which each label of a position brings its share.
        """
        self.tokens += gradient_KTD.shape[1]
        self._work(self._gathering.add((*args, gradient_KTD), gradient_KTD.shape[1]))

    @torch.no_grad()
    def _work(self, call: Sequence[Tensor] | None) -> None:
        if call is None:
            return
        *args, gradient_KTD = call
        self._add_gram_(self.gram_DD, gradient_KTD, rows=len(gradient_KTD) * self.tokens)
        for expert, rows_n, x_nD, p_n in routed_tokens(self.layer, args):
            self._add_expert(expert, x_nD, p_n.float().unsqueeze(1), gradient_KTD[:, rows_n])

    def _add_expert(self, e: int, x_nD: Tensor, p_n1: Tensor, gradient_KnD: Tensor) -> None:
        self.weight_square_E[e] += p_n1.square().sum()
        self._rows[e] += len(x_nD)
        self._add_gram_(self.gram_EDD[e], gradient_KnD, p_n1, rows=len(gradient_KnD) * self._rows[e])
        square_n = self._add_rows(e, x_nD, p_n1, gradient_KnD)
        self._add_gram_(self.weighted_input_gram_EDD[e], x_nD, square_n.sqrt().unsqueeze(1), rows=self._rows[e])

    def _add_rows(self, e: int, x_nD: Tensor, p_n1: Tensor, gradient_KnD: Tensor) -> Tensor:
        """Add what is collected of δ of one expert's tokens, and give its square of each of them, [n], float32."""
        if self._fuses:
            at_neurons_KnM = gradient_KnD.to(x_nD.dtype) @ self.weights.output_EDM[e]
            row_N, square_n = row_squares(pre_activations(self.weights, e, x_nD), at_neurons_KnM, p_n1[:, 0])
            self.row_square_EN[e] += row_N
            return square_n
        gradient_KnD = p_n1 * gradient_KnD.float()
        if self._on_card and self.row_gram_ENN is None:
            square_nN = self._row_squares(e, x_nD, gradient_KnD)
        else:
            delta_KnN = self._row_gradients(e, x_nD, gradient_KnD)
            square_nN = delta_KnN.square().sum(0)
            if self.row_gram_ENN is not None:
                self._add_gram_(self.row_gram_ENN[e], delta_KnN, rows=len(delta_KnN) * self._rows[e])
        self.row_square_EN[e] += square_nN.sum(0)
        return square_nN.sum(1)

    def _row_gradients(self, e: int, x_nD: Tensor, gradient_KnD: Tensor) -> Tensor:
        """δ of one expert's tokens from the gradients at its own output, [K, n, N], float32."""
        at_neurons_KnM = (gradient_KnD.to(x_nD.dtype) @ self.weights.output_EDM[e]).float()
        if self._on_card:  # the labels share their slopes: less to pass over
            return at_neurons_KnM[..., self._neuron_of_row] * slopes(self.gate, pre_activations(self.weights, e, x_nD).float())[1]
        pre_KnN = pre_activations(self.weights, e, x_nD).float().expand(len(gradient_KnD), -1, -1)
        with torch.enable_grad():
            h_KnM = self.gate(pre_KnN.requires_grad_())
            (delta_KnN,) = torch.autograd.grad(h_KnM, pre_KnN, at_neurons_KnM)
        return delta_KnN

    def _row_squares(self, e: int, x_nD: Tensor, gradient_KnD: Tensor) -> Tensor:
        """Σ δ² over the labels of one expert's tokens, [n, N], float32, without δ itself, which is as large as all labels' neurons.

        Every row feeds one neuron, so δ is the gradient at the neuron times the row's slope, which is the same for all labels. On a card it
        is passes over memory that these numbers wait for, and this makes a third of them.
        """
        at_neurons_KnM = gradient_KnD.to(x_nD.dtype) @ self.weights.output_EDM[e]
        square_nM: Tensor = torch.linalg.vector_norm(at_neurons_KnM, dim=0, dtype=torch.float32).square_()
        slope_nN = slopes(self.gate, pre_activations(self.weights, e, x_nD).float())[1]
        return slope_nN.square() * square_nM[:, self._neuron_of_row]

    def finish(self) -> dict[str, Any]:
        """The fields of `LayerStatistics` that a backward pass fills, on the host, sums in float32.

        Raises:
            StatisticsError: a gradient was NaN or infinite; names the layer and, inside the experts, the expert.
        """
        self._work(self._gathering.rest())
        if not self.gram_DD.isfinite().all():
            raise StatisticsError(
                f"layer {self.layer.index}: the gradient at its experts' output is NaN or infinite; calibrate in bfloat16 instead"
            )
        bad_E = (~self.row_square_EN.isfinite().all(1)).nonzero()
        if len(bad_E):
            raise StatisticsError(
                f"layer {self.layer.index}, expert {int(bad_E[0])}: the gradient at its neurons is NaN or infinite; "
                "calibrate in bfloat16 or float32"
            )
        return {
            "gradient_tokens": self.tokens,
            "gradient_gram_DD": symmetric_on_host(self.gram_DD[None])[0],
            "gradient_weight_square_E": on_host(self.weight_square_E),
            "gradient_gram_EDD": symmetric_on_host(self.gram_EDD),
            "row_square_EN": on_host(self.row_square_EN),
            "row_gram_ENN": None if self.row_gram_ENN is None else symmetric_on_host(self.row_gram_ENN),
            "weighted_input_gram_EDD": symmetric_on_host(self.weighted_input_gram_EDD),
        }
