"""Products of all experts at a time, for small experts on CPUs: calls cost more than arithmetic there, even where some is for nothing.

Few tokens are answered by every expert, and the router's weights leave out whom it did not ask. Of more tokens each expert gets its own
rows, filled up to a number that few exceed.

An export carries a copy of this file, so it must import torch and the other files that are carried only.

Shapes: T tokens, k active experts a token, E experts, Q rows of each, G experts of one batch, N rows and C columns of one matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from moesvd_core.grouped import Run, usual


class Batch(NamedTuple):
    """Experts whose matrices are of one shape.

    Attributes:
        ids_G: who they are; None: all, in order.
        chain: matrices [G, N, C] that their rows pass one after the other.
        place_E: where each expert stands when the experts of all batches follow each other; None where there is one batch.
    """

    ids_G: torch.Tensor | None
    chain: tuple[torch.Tensor, ...]
    place_E: torch.Tensor | None = None

    def own(self, x_EXC: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """What concerns these experts of what is given for all."""
        return x_EXC if self.ids_G is None else x_EXC.index_select(dim, self.ids_G)


def slot_rows(counts: Sequence[int], turn: float, unread: float) -> int:
    """How many rows all experts take together, where that and the turns of those that have more take least; 0: turns for all.

    Args:
        counts: pairs of each expert.
        turn: rows in the time of calling the products of one expert, beside computing them; setting a rest apart takes as long once more.
        unread: rows in the time of reading the matrices of experts that nobody asked.
    """
    rows = {usual(count): None for count in sorted(counts) if count > 0}

    def cost(each: int) -> float:
        turns = sum(turn + count - each for count in counts if count > each)
        return turns if each == 0 else len(counts) * each + unread + turns + (turn if turns > 0 else 0)

    return min((0, *rows), key=cost)


class Slots:
    """Every expert's own rows, and a rest of experts that have more than the others.

    Attributes:
        token_EQ: the token of each row; filled up with the first.
        token_X: the tokens of the rest, by expert.
        rest: which expert each run of the rest belongs to, its start and its end.
        place_Tk: where a token's pairs stand among all rows [E·Q], followed by the rest.
    """

    def __init__(self, index_Tk: torch.Tensor, counts: Sequence[int], rows: int) -> None:
        """Take the router's choice, how often it chose each expert, and Q."""
        experts = len(counts)
        expert_P, order_P = torch.sort(index_Tk.reshape(-1), stable=True)
        count_E = torch.tensor(counts)
        first_E = torch.arange(experts) * rows - (count_E.cumsum(0) - count_E)  # less the pairs before it
        place_P = torch.arange(len(order_P)) + first_E.index_select(0, expert_P)
        token_P = order_P // index_Tk.shape[1]
        self.token_X, self.rest = token_P[:0], list[Run]()
        if max(counts) > rows:
            beyond_P = place_P - expert_P * rows >= rows
            (beyond_X,), (within_S,) = beyond_P.nonzero(as_tuple=True), (~beyond_P).nonzero(as_tuple=True)
            place_P[beyond_X] = experts * rows + torch.arange(len(beyond_X))
            self.token_X = token_P.index_select(0, beyond_X)
            start = 0
            for expert, count in enumerate(counts):
                if count > rows:
                    self.rest.append((expert, start, start + count - rows))
                    start += count - rows
            token_S, place_S = token_P.index_select(0, within_S), place_P.index_select(0, within_S)
        else:
            token_S, place_S = token_P, place_P
        self.token_EQ = order_P.new_zeros(experts * rows).scatter_(0, place_S, token_S).view(experts, rows)
        self.place_Tk = torch.empty_like(order_P).scatter_(0, order_P, place_P).view(index_Tk.shape)


def every_token(batches: Sequence[Batch], x_TC: torch.Tensor) -> torch.Tensor:
    """Every token through each expert's matrices [E, T, N]; the first step is one matrix for all."""
    parts = []
    for batch in batches:
        first_GNC, *others = batch.chain
        y_TGN = linear(x_TC.to(first_GNC.dtype), first_GNC.flatten(0, 1)).view(len(x_TC), *first_GNC.shape[:2])
        parts.append(_through(others, y_TGN.transpose(0, 1)))
    return _by_expert(batches, parts)


def every_row(batches: Sequence[Batch], x_EQC: torch.Tensor) -> torch.Tensor:
    """Each expert's rows through its own matrices [E, Q, N]."""
    return _by_expert(batches, [_through(batch.chain, batch.own(x_EQC)) for batch in batches])


def sum_of_all(batches: Sequence[Batch], x_ETC: torch.Tensor, weight_TE: torch.Tensor) -> torch.Tensor:
    """Every token's rows of all experts through their matrices, added up by weights [T, N]; where the last matrices stand transposed, they
    are one for all."""
    sums = []
    for batch in batches:
        *others, last_GNC = batch.chain
        x_TGC = _through(others, batch.own(x_ETC)).to(last_GNC.dtype).transpose(0, 1)
        x_TGC = x_TGC * batch.own(weight_TE, 1)[..., None].to(last_GNC.dtype)
        last_GCN = last_GNC.transpose(1, 2)
        if last_GCN.is_contiguous():
            sums.append(torch.mm(x_TGC.flatten(1), last_GCN.flatten(0, 1)))
        else:
            sums.append(torch.bmm(x_TGC.transpose(0, 1), last_GCN).sum(0))
    return sum(sums[1:], sums[0])


def _through(chain: Sequence[torch.Tensor], x_GQC: torch.Tensor) -> torch.Tensor:
    for weight_GNC in chain:
        x_GQC = torch.bmm(x_GQC.to(weight_GNC.dtype), weight_GNC.transpose(1, 2))
    return x_GQC


def _by_expert(batches: Sequence[Batch], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The batches' answers in the order of the experts."""
    place_E = batches[0].place_E
    return parts[0] if place_E is None else torch.cat(list(parts)).index_select(0, place_E)
