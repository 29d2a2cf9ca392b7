"""What counts as error on each side of a layer: from collected statistics to well-conditioned inner products.

Shapes: E experts, d = D hidden size, m width, n input rows; a side's matrix W is rows × columns: input n × d, output d × m.

The error of ΔW for expert e is tr L_e ΔW G_e ΔWᵀ: G_e weighs the inputs of the matrix, L_e its outputs. In the "output" metric it is the
second-order change of the summed NLL; what weighs there is told by `curvature`. G_e is the Gram of the tokens routed to the expert, with
p² in it, but for the output metric's input side, where tokens count by their gradient.

The optimum never needs both Grams at their size: with rows >= columns everything happens in the space of the columns, through
Wᵀ L W ("right": W ≈ W X V), otherwise in the space of the rows, through W G Wᵀ ("left": W ≈ U K W), which for the output side is the
collected O_e itself, so that no Gram of a wide expert's neurons is needed.

Where `expert` may be a slice (`Which`), what is told of several experts has a leading dimension, or none where it is the same for all.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cached_property

import torch

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.decomposition.curvature import GRAM_RIDGE, PSEUDO_SHARE, Which, curvature_of
from moesvd_core.decomposition.grams import (
    EPSILON,
    DiagonalGram,
    FullGram,
    Gram,
    ImpliedGram,
    RootedGram,
    diagonal_of,
    least_squares,
    ridged,
    settled_,
    summed,
    symmetric,
    trace_product,
)
from moesvd_core.decomposition.parallel import STREAMS, MadeOnce
from moesvd_core.devices import on_card, to_device, unused
from moesvd_core.errors import CheckpointError, StatisticsError
from moesvd_core.linalg import mirrored_, symmetric_product
from moesvd_core.planning import Metric, Side

EXPERT_SUMS = ("input_gram_EDD", "output_gram_EDD", "intermediate_gram_EMM", "slope_EN", "weight_square_E")
BACKWARD_SUMS = ("gradient_gram_EDD", "gradient_weight_square_E", "row_square_EN", "weighted_input_gram_EDD")
"""What a backward pass collects for every expert: all of it or nothing."""
MOST_KEPT = 1 << 28
"""Entries of Wᵀ L W, and of W G Wᵀ, kept for all experts of a layer; several structures and passes ask for the same ones."""
TOGETHER = 1 << 26
"""Entries that the largest matrices of experts which a card works on at once may have."""
WORKING = STREAMS * 12 * 8
"""Bytes that a card needs for each of them: at most a part holds twelve times as many in double precision, and others do beside it."""


class LayerMetric:
    """The inner products of one layer, made on demand.

    Args:
        weights: the layer's experts.
        layer: their layout.
        statistics: what calibration collected.
        device: where matrices are worked on.
        shrink: whether experts with few tokens lean on the layer's average.

    Raises:
        CheckpointError: a weight is not finite.
        StatisticsError: statistics of another layer, not finite, or of no token at all.
    """

    def __init__(
        self, weights: ExpertWeights, layer: ExpertLayer, statistics: LayerStatistics, device: torch.device | str = "cpu", *,
        shrink: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.weights = weights
        self.layer = layer
        self._stored = statistics
        self.statistics = statistics.on(self.device)
        _check(weights, layer, self.statistics)
        self._read: defaultdict[Metric, dict[int, torch.Tensor]] = defaultdict(dict)
        self._written: dict[int, torch.Tensor] = {}
        self._lent = PSEUDO_SHARE if shrink else 0.0
        self._curvature = curvature_of(weights, layer, self.statistics, self.device, self._lent)
        self.pseudo_tokens = self._lent * float(statistics.count_E.sum()) / layer.experts

    def release(self) -> None:
        """Let go of what several structures ask for while they are made, and of what lies on a card beside the weights: if it is wanted
        later, it is taken from the statistics on the host again.
        """
        self._read.clear()
        self._written.clear()
        if on_card(self.device):
            self.statistics = self._stored
            self._curvature = curvature_of(self.weights, self.layer, self.statistics, self.device, self._lent)
            vars(self).pop("_pooled_gram", None)

    # -- what a side looks like ------------------------------------------------------------------------------------------------------

    def shape(self, side: Side) -> tuple[int, int]:
        """Rows and columns of the side's matrices."""
        return self.stored(side).shape[1], self.stored(side).shape[2]

    def works_right(self, side: Side) -> bool:
        """Whether the columns are the smaller space (W ≈ W X V), or the rows (W ≈ U K W)."""
        rows, columns = self.shape(side)
        return columns <= rows if side == "input" else columns < rows

    @cached_property
    def together(self) -> list[int] | list[slice]:
        """The layer's experts in the parts that are best worked on at once: small matrices leave most of a card to others, and each asks it
        for as much as all of them.
        """
        experts = self.layer.experts
        if not on_card(self.device):
            return list(range(experts))
        hidden, rows = self.layer.hidden, self.layer.input_rows
        largest = max(hidden * max(hidden, rows, self.layer.width), 0 if self.statistics.row_gram_ENN is None else rows**2)
        most = max(1, min(TOGETHER, unused(self.device) // WORKING) // largest)
        return [slice(start, min(start + most, experts)) for start in range(0, experts, most)]

    def weight(self, side: Side, expert: Which) -> torch.Tensor:
        """The expert's matrix for computing, [rows, columns]."""
        return self.stored(side)[expert].to(self.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of factors and bases: float64 for float64 weights, else float32."""
        return torch.float64 if self.weights.input_END.dtype == torch.float64 else torch.float32

    @cached_property
    def frequencies(self) -> list[float]:
        """f_e, the share of tokens routed to each expert (Eq. 5, 9); they add up to k."""
        return [count / self.statistics.tokens for count in self.statistics.count_E.tolist()]

    def stored(self, side: Side) -> torch.Tensor:
        """The side's original matrices, [E, rows, columns]."""
        return self.weights.input_END if side == "input" else self.weights.output_EDM

    @property
    def unit(self) -> float:
        """Turns tr L ΔW G ΔWᵀ in the output metric into nats a calibration token (half the second-order sum)."""
        return 0.5 / self.statistics.tokens

    # -- the two sides of the inner product ------------------------------------------------------------------------------------------

    def left(self, side: Side, metric: Metric, expert: Which) -> RootedGram:
        """L_e [rows, rows]."""
        rows, _ = self.shape(side)
        if metric != "output":
            return self._ones(rows)
        if side == "output":
            return self._curvature.of_output(expert)
        return self._curvature.of_rows(expert)

    def right(self, side: Side, metric: Metric, expert: Which) -> Gram:
        """G_e [columns, columns]."""
        return self.right_of_input(metric, expert) if side == "input" else self.right_of_output(metric, expert)

    def right_of_input(self, metric: Metric, expert: Which) -> RootedGram:
        """G_e of the input matrix, [D, D]: C_e, or what a backward pass puts in its place; nothing but lengths in the simpler metrics."""
        if metric == "plain":
            return self._ones(self.layer.hidden)
        if metric == "scaled":
            return DiagonalGram(self._channel_mean(self.statistics.input_mean_ED, expert))
        weighted_DD = self._curvature.input_gram(expert) if metric == "output" else None
        return FullGram(self._input_gram(expert) if weighted_DD is None else weighted_DD)

    def right_of_output(self, metric: Metric, expert: Which) -> Gram:
        """G_e of the output matrix, [M, M]: H_e, which is told of one expert at a time, but for the metrics that look at no Gram."""
        if metric == "plain":
            return self._ones(self.layer.width)
        if metric == "scaled":
            return DiagonalGram(self._channel_mean(self.statistics.intermediate_mean_EM, expert))
        assert isinstance(expert, int)  # noqa: S101 - who asks for several wants what H_e makes of a matrix, which was collected
        return self._intermediate_gram(expert)

    def inner(self, side: Side, metric: Metric, expert: int) -> RootedGram:
        """The inner product of the smaller space: G_e when working right, L_e when working left."""
        if not self.works_right(side):
            return self.left(side, metric, expert)
        gram = self.right(side, metric, expert)
        assert isinstance(gram, RootedGram)  # noqa: S101 - an implied Gram is made for wide matrices only, which work left
        return gram

    def outer(self, side: Side, metric: Metric, expert: int) -> torch.Tensor:
        """What W carries into the smaller space: Wᵀ L_e W [columns, columns] or W G_e Wᵀ [rows, rows]; float64."""
        return (self.read_by if self.works_right(side) else self.written_by)(side, metric, expert).double()

    def written_by(self, side: Side, metric: Metric, expert: Which) -> torch.Tensor:
        """W G_e Wᵀ [rows, rows], in the weights' computing precision."""
        if side == "output" and metric in ("input", "output"):
            return self._kept(self._written, expert, lambda which: self._output_gram(which).to(self.dtype))
        return self.right(side, metric, expert).carried(self.weight(side, expert).mT)

    def read_by(self, side: Side, metric: Metric, expert: Which) -> torch.Tensor:
        """Wᵀ L_e W [columns, columns], in the weights' computing precision."""
        if side == "output":
            return self._read_by(side, metric, expert)
        kind: Metric = "output" if metric == "output" else "plain"
        return self._kept(self._read[kind], expert, lambda which: self._read_by("input", kind, which))

    def _read_by(self, side: Side, metric: Metric, expert: Which) -> torch.Tensor:
        return self.left(side, metric, expert).carried(self.weight(side, expert))

    def _kept(self, among: dict[int, torch.Tensor], expert: Which, make: Callable[[Which], torch.Tensor]) -> torch.Tensor:
        """What was made of an expert before, or else now; kept where that of all experts is not too much."""
        experts = self._each(expert)
        if all(each in among for each in experts):
            return torch.stack([among[each] for each in experts]) if isinstance(expert, slice) else among[expert]
        made = make(expert)
        if self.layer.experts * made.shape[-1] ** 2 <= MOST_KEPT:
            among.update(zip(experts, made if isinstance(expert, slice) else [made], strict=True))
        return made

    def _each(self, expert: Which) -> range:
        return range(self.layer.experts)[expert] if isinstance(expert, slice) else range(expert, expert + 1)

    def _ones(self, size: int) -> DiagonalGram:
        return DiagonalGram(torch.ones(size, dtype=torch.float64, device=self.device))

    def energy(self, side: Side, expert: int) -> float:
        """tr L_e W G_e Wᵀ in the output metric: what dropping the whole matrix loses."""
        return float(trace_product(self.inner(side, "output", expert).full(), self.outer(side, "output", expert)))

    # -- biases ------------------------------------------------------------------------------------------------------------------------

    def bias(self, side: Side, expert: int) -> torch.Tensor:
        """The expert's bias, [rows], float64; zeros where experts have none."""
        bias_EN = self._biases(side)
        if bias_EN is None:
            return torch.zeros(self.shape(side)[0], dtype=torch.float64, device=self.device)
        return bias_EN[expert].to(self.device, torch.float64)

    def bias_loss(self, side: Side, expert: int, error_N: torch.Tensor) -> float:
        """Σ p² cᵀ L_e c in the output metric: what an error c of the expert's bias [rows] loses by itself.

        On the input side tokens count by ‖δ‖² after a backward pass, as they do in G_e.
        """
        if self._biases(side) is None:
            return 0.0
        error_1N = error_N.double()[None]
        return self._token_weight(side, expert) * float((self.left(side, "output", expert).times(error_1N) * error_1N).sum())

    def absence(self, expert: int) -> float:
        """tr L_e Σ p² (y + c)(y + c)ᵀ in the output metric: what the expert's whole answer is worth, its output bias c with it.

        That is O_e + c (Σ p² y)ᵀ + (Σ p² y) cᵀ + Σ p² c cᵀ; statistics of an older version lack Σ p² y, and the two terms with it are left
        out. Pseudo-tokens have c in their answers, too, and neurons of mean zero.
        """
        energy = self.energy("output", expert)
        if self.weights.output_bias_ED is None:
            return energy
        bias_D, sum_ED = self.bias("output", expert), self.statistics.output_sum_ED
        shared_D = self._token_weight("output", expert) * bias_D
        if sum_ED is not None:
            shared_D += 2 * sum_ED[expert].to(self.device, torch.float64)
        added = float(self.left("output", "output", expert).times(shared_D[None])[0] @ bias_D)
        return max(0.0, energy + added)  # where a bias cancels the answers, what rounding leaves of their difference may be negative

    def _biases(self, side: Side) -> torch.Tensor | None:
        return self.weights.input_bias_EN if side == "input" else self.weights.output_bias_ED

    def _token_weight(self, side: Side, expert: int) -> float:
        """What the expert's tokens count for in the output metric's G_e, those that it is lent included: Σ p², or Σ ‖δ‖²."""
        row_square_EN, scale = self.statistics.row_square_EN, 1.0
        weight_E = self.statistics.weight_square_E.double()
        if side == "input" and row_square_EN is not None:
            weight_E, scale = row_square_EN.sum(1, dtype=torch.float64), self.statistics.tokens / self.statistics.gradient_tokens
        return scale * float(weight_E[expert] + self._lent * weight_E.mean())

    # -- shrunken statistics -----------------------------------------------------------------------------------------------------------

    def _input_gram(self, expert: Which) -> torch.Tensor:
        """C_e + n0·C̄, ridged: an expert with few tokens leans on what an average token looks like."""
        summed_DD = self.statistics.input_gram_EDD[expert]
        own_DD = to_device(summed_DD, self.device).to(torch.float64, copy=True).add_(self._pooled_gram, alpha=self.pseudo_tokens)
        return settled_(own_DD, GRAM_RIDGE, summed_DD.dtype)

    @MadeOnce
    def _pooled_gram(self) -> torch.Tensor:
        """C̄, the layer's input Gram a routed token."""
        return summed(to_device(self.statistics.input_gram_EDD, self.device)) / float(self.statistics.count_E.sum())

    def _output_gram(self, expert: Which) -> torch.Tensor:
        """O_e + h̄·n0·W Wᵀ: the same shrinkage as of H_e, seen through W."""
        weight_DM = self.weight("output", expert)
        own_DD = mirrored_(to_device(self.statistics.output_gram_EDD[expert], self.device).to(torch.float64, copy=True))
        isotropic = torch.tensor([self._isotropic(each) for each in self._each(expert)], dtype=torch.float64, device=self.device)
        return own_DD.addcmul_(symmetric_product(weight_DM, weight_DM.mT), isotropic.reshape(*own_DD.shape[:-2], 1, 1))

    def _intermediate_gram(self, expert: int) -> Gram:
        """H_e + h̄·n0·1. Neurons have no common order across experts: the pooled Gram to lean on is isotropic.

        Without a collected H_e: recovered from O_e, exactly where W has as many rows as columns, else as `ImpliedGram` says.
        """
        isotropic = self._isotropic(expert)
        if self.statistics.intermediate_gram_EMM is not None:
            own_MM = to_device(self.statistics.intermediate_gram_EMM[expert], self.device).double()
            isotropic_MM = isotropic * torch.eye(own_MM.shape[0], dtype=torch.float64, device=self.device)
            return FullGram(ridged(own_MM + isotropic_MM, EPSILON))
        weight_DM = self.weight("output", expert).double()
        if not self.works_right("output"):
            own_share = float(self.statistics.count_E[expert]) * self._mean_square
            return ImpliedGram(weight_DM, self._output_gram(expert), own_share + isotropic)
        pseudo_inverse_MD = least_squares(weight_DM.T)
        return FullGram(ridged(symmetric(pseudo_inverse_MD @ self._output_gram(expert) @ pseudo_inverse_MD.T), EPSILON))

    def _isotropic(self, expert: int) -> float:
        """What shrinkage and ridge add to every eigenvalue of H_e."""
        return self._mean_square * (self.pseudo_tokens + GRAM_RIDGE * float(self.statistics.count_E[expert]))

    @MadeOnce
    def _mean_square(self) -> float:
        """h̄: mean p²·h² a routed token, as far as it shows in the outputs (so that it needs no H)."""
        norms_E = torch.linalg.vector_norm(self.weights.output_EDM, dim=(1, 2), dtype=self.dtype).square().double().cpu()
        energy = float(diagonal_of(self.statistics.output_gram_EDD).sum(dtype=torch.float64))
        return energy / float((norms_E * self.statistics.count_E).sum().clamp(min=torch.finfo(torch.float64).tiny))

    def _channel_mean(self, mean_ES: torch.Tensor, expert: Which) -> torch.Tensor:
        """mean |x| of every channel: ASVD's scaling squared, at its α = ½. Never zero; an expert without tokens leans on the others."""
        own_S = torch.where(self.statistics.count_E[expert].unsqueeze(-1) > 0, mean_ES[expert], mean_ES.mean(0))
        mean_S = own_S.to(self.device, torch.float64)
        average_1 = mean_S.mean(-1, keepdim=True)
        return mean_S + torch.where(average_1 > 0, GRAM_RIDGE * average_1, 1.0)


def _check(weights: ExpertWeights, layer: ExpertLayer, statistics: LayerStatistics) -> None:
    if statistics.layer != layer.index:
        raise StatisticsError(f"statistics of layer {statistics.layer} cannot be used for layer {layer.index}")
    if statistics.tokens <= 0 or int(statistics.count_E.sum()) == 0:
        raise StatisticsError(f"layer {layer.index}: no calibration token reached its experts; calibrate on at least one window of text")
    if (statistics.gradient_gram_DD is not None or statistics.gradient_gram_EDD is not None) and statistics.gradient_tokens <= 0:
        raise StatisticsError(f"layer {layer.index}: gradient_tokens must be > 0 beside a gradient Gram, got {statistics.gradient_tokens}")
    for name, tensor in (("input", weights.input_END), ("output", weights.output_EDM)):
        if (expert := _first_broken(tensor)) is not None:
            raise CheckpointError(f"layer {layer.index}, expert {expert}: NaN or Inf in the {name} matrix; the checkpoint is damaged")
    lacking = [name for name in BACKWARD_SUMS if getattr(statistics, name) is None]
    if 0 < len(lacking) < len(BACKWARD_SUMS):
        raise StatisticsError(f"layer {layer.index}: {lacking[0]} is missing beside other sums of the backward pass; calibrate again")
    for name in (*EXPERT_SUMS, *BACKWARD_SUMS, "row_gram_ENN", "output_sum_ED"):
        sums_E = getattr(statistics, name)
        if sums_E is not None and (expert := _first_broken(sums_E)) is not None:
            raise StatisticsError(f"layer {layer.index}, expert {expert}: {name} holds NaN or Inf; calibrate again")
    if statistics.gradient_gram_DD is not None and _first_broken(statistics.gradient_gram_DD[None]) is not None:
        raise StatisticsError(f"layer {layer.index}: the gradient Gram holds NaN or Inf; calibrate again, in float32 or without gradients")


def _first_broken(tensor_E: torch.Tensor) -> int | None:
    """The first expert with an entry that is not finite: one carries over to the sum, ten times faster to look at than every entry.

    A sum can also overflow by itself, and only then the entries are looked at. All sums are looked at together: a card answers only when it
    has done all that it was given.
    """
    precision = torch.promote_types(tensor_E.dtype, torch.float32)
    if on_card(tensor_E.device):
        total_E = tensor_E.sum([*range(1, tensor_E.ndim)], dtype=precision) if tensor_E.ndim > 1 else tensor_E
    else:  # one after the other, which for 16 bits is several times as fast there
        total_E = torch.stack([tensor.sum(dtype=precision) for tensor in tensor_E])
    if total_E.isfinite().all():
        return None
    return next((expert for expert, tensor in enumerate(tensor_E) if not tensor.isfinite().all()), None)
