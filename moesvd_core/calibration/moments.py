"""Sums over one layer's routed tokens, gathered while the layer runs and turned into `LayerStatistics` when it is through.

Neurons and outputs are computed a second time here, from the inputs that the experts module is called with: its own forward pass hides
them, and stays untouched. Products are made a batch at a time, mostly in float32 (`products`), and summed in float64.

Shapes: E experts, d hidden size (D), m expert width (M), n input rows (N); lower-case n in a name: the tokens of one expert in one batch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moesvd_core.architectures.experts_io import gate_function, read_experts, routed_tokens
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.calibration.fused import fuses, neuron_sums
from moesvd_core.calibration.gathering import Gathering
from moesvd_core.calibration.products import AT_ONCE, add_gram_, counts_above, multiplies_rounded
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.devices import copy_to_host_, on_card
from moesvd_core.errors import StatisticsError

PRINCIPAL = 1e-2
"""Share of the largest singular value above which one counts towards the principal rank (Alg. 1)."""
OWL_MULTIPLE = 5.0
"""M of OWL: a weight is an outlier when |W_ij|·‖x_j‖ is above M times the layer's mean."""
BIN_SHIFT = 16
"""Bits dropped from a float32 to get its bin: bins of 2^-7 relative width, whose order is that of the absolute values."""
BINS = 1 << (31 - BIN_SHIFT)
SCORED = 128
"""Rows of a matrix whose scores a CPU makes at a time."""
SAMPLED = 1 << 22
"""Neurons of a call whose bins a card looks up, those of evenly spread tokens: few bins that many processors add to at once take longer
than all else that is measured."""


class LayerMoments:
    """Running sums for one loaded experts module.

    Args:
        module: the native experts module, with weights.
        layer: its description.
        threshold: τ of Eq. 10.
        intermediate: collect H_e, [E, m, m].

    Raises:
        StatisticsError: a weight is NaN or infinite; names layer, expert and matrix.
    """

    def __init__(self, module: nn.Module, layer: ExpertLayer, *, threshold: float, intermediate: bool) -> None:
        self.layer = layer
        self.threshold = threshold
        self.weights = read_experts(module, layer)
        _refuse_non_finite_weights(layer, self.weights)
        self.gate: Callable[[Tensor], Tensor] = gate_function(module, layer)
        self._fuses = fuses(self.weights.input_END, self.gate)
        self._add_gram_ = partial(add_gram_, rounded=multiplies_rounded(self.weights.input_END))
        device = self.weights.input_END.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(layer.experts, *shape, dtype=torch.float64, device=device)

        self._gathering = Gathering(layer, device, (0, 0, 0))
        self._rows = [0] * layer.experts  # of each expert so far, which the host knows without asking
        self._device = device
        self.tokens = 0
        self.weight_square_E = zeros()
        self.input_gram_EDD = zeros(layer.hidden, layer.hidden)
        self.output_gram_EDD = zeros(layer.hidden, layer.hidden)
        self.output_sum_ED = zeros(layer.hidden)
        self.intermediate_gram_EMM = zeros(layer.width, layer.width) if intermediate else None
        self.input_sum_ED = zeros(layer.hidden)
        self.input_square_ED = zeros(layer.hidden)
        self.intermediate_sum_EM = zeros(layer.width)
        self.intermediate_bins_EB = zeros(BINS).long()
        self.saliency_E = zeros()
        self.slope_EN = zeros(layer.input_rows)

    @property
    def count_E(self) -> Tensor:  # noqa: N802 - a tensor, named by its shape
        """Tokens of each expert that were worked on, int64."""
        return torch.tensor(self._rows, device=self._device)

    def add(self, args: Sequence[Tensor], tokens: int) -> None:
        """Add one call of the experts module.

        Args:
            args: its positional arguments.
            tokens: tokens of the batch.
        """
        self.tokens += tokens
        self._work(self._gathering.add(args, tokens))

    @torch.no_grad()
    def _work(self, args: Sequence[Tensor] | None) -> None:
        if args is None:
            return
        for expert, _rows, x_nD, p_n in routed_tokens(self.layer, args):
            self._add_expert(expert, x_nD, p_n.float())

    def _add_expert(self, e: int, x_nD: Tensor, p_n: Tensor) -> None:
        p_n1 = p_n.unsqueeze(1)
        h_nM = self._add_neurons(e, pre_activations(self.weights, e, x_nD), p_n1)
        y_nD = (h_nM.to(x_nD.dtype) @ self.weights.output_EDM[e].T).float()
        x_nD = x_nD.float()
        self.weight_square_E[e] += p_n.square().sum()
        self._rows[e] += len(p_n)
        self._add_gram_(self.input_gram_EDD[e], x_nD, p_n1, rows=self._rows[e])
        self._add_gram_(self.output_gram_EDD[e], y_nD, p_n1, rows=self._rows[e])
        if self.intermediate_gram_EMM is not None:
            self._add_gram_(self.intermediate_gram_EMM[e], h_nM, p_n1, rows=self._rows[e])
        self.input_sum_ED[e] += x_nD.abs().sum(0)
        self.input_square_ED[e] += x_nD.square().sum(0)
        if self.weights.output_bias_ED is not None:
            self.output_sum_ED[e] += (p_n1.square() * y_nD).sum(0)
            y_nD = y_nD + self.weights.output_bias_ED[e]
        self.saliency_E[e] += (p_n * y_nD.norm(dim=1)).sum()

    def _add_neurons(self, e: int, pre_nN: Tensor, p_n1: Tensor) -> Tensor:
        """Add what is measured of one expert's neurons alone, and give them, [n, m]: float32, or in the model's precision."""
        if self._fuses:
            h_nM, magnitude_M, slope_N = neuron_sums(pre_nN, p_n1[:, 0])
            counted_nM = self.gate(_sampled(pre_nN, h_nM.numel()).float()).abs()
        else:
            h_nM, slope_nN = slopes(self.gate, pre_nN.float())
            magnitude_nM = h_nM.abs()
            magnitude_M, slope_N = magnitude_nM.sum(0), (p_n1 * slope_nN).square().sum(0)
            counted_nM = _sampled(magnitude_nM, h_nM.numel())
        self.intermediate_sum_EM[e] += magnitude_M
        self.slope_EN[e] += slope_N
        _count_(self.intermediate_bins_EB[e], counted_nM)
        return h_nM

    def finish(self) -> LayerStatistics:
        """The layer's statistics on the host, Grams and means as float32.

        Raises:
            StatisticsError: an activation was NaN or infinite; names layer, expert and where.
        """
        self._work(self._gathering.rest())
        self._refuse_non_finite_sums()
        count_E1 = self.count_E.clamp(min=1).unsqueeze(1)
        return LayerStatistics(
            layer=self.layer.index,
            tokens=self.tokens,
            count_E=self.count_E.cpu(),
            weight_square_E=on_host(self.weight_square_E),
            input_gram_EDD=symmetric_on_host(self.input_gram_EDD),
            output_gram_EDD=symmetric_on_host(self.output_gram_EDD),
            input_mean_ED=on_host(self.input_sum_ED / count_E1),
            intermediate_mean_EM=on_host(self.intermediate_sum_EM / count_E1),
            outlier_E=on_host(self._outlier_shares()),
            input_outlier=self._input_outlier(),
            principal_rank_E=principal_ranks(self.weights),
            saliency_E=on_host(self.saliency_E / count_E1.squeeze(1)),
            slope_EN=on_host(self.slope_EN),
            intermediate_gram_EMM=None if self.intermediate_gram_EMM is None else symmetric_on_host(self.intermediate_gram_EMM),
            output_sum_ED=None if self.weights.output_bias_ED is None else on_host(self.output_sum_ED),
        )

    def _outlier_shares(self) -> Tensor:
        """a_e (Eq. 10): share of |h| above τ·mean|h|, from the histogram; linear inside the bin that the threshold falls into, [E]."""
        mean_E = self.intermediate_sum_EM.sum(1) / (self.count_E.clamp(min=1) * self.layer.width)
        bits_E = (self.threshold * mean_E).float().view(torch.int32).long()
        bin_E1 = (bits_E >> BIN_SHIFT).unsqueeze(1)
        above_E1 = 1 - (bits_E % (1 << BIN_SHIFT)).double().unsqueeze(1) / (1 << BIN_SHIFT)
        bins_EB = self.intermediate_bins_EB.double()
        later_EB = bins_EB.flip(1).cumsum(1).flip(1) - bins_EB
        counted_E1 = later_EB.gather(1, bin_E1) + above_E1 * bins_EB.gather(1, bin_E1)
        return counted_E1.squeeze(1) / bins_EB.sum(1).clamp(min=1)

    def _input_outlier(self) -> float:
        """OWL's outlier ratio of the layer's input matrices; ‖x_j‖ is the root mean square over the expert's own tokens.

        A mean instead of OWL's sum over tokens: else experts with few tokens would count as free of outliers. An expert without tokens
        is given the layer's.
        """
        pooled_D = self.input_square_ED.sum(0) / self.count_E.sum().clamp(min=1)
        square_ED = self.input_square_ED / self.count_E.clamp(min=1).unsqueeze(1)
        scale_ED = torch.where(self.count_E.unsqueeze(1) > 0, square_ED, pooled_D).sqrt().float()
        total = sum(score.sum(dtype=torch.float64) for score in self._scores(scale_ED))
        bound = OWL_MULTIPLE * float(total) / self.weights.input_END.numel()
        above = sum((score > bound).sum() for score in self._scores(scale_ED))
        return int(above) / self.weights.input_END.numel()

    def _scores(self, scale_ED: Tensor) -> Iterator[Tensor]:
        """|W_ij|·‖x_j‖ of all input matrices, a few rows at a time where a CPU has caches for them."""
        for w_ND, s_D in zip(self.weights.input_END, scale_ED, strict=True):
            for w_nD in w_ND.split(len(w_ND) if on_card(w_ND.device) else SCORED):
                yield w_nD.float().abs() * s_D

    def _refuse_non_finite_sums(self) -> None:
        for what, sum_ED in (("input", self.input_sum_ED), ("intermediate", self.intermediate_sum_EM), ("output", self.saliency_E)):
            bad_E = (~sum_ED.reshape(self.layer.experts, -1).isfinite().all(1)).nonzero()
            if len(bad_E):
                raise StatisticsError(
                    f"layer {self.layer.index}, expert {int(bad_E[0])}: an {what} activation is NaN or infinite; "
                    "check the weights before this layer, or calibrate in bfloat16 or float32 if the dtype is float16"
                )


def pre_activations(weights: ExpertWeights, expert: int, x_nD: Tensor) -> Tensor:
    """What enters the gate of one expert, [n, N], in the model's dtype."""
    pre_nN = x_nD @ weights.input_END[expert].T
    if weights.input_bias_EN is not None:
        pre_nN = pre_nN + weights.input_bias_EN[expert]
    return pre_nN


def slopes(gate: Callable[[Tensor], Tensor], pre_nN: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons h [n, m] and ∂h_i(j)/∂pre_j [n, N] of one expert, float32; a row feeds one neuron, so the gradient of Σ h gives all."""
    with torch.enable_grad():
        h_nM = gate(pre_nN.requires_grad_())
        (slope_nN,) = torch.autograd.grad(h_nM, pre_nN, h_nM.new_ones(()).expand_as(h_nM))
    return h_nM.detach(), slope_nN


def principal_ranks(weights: ExpertWeights) -> Tensor:
    """r_e = #{σ_i > 1e-2·σ_max}, input plus output matrix (Alg. 1), int64 [E] on the host; from the eigenvalues of the smaller Gram."""
    rank_E = torch.zeros(len(weights.input_END), dtype=torch.int64)
    rounded = multiplies_rounded(weights.input_END)
    for matrix_E in (weights.input_END, weights.output_EDM):
        size = min(matrix_E.shape[1:])
        few = max(1, AT_ONCE // size**2) if on_card(matrix_E.device) else 1
        for start in range(0, len(matrix_E), few):
            part_E = matrix_E[start : start + few]
            gram_ESS = torch.zeros(len(part_E), size, size, dtype=torch.float64, device=matrix_E.device)
            for gram_SS, matrix in zip(gram_ESS, part_E, strict=True):
                add_gram_(gram_SS, _tall(matrix.float()), rounded=rounded)
            rank_E[start : start + few] += torch.tensor(counts_above(gram_ESS, PRINCIPAL**2))
    return rank_E


def _tall(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, whichever has more rows."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _sampled(x_nC: Tensor, neurons: int) -> Tensor:
    """On a card some of the rows, evenly, so that about `SAMPLED` of their neurons are left; all of them elsewhere."""
    return x_nC[:: max(1, neurons // SAMPLED)] if on_card(x_nC.device) else x_nC


def _count_(bins_B: Tensor, magnitude_nM: Tensor) -> None:
    """Add to every bin how many non-negative float32 values fall into it; their bit patterns are ordered as they are."""
    bin_S = magnitude_nM.contiguous().view(torch.int32).flatten() >> BIN_SHIFT
    if on_card(bins_B.device):  # where `bincount` would wait for all that was asked for, to see how far the bins go
        bins_B.scatter_add_(0, bin_S.long(), bins_B.new_ones(()).expand(len(bin_S)))
    else:
        bins_B += torch.bincount(bin_S, minlength=BINS)


def on_host(value: Tensor) -> Tensor:
    """A sum as it is kept: float32 on the host."""
    return value.float().cpu()


def symmetric_on_host(gram_E: Tensor) -> Tensor:
    """Grams as float32 on the host; rounding in the products had left them symmetric only almost."""
    kept_E = torch.empty(gram_E.shape, dtype=torch.float32)
    for kept, each in zip(kept_E, gram_E, strict=True):
        copy_to_host_(kept, (each + each.T) / 2)
    return kept_E


def _refuse_non_finite_weights(layer: ExpertLayer, weights: ExpertWeights) -> None:
    named = {
        "input matrix": weights.input_END,
        "output matrix": weights.output_EDM,
        "input bias": weights.input_bias_EN,
        "output bias": weights.output_bias_ED,
    }
    for what, tensor_E in named.items():
        if tensor_E is None or torch.stack([tensor.sum() for tensor in tensor_E]).isfinite().all():
            continue  # one question for all experts: a card answers only when it has done all that it was given
        for e, tensor in enumerate(tensor_E):
            if not tensor.isfinite().all():
                raise StatisticsError(f"layer {layer.index}, expert {e}: the {what} ({layer.name}) holds NaN or infinite weights")
