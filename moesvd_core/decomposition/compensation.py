"""What a layer's output factors should be once everything before them is compressed: fitted to the neurons that there really are.

A compressed layer reads a stream that earlier layers have changed, and its own gate and up make other neurons h̃ from it. Its output matrix
can take back part of both: instead of D, the matrix that comes closest to the wanted outputs t from h̃ is stored at the same rank,

    D* = argmin Σ p² ‖t − D h̃‖² = E[t h̃ᵀ] E[h̃ h̃ᵀ]^{-1},   then its best rank-r approximation where errors weigh tr L ΔD E[h̃ h̃ᵀ] ΔDᵀ.

Least squares fit noise too: with n tokens and F features, the change of D is shrunk by what the adjusted R² leaves of the plain one, so
that an expert with few tokens keeps the factors that it had. Closed form, no step size, no extra parameter.

Where experts are wide, E[h̃ h̃ᵀ] does not fit: then only the left factor is fitted, to what the right one reads. A base that all experts
share stays what it is, and what each has of its own is fitted to what the base leaves.

Shapes: E experts, D hidden size, M width, R rank; F features: M neurons, or the R numbers that the right factor reads; lower-case n:
tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce

import torch

from moesvd_core.decomposition.factors import (
    BaseDeltaFactors,
    LayerFactors,
    PerExpertFactors,
    PivotedFactors,
    RightGroup,
    SharedLeftFactors,
    SharedRightFactors,
    SideFactors,
    balanced,
)
from moesvd_core.decomposition.grams import FullGram, ridged
from moesvd_core.decomposition.least_squares import RIDGE, FitSums
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.projection import best_projection, reader
from moesvd_core.planning import DENSE, LayerPlan, Metric


def is_changed(plan: LayerPlan) -> bool:
    """Whether compensation changes a layer: fits its output factors anew, or refines a basis of either side (`alternating`)."""
    return plan.output.structure in ("per-expert", "pivoted", "latent", "base-delta") or plan.input.structure == "latent"


def can_compensate(factors: LayerFactors) -> bool:
    """Whether the layer's output side is stored in a form whose factors can be fitted anew."""
    return isinstance(factors.output, PerExpertFactors | PivotedFactors | SharedLeftFactors | BaseDeltaFactors)


def fitted_tensors(factors: LayerFactors) -> dict[str, torch.Tensor]:
    """What a file has to keep of fitted factors, so that `with_fitted` can put them into the plan's again."""
    output, shared = _own(factors.output), _shared_input(factors)
    kept = {} if shared is None else {"input.left": shared.left_KNR, "input.right": shared.right_RM}
    if isinstance(output, PerExpertFactors):
        named = {"left": output.left, "right": output.right}
        kept |= {f"{name}.{expert}": tensor for name, tensors in named.items() for expert, tensor in enumerate(tensors)}
    elif isinstance(output, SharedLeftFactors):
        kept |= {"left": output.left_NR, "right": output.right_ERM}
    return kept


def with_fitted(factors: LayerFactors, tensors: Mapping[str, torch.Tensor]) -> LayerFactors:
    """A plan's factors with the fitted ones that `fitted_tensors` described in their place.

    Raises:
        KeyError, ValueError: the tensors are of another plan.
    """
    output, shared = _own(factors.output), _shared_input(factors)
    if shared is not None:
        group = replace(shared, left_KNR=tensors["input.left"], right_RM=tensors["input.right"])
        factors = replace(factors, input=SharedRightFactors((group,)))
    if isinstance(output, PerExpertFactors):
        left, right = (tuple(tensors[f"{name}.{expert}"] for expert in range(len(output.ranks))) for name in ("left", "right"))
        return replace(factors, output=_with_own(factors.output, PerExpertFactors(output.ranks, left, right, output.dense)))
    if isinstance(output, SharedLeftFactors):
        return replace(factors, output=SharedLeftFactors(tensors["left"], tensors["right"]))
    return factors


def _own(output: SideFactors) -> SideFactors:
    """Output factors but for a base, and in whichever form they are stored."""
    return output.own if isinstance(output, BaseDeltaFactors | PivotedFactors) else output


def _with_own(output: SideFactors, own: PerExpertFactors) -> SideFactors:
    """Output factors with other ones of each expert's own, and the same base and form."""
    return replace(output, own=own) if isinstance(output, BaseDeltaFactors | PivotedFactors) else own


def _shared_input(factors: LayerFactors) -> RightGroup | None:
    """What an input side stores of which all experts share one basis."""
    side = factors.input
    return side.groups[0] if isinstance(side, SharedRightFactors) and len(side.groups) == 1 else None


class OutputFit:
    """Gathers one layer's sums while both streams run, and fits its output factors.

    Args:
        metric: the layer's inner products.
        factors: what the plan stores for it.
        kind: the metric that the factors minimise.
        narrow: fit whole matrices to the neurons, where sums of [M, M] an expert are affordable; else left factors to right ones.

    Attributes:
        planned: the factors before the fit.
    """

    def __init__(self, metric: LayerMetric, factors: LayerFactors, kind: Metric, *, narrow: bool) -> None:
        self.planned = factors
        self._metric, self._kind, self._narrow = metric, kind, narrow
        self._sums: dict[int, FitSums] = {}

    @torch.no_grad()
    def add(self, expert: int, h_nM: torch.Tensor, target_nD: torch.Tensor, p_n: torch.Tensor) -> None:
        """Add tokens of one expert.

        Args:
            h_nM: h̃, the neurons in the compressed model.
            target_nD: t, what the expert should answer, without its bias.
            p_n: routing weights in the compressed model.
        """
        read, before_DF = self._before(expert)
        if before_DF is None:
            return
        output = self.planned.output
        if isinstance(output, BaseDeltaFactors) and not self._narrow:
            target_nD = target_nD - h_nM.to(target_nD.dtype) @ output.base_NM.to(target_nD).T
        p_n1 = p_n.float()[:, None]
        feature_nF = read(h_nM.float()) * p_n1
        added = FitSums.of(feature_nF, target_nD.float() * p_n1 - feature_nF @ before_DF.T)
        self._sums[expert] = added if expert not in self._sums else self._sums[expert].plus(added)

    def factors(self) -> LayerFactors:
        """The layer with fitted output factors, of the ranks and the form that it had."""
        output = _own(self.planned.output)
        fitted: SideFactors
        if isinstance(output, PerExpertFactors):
            fitted = _with_own(self.planned.output, self._per_expert(output))
        elif isinstance(output, SharedLeftFactors):
            fitted = self._shared_left(output)
        else:
            raise TypeError(f"output factors of type {type(output).__name__} cannot be fitted: ask `can_compensate` first")
        return replace(self.planned, output=fitted)

    def _before(self, expert: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
        """How features are read off the neurons, and the matrix B [D, F] before the fit; None for an expert that is not fitted."""
        output = _own(self.planned.output)
        if isinstance(output, PerExpertFactors):
            if output.ranks[expert] in (DENSE, 0):
                return torch.clone, None
            left_DR, right_RM = output.left[expert], output.right[expert]
        else:
            assert isinstance(output, SharedLeftFactors)  # noqa: S101 - `can_compensate`
            left_DR, right_RM = output.left_NR, output.right_ERM[expert]
        if self._narrow:
            return torch.clone, self._metric.weight("output", expert).float()
        place = self._metric.device
        right_MR = right_RM.to(place).float().T
        return lambda h_nM: h_nM @ right_MR, left_DR.to(place).float()

    def _per_expert(self, output: PerExpertFactors) -> PerExpertFactors:
        left, right = list(output.left), list(output.right)
        for expert, sums in self._sums.items():
            change_DF = sums.change()
            if not bool(change_DF.any()):
                continue
            if self._narrow:
                fitted = self._truncated(expert, change_DF, sums, output.ranks[expert])
            else:
                fitted = left[expert].to(change_DF) + change_DF, right[expert].to(change_DF)
            left[expert], right[expert] = (each.to(self._metric.dtype).cpu() for each in balanced(*fitted))
        return PerExpertFactors(output.ranks, tuple(left), tuple(right), output.dense)

    def _truncated(self, expert: int, change_DM: torch.Tensor, sums: FitSums, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best factors [D, R] and [R, M] of the fitted matrix, errors weighed by L on the left and E[h̃ h̃ᵀ] on the right."""
        target_DM = self._metric.weight("output", expert).double() + change_DM
        if isinstance(self.planned.output, BaseDeltaFactors):
            target_DM -= self.planned.output.base_NM.to(target_DM)
        right = FullGram(ridged(sums.gram_FF, RIDGE))
        left = self._metric.left("output", self._kind, expert)
        if target_DM.shape[1] < target_DM.shape[0]:  # either space gives the same product
            found = best_projection(right, left.carried(target_DM), rank)
            return target_DM @ right.times(found.basis_RS).T, found.basis_RS
        found = best_projection(left, right.carried(target_DM.T), rank)
        return found.basis_RS.T, left.times(found.basis_RS) @ target_DM

    def _shared_left(self, output: SharedLeftFactors) -> SharedLeftFactors:
        if self._narrow:
            right_ERM = output.right_ERM.clone()
            basis_RD = output.left_NR.T.to(self._metric.device, torch.float64)
            for expert, sums in self._sums.items():
                read_RD = reader(self._metric.left("output", self._kind, expert), basis_RD)
                right_ERM[expert] += (read_RD @ sums.change()).to(right_ERM)
            return SharedLeftFactors(*balanced(output.left_NR, right_ERM))
        if not self._sums:
            return output
        pooled = reduce(FitSums.plus, self._sums.values())
        left_DR = output.left_NR + pooled.change().to(output.left_NR)
        return SharedLeftFactors(*balanced(left_DR, output.right_ERM))
