"""What a compressed layer stores: small matrices in place of large ones, in the forms that the methods make.

Shapes: E experts, N rows and M columns of a side's matrices (input: n × d, output: d × m), R rank, K stored left factors.

Tensors lie where they were made, until `on_host` moves them. Slots that stay dense keep the original tensor, bit for bit; factors are
float32 (float64 when the weights are). The rank R of a matrix is always the length of a tensor's dimension: nothing is padded.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod, sqrt

import torch

from moesvd_core.architectures.layout import ExpertWeights
from moesvd_core.decomposition.parallel import in_parallel
from moesvd_core.decomposition.pivots import pivoted
from moesvd_core.devices import on_card, to_device, to_host
from moesvd_core.planning import DENSE

AT_ONCE = 512
"""Columns of a large matrix whose squares a CPU adds up at a time."""


class SideFactors(ABC):
    """One side (input or output matrices) of one layer's experts."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Stored parameters."""

    @abstractmethod
    def reconstruct(self) -> torch.Tensor:
        """The dense matrices that the factors stand for, [E, N, M]."""

    @abstractmethod
    def on_host(self) -> "SideFactors":
        """The same without a factor on a card, which what is kept for later must not fill; original matrices stay where they are."""


@dataclass(frozen=True)
class DenseFactors(SideFactors):
    """The original matrices.

    Attributes:
        weight_ENM: the original tensor (a view of it, where possible).
    """

    weight_ENM: torch.Tensor

    @property
    def parameters(self) -> int:
        return self.weight_ENM.numel()

    def reconstruct(self) -> torch.Tensor:
        return self.weight_ENM

    def on_host(self) -> "DenseFactors":
        return self


@dataclass(frozen=True)
class PerExpertFactors(SideFactors):
    """Every expert has its own `left @ right`, of its own rank, or stays dense.

    Attributes:
        ranks: rank of each expert; 0: the expert's matrix is zero; DENSE (-1): kept as it was.
        left: [N, R_e] of each expert; [N, 0] where dense.
        right: [R_e, M] of each expert; [0, M] where dense.
        dense: [N, M] of the experts that are kept as they were, by expert.
    """

    ranks: tuple[int, ...]
    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]
    dense: Mapping[int, torch.Tensor]

    def __post_init__(self) -> None:
        for expert, (rank, left_NR, right_RM) in enumerate(zip(self.ranks, self.left, self.right, strict=True)):
            stored = 0 if rank == DENSE else rank
            if (rank == DENSE) != (expert in self.dense) or left_NR.shape[1] != stored or right_RM.shape[0] != stored:
                raise ValueError(f"expert {expert}: rank {rank} does not fit factors {tuple(left_NR.shape)} and {tuple(right_RM.shape)}")

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in (*self.left, *self.right, *self.dense.values()))

    def reconstruct(self) -> torch.Tensor:
        return torch.stack(
            [
                self.dense[expert].to(left_NR) if expert in self.dense else left_NR @ right_RM
                for expert, (left_NR, right_RM) in enumerate(zip(self.left, self.right, strict=True))
            ]
        )

    def on_host(self) -> "PerExpertFactors":
        return replace(self, left=tuple(map(to_host, self.left)), right=tuple(map(to_host, self.right)))


@dataclass(frozen=True)
class RightGroup:
    """Experts that share one right factor.

    Attributes:
        experts: which experts, ascending.
        right_RM: the shared factor V.
        left_KNR: the stored left factors U.
        sums: for each of `experts`, the left factors whose sum it uses (Eq. 8); a single one when U is its own.
    """

    experts: tuple[int, ...]
    right_RM: torch.Tensor
    left_KNR: torch.Tensor
    sums: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        count = self.left_KNR.shape[0]
        if len(self.sums) != len(self.experts) or any(not 0 <= index < count for used in self.sums for index in used):
            raise ValueError(f"sums {self.sums} must name, for each of {len(self.experts)} experts, some of {count} left factors")
        if self.left_KNR.shape[2] != self.right_RM.shape[0]:
            raise ValueError(f"left factors of rank {self.left_KNR.shape[2]} do not fit a right factor of rank {self.right_RM.shape[0]}")


@dataclass(frozen=True)
class SharedRightFactors(SideFactors):
    """Right factors shared by groups of experts (the paper's V), or by all (the latent input basis).

    Attributes:
        groups: a partition of the layer's experts; each group has its own rank.
    """

    groups: tuple[RightGroup, ...]

    def __post_init__(self) -> None:
        experts = sorted(expert for group in self.groups for expert in group.experts)
        if experts != list(range(len(experts))):
            raise ValueError(f"groups must hold every expert once, got {experts}")

    @property
    def parameters(self) -> int:
        return sum(group.right_RM.numel() + group.left_KNR.numel() for group in self.groups)

    def reconstruct(self) -> torch.Tensor:
        weights: dict[int, torch.Tensor] = {}
        for group in self.groups:
            for expert, used in zip(group.experts, group.sums, strict=True):
                weights[expert] = group.left_KNR[list(used)].sum(0) @ group.right_RM
        return torch.stack([weights[expert] for expert in range(len(weights))])

    def on_host(self) -> "SharedRightFactors":
        moved = (replace(each, right_RM=to_host(each.right_RM), left_KNR=to_host(each.left_KNR)) for each in self.groups)
        return SharedRightFactors(tuple(moved))


@dataclass(frozen=True)
class SharedLeftFactors(SideFactors):
    """One left factor for all experts (the latent output basis): W_e = P B_e.

    Attributes:
        left_NR: P.
        right_ERM: B_e.
    """

    left_NR: torch.Tensor
    right_ERM: torch.Tensor

    def __post_init__(self) -> None:
        if self.left_NR.shape[1] != self.right_ERM.shape[1]:
            raise ValueError(f"a left factor of rank {self.left_NR.shape[1]} does not fit right factors of rank {self.right_ERM.shape[1]}")

    @property
    def parameters(self) -> int:
        return self.left_NR.numel() + self.right_ERM.numel()

    def reconstruct(self) -> torch.Tensor:
        return self.left_NR @ self.right_ERM

    def on_host(self) -> "SharedLeftFactors":
        return SharedLeftFactors(to_host(self.left_NR), to_host(self.right_ERM))


@dataclass(frozen=True)
class BaseDeltaFactors(SideFactors):
    """One matrix for all experts, and what each adds to it: W_e = B + U_e V_e.

    Attributes:
        base_NM: B.
        own: U_e and V_e, each of its own rank; rank 0 leaves the base alone, and where an expert stays dense the base is left out.
    """

    base_NM: torch.Tensor
    own: PerExpertFactors

    @property
    def parameters(self) -> int:
        return self.base_NM.numel() + self.own.parameters

    def reconstruct(self) -> torch.Tensor:
        full_ENM = self.own.reconstruct()
        based = [expert for expert, rank in enumerate(self.own.ranks) if rank != DENSE]
        full_ENM[based] += self.base_NM
        return full_ENM

    def on_host(self) -> "BaseDeltaFactors":
        return BaseDeltaFactors(to_host(self.base_NM), self.own.on_host())


@dataclass(frozen=True)
class PivotedFactors(SideFactors):
    """Factors of each expert's own, stored without what they say twice: `left @ right` is as well `(left T) @ (T⁻¹ right)`, so T is chosen
    to make some R columns of the right factor, its pivots, an identity, which need not be stored (`pivots`).

    Attributes:
        own: the factors in any such form, each of its own rank.
        device: where the stored form is made, which takes long, wherever the factors lie.
    """

    own: PerExpertFactors
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    @property
    def parameters(self) -> int:
        """With the pivots' indices, and without the identities."""
        return self.own.parameters - sum(rank * (rank - 1) for rank in self.own.ranks if rank > 0)

    @cached_property
    def stored(self) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        """Every expert's product at its pivots [N, R], coefficients of the other columns [R, M - R] and pivots [R]; made once."""

        def made(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            left_NR, right_RM = (to_device(each[expert], self.device) for each in (self.own.left, self.own.right))
            at_pivots_NR, others_RS, pivot_R = pivoted(left_NR, right_RM)
            if self.own.left[expert].device.type == "cpu":
                at_pivots_NR, others_RS = to_host(at_pivots_NR), to_host(others_RS)
            return at_pivots_NR, others_RS, pivot_R

        return tuple(in_parallel(made, len(self.own.left), self.device))

    def reconstruct(self) -> torch.Tensor:
        return self.own.reconstruct()

    def on_host(self) -> "PivotedFactors":
        return PivotedFactors(self.own.on_host(), self.device)


@dataclass(frozen=True)
class NarrowFactors(SideFactors):
    """The matrices of some of every expert's neurons: narrower ones of the same kind, zero where they are filled up to the old width.

    Attributes:
        weight_ENM: rows (input side) or columns (output side) of the neurons that are kept.
        dim: dimension that was cut, 1 (rows) or 2 (columns).
        blocks: equal parts in which the rows are cut: 2 where gate and up rows follow one another.
        full: size of that dimension before.
    """

    weight_ENM: torch.Tensor
    dim: int
    blocks: int
    full: int

    @property
    def parameters(self) -> int:
        return self.weight_ENM.numel()

    def reconstruct(self) -> torch.Tensor:
        return filled(self.weight_ENM, self.dim, self.blocks, self.full)

    def on_host(self) -> "NarrowFactors":
        return replace(self, weight_ENM=to_host(self.weight_ENM))


@dataclass(frozen=True)
class MergedFactors(SideFactors):
    """One matrix for every group of experts.

    Attributes:
        weight_GNM: the groups' matrices.
        groups: group of each expert.
    """

    weight_GNM: torch.Tensor
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        if set(self.groups) != set(range(len(self.weight_GNM))):
            raise ValueError(f"groups must name each of {len(self.weight_GNM)} matrices, got {self.groups}")

    @property
    def parameters(self) -> int:
        return self.weight_GNM.numel()

    def reconstruct(self) -> torch.Tensor:
        return self.weight_GNM[list(self.groups)]

    def on_host(self) -> "MergedFactors":
        return MergedFactors(to_host(self.weight_GNM), self.groups)


@dataclass(frozen=True)
class LayerFactors:
    """Both sides of one layer, the biases, which methods that look at matrices do not touch, and what became of its router.

    Attributes:
        layer: index of the decoder layer.
        input: factors of gate and up, stacked, n × d.
        output: factors of down, d × m.
        input_bias_EN, output_bias_ED: the biases, or None; the input bias has the rows that the input side stores.
        kept: experts among which the router chooses, where some were pruned; None: all of them.
        router_EF: the router's matrix, a row for every expert, where it was refitted (F: what it reads); None: as it is. It takes the
            original's place, so it is no parameter more.
    """

    layer: int
    input: SideFactors
    output: SideFactors
    input_bias_EN: torch.Tensor | None = None
    output_bias_ED: torch.Tensor | None = None
    kept: tuple[int, ...] | None = None
    router_EF: torch.Tensor | None = None

    @classmethod
    def unchanged(cls, layer: int, weights: ExpertWeights) -> "LayerFactors":
        """A layer whose experts stay as they are."""
        sides = DenseFactors(weights.input_END), DenseFactors(weights.output_EDM)
        return cls(layer, *sides, weights.input_bias_EN, weights.output_bias_ED)

    @property
    def parameters(self) -> int:
        """Stored parameters, biases included."""
        biases = sum(bias.numel() for bias in (self.input_bias_EN, self.output_bias_ED) if bias is not None)
        return self.input.parameters + self.output.parameters + biases

    def multiplied_out(self) -> ExpertWeights:
        """The experts that the factors stand for, in the shapes of the original ones."""
        bias_EN, side = self.input_bias_EN, self.input
        if bias_EN is not None and isinstance(side, NarrowFactors):
            bias_EN = filled(bias_EN, 1, side.blocks, side.full)
        return ExpertWeights(side.reconstruct(), self.output.reconstruct(), bias_EN, self.output_bias_ED)


def filled(value: torch.Tensor, dim: int, blocks: int, full: int) -> torch.Tensor:
    """Every block of a dimension followed by zeros, so that all of them together have the full size."""
    parts = value.unflatten(dim, (blocks, -1))
    rest = list(parts.shape)
    rest[dim + 1] = full // blocks - rest[dim + 1]
    return torch.cat([parts, parts.new_zeros(rest)], dim + 1).flatten(dim, dim + 1)


def balanced(left_NR: torch.Tensor, right_RM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with every rank's left column and right row of equal size, so that no factor overflows float16 or trains badly.

    Args:
        left_NR: [..., N, R]; leading dimensions share one right factor.
        right_RM: [..., R, M]; leading dimensions share one left factor.
    """
    return balanced_(left_NR.clone(memory_format=torch.contiguous_format), right_RM.clone(memory_format=torch.contiguous_format))


def balanced_(left_NR: torch.Tensor, right_RM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`balanced`, in place: all experts' factors of a layer are large."""
    left_R = _norms(left_NR.mT) / sqrt(prod(left_NR.shape[:-2]))
    right_R = _norms(right_RM) / sqrt(prod(right_RM.shape[:-2]))
    scale_R = torch.where((left_R > 0) & (right_R > 0), (right_R / left_R).sqrt(), 1.0)
    return left_NR.mul_(scale_R), right_RM.div_(scale_R[:, None])


def _norms(x_RM: torch.Tensor) -> torch.Tensor:
    """Length of every row, [R], of matrices that lie beside each other."""
    if on_card(x_RM.device):
        norm_R: torch.Tensor = torch.linalg.vector_norm(x_RM, dim=(*range(x_RM.ndim - 2), -1))
        return norm_R
    # In parts that stay in the caches, and by squares: where rows are columns in memory, a CPU takes several times as long otherwise.
    each_RM = x_RM.reshape(prod(x_RM.shape[:-2]), *x_RM.shape[-2:])
    return torch.stack([part.square().sum(-1) for own_RM in each_RM for part in own_RM.split(AT_ONCE, -1)]).sum(0).sqrt()
