"""The structures of one side of a layer's experts that `FactoredExperts` (see `experts.py`) is made of.

An export carries a copy of this file, so it must import torch and the other files that are carried only.

Shapes as in `experts.py`; F: experts with factors of their own.

A side (input: gate and up stacked; output: down) is one expert's matrix `W_e [N, C]`, stored in one of these structures:

- dense: `W_e`
- per-expert: `U_e V_e`, a rank for every expert; rank -1 is the matrix itself, rank 0 nothing at all
- shared-right: `(Σ U_s) V_g`, one V for a group of experts (the paper's form), or for all (latent input: V once a token)
- shared-left: `P B_e` on the output side (latent output: P once a token)
- those of `pivoted_side.py` and `rival_sides.py`
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from moesvd_core.batched import Arranged, transposed
from moesvd_core.grouped import Pairs, Runs, grouped_linear
from moesvd_core.sides import DISTINCT_RANKS, Side, places, segments
from moesvd_core.tiles import TiledSide


class DenseSide(Side):
    """The original matrices `weight` [E, N, C]."""

    def __init__(self, experts: int, rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        super().__init__(rows, reads_tokens)
        self.weight = nn.Parameter(torch.empty(experts, rows, columns, **kind))

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return self.own(x_PC, "weight", pairs)

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        return [[self.matrix("weight", expert)]]

    @property
    def batchable(self) -> bool:
        return self.weight.numel() > 0

    def _arrange(self) -> Arranged:
        return Arranged(self._parameters, [[transposed(self.weight)]])

    def _tile(self) -> TiledSide | None:
        return TiledSide(self._parameters, [list(self.weight)]) if self.weight.numel() > 0 else None

    def _multiplied_out(self) -> torch.Tensor:
        return self.weight


class PerExpertSide(Side):
    """`U_e V_e` with a rank for every expert, stored unpadded in slabs (see `segments`).

    Slab i is `left_i` [G, N, width] and `right_i` [G, width, C]; an expert's columns of U stand in its slabs from the widest down.
    Experts of rank -1 keep their matrix in `dense` [G, N, C].
    """

    def __init__(self, ranks: Sequence[int], rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        super().__init__(rows, reads_tokens)
        self.ranks, self.columns = tuple(ranks), columns
        self.slabs = segments(ranks)
        self.whole = tuple(e for e, rank in enumerate(ranks) if rank < 0)
        self.factored = tuple(sorted((e for e, rank in enumerate(ranks) if rank >= 0), key=lambda e: -ranks[e]))  # slab by slab
        self._joined: tuple[torch.Tensor, torch.Tensor] | None = None
        for i, (width, members) in enumerate(self.slabs):
            self.register_parameter(f"left_{i}", nn.Parameter(torch.empty(len(members), rows, width, **kind)))
            self.register_parameter(f"right_{i}", nn.Parameter(torch.empty(len(members), width, columns, **kind)))
        if self.whole:
            self.dense = nn.Parameter(torch.empty(len(self.whole), rows, columns, **kind))
        self._products: list[tuple[tuple[int, ...], tuple[str, ...]]] = [
            (members, (f"right_{i}", f"left_{i}")) for i, (_, members) in enumerate(self.slabs)
        ]
        if self.whole:
            self._products.append((self.whole, ("dense",)))
        self._parts = [[(members.index(e), names) for members, names in self._products if e in members] for e in range(len(ranks))]
        self._apart = len({rank for rank in ranks if rank > 0}) <= DISTINCT_RANKS  # each expert's factors are in one slab

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        x_PC = x_PC.to(next((own.dtype for own in self.parameters()), x_PC.dtype))
        if len(self._products) == 1 and len(self._products[0][0]) == len(self.ranks):  # one rank for all: the pairs stand as needed
            for name in self._products[0][1]:
                x_PC = self.own(x_PC, name, pairs)
            return x_PC
        several = any(len(parts) > 1 for parts in self._parts)  # parts of one matrix are added up
        exact = torch.promote_types(x_PC.dtype, torch.float32) if several else x_PC.dtype
        y_PN = torch.zeros(len(x_PC), self.rows, dtype=exact, device=x_PC.device)
        for i, (members, names) in enumerate(self._products):
            place_E = self.table(f"slab {i}", x_PC.device, partial(places, members, len(self.ranks)))
            runs = Runs(place_E[pairs.expert_P], len(members), ascending=True)
            y_QC = runs.take(x_PC)
            for name in names:
                y_QC = runs.clean(grouped_linear(y_QC, getattr(self, name), runs.end_G))
            y_PN.index_add_(0, runs.row_Q, y_QC.to(exact))
        return y_PN.to(x_PC.dtype)

    def filled_up(self, name: str, weight_GNC: torch.Tensor) -> torch.Tensor:
        """Ranks up to the next multiple of 32: each is a kernel of its own, and a packed matrix is filled up in any case."""
        if name == "dense":
            return weight_GNC
        side = name.startswith("right")
        missing = -weight_GNC.shape[1 if side else 2] % 32
        return pad(weight_GNC, (0, 0, 0, missing) if side else (0, missing))

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        if self._joined and self.ranks[expert] >= 0:
            rank, place, (right_FRC, left_FNR) = self.ranks[expert], self.factored.index(expert), self._joined
            return [[right_FRC[place, :rank], left_FNR[place, :, :rank]]]
        return [[self.matrix(name, place) for name in names] for place, names in self._parts[expert]]

    @property
    def batchable(self) -> bool:
        return self.joins and (self._apart or self._joined is not None)

    @property
    def joins(self) -> bool:
        return bool(self.slabs or not self.factored)

    def _arrange(self) -> Arranged:
        """Experts with a matrix of their own, and those with factors, of which slabs are views where no expert has several."""
        factors = self._joined
        if self.slabs and self._apart:
            factors = self._filled_up()
            for name, view in self._views(*factors):
                self.get_parameter(name).data = view
        batches = [*([[transposed(self.dense)]] if self.whole else []), *([factors] if factors else [])]
        return Arranged(self._parameters, batches, self.whole + self.factored, self.ranks)

    def _tile(self) -> TiledSide | None:
        if not self.slabs:
            return None
        experts = len(self.ranks)
        pieces = 1 if self._apart else len(self.slabs)
        first, last = ([list[torch.Tensor | None]([None] * experts) for _ in range(pieces)] for _ in range(2))
        for expert in self.factored:
            last[0][expert] = self.matrix("left_0", 0)[:, :0]  # of rank 0, or with pieces in other slabs only
        for i, (_, members) in enumerate(self.slabs):
            for place, expert in enumerate(members):
                right_RC, left_NR = self.matrix(f"right_{i}", place), self.matrix(f"left_{i}", place)
                first[i % pieces][expert], last[i % pieces][expert] = right_RC, left_NR
        whole = [self.dense[self.whole.index(expert)] if expert in self.whole else None for expert in range(experts)] if self.whole else ()
        return TiledSide(self._parameters, last, first, whole)

    def join(self) -> None:
        """Fill all factors up to the largest rank, in place of slabs that cannot be views of them."""
        if self._joined or self._apart:
            return
        self._joined = self._filled_up()
        for name, slab in self._slabs():
            self.register_parameter(name, nn.Parameter(torch.empty_like(slab, device="meta"), slab.requires_grad))

    def unpack(self) -> None:
        super().unpack()
        if self._joined:
            for name, slab in self._slabs():
                self.register_parameter(name, nn.Parameter(torch.empty_like(slab, device="cpu"), slab.requires_grad))
            for joined, piece in self._pieces(*self._joined):
                piece.copy_(joined)
            self._joined = self._arranged = None

    def _filled_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All V [F, R, C] and U [F, N, R] of one rank, transposed in memory; grouped products need strides of whole 16 bytes."""
        example, experts, rank = self.get_parameter("right_0").detach(), len(self.factored), -(-max(self.ranks) // 8) * 8
        right_FRC = example.new_zeros(experts, self.columns, rank).transpose(1, 2)
        left_FNR = example.new_zeros(experts, rank, self.rows).transpose(1, 2)
        for joined, piece in self._pieces(right_FRC, left_FNR):
            joined.copy_(piece)
        return right_FRC, left_FNR

    def _views(self, right_FRC: torch.Tensor, left_FNR: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What of all factors is a slab's."""
        start = 0
        for i, (width, members) in enumerate(self.slabs):
            stop = start + len(members)
            yield f"right_{i}", right_FRC[start:stop, :width]
            yield f"left_{i}", left_FNR[start:stop, :, :width]
            start = stop

    @property
    def packed(self) -> list[torch.Tensor]:
        return [*self._packed_matrices(), *(self._joined or ())]

    def _slabs(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, own) for name, own in self.named_parameters() if name != "dense"]

    def _pieces(self, right_FRC: torch.Tensor, left_FNR: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every part of joined factors with the part of a slab that it holds."""
        for place, expert in enumerate(self.factored):
            start = 0
            for i, (width, members) in enumerate(self.slabs):
                if expert in members:
                    own, stop = members.index(expert), start + width
                    yield right_FRC[place, start:stop], self.get_parameter(f"right_{i}").detach()[own]
                    yield left_FNR[place, :, start:stop], self.get_parameter(f"left_{i}").detach()[own]
                    start = stop

    def _multiplied_out(self) -> torch.Tensor:
        example = next(self.parameters(), torch.empty(0))
        full_ENC = example.new_zeros(len(self.ranks), self.rows, self.columns)
        for i, (_, members) in enumerate(self.slabs):
            full_ENC[list(members)] += getattr(self, f"left_{i}") @ getattr(self, f"right_{i}")
        if self.whole:
            full_ENC[list(self.whole)] = self.dense
        return full_ENC


class SharedRightSide(Side):
    """One V for each group of experts; an expert's matrix is the sum of one or several stored U's of its group, times V.

    Group g is `right_g` [R, C] and `left_g` [K, N, R]. With one group on the input side, V is applied once a token.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        """Make empty factors.

        Args:
            groups: for each group: experts, rank, stored (how many U's), and sums (for each of its experts the U's that are added up).
        """
        super().__init__(rows, reads_tokens)
        self.groups = groups
        self.experts = sum(len(group["experts"]) for group in groups)
        for g, group in enumerate(groups):
            self.register_parameter(f"right_{g}", nn.Parameter(torch.empty(group["rank"], columns, **kind)))
            self.register_parameter(f"left_{g}", nn.Parameter(torch.empty(group["stored"], rows, group["rank"], **kind)))
        own = [[e] for e in range(self.experts)]
        self.latent = len(groups) == 1 and groups[0]["experts"] == list(range(self.experts)) and groups[0]["sums"] == own
        self._once = reads_tokens and len(groups) == 1
        self._uses = {
            expert: (g, used) for g, group in enumerate(groups) for expert, used in zip(group["experts"], group["sums"], strict=True)
        }

    def narrow(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.shared(x_TC, "right_0") if self._once else x_TC

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        if len(self.groups) == 1 and not self._once:
            x_PC = self.shared(x_PC, "right_0")
        if len(self.groups) == 1:
            return self._expand(0, x_PC, pairs.expert_P, pairs)
        group_P = self.table("groups", x_PC.device, self._group_of_expert)[pairs.expert_P]
        y_PN = x_PC.new_zeros(len(x_PC), self.rows)
        for g in range(len(self.groups)):
            runs = Runs(torch.where(group_P == g, 0, 1), 1, ascending=True)
            if len(runs.row_Q) > 0:
                z_QR = runs.clean(grouped_linear(runs.take(x_PC), getattr(self, f"right_{g}")[None], runs.end_G))
                y_QN = self._expand(g, z_QR, pairs.expert_P[runs.row_Q], pairs)
                y_PN.index_add_(0, runs.row_Q, y_QN.to(y_PN.dtype))
        return y_PN

    @property
    def batchable(self) -> bool:
        return self.latent and self.reads_tokens and self.groups[0]["rank"] > 0

    def _arrange(self) -> Arranged:
        left_ENR, right_RC = (transposed(self.get_parameter(name)) for name in ("left_0", "right_0"))
        return Arranged(self._parameters, [[left_ENR]], shared_NC=right_RC)

    def _tile(self) -> TiledSide | None:
        if not all(group["stored"] for group in self.groups) or not any(group["rank"] for group in self.groups):
            return None
        depth = max(1, *(len(used) for _, used in self._uses.values()))
        last, first = ([list[torch.Tensor | None]([None] * self.experts) for _ in range(count)] for count in (depth, 1))
        for expert, (g, used) in self._uses.items():
            first[0][expert] = self.matrix(f"right_{g}")
            last[0][expert] = self.matrix(f"left_{g}", 0)[:, :0]  # of no U at all
            for place, stored in enumerate(used):
                last[place][expert] = self.matrix(f"left_{g}", stored)
        return TiledSide(self._parameters, last, [] if self._once else first, added_up=True)

    def _multiplied_out(self) -> torch.Tensor:
        full: dict[int, torch.Tensor] = {}
        for g, group in enumerate(self.groups):
            left_KNR, right_RC = getattr(self, f"left_{g}"), getattr(self, f"right_{g}")
            full |= {expert: left_KNR[used].sum(0) @ right_RC for expert, used in zip(group["experts"], group["sums"], strict=True)}
        return torch.stack([full[expert] for expert in range(self.experts)])

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        g, used = self._uses[expert]
        first = [] if self._once else [self.matrix(f"right_{g}")]
        return [[*first, self.matrix(f"left_{g}", place)] for place in used]

    def _expand(self, g: int, z_QR: torch.Tensor, expert_Q: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """`Σ U_s z` over the U's of each row's expert [Q, N]; zero for rows whose expert is of another group."""
        left_KNR = getattr(self, f"left_{g}")
        if self.latent:
            return grouped_linear(z_QR, left_KNR, pairs.end_E)
        used_QS = self.table(f"sums {g}", z_QR.device, partial(self._sums_of_expert, g))[expert_Q]
        runs = Runs(used_QS.reshape(-1), len(left_KNR))
        runs.row_Q = runs.row_Q // used_QS.shape[1]
        y_XN = runs.clean(grouped_linear(runs.take(z_QR), left_KNR, runs.end_G))
        return y_XN.new_zeros(len(z_QR), self.rows).index_add_(0, runs.row_Q, y_XN)

    def _sums_of_expert(self, g: int) -> list[list[int]]:
        """The group's U's that each expert adds up, filled up with the number of U's, which stands for none."""
        depth, none = max(len(used) for used in self.groups[g]["sums"]), self.groups[g]["stored"]
        own = [used if group == g else () for group, used in (self._uses[expert] for expert in range(self.experts))]
        return [[*used, *[none] * depth][:depth] for used in own]

    def _group_of_expert(self) -> list[int]:
        return [self._uses[expert][0] for expert in range(self.experts)]


class SharedLeftSide(Side):
    """`P B_e` on the output side: own small matrices `right` [E, R, C], and one `left` [N, R] that maps every token back once."""

    def __init__(self, rank: int, experts: int, rows: int, columns: int, **kind: Any) -> None:
        super().__init__(rank, reads_tokens=False)
        self.right = nn.Parameter(torch.empty(experts, rank, columns, **kind))
        self.left = nn.Parameter(torch.empty(rows, rank, **kind))

    def widen(self, y_TN: torch.Tensor) -> torch.Tensor:
        return self.shared(y_TN, "left")

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return self.own(x_PC, "right", pairs)

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        return [[self.matrix("right", expert)]]

    @property
    def batchable(self) -> bool:
        return self.rows > 0

    def _arrange(self) -> Arranged:
        return Arranged(self._parameters, [[transposed(self.right)]], shared_NC=transposed(self.left))

    def _tile(self) -> TiledSide | None:
        return TiledSide(self._parameters, [list(self.right)]) if self.batchable else None

    def _multiplied_out(self) -> torch.Tensor:
        return self.left @ self.right


STRUCTURES: dict[str, Callable[..., Side]] = {}
"""Further structures by name, put here by the files that define them: (spec, experts, rows, columns, reads_tokens) -> empty side."""


def make_side(spec: dict[str, Any], experts: int, rows: int, columns: int, reads_tokens: bool, **kind: Any) -> Side:
    """The empty side that its description asks for.

    Raises:
        ValueError: the structure is unknown.
    """
    structure = spec["structure"]
    if structure == "dense":
        return DenseSide(experts, rows, columns, reads_tokens, **kind)
    if structure == "per-expert":
        return PerExpertSide(spec["ranks"], rows, columns, reads_tokens, **kind)
    if structure == "shared-right":
        return SharedRightSide(spec["groups"], rows, columns, reads_tokens, **kind)
    if structure == "shared-left" and not reads_tokens:
        return SharedLeftSide(spec["rank"], experts, rows, columns, **kind)
    if structure in STRUCTURES:
        return STRUCTURES[structure](spec, experts, rows, columns, reads_tokens, **kind)
    raise ValueError(f"structure {structure!r} is not known for this side: a newer version of moesvd must have made the checkpoint")
