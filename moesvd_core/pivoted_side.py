"""The side of `FactoredExperts` (see `experts.py`) whose factors are stored without their identities (see `decomposition/pivots.py`).

An export carries a copy of this file, so it must import torch and the other files that are carried only.

Shapes as in `experts.py`; here G is the number of experts of one slab, and S = C − R.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moesvd_core.batched import Arranged, Link, Step, transposed
from moesvd_core.factor_sides import STRUCTURES
from moesvd_core.grouped import TURNED_ROWS, Pairs, Runs, grouped_linear, in_graph, times
from moesvd_core.sides import Side, by_rank, places
from moesvd_core.tiles import TiledSide

_packed_sum = torch.ops.mkldnn._linear_pointwise.binary

GATHERED = 1 << 26
"""So many numbers at most are put in order at once: each takes an index of eight bytes."""


class PivotedSide(Side):
    """`U_e V_e` with a rank for every expert, where some R columns of V_e, its pivots, are an identity.

    Slab i, of the experts of one rank, is `left_i` [G, N, R], `right_i` [G, R, S] with the columns that are no pivots, and `pivot_i`
    [G, R], which ones are, ascending. Experts of rank -1 keep their matrix in `dense` [F, N, C].
    """

    def __init__(self, ranks: Sequence[int], rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        super().__init__(rows, reads_tokens)
        self.ranks, self.columns = tuple(ranks), columns
        self.slabs = by_rank(ranks)
        self.whole = tuple(expert for expert, rank in enumerate(ranks) if rank < 0)
        self._found: tuple[list[torch.Tensor], torch.Tensor | None] | None = None
        for i, (rank, members) in enumerate(self.slabs):
            self.register_parameter(f"left_{i}", nn.Parameter(torch.empty(len(members), rows, rank, **kind)))
            self.register_parameter(f"right_{i}", nn.Parameter(torch.empty(len(members), rank, columns - rank, **kind)))
            index = torch.arange(rank, dtype=index_type(kind.get("dtype") or torch.get_default_dtype()), device=kind.get("device"))
            self.register_buffer(f"pivot_{i}", index.repeat(len(members), 1))
        self._pivots = tuple(self._buffers)
        if self.whole:
            self.dense = nn.Parameter(torch.empty(len(self.whole), rows, columns, **kind))
        self._place = {expert: (i, place) for i, (_, members) in enumerate(self.slabs) for place, expert in enumerate(members)}

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        x_PC = x_PC.to(next((own.dtype for own in self.parameters()), x_PC.dtype))
        if (order_EC := self._order()) is not None:
            x_PC = _in_order(x_PC, order_EC, pairs.expert_P)
        if self.slabs and len(self.slabs[0][1]) == len(self.ranks):  # one rank for all: the pairs stand as needed
            return self._pivoted(0, x_PC, pairs.end_E, lambda z_PR: z_PR)
        y_PN = torch.zeros(len(x_PC), self.rows, dtype=x_PC.dtype, device=x_PC.device)
        for i, members in enumerate([*(members for _, members in self.slabs), *([self.whole] if self.whole else [])]):
            place_E = self.table(f"slab {i}", x_PC.device, partial(places, members, len(self.ranks)))
            runs = Runs(place_E[pairs.expert_P], len(members), ascending=True)
            x_QC = runs.take(x_PC)
            if i < len(self.slabs):
                y_QN = self._pivoted(i, x_QC, runs.end_G, runs.clean)
            else:
                y_QN = grouped_linear(x_QC, self.dense, runs.end_G)
            y_PN.index_add_(0, runs.row_Q, runs.clean(y_QN))
        return y_PN

    def _pivoted(
        self, i: int, x_QC: torch.Tensor, end_G: torch.Tensor, clean: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Rows of a slab's experts, their columns in order, by grouped products [Q, N]."""
        rank = self.slabs[i][0]
        z_QR = x_QC[:, :rank] + grouped_linear(x_QC[:, rank:], getattr(self, f"right_{i}"), end_G)
        return grouped_linear(clean(z_QR), getattr(self, f"left_{i}"), end_G)

    def answer(self, expert: int, x_QC: torch.Tensor) -> torch.Tensor:
        if self.ranks[expert] <= 0:
            whole = self.ranks[expert] < 0
            return times(x_QC, self.matrix("dense", self.whole.index(expert))) if whole else x_QC.new_zeros(len(x_QC), self.rows)
        rank, (i, place) = self.ranks[expert], self._place[expert]
        order_EC, right_RS = self._order(), self.matrix(f"right_{i}", place)
        order_C = None if order_EC is None else order_EC[expert]
        x_QC = x_QC.to(right_RS.dtype)
        if right_RS.is_mkldnn:
            in_order = order_C is None
            z_QR = _packed_sum(x_QC[:, rank:], x_QC[:, :rank], right_RS, None, "add") if in_order else times(x_QC, right_RS)
        elif len(x_QC) >= TURNED_ROWS[0]:
            z_QR = _ordered_times(order_C, right_RS, x_QC)
        else:
            z_QR = _after_identity(right_RS.t(), x_QC if order_C is None else x_QC.gather(1, order_C.expand(len(x_QC), -1)))
        return times(z_QR, self.matrix(f"left_{i}", place))

    def filled_up(self, name: str, weight_GNC: torch.Tensor) -> torch.Tensor:
        """Right factors with their identities, where columns would have to be put in order at every call."""
        order_EC = self._order()
        if order_EC is None or not name.startswith("right"):
            return weight_GNC
        rank, members = self.slabs[int(name.removeprefix("right_"))]
        identity_GRR = torch.eye(rank, dtype=weight_GNC.dtype).expand(len(members), -1, -1)
        ordered_GRC = torch.cat([identity_GRR, weight_GNC], 2)
        return torch.empty_like(ordered_GRC).scatter_(2, order_EC[list(members), None].expand(ordered_GRC.shape), ordered_GRC)

    def taken_out(self, name: str, full_GNC: torch.Tensor) -> torch.Tensor:
        order_EC = self._order()
        if order_EC is None or not name.startswith("right"):
            return full_GNC
        rank, members = self.slabs[int(name.removeprefix("right_"))]
        return full_GNC.gather(2, order_EC[list(members), None, rank:].expand(-1, full_GNC.shape[1], -1))

    def _order(self) -> torch.Tensor | None:
        """All columns, for each expert: its pivots, then the others, ascending [E, C]; made anew when pivots were replaced.

        None where this is how they stand, as `neuron_order` has them stored; a graph that is recorded first does not look.
        """
        buffers: dict[str, Any] = self._buffers  # others may have put theirs beside the pivots
        pivots: list[torch.Tensor] = [buffers[name] for name in self._pivots]  # one a slab, in their order
        if self._found is not None and all(own is other for own, other in zip(self._found[0], pivots, strict=True)):
            return self._found[1]
        device = next((own.device for own in (*pivots, *self.parameters())), None)
        other_EC = torch.ones(len(self.ranks), self.columns, dtype=torch.uint8, device=device)
        for pivot_GR, (_, members) in zip(pivots, self.slabs, strict=True):
            of_slab_GC = other_EC.new_ones(len(members), self.columns).scatter_(1, as_places(pivot_GR), 0)
            other_EC[list(members)] = of_slab_GC
        order_EC = other_EC.argsort(dim=1, stable=True)
        if in_graph():  # whose memory is its own
            return order_EC
        self._found = pivots, None if bool((order_EC.diff(dim=1) == 1).all()) else order_EC
        return self._found[1]

    def _load_from_state_dict(self, *call: Any) -> None:
        self._found = None  # loading may write into the pivots
        self._arranged = self._tiled = None
        super()._load_from_state_dict(*call)

    @property
    def batchable(self) -> bool:
        return bool(self.slabs)

    def _arrange(self) -> Arranged:
        """All U as rows, and the other columns of all V as rows behind those of an identity, which all experts share. Rows of V are filled
        up to the highest rank; where that asks for rows of U that an expert has not, it reads one of zeros."""
        example, highest = self.get_parameter("left_0").detach(), -(-self.slabs[0][0] // 8) * 8
        factored = (*self._place, *(expert for expert, rank in enumerate(self.ranks) if rank == 0))
        rows_XR = example.new_zeros(highest + 1 + sum(len(members) * (self.columns - rank) for rank, members in self.slabs), highest)
        rows_XR[:highest].fill_diagonal_(1)
        rows_YN = example.new_zeros(1 + sum(len(members) * rank for rank, members in self.slabs), self.rows)
        row_FC = torch.full((len(factored), self.columns), highest, dtype=torch.int32)  # a row of zeros
        row_FR = torch.zeros(len(factored), highest, dtype=torch.int32)  # the same
        first_links, last_links, found_EC = list[Link](), list[Link](), self._order()
        order_EC = torch.arange(self.columns).repeat(len(self.ranks), 1) if found_EC is None else found_EC
        x, y = highest + 1, 1
        for i, (rank, members) in enumerate(self.slabs):
            place, others, order_GC = len(last_links), self.columns - rank, order_EC[list(members)]
            after, x_end, y_end = place + len(members), x + len(members) * others, y + len(members) * rank
            other_GS = torch.arange(x, x_end, dtype=torch.int32).view(len(members), others)
            pivot_GR = torch.arange(rank, dtype=torch.int32).expand(len(members), -1)
            row_FC[place:after].scatter_(1, order_GC, torch.cat([pivot_GR, other_GS], 1))
            row_FR[place:after, :rank] = torch.arange(y, y_end, dtype=torch.int32).view(len(members), rank)
            right_GSR = rows_XR[x:x_end].view(len(members), others, highest)[:, :, :rank]
            left_GRN = rows_YN[y:y_end].view(len(members), rank, self.rows)
            for name, transposed_G in ((f"right_{i}", right_GSR), (f"left_{i}", left_GRN)):
                view = transposed_G.transpose(1, 2)
                view.copy_(self.get_parameter(name).detach())
                self.get_parameter(name).data = view
            for order_C, right_SR in zip(order_GC, right_GSR, strict=True):
                ordered = partial(_ordered_times, order_C, right_SR.t())
                first_links.append(ordered if found_EC is not None else partial(_after_identity, right_SR))
            last_links += left_GRN
            x, y = x_end, y_end
        first_links += [lambda x_QC: x_QC[:, :0]] * (len(factored) - len(last_links))
        last_links += [rows_YN[:0]] * (len(factored) - len(last_links))
        steps = Step(first_links, rows_XR, row_FC, len(self.whole)), Step(last_links, rows_YN, row_FR, len(self.whole))
        return Arranged(self._parameters, [*([[transposed(self.dense)]] if self.whole else []), steps], self.whole + factored, self.ranks)

    def _tile(self) -> TiledSide | None:
        if not self.slabs:
            return None
        first, last, whole = (list[torch.Tensor | None]([None] * len(self.ranks)) for _ in range(3))
        for expert, rank in enumerate(self.ranks):
            if rank < 0:
                whole[expert] = self.matrix("dense", self.whole.index(expert))
            elif rank == 0:
                last[expert] = self.matrix("left_0", 0)[:, :0]
            else:
                i, place = self._place[expert]
                first[expert], last[expert] = self.matrix(f"right_{i}", place), self.matrix(f"left_{i}", place)
        return TiledSide(self._parameters | self._buffers, [last], [first], whole if self.whole else (), self._order(), after_identity=True)

    def _multiplied_out(self) -> torch.Tensor:
        example = next(self.parameters(), torch.empty(0))
        full_ENC, order_EC = example.new_zeros(len(self.ranks), self.rows, self.columns), self._order()
        for i, (_, members) in enumerate(self.slabs):
            left_GNR, right_GRS = getattr(self, f"left_{i}"), getattr(self, f"right_{i}")
            ordered_GNC = torch.cat([left_GNR, left_GNR @ right_GRS], 2)
            if order_EC is not None:
                order_GNC = order_EC[list(members), None].expand(ordered_GNC.shape)
                ordered_GNC = torch.empty_like(ordered_GNC).scatter(2, order_GNC, ordered_GNC)
            full_ENC[list(members)] = ordered_GNC
        if self.whole:
            full_ENC[list(self.whole)] = self.dense
        return full_ENC


def _in_order(x_QC: torch.Tensor, order_GC: torch.Tensor, place_Q: torch.Tensor) -> torch.Tensor:
    """Every row's columns in its own expert's order."""
    most = max(1, GATHERED // x_QC.shape[1])
    if in_graph() or len(x_QC) <= most:  # a graph is to serve any number of rows
        return x_QC.gather(1, order_GC[place_Q])
    parts = zip(x_QC.split(most), place_Q.split(most), strict=True)
    return torch.cat([part_XC.gather(1, order_GC[place_X]) for part_XC, place_X in parts])


def _ordered_times(order_C: torch.Tensor | None, right_RS: torch.Tensor, x_QC: torch.Tensor) -> torch.Tensor:
    """Rows times a right factor [Q, R]; their columns are put in order where they stand as rows, which is faster on CPUs."""
    ordered_CQ = x_QC.t() if order_C is None else x_QC.t().contiguous().index_select(0, order_C)
    rank = len(right_RS)
    return torch.addmm(ordered_CQ[:rank], right_RS, ordered_CQ[rank:]).t()


def _after_identity(right_SR: torch.Tensor, x_QC: torch.Tensor) -> torch.Tensor:
    """Rows in order times an identity and the coefficients that stand behind it [Q, R]."""
    rank = right_SR.shape[1]
    return torch.addmm(x_QC[:, :rank], x_QC[:, rank:], right_SR)


def index_type(dtype: torch.dtype) -> torch.dtype:
    """Integers of as many bytes as the factors' numbers have, so that a parameter counts alike whatever it is."""
    return {2: torch.int16, 4: torch.int32}.get(dtype.itemsize, torch.int64)


def as_places(index_GR: torch.Tensor) -> torch.Tensor:
    """Stored indices, int64; those of two bytes go up to 65,535 and may have become negative."""
    return index_GR.long() & 0xFFFF if index_GR.dtype == torch.int16 else index_GR.long()


STRUCTURES["pivoted"] = lambda spec, experts, *shape, **kind: PivotedSide(spec["ranks"], *shape, **kind)
