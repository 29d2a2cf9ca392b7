"""Products of rows with the matrices that a router chose for them, without a loop over experts on GPUs and without waiting for them.

On CPUs a grouped kernel is a loop over all experts itself. There the loop may as well be in the open, over those that are asked: each takes
its rows through all of its matrices at once, of whatever ranks, and the answers are written where they belong.

An export carries a copy of this file, so it must import torch, transformers, `kernels.py`, `cpu_tiles.py` and `tiles.py` only.

Shapes: T tokens, k active experts a token, P = T·k pairs of a token and one of its experts, sorted by expert; E experts; Q places of rows
arranged by group, G groups; N rows and C columns of one matrix.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import embedding_bag, linear
from transformers.integrations.moe import _grouped_linear

from moesvd_core.cpu_tiles import cpu_times
from moesvd_core.kernels import capturing, usable
from moesvd_core.tiles import Tiles

_packed_linear = torch.ops.mkldnn._linear_pointwise


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
    """Whether rows of no group stay behind the others: cutting them off would make the host wait for a GPU to tell how many there are.

    Graphs cannot wait for anything either.
    """
    return group_P.device.type != "cpu" or in_graph()


def in_graph() -> bool:
    """Whether operations are being recorded, to be compiled or played back by a GPU: nothing may depend on what tensors hold."""
    return written_down() or capturing()


def written_down() -> bool:
    """Whether they are recorded by name, to be compiled or traced: a kernel of our own would be left out."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


Run = tuple[int, int, int]
"""An expert, and the start and end of its pairs."""
Answer = Callable[[int, torch.Tensor], torch.Tensor]
"""What an expert makes of rows: [Q, C] to [Q, N]."""
CACHED_ROWS = 512
"""So many rows at most pass an expert at a time: what is made of them on the way stays in a CPU's cache, where new memory would cost more
than products of few columns."""
SMALL_ROWS = 1024
"""The same where experts are small, and so are their rows."""
TURNED_ROWS = (8, 192)
"""With so many rows, a matrix in bfloat16 is better read as it stands than brought into the order that kernels want (see `times`)."""


def in_turns(x_TC: torch.Tensor, row_P: torch.Tensor | None, runs: Sequence[Run], answer: Answer, columns: int) -> torch.Tensor:
    """What experts make of the rows of their pairs, [P, columns]: of row `row_P[p]` (None: of row p, or of the only one).

    A CPU's kernels are compiled for each number of rows, which takes longer than most products. So a run takes a few of its neighbours'
    rows along, up to a number that comes up often; what they give is left out.
    """
    parts = []
    for expert, start, end in runs:
        size = -(-(end - start) // -(-(end - start) // CACHED_ROWS))
        for begin in range(start, end, size):
            stop = min(end, begin + size)
            if len(x_TC) == 1:
                parts.append(answer(expert, x_TC))
                continue
            first, last = _window(begin, stop, len(x_TC) if row_P is None else len(row_P))
            x_QC = x_TC[first:last] if row_P is None else x_TC.index_select(0, row_P[first:last])
            parts.append(answer(expert, x_QC)[begin - first : stop - first])
    return torch.cat(parts) if parts else x_TC.new_empty(0, columns)


def spans_of(runs: Sequence[Run]) -> tuple[list[Run], int]:
    """Runs in parts, each up to a number of rows that comes up often, and how many rows there have to be.

    What a part takes along belongs to the next ones: whoever writes where it stands, part after part, need not leave it out.
    """
    spans = []
    for expert, start, end in runs:
        size = -(-(end - start) // -(-(end - start) // SMALL_ROWS))
        spans += [(expert, begin, begin + usual(min(size, end - begin))) for begin in range(start, end, size)]
    return spans, max((stop for _, _, stop in spans), default=0)


def usual(count: int) -> int:
    """The number that so many rows are filled up to: four between one power of two and the next, eight above 32."""
    step = max(1, 1 << ((count - 1).bit_length() - (3 if count <= 32 else 4))) if count > 8 else 1
    return -(-count // step) * step


def _window(start: int, end: int, rows: int) -> tuple[int, int]:
    """The run's rows and neighbours."""
    size = usual(end - start)
    first = max(0, min(start, rows - size))
    return first, min(rows, first + size)


def through(chains: Sequence[Sequence[torch.Tensor]], x_QC: torch.Tensor, columns: int) -> torch.Tensor:
    """The sum of what chains of matrices [N, C] make of rows, each taking them through one after the other, [Q, columns]."""
    parts = []
    for chain in chains:
        y_QN = x_QC
        for weight_NC in chain:
            y_QN = times(y_QN, weight_NC)
        parts.append(y_QN)
    if not parts:
        return x_QC.new_zeros(len(x_QC), columns)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def times(x_QC: torch.Tensor, weight_NC: torch.Tensor) -> torch.Tensor:
    """Rows times a matrix [Q, N], which may be packed; what comes out may stand transposed in memory."""
    x_QC = x_QC.to(weight_NC.dtype)
    if weight_NC.is_mkldnn:
        product: torch.Tensor = _packed_linear(x_QC.contiguous(), weight_NC, None, "none", [], "")
        return product
    if not (torch.is_grad_enabled() or in_graph()) and (made := cpu_times(x_QC, weight_NC)) is not None:
        return made
    if _turned(x_QC, weight_NC):
        return linear(weight_NC, x_QC).t()
    return linear(x_QC.contiguous(), weight_NC)


def _turned(x_QC: torch.Tensor, weight_NC: torch.Tensor) -> bool:
    """Whether to multiply the matrix by the rows, instead of the rows by the matrix.

    A CPU's kernels for bfloat16 bring the second factor into an order of their own at every call, and read the first as it stands. That
    pays where there are rows enough for their registers, and the matrix outweighs them.
    """
    if in_graph() or weight_NC.dtype != torch.bfloat16 or weight_NC.device.type != "cpu" or weight_NC.stride(-1) != 1:
        return False
    rows, (answers, columns) = len(x_QC), weight_NC.shape
    return TURNED_ROWS[0] <= rows <= TURNED_ROWS[1] and columns >= (answers if rows > 16 else 2 * answers)


def pack(weight_NC: torch.Tensor) -> torch.Tensor:
    """The matrix in the order in which a CPU's kernel reads it, exactly; as many bytes, but for filling up blocks of 64 rows.

    A kernel otherwise brings a matrix into this order at every call, which takes as long as all else while there are few rows.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NC.contiguous())
    return packed


def packed_bytes(weight_NC: torch.Tensor) -> int:
    """What a packed matrix takes, or one in the usual order."""
    return int(torch.ops.mkldnn._nbytes(weight_NC)) if weight_NC.is_mkldnn else weight_NC.nbytes


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
    """Which experts answer which tokens, as pairs sorted by expert (on CPUs those of a single token stand as the router chose them).

    Attributes:
        expert_P: the expert of each pair.
        runs: those of the experts that are asked, where these should take turns; None where finding out would make the host wait for a
            GPU, in graphs, and where gradients are recorded.
        tiles: the pairs as a GPU's own kernels need them; None where these cannot be used.
    """

    def __init__(self, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None, experts: int) -> None:
        """Take the router's choice: experts, and the weights of their answers (None: every answer counts fully)."""
        self._shape, self._experts, self._weight_Tk = index_Tk.shape, experts, weight_Tk
        self._order_P: torch.Tensor | None = None
        self._end_E: torch.Tensor | None = None
        self.expert_P = index_Tk.reshape(-1)
        self.runs: list[Run] | None = None
        self.tiles: Tiles | None = None
        if index_Tk.numel() > 0 and not (torch.is_grad_enabled() or written_down()) and usable(index_Tk):
            self.tiles = Tiles(index_Tk, experts)
            self.expert_P, self._end_E = self.tiles.expert_P, self.tiles.end_E
            return
        open_loop = not (keeps_tail(index_Tk) or torch.is_grad_enabled())
        if open_loop and len(index_Tk) == 1:  # one token: every pair is a run, in whatever order
            self.runs = [(expert, place, place + 1) for place, expert in enumerate(self.expert_P.tolist())]
            return
        self.expert_P, self._order_P = torch.sort(self.expert_P, stable=True)
        if open_loop:
            self.runs = _runs(self.expert_P, experts)

    @property
    def end_E(self) -> torch.Tensor:  # noqa: N802 - a tensor, named by its shape
        """Where each expert's run of pairs ends, int32."""
        if self._end_E is None:
            ids_E = torch.arange(self._experts, device=self.expert_P.device)
            self._end_E = torch.searchsorted(self.expert_P, ids_E, right=True).to(torch.int32)
        return self._end_E

    @property
    def token_P(self) -> torch.Tensor | None:  # noqa: N802 - a tensor, named by its shape
        """The token of each pair; None where there is only one."""
        if self.tiles is not None:
            return self.tiles.token_P
        return None if self._order_P is None else self._order_P // self._shape[1]

    def spread(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Each token's row for each of its pairs [P, C]."""
        return x_TC.expand(len(self.expert_P), -1) if self.token_P is None else x_TC[self.token_P]

    def combine(self, y_PN: torch.Tensor) -> torch.Tensor:
        """Each token's weighted sum of its experts' answers [T, N], always added in the order of the router's choice."""
        if self.tiles is not None:
            return self.tiles.combine(y_PN, self._weight_Tk, self._shape[1])
        if self._order_P is None and self._weight_Tk is not None:
            exact = torch.promote_types(y_PN.dtype, self._weight_Tk.dtype)
            return torch.mm(self._weight_Tk.to(exact), y_PN.to(exact))
        if self.runs is not None and self._order_P is not None and y_PN.numel() > 0:
            place_P = torch.empty_like(self._order_P).scatter_(0, self._order_P, torch.arange(len(self._order_P)))
            return add_up(y_PN, place_P.view(self._shape), self._weight_Tk)
        chosen_PN = y_PN if self._order_P is None else torch.empty_like(y_PN).index_copy_(0, self._order_P, y_PN)
        chosen_TkN = chosen_PN.view(*self._shape, y_PN.shape[1])
        return (chosen_TkN if self._weight_Tk is None else chosen_TkN * self._weight_Tk[..., None]).sum(1)


def add_up(y_SN: torch.Tensor, place_Tk: torch.Tensor, weight_Tk: torch.Tensor | None) -> torch.Tensor:
    """The weighted sums [T, N] of the rows that stand at places, in one pass, for CPUs and without gradients; weights are rounded to the
    rows' precision."""
    if y_SN.numel() == 0:
        return y_SN.new_zeros(len(place_Tk), y_SN.shape[-1])
    return embedding_bag(place_Tk, y_SN, mode="sum", per_sample_weights=None if weight_Tk is None else weight_Tk.to(y_SN.dtype))


def _runs(expert_P: torch.Tensor, experts: int) -> list[Run]:
    """Runs of equal experts."""
    runs, start = list[Run](), 0
    for expert, count in enumerate(expert_P.bincount(minlength=experts).tolist()):
        if count > 0:
            runs.append((expert, start, start + count))
            start += count
    return runs
