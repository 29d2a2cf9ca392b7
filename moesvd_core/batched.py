"""Products of all experts at a time, for small experts on CPUs: calls cost more than arithmetic there, even where some is for nothing.

Few tokens are answered by every expert, and the router's weights leave out whom it did not ask. Of more tokens each expert gets its own
rows, filled up to the most that any expert gets.

An export carries a copy of this file, so it must import torch and the other files that are carried only.

Shapes: T tokens, k active experts a token, E experts, Q rows of each, G experts of one batch, N rows and C columns of one matrix, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

from moesvd_core.grouped import times, usual


@dataclass(frozen=True)
class Batch:
    """Experts whose matrices are of one shape.

    Attributes:
        ids_G: who they are; None: all, in order.
        chain: matrices [G, N, C] that their rows pass one after the other.
        stack: a packed matrix that comes before those on the input side, [G·R, C], and after them on the output side, [N, G·R].
    """

    ids_G: torch.Tensor | None
    chain: tuple[torch.Tensor, ...]
    stack: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        """In how many products it answers."""
        return len(self.chain) + (self.stack is not None)

    @property
    def size(self) -> int:
        """How many experts."""
        return len(self.chain[0])

    def own(self, x_EXC: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """What concerns these experts of what is given for all."""
        return x_EXC if self.ids_G is None else x_EXC.index_select(dim, self.ids_G)


class Slots:
    """Every expert's own rows.

    Attributes:
        rows: Q.
        asked: how many experts have any.
        token_EQ: the token of each row; filled up with the first.
        offset_TE: which of an expert's rows is a token's, where it was asked.
    """

    def __init__(self, index_Tk: torch.Tensor, experts: int) -> None:
        """Take the router's choice."""
        self._index_Tk = index_Tk
        tokens, active = index_Tk.shape
        expert_P, order_P = torch.sort(index_Tk.reshape(-1), stable=True)
        count_E = torch.bincount(expert_P, minlength=experts)
        counts = count_E.tolist()
        self.rows, self.asked = usual(max(counts)), sum(count > 0 for count in counts)
        token_P = order_P // active
        offset_P = torch.arange(len(order_P)) - (count_E.cumsum(0) - count_E).index_select(0, expert_P)
        self.token_EQ = token_P.new_zeros(experts, self.rows)
        self.token_EQ.view(-1).scatter_(0, expert_P * self.rows + offset_P, token_P)
        self.offset_TE = token_P.new_zeros(tokens, experts)
        self.offset_TE.view(-1).scatter_(0, token_P * experts + expert_P, offset_P)

    def pick(self, y_GQN: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Each token's row of each expert of a batch [T, G, N]; any row where the expert was not asked."""
        place_TG = batch.own(self.offset_TE, 1) + torch.arange(batch.size) * self.rows
        return y_GQN.flatten(0, 1).index_select(0, place_TG.flatten()).view(len(place_TG), batch.size, -1)

    def add_up(self, y_EQN: torch.Tensor, weight_Tk: torch.Tensor | None) -> torch.Tensor:
        """Each token's weighted sum of its experts' rows [T, N]; weights are rounded to the rows' precision."""
        place_Tk = self._index_Tk * self.rows + self.offset_TE.gather(1, self._index_Tk)
        weight_Tk = None if weight_Tk is None else weight_Tk.to(y_EQN.dtype)
        if y_EQN.numel() == 0:
            return y_EQN.new_zeros(len(place_Tk), y_EQN.shape[-1])
        return embedding_bag(place_Tk, y_EQN.flatten(0, 1), mode="sum", per_sample_weights=weight_Tk)


def every_token(batches: Sequence[Batch], x_TC: torch.Tensor) -> torch.Tensor:
    """Every token through each expert's matrices [E, T, N]; the first step is one matrix for all."""
    parts = []
    for batch in batches:
        if batch.stack is not None:
            y_TGN, others = times(x_TC, batch.stack).view(len(x_TC), batch.size, -1), batch.chain
        else:
            first_GNC, *rest = batch.chain
            y_TGN, others = times(x_TC, first_GNC.flatten(0, 1)).view(len(x_TC), *first_GNC.shape[:2]), tuple(rest)
        parts.append(_through(others, y_TGN.transpose(0, 1)))
    return _by_expert(batches, parts)


def every_row(batches: Sequence[Batch], x_TC: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Each expert's rows through its own matrices [E, Q, N]."""
    parts = []
    for batch in batches:
        token_GQ = batch.own(slots.token_EQ)
        if batch.stack is not None:
            rows_XR = times(x_TC, batch.stack).view(len(x_TC) * batch.size, -1)
            place_GQ = token_GQ * batch.size + torch.arange(batch.size)[:, None]
        else:
            rows_XR, place_GQ = x_TC, token_GQ
        x_GQR = rows_XR.index_select(0, place_GQ.flatten()).view(*place_GQ.shape, -1)
        parts.append(_through(batch.chain, x_GQR))
    return _by_expert(batches, parts)


def sum_of_all(batches: Sequence[Batch], x_ETC: torch.Tensor, weight_TE: torch.Tensor) -> torch.Tensor:
    """Every token's rows of all experts through their matrices, added up by weights [T, N]."""
    sums = []
    for batch in batches:
        x_GTC, weight_TG1 = batch.own(x_ETC), batch.own(weight_TE, 1)[..., None]
        if batch.stack is not None:
            y_TGR = _through(batch.chain, x_GTC).transpose(0, 1)
            sums.append(times((y_TGR * weight_TG1.to(y_TGR.dtype)).flatten(1), batch.stack))
        else:
            y_GTN = _through(batch.chain, x_GTC)
            sums.append((y_GTN * weight_TG1.transpose(0, 1).to(y_GTN.dtype)).sum(0))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def sum_of_rows(
    batches: Sequence[Batch], x_EQC: torch.Tensor, slots: Slots, weight_Tk: torch.Tensor | None, weight_TE: torch.Tensor
) -> torch.Tensor:
    """Each expert's rows through its own matrices, and each token's added up by weights [T, N] (given in both forms)."""
    if len(batches) == 1 and batches[0].stack is None:
        return slots.add_up(_through(batches[0].chain, x_EQC), weight_Tk)
    sums = []
    for batch in batches:
        y_GQN = _through(batch.chain, batch.own(x_EQC))
        y_TGN = slots.pick(y_GQN, batch) * batch.own(weight_TE, 1)[..., None].to(y_GQN.dtype)
        sums.append(y_TGN.sum(1) if batch.stack is None else times(y_TGN.flatten(1), batch.stack))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _through(chain: Sequence[torch.Tensor], x_GQC: torch.Tensor) -> torch.Tensor:
    for weight_GNC in chain:
        x_GQC = torch.bmm(x_GQC.to(weight_GNC.dtype), weight_GNC.transpose(1, 2))
    return x_GQC


def _by_expert(batches: Sequence[Batch], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The batches' answers in the order of the experts."""
    if len(parts) == 1:
        return parts[0]
    place_E = torch.cat([batch.ids_G for batch in batches if batch.ids_G is not None]).argsort()
    return torch.cat(list(parts)).index_select(0, place_E)
