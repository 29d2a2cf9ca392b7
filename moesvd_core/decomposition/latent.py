"""One input basis and one output basis for all experts of a layer, and each expert's own small matrices in between.

Gate and up of all experts read the same input, and down writes the same output space, so these two spaces can be shared; the neurons
between them have no common order across experts, so nothing there is. At run time an ordinary, narrower mixture is left.

Shapes: E experts, D hidden size, N rows of an input matrix, M width, R rank. Experts that are worked on at once (`LayerMetric.together`)
are a leading dimension that is not named.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.decomposition.alternating import refined
from moesvd_core.decomposition.curvature import GRAM_RIDGE, Which
from moesvd_core.decomposition.curves import break_even, latent_curve
from moesvd_core.decomposition.factors import DenseFactors, RightGroup, SharedLeftFactors, SharedRightFactors, SideFactors, balanced_
from moesvd_core.decomposition.grams import FullGram, RootedGram, ridged, trace_of
from moesvd_core.decomposition.losses import projection_losses, tail_losses
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.parallel import in_parallel
from moesvd_core.decomposition.projection import NestedFit, fit_gains, orthonormal, reader, whitened_directions
from moesvd_core.devices import on_card, to_device, to_host
from moesvd_core.linalg import matmul
from moesvd_core.planning import DENSE, SIDES, Metric, Side, SideCurve

SMALL = 1 << 24
"""Entries of matrices of hidden size, one for each expert, that may be kept: inner products from finding a basis to measuring it, and fits
from there on."""


class LatentBasis:
    """The shared directions of one side of a layer, best first.

    Args:
        basis_DD: rows of V, or columns of P, of the whole space.
        dual_DD: its inverse, transposed.
        fits: how experts are fitted to the basis, by the number of their part, as far as that is known already.

    Attributes:
        curve: predicted loss at every rank; one slot.
    """

    def __init__(
        self, metric: LayerMetric, side: Side, kind: Metric, basis_DD: torch.Tensor, dual_DD: torch.Tensor, curve: SideCurve,
        fits: Mapping[int, NestedFit],
    ) -> None:
        self.curve = curve
        self._metric, self._side, self._kind, self._basis_DD, self._dual_DD = metric, side, kind, basis_DD, dual_DD
        self._fits = dict(fits)

    @classmethod
    def both(cls, metric: LayerMetric, kind: Metric) -> dict[Side, "LatentBasis"]:
        """Find the shared bases of both sides: one eigendecomposition of hidden size each.

        Args:
            metric: the layer's inner products.
            kind: the metric that basis and refits minimise; losses are predicted in the output metric whichever it is.
        """
        shared = _shared_bases(metric, kind)
        losses = _refitted_losses(metric, kind, shared)
        made: dict[Side, LatentBasis] = {}
        for side in SIDES:
            of, (rows, columns) = shared[side], metric.shape(side)
            own = metric.layer.experts * (rows if side == "input" else columns)
            ranks = break_even(metric.layer.experts * rows * columns, metric.layer.hidden + own, min(metric.layer.hidden, own))
            curve = latent_curve(metric, side, losses[side][: ranks + 1] * metric.unit, of.gain_R[:ranks])
            made[side] = cls(metric, side, kind, to_host(of.basis_DD), to_host(of.dual_DD), curve, of.fits)
        return made

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """Factors at one rank for the layer; DENSE keeps the original matrices."""
        (rank,) = ranks
        if rank == DENSE:
            return DenseFactors(self._metric.stored(self._side))
        basis_RD = self._leading(rank)
        return self._fitted(basis_RD, lambda part: self._fit(part).reader(rank) if self._keeps_fits else self._reader(part, basis_RD))

    def refined(self, ranks: Sequence[int]) -> SideFactors:
        """The same with a basis that is the better for being of this rank alone (see `alternating`), in the time of many products."""
        (rank,) = ranks
        if rank in (DENSE, 0):
            return self.factors(ranks)

        def pairs() -> Iterator[tuple[RootedGram, torch.Tensor]]:
            for expert in range(self._metric.layer.experts):
                where = (self._metric, self._side, self._kind, expert)
                yield _inner(*where), _outer(*where).double()

        basis_RD = refined(self._leading(rank).double(), pairs).to(self._metric.dtype)
        return self._fitted(basis_RD, lambda part: self._reader(part, basis_RD))

    def release(self) -> None:
        """Let go of what lies on a card."""
        if on_card(self._metric.device):
            self._fits.clear()

    def _leading(self, rank: int) -> torch.Tensor:
        return to_device(self._basis_DD[:rank], self._metric.device)

    def _fitted(self, basis_RD: torch.Tensor, reader_of: Callable[[int], torch.Tensor]) -> SideFactors:
        """A shared basis, and each expert's own matrices for it.

        Args:
            basis_RD: V, or Pᵀ.
            reader_of: what reads the coefficients of the basis for the experts of a part, [R, D].
        """
        return (self._input_factors if self._side == "input" else self._output_factors)(basis_RD, reader_of)

    def _input_factors(self, basis_RD: torch.Tensor, reader_of: Callable[[int], torch.Tensor]) -> SideFactors:
        """V and A_e = W_e G_e Vᵀ (V G_e Vᵀ)^{-1}: the shared basis, refitted to each expert's own tokens."""
        metric, experts, parts = self._metric, range(self._metric.layer.experts), self._metric.together
        left_ENR = basis_RD.new_empty(len(experts), metric.shape("input")[0], len(basis_RD))

        def fit(part: int) -> None:
            left_ENR[parts[part]] = matmul(metric.weight("input", parts[part]), reader_of(part).to(basis_RD.dtype).mT)

        list(in_parallel(fit, len(parts), metric.device))
        left_ENR, right_RD = balanced_(left_ENR, basis_RD.clone())
        alone = tuple((expert,) for expert in experts)
        return SharedRightFactors((RightGroup(tuple(experts), right_RD, left_ENR, alone),))

    def _output_factors(self, basis_RD: torch.Tensor, reader_of: Callable[[int], torch.Tensor]) -> SideFactors:
        """P and B_e = (Pᵀ L_e P)^{-1} Pᵀ L_e D_e: the shared basis, refitted to what each expert's own tokens do to the loss."""
        metric, parts = self._metric, self._metric.together
        right_ERM = basis_RD.new_empty(metric.layer.experts, len(basis_RD), metric.layer.width)

        def fit(part: int) -> None:
            right_ERM[parts[part]] = matmul(reader_of(part).to(basis_RD.dtype), metric.weight("output", parts[part]))

        list(in_parallel(fit, len(parts), metric.device))
        left_DR, right_ERM = balanced_(basis_RD.T.clone(memory_format=torch.contiguous_format), right_ERM)
        return SharedLeftFactors(left_DR, right_ERM)

    @property
    def _keeps_fits(self) -> bool:
        return _are_small(self._metric.layer)

    def _fit(self, part: int) -> NestedFit:
        """Made when a ratio is first asked for, if it was read from a file; every further one needs little more than a product."""
        if part not in self._fits:
            basis_DD, dual_DD = (to_device(each, self._metric.device) for each in (self._basis_DD, self._dual_DD))
            self._fits[part] = NestedFit.of(_inner(self._metric, self._side, self._kind, self._metric.together[part]), basis_DD, dual_DD)
        return self._fits[part]

    def _reader(self, part: int, basis_RD: torch.Tensor) -> torch.Tensor:
        """For any basis."""
        return reader(_inner(self._metric, self._side, self._kind, self._metric.together[part]), basis_RD)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can slice again."""
        loss_SR, gain_SR = torch.from_numpy(self.curve.loss_SR), torch.from_numpy(self.curve.gain_SR)
        return {"basis": self._basis_DD, "dual": self._dual_DD, "loss": loss_SR, "gain": gain_SR}

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, kind: Metric, tensors: Mapping[str, torch.Tensor]) -> "LatentBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        curve = latent_curve(metric, side, tensors["loss"][0], tensors["gain"][0])
        return cls(metric, side, kind, tensors["basis"], tensors["dual"], curve, {})


def _are_small(layer: ExpertLayer) -> bool:
    return layer.experts * layer.hidden**2 <= SMALL


def _inner(metric: LayerMetric, side: Side, kind: Metric, expert: Which) -> RootedGram:
    """The expert's inner product of hidden size: of what its input matrix reads (G_e), of what its output matrix writes (L_e)."""
    return metric.right_of_input(kind, expert) if side == "input" else metric.left(side, kind, expert)


def _outer(metric: LayerMetric, side: Side, kind: Metric, expert: Which) -> torch.Tensor:
    """What the expert's matrix carries into the hidden size: Wᵀ L W of the input side, W G Wᵀ of the output side."""
    return metric.read_by(side, kind, expert) if side == "input" else metric.written_by(side, kind, expert)


@dataclass(frozen=True)
class _Shared:
    """The directions that all experts of a side share, of the whole space, best first.

    Attributes:
        basis_DD: rows of V, or columns of P, in the precision of factors.
        dual_DD: its inverse, transposed.
        gain_R: squared singular values of what all experts carry, in the one inner product that they share.
        inners: the experts' own inner products by the number of their part, where all of them together are small.
        fits: how they are fitted to the basis, likewise.
    """

    basis_DD: torch.Tensor
    dual_DD: torch.Tensor
    gain_R: torch.Tensor
    inners: Mapping[int, RootedGram]
    fits: dict[int, NestedFit] = field(default_factory=dict)


def _parts(metric: LayerMetric) -> list[tuple[Side, int]]:
    """The parts of either side, by their number: as many experts at once as are worked on together."""
    return [(side, part) for side in SIDES for part in range(len(metric.together))]


def _shared_bases(metric: LayerMetric, kind: Metric) -> dict[Side, _Shared]:
    """The bases of both sides, each orthonormal in its pooled Gram.

    Expert e would have its own from the inner product I_e and from what it carries, O_e. One basis needs one pair, so Σ_e I_e ⊗ O_e is
    taken as the product of its two marginals, which it is where all I_e or all O_e are alike; the refit puts right what that leaves out.
    """
    parts, hidden = _parts(metric), metric.layer.hidden
    pooled, summed = ({side: torch.zeros(hidden, hidden, dtype=torch.float64, device=metric.device) for side in SIDES} for _ in range(2))
    inners: dict[Side, dict[int, RootedGram]] = {side: {} for side in SIDES}

    def pair(number: int) -> tuple[RootedGram, torch.Tensor]:
        side, part = parts[number]
        return _inner(metric, side, kind, metric.together[part]), _outer(metric, side, kind, metric.together[part])

    def found(place: int) -> _Shared:
        side = SIDES[place]
        total = trace_of(summed[side]).clamp(min=torch.finfo(torch.float64).tiny)
        gram = FullGram(ridged(pooled[side] / total, GRAM_RIDGE))
        gain_R, vector_DD = whitened_directions(gram, summed[side], metric.dtype)
        basis_DD, dual_DD = gram.inverse_root_times(vector_DD), gram.turned_root_times(vector_DD)  # V = Qᵀ R^{-1}, V^{-T} = Qᵀ Rᵀ
        return _Shared(_settled(basis_DD, metric), _settled(dual_DD, metric), gain_R, inners[side])

    for (side, part), (inner, outer_DD) in zip(parts, in_parallel(pair, len(parts), metric.device), strict=True):
        inner_DD = inner.full().expand_as(outer_DD)
        _add_weighted_(pooled[side], inner_DD, trace_of(outer_DD))
        _add_weighted_(summed[side], outer_DD, trace_of(inner_DD))
        if _are_small(metric.layer):
            inners[side][part] = inner
    return dict(zip(SIDES, in_parallel(found, len(SIDES), metric.device), strict=True))


def _settled(matrix_DD: torch.Tensor, metric: LayerMetric) -> torch.Tensor:
    """In the precision of factors, and contiguous, so that what is read from a file later multiplies to the same bits."""
    return matrix_DD.to(metric.dtype).contiguous()


def _add_weighted_(sum_DD: torch.Tensor, matrix_DD: torch.Tensor, weight: torch.Tensor) -> None:
    """Add one matrix, or several, each times its weight."""
    for each_DD, times in zip(matrix_DD.reshape(-1, *sum_DD.shape), weight.reshape(-1).tolist(), strict=True):
        sum_DD.add_(each_DD, alpha=times)


def _refitted_losses(metric: LayerMetric, kind: Metric, shared: Mapping[Side, _Shared]) -> dict[Side, torch.Tensor]:
    """Loss of each side at every rank, [D+1], in the output metric, after every expert's own refit in the method's metric.

    The basis is that of the whole space, so that in the output metric nothing is lost beyond it: every loss is a sum of gains, where
    total less gains would be a difference of large numbers.
    """
    parts = _parts(metric)

    def losses(number: int) -> torch.Tensor:
        side, part = parts[number]
        of, which = shared[side], metric.together[part]
        own, outer_DD = of.inners.get(part) or _inner(metric, side, kind, which), _outer(metric, side, "output", which)
        if kind == "output":
            fit = NestedFit.of(own, of.basis_DD, of.dual_DD)
            if _are_small(metric.layer):
                of.fits[part] = fit
            return tail_losses(fit_gains(fit, of.basis_DD, own, outer_DD))
        read_DD, fitted_DD = orthonormal(own, of.basis_DD.double())
        return projection_losses(read_DD, fitted_DD, _inner(metric, side, "output", which), outer_DD.double())

    loss = {side: torch.zeros(metric.layer.hidden + 1, dtype=torch.float64, device=metric.device) for side in SIDES}
    for (side, _), own_R in zip(parts, in_parallel(losses, len(parts), metric.device), strict=True):
        loss[side] += own_R.reshape(-1, own_R.shape[-1]).sum(0)
    return loss
