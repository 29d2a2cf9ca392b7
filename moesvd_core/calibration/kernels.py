"""The two passes over an expert's neurons that a GPU takes while a model is calibrated (Triton); what they are for: `fused.py`.

Shapes, of a tile: R pairs of a token and the expert, W neurons. Other lower-case names are addresses, and numbers that a launch is given.
"""

from moesvd_core.kernels import constexpr, jit, tl


@jit
def _passed(pre, pair_R, neuron_W, own_RW, width):
    """SiLU of the gates of some pairs, what they let up, and the slopes of the gates' rows; those of the others are SiLU itself."""
    pre_RW = pre + pair_R.to(tl.int64)[:, None] * (2 * width) + neuron_W[None, :]
    gate_RW = tl.load(pre_RW, mask=own_RW, other=0.0).to(tl.float32)
    up_RW = tl.load(pre_RW + width, mask=own_RW, other=0.0).to(tl.float32)
    sigmoid_RW = 1 / (1 + tl.exp(-gate_RW))
    return gate_RW * sigmoid_RW, up_RW, up_RW * sigmoid_RW * (1 + gate_RW * (1 - sigmoid_RW))


@jit
def neurons_kernel(pre, weight, h, magnitude, slope, pairs, width, PART: constexpr, ROWS: constexpr, WIDTH: constexpr):
    """One part of the pairs, one of the neurons."""
    part = tl.program_id(0)
    neuron_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_W = neuron_W < width
    magnitude_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    gates_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    ups_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, pairs), ROWS):
        pair_R = start + tl.arange(0, ROWS)
        own_R = pair_R < pairs
        own_RW = own_R[:, None] & inside_W[None, :]
        silu_RW, up_RW, slope_RW = _passed(pre, pair_R, neuron_W, own_RW, width)
        p_R1 = tl.load(weight + pair_R, mask=own_R, other=0.0)[:, None]
        h_RW = silu_RW * up_RW
        tl.store(h + pair_R.to(tl.int64)[:, None] * width + neuron_W[None, :], h_RW.to(h.dtype.element_ty), mask=own_RW)
        at_gate_RW = p_R1 * slope_RW
        at_up_RW = p_R1 * silu_RW
        magnitude_RW += tl.abs(h_RW)
        gates_RW += at_gate_RW * at_gate_RW
        ups_RW += at_up_RW * at_up_RW
    tl.store(magnitude + part * width + neuron_W, tl.sum(magnitude_RW, 0), mask=inside_W)
    tl.store(slope + part * 2 * width + neuron_W, tl.sum(gates_RW, 0), mask=inside_W)
    tl.store(slope + part * 2 * width + width + neuron_W, tl.sum(ups_RW, 0), mask=inside_W)


@jit
def squares_kernel(
    pre, gradient, weight, row, pair, pairs, width, labels, PART: constexpr, ROWS: constexpr, WIDTH: constexpr,
):
    """One part of the pairs, one of the neurons: every row feeds one neuron, so δ is the gradient there times the row's slope."""
    part = tl.program_id(0)
    neuron_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_W = neuron_W < width
    gates_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    ups_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, pairs), ROWS):
        pair_R = start + tl.arange(0, ROWS)
        own_R = pair_R < pairs
        own_RW = own_R[:, None] & inside_W[None, :]
        silu_RW, _up_RW, slope_RW = _passed(pre, pair_R, neuron_W, own_RW, width)
        p_R1 = tl.load(weight + pair_R, mask=own_R, other=0.0)[:, None]
        square_RW = tl.zeros((ROWS, WIDTH), tl.float32)
        for label in range(labels):
            at_RW = gradient + (label * pairs.to(tl.int64) + pair_R.to(tl.int64))[:, None] * width + neuron_W[None, :]
            at_RW = p_R1 * tl.load(at_RW, mask=own_RW, other=0.0).to(tl.float32)
            square_RW += at_RW * at_RW
        at_gate_RW = slope_RW * slope_RW * square_RW
        at_up_RW = silu_RW * silu_RW * square_RW
        gates_RW += at_gate_RW
        ups_RW += at_up_RW
        tl.store(pair + tl.program_id(1) * pairs.to(tl.int64) + pair_R, tl.sum(at_gate_RW + at_up_RW, 1), mask=own_R)
    tl.store(row + part * 2 * width + neuron_W, tl.sum(gates_RW, 0), mask=inside_W)
    tl.store(row + part * 2 * width + width + neuron_W, tl.sum(ups_RW, 0), mask=inside_W)
