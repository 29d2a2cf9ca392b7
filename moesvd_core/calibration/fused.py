"""What a GPU sums up of an expert's neurons in one pass over them (Triton).

A wide expert's neurons outweigh all else that is measured of it, and with a pass over memory for every step of SiLU, its slope, squares and
sums, a GPU waits for memory several times as long as it multiplies. Here the pre-activations are read once, in the model's precision,
neurons are written in it, and of all else only sums leave the processors. Numbers between are float32, as elsewhere in calibration.

Shapes: n pairs of a token and one expert, m expert width (M), N = 2m input rows (all gates, then all ups), K labels a position; B parts of
the pairs, C parts of the neurons.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moesvd_core.calibration.kernels import neurons_kernel, squares_kernel
from moesvd_core.calibration.products import multiplies_rounded
from moesvd_core.experts import swiglu
from moesvd_core.kernels import launch, usable

PART = 256
"""Pairs that are summed up in float32 by one program, before all parts are in float64."""
TILE = {"ROWS": 8, "WIDTH": 256}


def fuses(weight: Tensor, gate: Callable[[Tensor], Tensor]) -> bool:
    """Whether experts with such weights and such a gate are measured here: 16 bits, SiLU(gate) · up, on a GPU that Triton knows."""
    return multiplies_rounded(weight) and gate is swiglu and usable(weight)


def neuron_sums(pre_nN: Tensor, weight_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neurons h [n, m] in the model's precision, Σ |h| [m] and Σ (p·∂h/∂pre)² [N] over the pairs, float64.

    Args:
        pre_nN: pre-activations, contiguous, 16 bits.
        weight_n: routing weights p, float32.
    """
    pairs, width = len(pre_nN), pre_nN.shape[1] // 2
    parts = -(-pairs // PART)
    h_nM = pre_nN.new_empty(pairs, width)
    magnitude_BM = weight_n.new_empty(parts, width)
    slope_BN = weight_n.new_empty(parts, 2 * width)
    grid = parts, -(-width // TILE["WIDTH"])
    launch(neurons_kernel, grid, pre_nN, weight_n, h_nM, magnitude_BM, slope_BN, pairs, width, PART=PART, **TILE, num_warps=4)
    return h_nM, magnitude_BM.sum(0, dtype=torch.float64), slope_BN.sum(0, dtype=torch.float64)


def row_squares(pre_nN: Tensor, gradient_KnM: Tensor, weight_n: Tensor) -> tuple[Tensor, Tensor]:
    """Σ δ² of every row [N], float64, and of every pair [n], float32, with δ = p·gradient·∂h/∂pre, summed over labels.

    Args:
        pre_nN: pre-activations, contiguous, 16 bits.
        gradient_KnM: gradients at the neurons of an answer that counts fully, contiguous, 16 bits.
        weight_n: routing weights p, float32.
    """
    labels, pairs, width = gradient_KnM.shape
    parts, blocks = -(-pairs // PART), -(-width // TILE["WIDTH"])
    row_BN = weight_n.new_empty(parts, 2 * width)
    pair_Cn = weight_n.new_empty(blocks, pairs)
    launch(
        squares_kernel, (parts, blocks), pre_nN, gradient_KnM, weight_n, row_BN, pair_Cn, pairs, width, labels, PART=PART, **TILE,
        num_warps=4,
    )
    return row_BN.sum(0, dtype=torch.float64), pair_Cn.sum(0)
