"""Sides of `FactoredExperts` (see `experts.py`) for what other methods store: a base with deltas, narrower experts, merged experts.

An export carries a copy of this file, so it must import torch and the other files that are carried only.

Shapes as in `experts.py`; here G is the number of groups that experts were merged into.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moesvd_core.factor_sides import STRUCTURES, DenseSide, PerExpertSide
from moesvd_core.grouped import Pairs, Runs, grouped_linear
from moesvd_core.sides import Side
from moesvd_core.tiles import TiledSide


class BaseDeltaSide(PerExpertSide):
    """`B + U_e V_e`: one matrix `base` [N, C] for all experts, and what `PerExpertSide` stores; a rank of -1 leaves the base out.

    The base meets every token once: on the input side before tokens are spread over their experts, on the output side after their neurons
    were added up with the router's weights.
    """

    by_pair = False

    def __init__(self, ranks: Sequence[int], rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        super().__init__(ranks, rows, columns, reads_tokens, **kind)
        self.base = nn.Parameter(torch.empty(rows, columns, **kind))

    def forward(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        if self.reads_tokens:
            return self._based(pairs.spread(self.shared(x, "base")), pairs) + self.multiply(pairs.spread(x), pairs)
        return self.shared(pairs.combine(self._based(x, pairs)), "base") + pairs.combine(self.multiply(x, pairs))

    def _based(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Zeros for the pairs of experts that do without the base."""
        if not self.whole:
            return x_PC
        based_E = self.table("based", x_PC.device, lambda: [rank >= 0 for rank in self.ranks])
        return x_PC.masked_fill(~based_E[pairs.expert_P][:, None], 0)

    def filled_up(self, name: str, weight_GNC: torch.Tensor) -> torch.Tensor:
        return weight_GNC if name == "base" else super().filled_up(name, weight_GNC)

    @property
    def joins(self) -> bool:
        return False

    def _multiplied_out(self) -> torch.Tensor:
        full_ENC = super()._multiplied_out()
        full_ENC[[expert for expert, rank in enumerate(self.ranks) if rank >= 0]] += self.base
        return full_ENC


class NarrowSide(DenseSide):
    """The matrices of the neurons that were kept, `weight` [E, N, C]: rows of the input side, columns of the output side."""

    def __init__(self, size: int, blocks: int, experts: int, rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        super().__init__(experts, *((size, columns) if reads_tokens else (rows, size)), reads_tokens, **kind)
        self.blocks, self.full = blocks, rows if reads_tokens else columns

    def _multiplied_out(self) -> torch.Tensor:
        return self.filled(self.weight, 1 if self.reads_tokens else 2)

    def filled(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """Zeros after each block of a dimension, up to its full size: neurons that do nothing."""
        parts = value.unflatten(dim, (self.blocks, -1))
        rest = list(parts.shape)
        rest[dim + 1] = self.full // self.blocks - rest[dim + 1]
        return torch.cat([parts, parts.new_zeros(rest)], dim + 1).flatten(dim, dim + 1)


class MergedSide(Side):
    """One matrix for every group of experts, `weight` [G, N, C]."""

    def __init__(self, groups: Sequence[int], rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        """Make empty matrices; `groups` names each expert's."""
        super().__init__(rows, reads_tokens)
        self.groups = list(groups)
        self.weight = nn.Parameter(torch.empty(max(self.groups) + 1, rows, columns, **kind))

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        group_P = self.table("groups", x_PC.device, lambda: self.groups)[pairs.expert_P]
        runs = Runs(group_P, len(self.weight))
        y_QN = grouped_linear(runs.take(x_PC), self.weight, runs.end_G)
        return torch.empty_like(y_QN).index_copy(0, runs.row_Q, y_QN)

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        return [[self.matrix("weight", self.groups[expert])]]

    def _tile(self) -> TiledSide | None:
        return TiledSide(self._parameters, [[self.weight[group] for group in self.groups]]) if self.weight.numel() > 0 else None

    def _multiplied_out(self) -> torch.Tensor:
        return self.weight[self.groups]


STRUCTURES["base-delta"] = lambda spec, experts, *shape, **kind: BaseDeltaSide(spec["ranks"], *shape, **kind)
STRUCTURES["narrow"] = lambda spec, *shape, **kind: NarrowSide(spec["size"], spec["blocks"], *shape, **kind)
STRUCTURES["merged"] = lambda spec, experts, *shape, **kind: MergedSide(spec["groups"], *shape, **kind)
