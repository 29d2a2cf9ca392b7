"""Products of many experts at a time, for small experts on CPUs: calls cost more than arithmetic there, even where some is for nothing.

Of few pairs of a token and an expert each reads the rows of its expert's matrix that its numbers stand for, and adds them up. Of more, each
expert gets its own rows, filled up to a number that few exceed.

An export carries a copy of this file, so it must import torch and the other files that are carried only.

Shapes: T tokens, k active experts a token, P pairs, E experts in an order of a side's own (their places in it), Q rows of each, G experts
of one batch, R rows in memory, N rows and C columns of one matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from moesvd_core.grouped import Run, add_up, usual

Link = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
"""A matrix [C, N], or what makes the same of rows [Q, C] where no expert has one of its own."""


class Step(NamedTuple):
    """One matrix of each expert of a batch.

    Attributes:
        weight_GCN: the matrices, transposed; one piece of memory, or links.
        rows_RN: the same as rows, C for each expert, who may share some.
        row_GC: which of these are whose, int32.
        first: the place of the first expert.
    """

    weight_GCN: torch.Tensor | Sequence[Link]
    rows_RN: torch.Tensor
    row_GC: torch.Tensor
    first: int

    @classmethod
    def of(cls, weight_GNC: torch.Tensor, first: int = 0) -> "Step":
        """Take matrices that stand transposed in memory."""
        weight_GCN = weight_GNC.transpose(1, 2)
        rows_RN = weight_GCN.view(-1, weight_GCN.shape[2])
        return cls(weight_GCN, rows_RN, torch.arange(len(rows_RN), dtype=torch.int32).view(weight_GCN.shape[:2]), first)


Batch = tuple[Step, ...]
"""What rows of some experts pass, one step after the other."""
Share = tuple[Batch, list[int] | None]
"""A batch and which of the pairs it answers; None: all of them."""


class Arranged:
    """A side's matrices as products of many experts need them, in memory that the side's parameters are views of.

    Attributes:
        batches: of experts that follow each other in `order`.
        order: all experts.
        chains: of each expert, what its rows pass; a matrix comes last.
        joined: whether each batch can take rows of all its experts at once.
        shared: what every token meets once, before the input side's batches or after the output side's.
        steps: products that all experts take together.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter | None],
        batches: Sequence[Sequence[torch.Tensor | Step]],
        order: Sequence[int] | None = None,
        ranks: Sequence[int] = (),
        shared_NC: torch.Tensor | None = None,
    ) -> None:
        """Take what `parameters` are views of.

        Args:
            parameters: who replaces or moves one makes this outdated (see `holds`).
            batches: matrices [G, N, C] of consecutive experts, standing transposed in memory, or the steps that they are made into.
            order: None: as they are counted.
            ranks: of each expert; what pairs of matrices are filled up with beyond is left out of `chains`.
            shared_NC: one matrix for all.
        """
        self.batches, count = list[Batch](), 0
        for batch in batches:
            self.batches.append(tuple(each if isinstance(each, Step) else Step.of(each, count) for each in batch))
            count += len(self.batches[-1][0].row_GC)
        self.joined = all(isinstance(step.weight_GCN, torch.Tensor) for batch in self.batches for step in batch)
        self.shared = None if shared_NC is None else Step.of(shared_NC[None])
        self.steps = sum(len(batch) for batch in batches)
        self.order = tuple(range(count)) if order is None else tuple(order)
        places = inverse(self.order)
        self.chains = [self._chain(place, ranks[expert] if ranks else 0) for expert, place in enumerate(places)]
        self._place_E = None if places == list(self.order) == sorted(places) else torch.tensor(places)
        self._found = [(name, (each.data_ptr(), each.stride())) for name, each in parameters.items() if each is not None]

    def _chain(self, place: int, rank: int) -> list[Link]:
        batch = next(batch for batch in reversed(self.batches) if batch[0].first <= place)
        links = [step.weight_GCN[place - step.first] for step in batch]
        if len(links) == 1:
            return links
        first, last_RN = links
        return [first[:, :rank] if isinstance(first, torch.Tensor) else first, cast(torch.Tensor, last_RN)[:rank]]

    def holds(self, parameters: Mapping[str, nn.Parameter | None]) -> bool:
        """Whether the parameters are still where they were, and stand there as they did."""
        return all((now := parameters.get(name)) is not None and (now.data_ptr(), now.stride()) == place for name, place in self._found)

    def places(self, expert: torch.Tensor) -> torch.Tensor:
        """Where experts stand in the order."""
        return expert if self._place_E is None else self._place_E.index_select(0, expert.flatten()).view(expert.shape)

    def once(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Few tokens through what all experts share."""
        return x_TC if self.shared is None else _sums(self.shared, x_TC, torch.zeros(len(x_TC), dtype=torch.int64))


def inverse(order: Sequence[int]) -> list[int]:
    """Where each number stands in an order."""
    return sorted(range(len(order)), key=order.__getitem__)


def transposed(parameter: nn.Parameter) -> torch.Tensor:
    """Let a parameter's matrices stand transposed in memory; nothing else about it changes."""
    if not parameter.transpose(-1, -2).is_contiguous():
        parameter.data = parameter.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    return parameter.detach()


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


def every_pair(batches: Sequence[Batch], x_PC: torch.Tensor, place_P: torch.Tensor) -> torch.Tensor:
    """Every pair's row through the matrices of its expert [P, N], in any order of pairs."""
    return _answered(_shares(batches, place_P), x_PC, place_P)


def _answered(shares: Sequence[Share], x_PC: torch.Tensor, place_P: torch.Tensor) -> torch.Tensor:
    order: list[int] = []
    parts = []
    for batch, pairs in shares:
        if pairs is None:
            return _through(batch, x_PC, place_P)
        pair_O = torch.tensor(pairs)
        parts.append(_through(batch, x_PC.index_select(0, pair_O), place_P.index_select(0, pair_O)))
        order += pairs
    y_PN = torch.cat(parts)
    return torch.empty_like(y_PN).index_copy_(0, torch.tensor(order), y_PN)


def sum_of_pairs(batches: Sequence[Batch], x_PC: torch.Tensor, place_P: torch.Tensor, weight_Tk: torch.Tensor | None) -> torch.Tensor:
    """The same, added up by weights [T, N] (None: one pair a token, which counts fully)."""
    shares = _shares(batches, place_P)
    if weight_Tk is None:
        return _answered(shares, x_PC, place_P)
    batch, pairs = shares[0]
    if pairs is not None:
        return add_up(_answered(shares, x_PC, place_P), torch.arange(len(place_P)).view(weight_Tk.shape), weight_Tk)
    x_PC = _through(batch[:-1], x_PC, place_P) * weight_Tk.reshape(-1, 1)
    return _sums(batch[-1], x_PC, place_P, weight_Tk.shape[1])


def _shares(batches: Sequence[Batch], place_P: torch.Tensor) -> list[Share]:
    """What each batch that is asked answers."""
    if len(batches) == 1:
        return [(batches[0], None)]
    places, shares, start = place_P.tolist(), list[Share](), 0
    for batch in batches:
        stop = start + len(batch[0].row_GC)
        pairs = [pair for pair, place in enumerate(places) if start <= place < stop]
        if len(pairs) == len(places):
            return [(batch, None)]
        if pairs:
            shares.append((batch, pairs))
        start = stop
    return shares


def _through(batch: Batch, x_PC: torch.Tensor, place_P: torch.Tensor) -> torch.Tensor:
    for step in batch:
        x_PC = _sums(step, x_PC, place_P)
    return x_PC


def _sums(step: Step, x_PC: torch.Tensor, place_P: torch.Tensor, pairs: int = 1) -> torch.Tensor:
    """Products as sums of weighted rows in memory, each of so many pairs: one call reads the matrices that are asked for, and no others."""
    row_PC = step.row_GC.index_select(0, place_P - step.first if step.first else place_P)
    start_S = torch.arange(0, row_PC.numel(), pairs * row_PC.shape[1], dtype=torch.int32)
    weight_X = x_PC.to(step.rows_RN.dtype).reshape(-1)
    return torch.embedding_bag(step.rows_RN, row_PC.view(-1), start_S, False, 0, False, weight_X)[0]


def every_row(batches: Sequence[Batch], x_EQC: torch.Tensor) -> torch.Tensor:
    """Each expert's rows through its own matrices [E, Q, N]."""
    parts, start = [], 0
    for batch in batches:
        x_GQC = x_EQC[start : start + len(batch[0].row_GC)]
        start += len(x_GQC)
        for step in batch:
            weight_GCN = cast(torch.Tensor, step.weight_GCN)
            x_GQC = torch.bmm(x_GQC.to(weight_GCN.dtype), weight_GCN)
        parts.append(x_GQC)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def chained(x_QC: torch.Tensor, chain: Sequence[Link]) -> torch.Tensor:
    """Rows of one expert through its matrices [C, N], one after the other."""
    for link in chain:
        x_QC = torch.mm(x_QC, link) if isinstance(link, torch.Tensor) else link(x_QC)
    return x_QC
