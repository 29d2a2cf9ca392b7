"""The paper's structure: one V for a group of experts, the most frequent expert's, and few U's (MoE-SVD 3.3, Eq. 5-8, Algorithm 3, D.4).

Two variants. As written: each expert's left factor is the sum of U·Σ of the k most frequent experts among those more frequent than it,
with its own added where there are fewer than k (Algorithm 3). Eq. 8 is followed for the sum, (U₁Σ₁ + U₂Σ₂), where Algorithm 3 multiplies
a sum of U's by a sum of Σ's. The shared V is un-whitened with the square root S of the expert that it came from: Algorithm 3 un-whitens
with each expert's own, which could not be shared. `refit`: every expert gets the least-squares left factor for the shared V instead.

Shapes: E experts, N rows, M columns of a side's matrices, R rank, K stored left factors of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from moesvd_core.decomposition.curves import SharedGroup, break_even, shared_curve
from moesvd_core.decomposition.factors import DenseFactors, RightGroup, SharedRightFactors, SideFactors, balanced
from moesvd_core.decomposition.losses import pair_losses
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.projection import best_projection, orthonormal, reader
from moesvd_core.errors import InputError
from moesvd_core.planning import DENSE, Metric, Side, SideCurve

GROUPED_FROM = 64
"""Experts from which a layer is divided into `GROUPS` groups (D.4)."""
GROUPS = 8
NOISE = 1e-10
"""Share of the largest squared singular value up to which one is rounding noise that V must not be divided by."""


@dataclass(frozen=True)
class Sharing:
    """Who shares what within one group.

    Attributes:
        experts: the group, ascending.
        source: the most frequent expert, whose V is shared (Eq. 5).
        keepers: experts whose U is stored; most frequent first, or all of the group after a refit.
        sums: for each of `experts`, which of the stored U's it sums (Eq. 7).
        refit: every expert's U is its own, fitted.
    """

    experts: tuple[int, ...]
    source: int
    keepers: tuple[int, ...]
    sums: tuple[tuple[int, ...], ...]
    refit: bool

    @property
    def decomposed(self) -> tuple[int, ...]:
        """Experts whose own decomposition is needed, the source first."""
        return (self.source,) if self.refit else self.keepers

    @property
    def stored(self) -> int:
        """Stored U's, K."""
        return len(self.keepers)


def sharings(count_E: torch.Tensor, *, refit: bool) -> list[Sharing]:
    """Groups of a layer by routed tokens: one group, or eight from 64 experts on, of neighbours in number.

    k is a quarter of the group: 2 of 8 experts, 4 of 16, and 2 of the 8 in each group of 64, whose 6 rarest are trimmed (D.4).
    Ties in frequency are broken by number, so that "more frequent" is a strict order.
    """
    experts = len(count_E)
    groups = GROUPS if experts >= GROUPED_FROM else 1
    bounds = [experts * group // groups for group in range(groups + 1)]
    return [_sharing(count_E, range(low, high), refit) for low, high in pairwise(bounds)]


def _sharing(count_E: torch.Tensor, members: range, refit: bool) -> Sharing:
    order = sorted(members, key=lambda expert: (-int(count_E[expert]), expert))
    if refit:
        return Sharing(tuple(members), order[0], tuple(members), tuple((index,) for index in range(len(members))), refit=True)
    kept = max(1, len(members) // 4)
    place = {expert: index for index, expert in enumerate(order)}
    sums = tuple(tuple(range(min(place[expert] + 1, kept))) for expert in members)
    return Sharing(tuple(members), order[0], tuple(order[:kept]), sums, refit=False)


class SharedVBasis:
    """The shared V of every group of one side of a layer, best direction first.

    Attributes:
        curve: predicted loss at every rank; a slot a group.
    """

    def __init__(
        self, metric: LayerMetric, side: Side, kind: Metric, sharing: Sequence[Sharing], found: Sequence["Found"], curve: SideCurve
    ) -> None:
        self.curve = curve
        self._metric, self._side, self._kind, self._sharing, self._found = metric, side, kind, sharing, found

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric, *, refit: bool) -> "SharedVBasis":
        """Decompose one side of a layer: one eigendecomposition for each expert whose U or V is stored.

        Args:
            metric: the layer's inner products.
            side: which matrices.
            kind: the metric that the factors minimise; losses are predicted in the output metric whichever it is.
            refit: least-squares U for every expert instead of the sums of Eq. 8.
        """
        sharing = sharings(metric.statistics.count_E, refit=refit)
        ranks = min(_ranks(metric, side, group) for group in sharing)
        whole = [Found.of(metric, side, kind, group, ranks) for group in sharing]
        offered = max(1, *(each.reach(metric, side) for each in whole))  # what no group has is not offered
        found = [each.cut(offered) for each in whole]
        losses = [_losses(metric, side, kind, *each) * metric.unit for each in zip(sharing, found, strict=True)]
        gains = [each.gain_KR[0] for each in found]
        return cls(metric, side, kind, sharing, found, _curve(metric, side, sharing, torch.stack(losses), torch.stack(gains)))

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """Factors at one rank a group; DENSE keeps the original matrices.

        Raises:
            InputError: some groups dense and others not; a side is stored in one form.
        """
        if all(rank == DENSE for rank in ranks):
            return DenseFactors(self._metric.stored(self._side))
        if DENSE in ranks:
            raise InputError(f"groups of shared-v must be all dense or all factored, got ranks {tuple(ranks)}; plan the side as a whole")
        return SharedRightFactors(tuple(self._group(*each) for each in zip(self._sharing, self._found, ranks, strict=True)))

    def _group(self, sharing: Sharing, found: "Found", rank: int) -> RightGroup:
        metric, side, kind = self._metric, self._side, self._kind
        left_KNR, right_RM = found.pairs(metric, side, kind, sharing, rank)
        if sharing.refit:
            own_RM = right_RM[: found.reach(metric, side)].double()
            readers = [_filled(reader(metric.right(side, kind, expert), own_RM), rank) for expert in sharing.experts]
            fits = [metric.weight(side, each) @ fit.T.to(metric.dtype) for each, fit in zip(sharing.experts, readers, strict=True)]
            left_KNR = torch.stack(fits)
        left_KNR, right_RM = balanced(left_KNR, right_RM)
        return RightGroup(sharing.experts, right_RM, left_KNR, sharing.sums)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can slice again."""
        return {
            "basis": torch.stack([found.basis_KRS for found in self._found]),
            "squares": torch.stack([found.gain_KR for found in self._found]),
            "loss": torch.from_numpy(self.curve.loss_SR),
            "gain": torch.from_numpy(self.curve.gain_SR),
        }

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, kind: Metric, tensors: Mapping[str, torch.Tensor], *, refit: bool) -> "SharedVBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        sharing = sharings(metric.statistics.count_E, refit=refit)
        found = [Found(*each) for each in zip(tensors["basis"], tensors["squares"], strict=True)]
        return cls(metric, side, kind, sharing, found, _curve(metric, side, sharing, tensors["loss"], tensors["gain"]))


@dataclass(frozen=True)
class Found:
    """The decompositions of a group that are kept, the source's first.

    Attributes:
        basis_KRS: best directions of each in the smaller space.
        gain_KR: squared singular values of each.
    """

    basis_KRS: torch.Tensor
    gain_KR: torch.Tensor

    @classmethod
    def of(cls, metric: LayerMetric, side: Side, kind: Metric, sharing: Sharing, ranks: int) -> "Found":
        """Decompose the group's experts whose U or V is stored."""
        found = [best_projection(metric.inner(side, kind, each), metric.outer(side, kind, each), ranks) for each in sharing.decomposed]
        basis_KRS = torch.stack([each.basis_RS for each in found]).to(metric.dtype)
        return cls(basis_KRS.cpu(), torch.stack([each.gain_R for each in found]).cpu())

    def cut(self, ranks: int) -> "Found":
        """The leading directions alone."""
        return Found(self.basis_KRS[:, :ranks].contiguous(), self.gain_KR[:, :ranks].contiguous())

    def reach(self, metric: LayerMetric, side: Side) -> int:
        """Directions that V has. Working left it is made of the source's matrix, and has no more than that: 0 where it is all zeros."""
        if metric.works_right(side):
            return self.basis_KRS.shape[1]
        source_R = self.gain_KR[0]
        return int((source_R > NOISE * source_R[0]).sum())

    def pairs(self, metric: LayerMetric, side: Side, kind: Metric, sharing: Sharing, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """U·Σ of each decomposed expert [K, N, rank] and V of the source [rank, M], whose rows beyond its reach are 0."""
        lefts = []
        for expert, basis_RS, gain_R in zip(sharing.decomposed, self.basis_KRS[:, :rank], self.gain_KR[:, :rank], strict=True):
            basis_RS = basis_RS.to(metric.device, torch.float64)
            if metric.works_right(side):
                read_RS = metric.inner(side, kind, expert).times(basis_RS)
                lefts.append(metric.weight(side, expert) @ read_RS.T.to(metric.dtype))
            else:
                lefts.append((basis_RS * gain_R.to(metric.device).sqrt()[:, None]).T.to(metric.dtype))
        return torch.stack(lefts), self._shared(metric, side, kind, sharing.source)[:rank]

    def _shared(self, metric: LayerMetric, side: Side, kind: Metric, source: int) -> torch.Tensor:
        """V of the source, un-whitened with the source's S [R, M] (Eq. 12).

        Of every rank, whichever is asked for: products of other shapes are rounded otherwise, and a weak direction is little else.
        """
        basis_RS = self.basis_KRS[0].to(metric.device)
        if metric.works_right(side):
            return basis_RS
        reach = self.reach(metric, side)
        read_RS = metric.inner(side, kind, source).times(basis_RS[:reach].double())
        sigma_R1 = self.gain_KR[0, :reach].to(metric.device).sqrt()[:, None]
        return _filled((read_RS / sigma_R1).to(metric.dtype) @ metric.weight(side, source), len(basis_RS))


def _ranks(metric: LayerMetric, side: Side, sharing: Sharing) -> int:
    rows, columns = metric.shape(side)
    return break_even(len(sharing.experts) * rows * columns, columns + sharing.stored * rows, min(rows, columns))


def _curve(metric: LayerMetric, side: Side, sharing: Sequence[Sharing], loss_GR: torch.Tensor, gain_GR: torch.Tensor) -> SideCurve:
    groups = [SharedGroup(group.experts, group.stored, [len(used) for used in group.sums]) for group in sharing]
    return shared_curve(metric, side, groups, loss_GR, gain_GR)


def _filled(rows_RS: torch.Tensor, ranks: int) -> torch.Tensor:
    """So many rows: those that there are, and zeros."""
    return functional.pad(rows_RS, (0, 0, 0, ranks - len(rows_RS)))


def _losses(metric: LayerMetric, side: Side, kind: Metric, sharing: Sharing, found: Found) -> torch.Tensor:
    """Loss of a whole group at every rank, [R+1], output metric."""
    left_KNR, right_RM = found.pairs(metric, side, kind, sharing, found.basis_KRS.shape[1])
    loss_R = torch.zeros(len(right_RM) + 1, dtype=torch.float64, device=metric.device)
    for expert, used in zip(sharing.experts, sharing.sums, strict=True):
        if sharing.refit:
            own_RM = right_RM[: found.reach(metric, side)].double()
            read_RM, fitted_RM = (_filled(each, len(right_RM)) for each in orthonormal(metric.right(side, kind, expert), own_RM))
            loss_R += _expert_losses(metric, side, expert, metric.weight(side, expert).double() @ read_RM.T, fitted_RM)
        else:
            loss_R += _expert_losses(metric, side, expert, left_KNR[list(used)].sum(0).double(), right_RM.double())
    return loss_R


def _expert_losses(metric: LayerMetric, side: Side, expert: int, left_NR: torch.Tensor, right_RM: torch.Tensor) -> torch.Tensor:
    """Loss of one expert at every rank, [R+1], output metric."""
    weight_NM = metric.weight(side, expert).double()
    left, right = metric.left(side, "output", expert), metric.right(side, "output", expert)
    total = metric.energy(side, expert)
    seen_RM, weighed_RN = right.times(right_RM), left.times(left_NR.T)
    return pair_losses(total, (weighed_RN * (seen_RM @ weight_NM.T)).sum(1), (weighed_RN @ left_NR) * (seen_RM @ right_RM.T))
