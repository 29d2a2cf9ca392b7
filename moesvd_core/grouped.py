"""Products of rows with the matrices that a router chose for them, without a loop over experts on GPUs and without waiting for them.

An export carries a copy of this file, so it must import torch and transformers only.

Shapes: T tokens, k active experts a token, P = T·k pairs of a token and one of its experts, sorted by expert; E experts; Q places of rows
arranged by group, G groups; N rows and C columns of one matrix.
"""

from functools import cached_property

import torch
from transformers.integrations.moe import _grouped_linear


def grouped_linear(x_PC: torch.Tensor, weight_GNC: torch.Tensor, end_G: torch.Tensor) -> torch.Tensor:
    """Multiply consecutive runs of rows by one matrix each: rows end_G[g-1]..end_G[g]-1 by `weight_GNC[g]`, giving [P, N].

    Rows after the last end are not computed: their content is undefined on GPUs. One kernel where strides are multiples of 16 bytes (ranks
    in multiples of 8) and numbers have at most 32 bits; elsewhere a loop over the runs inside one operator.
    """
    x_PC = x_PC.to(weight_GNC.dtype)
    if weight_GNC.numel() == 0:
        return x_PC.new_zeros(len(x_PC), weight_GNC.shape[1])
    aligned = weight_GNC.dtype != torch.float64 and all(size * weight_GNC.element_size() % 16 == 0 for size in weight_GNC.shape[1:])
    if aligned:
        return _grouped_linear(x_PC, weight_GNC, end_G)
    product: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x_PC, weight_GNC.transpose(1, 2), end_G)
    return product


def keeps_tail(group_P: torch.Tensor) -> bool:
    """Whether rows of no group stay behind the others: cutting them off would make the host wait for a GPU to tell how many there are."""
    return group_P.is_cuda


class Runs:
    """Rows arranged by group, for one grouped product over some of the groups.

    Attributes:
        row_Q: which row of the source stands at each place; rows of no group come last (on CPUs: not at all).
        end_G: where each group's run ends, int32.
        valid_Q1: False for places after the last run, or None when there are none.
    """

    def __init__(self, group_P: torch.Tensor, groups: int, ascending: bool = False) -> None:
        """Arrange rows by `group_P`; a row whose group is `groups` belongs to none. `ascending`: the others stand in order already."""
        self.valid_Q1: torch.Tensor | None = None
        if ascending and not keeps_tail(group_P):
            self.row_Q = (group_P < groups).nonzero()[:, 0]
            group_Q = group_P[self.row_Q]
        else:
            group_Q, self.row_Q = torch.sort(group_P, stable=True)
        self.end_G = torch.searchsorted(group_Q, torch.arange(groups, device=group_P.device), right=True).to(torch.int32)
        if keeps_tail(group_P):
            self.valid_Q1 = (group_Q < groups)[:, None]
        else:
            self.row_Q = self.row_Q[: int(self.end_G[-1])]

    def take(self, x_PC: torch.Tensor) -> torch.Tensor:
        """The source's rows in the order of the runs [Q, C]; zeros beyond the last run, which keeps its gradient clean."""
        x_QC = x_PC[self.row_Q]
        return x_QC if self.valid_Q1 is None else x_QC.masked_fill(~self.valid_Q1, 0)

    def clean(self, y_QN: torch.Tensor) -> torch.Tensor:
        """Zero what a grouped product left undefined."""
        return y_QN if self.valid_Q1 is None else y_QN.masked_fill(~self.valid_Q1, 0)


class Pairs:
    """Which experts answer which tokens, as pairs sorted by expert.

    Attributes:
        expert_P, token_P: the two ends of each pair.
        end_E: where each expert's run of pairs ends, int32.
    """

    def __init__(self, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None, experts: int) -> None:
        """Take the router's choice: experts, and the weights of their answers (None: every answer counts fully)."""
        self._shape = index_Tk.shape
        self.expert_P, self._order_P = torch.sort(index_Tk.reshape(-1), stable=True)
        self.token_P = self._order_P // index_Tk.shape[1]
        self._weight_P1 = None if weight_Tk is None else weight_Tk.reshape(-1)[self._order_P, None]
        ids_E = torch.arange(experts, device=index_Tk.device)
        self.end_E = torch.searchsorted(self.expert_P, ids_E, right=True).to(torch.int32)

    @cached_property
    def hit(self) -> frozenset[int] | None:
        """Experts that answer any token; None where asking would make the host wait for a GPU."""
        return None if keeps_tail(self.expert_P) else frozenset(self.expert_P.unique_consecutive().tolist())

    def spread(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Each token's row for each of its pairs [P, C]."""
        return x_TC[self.token_P]

    def combine(self, y_PN: torch.Tensor) -> torch.Tensor:
        """Each token's weighted sum of its experts' answers [T, N], always added in the order of the router's choice."""
        weighted_PN = y_PN if self._weight_P1 is None else y_PN * self._weight_P1
        chosen_PN = torch.empty_like(weighted_PN).index_copy(0, self._order_P, weighted_PN)
        return chosen_PN.view(*self._shape, -1).sum(1)
