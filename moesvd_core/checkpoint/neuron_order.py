"""In which order the neurons of a stored layer stand: pivots of the output side first, so that nothing has to be gathered at run time.

An expert's neurons may stand in any order that both of its sides agree on. Everything that makes or compares factors counts them as the
original does; only what a checkpoint or a model in memory holds is put in order.

Shapes: as in `decomposition/factors.py`.
"""

import torch

from moesvd_core.decomposition.factors import (
    DenseFactors,
    LayerFactors,
    PerExpertFactors,
    PivotedFactors,
    SharedRightFactors,
    SideFactors,
)


def neuron_order(factors: LayerFactors) -> torch.Tensor | None:
    """The neurons of every expert as they are to be stored: the output side's pivots, then the others, ascending, int64 [E, M].

    None where they stay as they are counted: nothing has pivots there, or experts share rows of the input side.
    """
    if not isinstance(factors.output, PivotedFactors) or not _has_own_rows(factors.input):
        return None
    own = factors.output.own
    other_EM = torch.ones(len(own.ranks), own.right[0].shape[1], dtype=torch.uint8)
    for other_M, (_, _, pivot_R) in zip(other_EM, factors.output.stored, strict=True):
        other_M[pivot_R] = 0
    return other_EM.argsort(dim=1, stable=True)


def _has_own_rows(factors: SideFactors) -> bool:
    """Whether no row belongs to several experts."""
    if isinstance(factors, SharedRightFactors):
        return all(sorted(group.sums) == [(slot,) for slot in range(len(group.experts))] for group in factors.groups)
    return isinstance(factors, DenseFactors | PerExpertFactors | PivotedFactors)
