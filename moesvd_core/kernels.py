"""What a GPU runs (Triton): arranging pairs, products with matrices of any shapes, and what stands between and after them (see `tiles.py`).

An export carries a copy of this file, so it must import torch and triton only, and do without the latter.

Shapes: P pairs sorted by expert, E experts, B blocks of pairs of one expert; lower-case names are addresses, and numbers that a launch
is given. Of a tile: R pairs, C answers, D columns at a time, W columns of a row.
"""

import warnings
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not on this kind of machine
    triton = tl = None

constexpr: Any = tl.constexpr if triton else int
jit: Any = triton.jit(do_not_specialize=["pairs", "blocks", "tiles"]) if triton else lambda kernel: kernel


def usable(example: torch.Tensor) -> bool:
    """Whether kernels can be launched on a tensor's device."""
    return triton is not None and example.is_cuda and _starts(example.device)


@cache
def _starts(device: torch.device) -> bool:
    """Whether a GPU takes a kernel: for that Triton has to know it, and wants a C compiler on the host."""
    try:
        end_E, block_B3 = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, 3, dtype=torch.int32, device=device)
        launch(blocks_kernel, (1,), end_E, block_B3, 1, 1, E=16, ROWS=16, num_warps=4)
    except Exception as error:  # a compiler's, a loader's or a driver's
        warnings.warn(f"Triton cannot start kernels on {device}, so experts are slower there: {error}", stacklevel=2)
        return False
    return True


@cache
def has_grouped_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has a kernel for it. Elsewhere it loops over experts, and waits for their numbers of pairs: no recording can."""
    return device.type != "cuda" or (dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10))


def capturing() -> bool:
    """Whether a GPU records what it is to play back: nothing can be waited for then."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def launch(kernel: Any, grid: tuple[int, ...], example: torch.Tensor, *more: Any, **sizes: Any) -> None:
    """Start a kernel with a tensor and more on that tensor's GPU: Triton takes the current one, and layers may be on several."""
    if not example.is_cuda:  # in Triton's interpreter
        kernel[grid](example, *more, **sizes)
        return
    with torch.cuda.device(example.device):
        kernel[grid](example, *more, **sizes)


def lend_memory() -> None:
    """Give kernels memory for the descriptions of matrices that a GPU's copying units want; a setting of the calling thread."""
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))


@jit
def _write_blocks(begin_E, end_E, block_B3, blocks, experts, E: constexpr, ROWS: constexpr):
    """Cut every expert's pairs into blocks, and mark those that are left over."""
    expert_E = tl.arange(0, E)
    count_E = tl.where(expert_E < experts, (end_E - begin_E + ROWS - 1) // ROWS, 0)
    after_E = tl.cumsum(count_E, 0)
    for number in range(0, tl.max(count_E, 0)):
        entry_E = block_B3 + 3 * (after_E - count_E + number)
        own_E = number < count_E
        tl.store(entry_E, expert_E, mask=own_E)
        tl.store(entry_E + 1, begin_E + number * ROWS, mask=own_E)
        tl.store(entry_E + 2, tl.minimum(begin_E + (number + 1) * ROWS, end_E), mask=own_E)
    used = tl.sum(count_E, 0)
    for start in range(0, blocks, E):
        place_E = start + expert_E
        tl.store(block_B3 + 3 * place_E, tl.full((E,), -1, tl.int32), mask=(place_E >= used) & (place_E < blocks))


@jit
def blocks_kernel(end, block_B3, blocks, experts, E: constexpr, ROWS: constexpr):
    """Blocks of pairs that are sorted already."""
    expert_E = tl.arange(0, E)
    end_E = tl.load(end + expert_E, mask=expert_E < experts, other=0)
    begin_E = tl.load(end + expert_E - 1, mask=(expert_E > 0) & (expert_E < experts), other=0)
    _write_blocks(begin_E, end_E, block_B3, blocks, experts, E, ROWS)


@jit
def arrange_kernel(
    index, expert, token, place, end, block_B3, pairs, blocks, active, experts, P: constexpr, E: constexpr, Q: constexpr,
    ROWS: constexpr,
):
    """A pair stands behind all that ask for earlier experts, and those before it that ask for the same."""
    pair_P, expert_E = tl.arange(0, P), tl.arange(0, E)
    expert_P = tl.load(index + pair_P, mask=pair_P < pairs, other=E).to(tl.int32)
    before_PQ = tl.zeros((P, Q), tl.int32)
    before_EQ = tl.zeros((E, Q), tl.int32)
    until_EQ = tl.zeros((E, Q), tl.int32)
    for start in range(0, pairs, Q):
        pair_Q = start + tl.arange(0, Q)
        expert_Q = tl.load(index + pair_Q, mask=pair_Q < pairs, other=2 * E).to(tl.int32)
        same_PQ = (expert_Q[None, :] == expert_P[:, None]) & (pair_Q[None, :] < pair_P[:, None])
        before_PQ += ((expert_Q[None, :] < expert_P[:, None]) | same_PQ).to(tl.int32)
        before_EQ += (expert_Q[None, :] < expert_E[:, None]).to(tl.int32)
        until_EQ += (expert_Q[None, :] <= expert_E[:, None]).to(tl.int32)
    place_P, begin_E, end_E = tl.sum(before_PQ, 1), tl.sum(before_EQ, 1), tl.sum(until_EQ, 1)
    tl.store(place + pair_P, place_P, mask=pair_P < pairs)
    tl.store(token + place_P, pair_P // active, mask=pair_P < pairs)
    tl.store(expert + place_P, expert_P, mask=pair_P < pairs)
    tl.store(end + expert_E, end_E, mask=expert_E < experts)
    _write_blocks(begin_E, end_E, block_B3, blocks, experts, E, ROWS)


@jit
def order_kernel(
    x, row, expert, order, made, columns, GATHERED: constexpr, ORDERED: constexpr, GATED: constexpr, WIDTH: constexpr,
):
    """Columns of one row in its expert's order, of a gate and what it lets up: SiLU(gate) · up, rounded where torch rounds."""
    pair = tl.program_id(0)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_W = column_W < columns
    source, from_W, stride = pair.to(tl.int64), column_W, columns
    if GATHERED:
        source = tl.load(row + pair).to(tl.int64)
    if ORDERED:
        from_W = tl.load(order + tl.load(expert + pair).to(tl.int64) * columns + column_W, mask=inside_W, other=0)
    if GATED:
        stride = 2 * columns
    x_W = x + source * stride + from_W
    value_W = tl.load(x_W, mask=inside_W, other=0.0)
    if GATED:
        gate_W = value_W.to(tl.float32)
        gate_W = (gate_W / (1 + tl.exp(-gate_W))).to(made.dtype.element_ty).to(tl.float32)
        value_W = (gate_W * tl.load(x_W + columns, mask=inside_W, other=0.0).to(tl.float32)).to(made.dtype.element_ty)
    tl.store(made + pair.to(tl.int64) * columns + column_W, value_W, mask=inside_W)


@jit
def product_kernel(
    x, row, table, tile_L2, block_B3, y, blocks, tiles, x_step, y_step, experts, GATHERED: constexpr,
    AFTER_IDENTITY: constexpr, UNIT: constexpr, ACROSS: constexpr, COPIED: constexpr, ROWS: constexpr,
    COLUMNS: constexpr, DEPTH: constexpr,
):
    """One tile of the answers of one block of pairs. Blocks that follow each other share matrices, so that eight of them take turns."""
    number = tl.program_id(0)
    first = number // (8 * tiles) * 8
    several = tl.minimum(blocks - first, 8)
    entry = block_B3 + 3 * (first + number % (8 * tiles) % several)
    expert = tl.load(entry)
    if expert < 0:
        return
    tile = tile_L2 + 2 * (number % (8 * tiles) // several)
    place = table + 5 * (tl.load(tile) * experts + expert)
    answer = tl.multiple_of(tl.load(tile + 1), COLUMNS)
    rows = tl.load(place + 1).to(tl.int32)
    if answer >= rows:
        return
    begin, end = tl.load(entry + 1), tl.load(entry + 2)
    rows = tl.multiple_of(rows, UNIT)
    x_stride, y_stride = x_step * UNIT, y_step * UNIT
    pair_R = begin + tl.arange(0, ROWS)
    own_R = pair_R < end
    source_R = pair_R.to(tl.int64)
    if GATHERED:
        source_R = tl.load(row + pair_R, mask=own_R, other=0).to(tl.int64)
    answer_C = answer + tl.arange(0, COLUMNS)
    inside_C = answer_C < rows
    x_R1 = x + source_R[:, None] * x_stride
    sum_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    before = 0
    if AFTER_IDENTITY:
        sum_RC += tl.load(x_R1 + answer_C[None, :], mask=own_R[:, None] & inside_C[None, :], other=0.0).to(tl.float32)
        before = rows
    for piece in tl.static_range(ACROSS):
        own = place + 5 * piece * experts
        columns = tl.load(own + 2).to(tl.int32)
        stride = tl.load(own + 3)
        start = before
        if ACROSS > 1:
            start = tl.load(own + 4).to(tl.int32)
        matrix = tl.load(own).to(tl.pointer_type(x.dtype.element_ty))
        matrix = tl.multiple_of(matrix, 2 * UNIT)
        columns = tl.multiple_of(columns, UNIT)
        stride = tl.multiple_of(stride, UNIT)
        start = tl.multiple_of(start, UNIT)
        if COPIED:
            x_box = tl.make_tensor_descriptor(x, [end, start + columns], [x_stride, 1], [ROWS, DEPTH])
            matrix_box = tl.make_tensor_descriptor(matrix, [rows, columns], [stride, 1], [COLUMNS, DEPTH])
            for depth in range(0, columns, DEPTH):
                sum_RC = tl.dot(x_box.load([begin, start + depth]), matrix_box.load([answer, depth]).T, sum_RC)
        else:
            matrix_C1 = matrix + answer_C.to(tl.int64)[:, None] * stride
            for depth in range(0, columns, DEPTH):
                depth_D = depth + tl.arange(0, DEPTH)
                inside_D = depth_D < columns
                x_RD = tl.load(x_R1 + start + depth_D[None, :], mask=own_R[:, None] & inside_D[None, :], other=0.0)
                matrix_CD = tl.load(matrix_C1 + depth_D[None, :], mask=inside_C[:, None] & inside_D[None, :], other=0.0)
                sum_RC = tl.dot(x_RD, matrix_CD.T, sum_RC)
    y_RC = y + pair_R.to(tl.int64)[:, None] * y_stride + answer_C[None, :]
    if ACROSS == 1:
        y_RC += tl.multiple_of(tl.load(place + 4), UNIT)
    tl.store(y_RC, sum_RC.to(y.dtype.element_ty), mask=own_R[:, None] & inside_C[None, :])


@jit
def combine_kernel(
    y, place, weight, total, columns, active, WEIGHED: constexpr, WIDTH: constexpr,
):
    """Part of one token's answer, added up in the order of the router's choice."""
    token = tl.program_id(0).to(tl.int64)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_W = column_W < columns
    exact = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    sum_W = tl.zeros((WIDTH,), exact)
    for choice in range(0, active):
        own = tl.load(place + token * active + choice).to(tl.int64)
        value_W = tl.load(y + own * columns + column_W, mask=inside_W, other=0.0).to(exact)
        if WEIGHED:
            value_W *= tl.load(weight + token * active + choice).to(exact)
        sum_W += value_W
    tl.store(total + token * columns + column_W, sum_W.to(total.dtype.element_ty), mask=inside_W)
