"""Products of many rows with their experts' matrices in one call each, whatever shapes the matrices have: on GPUs (Triton) and CPUs (C).

torch's grouped products want one shape for all experts and a launch for each further one, around which rows are gathered and put back; a
step of decoding then waits for launches more than for memory. Here a tile of the result looks up where its expert's matrix lies and how
large it is. What belongs to arranging pairs of a token and an expert, and to adding up answers, is one launch each too.

Where `kernels.py` and `cpu_tiles.py` have nothing for a device, gradients or graphs of the compiler are recorded, or numbers have more
than 16 bits, nothing here is used. An export carries a copy of this file, so it must import torch, transformers and those two only.

Shapes: T tokens, k active experts a token, P = T·k pairs sorted by expert, E experts, N rows and C columns of one expert's matrix, R its
rank; B blocks of pairs of one expert.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from transformers.integrations.moe import _grouped_linear

from moesvd_core.cpu_tiles import CpuTiles
from moesvd_core.kernels import (
    arrange_kernel,
    blocks_kernel,
    capturing,
    combine_kernel,
    has_grouped_product,
    launch,
    lend_memory,
    order_kernel,
    product_kernel,
)

SORTED_HERE = 1024
"""So many pairs at most are put in order by comparing each with each, in one launch; more are sorted by torch."""
MANY_ROWS = 256
"""From so many pairs an expert on, the library's products are faster for large matrices: several processors share what they read."""
WIDE_BYTES = 160_000
"""Memory that a processor shares, of GPUs that the largest tiles fit; they take 147,456 bytes, and 196,640 where copying units fill them,
on GPUs that have 232,448."""
GROUPED, ALONE = 1 / 3, 1 / 2
"""The share of the processors that an expert's product has to keep busy for them: all experts in one product, or each in one of its own."""
Matrices = Sequence[torch.Tensor | None]
"""One of each expert; None where it has none. A table says of each: address, rows (-1: none), columns, numbers from one row to the next,
and where it begins among the pieces of its expert's matrix."""


class Tiles:
    """Pairs of a token and an expert in the order of their experts, cut into blocks.

    Attributes:
        expert_P, token_P: of each pair, by expert; int32.
        end_E: where each expert's pairs end, int32.
        place_P: where each pair of the router's order stands, int32.
        rows: pairs in a block at most.
        many: whether experts have `MANY_ROWS` on average.
        block_B3: each block's expert (-1: the block is not used), and its first pair and the one after its last; int32.
    """

    def __init__(self, index_Tk: torch.Tensor, experts: int) -> None:
        """Take the router's choice, of at least one token."""
        pairs, active = index_Tk.numel(), index_Tk.shape[1]
        self.rows = _block_rows(pairs, experts)
        self.blocks = pairs // self.rows + min(pairs, experts)
        self.many = pairs >= MANY_ROWS * experts
        self._runs: list[tuple[int, int, int]] | None = None
        whole: dict[str, Any] = {"dtype": torch.int32, "device": index_Tk.device}
        self.end_E = torch.empty(experts, **whole)
        self.block_B3 = torch.empty(self.blocks, 3, **whole)
        size_E = _power(experts)
        self.expert_P: torch.Tensor
        self.token_P: torch.Tensor
        if pairs <= SORTED_HERE:
            self.expert_P, self.token_P, self.place_P = torch.empty(3, pairs, **whole)
            launch(
                arrange_kernel, (1,), index_Tk.contiguous(), self.expert_P, self.token_P, self.place_P, self.end_E, self.block_B3, pairs,
                self.blocks, active, experts, P=_power(pairs), E=size_E, Q=16, ROWS=self.rows, num_warps=16,
            )
            return
        expert_P, order_P = torch.sort(index_Tk.reshape(-1).to(torch.int32), stable=True)
        self.expert_P, self.token_P = expert_P, (order_P // active).to(torch.int32)
        places = torch.arange(pairs, **whole)
        self.place_P = torch.empty_like(places).scatter_(0, order_P, places)
        torch.searchsorted(expert_P, torch.arange(experts, **whole), right=True, out_int32=True, out=self.end_E)
        launch(blocks_kernel, (1,), self.end_E, self.block_B3, self.blocks, experts, E=size_E, ROWS=self.rows, num_warps=4)

    def runs(self) -> list[tuple[int, int, int]]:
        """Each expert that is asked, and the start and end of its pairs: the host waits for them."""
        if self._runs is None:
            ends = self.end_E.tolist()
            self._runs = [(expert, begin, end) for expert, (begin, end) in enumerate(pairwise([0, *ends])) if begin < end]
        return self._runs

    def in_order(
        self, x_SC: torch.Tensor, row_P: torch.Tensor | None, order_EC: torch.Tensor | None, *, gated: bool = False
    ) -> torch.Tensor:
        """Every pair's row in its expert's order of columns (None: as they stand), [P, C].

        Args:
            row_P: which row is whose, int32; None: pairs have one each.
            gated: rows are gates and what they let up [P, 2C], of which SiLU(gate) · up is put in order.
        """
        columns = x_SC.shape[1] // (1 + gated)
        made_PC, width = x_SC.new_empty(len(self.expert_P), columns), min(1024, _power(columns))
        launch(
            order_kernel, (len(made_PC), -(-columns // width)), x_SC, self.token_P if row_P is None else row_P, self.expert_P,
            x_SC if order_EC is None else order_EC, made_PC, columns, GATHERED=row_P is not None, ORDERED=order_EC is not None, GATED=gated,
            WIDTH=width, num_warps=4,
        )
        return made_PC

    def combine(self, y_PN: torch.Tensor, weight_Tk: torch.Tensor | None, active: int) -> torch.Tensor:
        """Each token's sum of its experts' answers [T, N] by weights (None: all count fully), added up in float32, or in float64."""
        tokens, columns = len(y_PN) // active, y_PN.shape[1]
        sum_TN = y_PN.new_empty(tokens, columns)
        width = min(1024, _power(columns))
        weight = y_PN if weight_Tk is None else weight_Tk.contiguous()
        launch(
            combine_kernel, (tokens, -(-columns // width)), y_PN, self.place_P, weight, sum_TN, columns, active,
            WEIGHED=weight_Tk is not None, WIDTH=width, num_warps=4,
        )
        return sum_TN


class TiledSide:
    """One side's matrices for `Tiles` or `CpuTiles`: of each expert one matrix, or two factors.

    Attributes:
        found: where the parameters were when this was made.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor | None],
        last: Sequence[Matrices],
        first: Sequence[Matrices] = (),
        whole: Matrices = (),
        order_EC: torch.Tensor | None = None,
        *,
        after_identity: bool = False,
        added_up: bool = False,
    ) -> None:
        """Take every expert's matrices, whose numbers must be one after the other in a row.

        Args:
            parameters: whose memory the matrices are in.
            last: what gives the answer, [N, C] or left factors [N, R]; several: an expert's own stand side by side in one matrix. None
                where the expert's matrix is among `whole`.
            first: right factors [R, C], as many; an expert's own stand one below the other. None where there are none.
            whole: matrices of experts beside others that have factors, [N, C].
            order_EC: an order of columns of each expert; None: as they stand.
            after_identity: an identity [R, R] stands before what is in `first`, [R, C - R].
            added_up: several matrices of an expert in `last` are a sum instead, which one in `first` stands behind, or none.
        """
        self.columns = len(next(matrix for matrix in (*last[0], *whole) if matrix is not None))
        self._order_EC = None if order_EC is None else order_EC.to(torch.int32)
        self._last = _Table(last, across=True, added_up=added_up)
        self._whole = _Table([whole]) if whole else None
        self._first = _Table(first, after_identity=after_identity) if first else None
        self.found = where(parameters)

    def times(self, x_SC: torch.Tensor, tiles: Tiles | CpuTiles, row_P: torch.Tensor | None = None) -> torch.Tensor:
        """Every pair's row times its expert's matrix [P, N]; `row_P`: which row is whose, int32 (None: pairs have one each)."""
        x_SC = x_SC.to(self._last.dtype).contiguous()
        if self._order_EC is not None:
            x_SC, row_P = tiles.in_order(x_SC, row_P, self._order_EC), None
        return self._products(x_SC, row_P, tiles)

    def gated(self, pre_PN: torch.Tensor, tiles: Tiles | CpuTiles) -> torch.Tensor:
        """The same for SiLU(gate) · up of rows of gates and what they let up, [P, 2C]."""
        pre_PN = pre_PN.to(self._last.dtype).contiguous()
        return self._products(tiles.in_order(pre_PN, None, self._order_EC, gated=True), None, tiles)

    def _products(self, x_SC: torch.Tensor, row_P: torch.Tensor | None, tiles: Tiles | CpuTiles) -> torch.Tensor:
        pairs = len(tiles.expert_P)
        y_PN, z_SC, of_P = x_SC.new_empty(pairs, self.columns), x_SC, row_P
        if self._first is not None:
            z_SC, of_P = x_SC.new_empty(pairs, -(-self._first.most_rows // 64) * 64), None  # rows begin where memory is read from
            self._first.multiply(x_SC, row_P, z_SC, tiles)
        self._last.multiply(z_SC, of_P, y_PN, tiles)
        if self._whole is not None:
            self._whole.multiply(x_SC, row_P, y_PN, tiles)
        return y_PN


class _Table:
    """Where each expert's matrices are, and how large."""

    def __init__(
        self, pieces: Sequence[Matrices], *, after_identity: bool = False, across: bool = False, added_up: bool = False
    ) -> None:
        """Take pieces of every expert's matrix, which stand one below the other, or side by side (`across`), or all at its beginning
        (`added_up` besides)."""
        example = next(matrix for matrices in pieces for matrix in matrices if matrix is not None)
        self._matrices, self._stack_ENC = pieces[0], _stack(pieces[0]) if len(pieces) == 1 else None
        self.dtype, self.after_identity, self.across, self.pieces = example.dtype, after_identity, across, len(pieces)
        entries, begin_E = list[tuple[int, ...]](), [0] * len(pieces[0])
        for matrices in pieces:
            for expert, matrix_NC in enumerate(matrices):
                entries.append((0, -1, 0, 0, 0))
                if matrix_NC is not None:
                    entries[-1] = (matrix_NC.data_ptr(), *matrix_NC.shape, matrix_NC.stride(0), begin_E[expert])
                    begin_E[expert] += 0 if added_up else matrix_NC.shape[int(across)]
        numbers = [number for _, *others in entries for number in others if number > 0]
        self._aligned = all(number % 8 == 0 for number in numbers) and all(address % 16 == 0 for address, *_ in entries)
        self._heights = [max(0 if matrix is None else len(matrix) for matrix in matrices) for matrices in pieces]
        self.most_rows = max(begin_E) if not across else self._heights[0]
        self.entry_SEF = torch.tensor(entries, dtype=torch.int64, device=example.device)
        self._tiles: dict[int, torch.Tensor] = {}
        self._launched = set[int]()  # for blocks of so many pairs: a recording can do no more than what was done before

    def multiply(self, x_SC: torch.Tensor, row_P: torch.Tensor | None, y_PN: torch.Tensor, tiles: Tiles | CpuTiles) -> None:
        """Write rows times matrices to the pairs whose experts have one."""
        if self.most_rows <= 0:
            return
        if isinstance(tiles, CpuTiles):
            tiles.multiply(self.entry_SEF, self.pieces, x_SC, row_P, y_PN, across=self.across, after_identity=self.after_identity)
            return
        share = self._share_of_processors(len(tiles.expert_P) // len(self._matrices), x_SC.device) if tiles.many else 0
        if self._stack_ENC is not None and self._aligned and share >= GROUPED and has_grouped_product(self.dtype, x_SC.device):
            self._multiply_grouped(self._stack_ENC, _of_pairs(x_SC, row_P), y_PN, tiles)
            return
        if self.pieces == 1 and share >= ALONE and tiles.rows in self._launched and not capturing():
            self._multiply_in_turns(_of_pairs(x_SC, row_P), y_PN, tiles.runs())
            return
        aligned = self._aligned and x_SC.stride(0) % 8 == 0 and y_PN.stride(0) % 8 == 0 and x_SC.data_ptr() % 16 == 0
        shape, unit = _tile(tiles.rows, self.most_rows, _shared_bytes(x_SC.device)), 8 if aligned else 1
        copied = bool(shape.pop("COPIED")) and aligned and self.pieces == 1
        if copied:
            x_SC, row_P = _of_pairs(x_SC, row_P), None
            lend_memory()
        tile_L2 = self._tiles_of(shape["COLUMNS"])
        launch(
            product_kernel, (tiles.blocks * len(tile_L2),), x_SC, tiles.token_P if row_P is None else row_P, self.entry_SEF, tile_L2,
            tiles.block_B3, y_PN, tiles.blocks, len(tile_L2), x_SC.stride(0) // unit, y_PN.stride(0) // unit,
            len(self.entry_SEF) // self.pieces, GATHERED=row_P is not None, AFTER_IDENTITY=self.after_identity, UNIT=unit,
            ACROSS=self.pieces if self.across else 1, COPIED=copied, ROWS=tiles.rows, **shape,
        )
        self._launched.add(tiles.rows)

    def _share_of_processors(self, rows: int, device: torch.device) -> float:
        """How many of them the product of one expert with so many rows keeps busy."""
        return (rows // 128) * (self.most_rows // 256) / _processors(device)

    def _multiply_grouped(self, stack_ENC: torch.Tensor, x_PC: torch.Tensor, y_PN: torch.Tensor, tiles: Tiles) -> None:
        """The same by one product of the library, for matrices of one shape."""
        rows, start = self.most_rows, self.most_rows if self.after_identity else 0
        product_PN = _grouped_linear(x_PC[:, start : start + stack_ENC.shape[2]], stack_ENC, tiles.end_E)
        if self.after_identity:
            torch.add(x_PC[:, :rows], product_PN, out=y_PN[:, :rows])
        else:
            y_PN[:, :rows] = product_PN

    def _multiply_in_turns(self, x_PC: torch.Tensor, y_PN: torch.Tensor, runs: Sequence[tuple[int, int, int]]) -> None:
        """The same by one product of the library for each expert."""
        for expert, begin, end in runs:
            matrix_NC = self._matrices[expert]
            if matrix_NC is None or len(matrix_NC) == 0:
                continue
            rows, columns = matrix_NC.shape
            y_QN, start = y_PN[begin:end, :rows], rows if self.after_identity else 0
            x_QC = x_PC[begin:end, start : start + columns]
            if self.after_identity:
                torch.addmm(x_PC[begin:end, :rows], x_QC, matrix_NC.T, out=y_QN)
            else:
                torch.mm(x_QC, matrix_NC.T, out=y_QN)

    def _tiles_of(self, height: int) -> torch.Tensor:
        """Tiles of so many rows: the piece that each is of, and its first row there; int32."""
        if height not in self._tiles:
            heights = self._heights[:1] if self.across else self._heights
            made = [(piece, row) for piece, rows in enumerate(heights) for row in range(0, rows, height)]
            self._tiles[height] = torch.tensor(made, dtype=torch.int32, device=self.entry_SEF.device)
        return self._tiles[height]


def _of_pairs(x_SC: torch.Tensor, row_P: torch.Tensor | None) -> torch.Tensor:
    """Every pair's row [P, C]."""
    return x_SC if row_P is None else x_SC.index_select(0, row_P)


def _stack(matrices: Matrices) -> torch.Tensor | None:
    """The matrices as one [E, N, C], where they are of one shape and follow each other in memory."""
    first = matrices[0]
    if first is None or first.numel() == 0 or not first.is_contiguous():
        return None
    for place, matrix in enumerate(matrices):
        if matrix is None or matrix.shape != first.shape or matrix.data_ptr() != first.data_ptr() + place * first.nbytes:
            return None
    return first.as_strided((len(matrices), *first.shape), (first.numel(), *first.stride()))


def where(parameters: Mapping[str, torch.Tensor | None]) -> tuple[Any, ...]:
    """Where parameters are and how they stand there: otherwise, what was made of them is out of date."""
    return tuple((each.data_ptr(), each.stride(), each.dtype) for each in parameters.values() if each is not None)


def _power(count: int) -> int:
    """The next power of two, as kernels need it; at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def _block_rows(pairs: int, experts: int) -> int:
    """Pairs in a block: about as many as an expert has, of the sizes that matrix units take."""
    each = pairs / experts
    return next((rows for rows, most in ((16, 12), (32, 24), (64, 96)) if each <= most), 128)


def _tile(rows: int, most_rows: int, shared_bytes: int) -> dict[str, int]:
    """Sizes of a kernel's tiles, as measured: those of few rows wait for memory, those of many share what they read.

    COPIED: the GPU's copying units bring what a tile reads.
    """
    if rows < 64:
        return {"COLUMNS": 32, "DEPTH": 128, "num_warps": 2, "num_stages": 5, "COPIED": 0}
    if rows == 64:
        return {"COLUMNS": 128, "DEPTH": 64, "num_warps": 4, "num_stages": 4, "COPIED": 0}
    wasted = -most_rows % 256 - -most_rows % 128
    wide = 8 * wasted <= most_rows and shared_bytes >= WIDE_BYTES
    return {"COLUMNS": 256 if wide else 128, "DEPTH": 64, "num_warps": 8, "num_stages": 4 if wide else 3, "COPIED": 1}


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@cache
def _shared_bytes(device: torch.device) -> int:
    """What a kernel's program may take of the memory that a processor shares."""
    if device.type != "cuda":
        return WIDE_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))
