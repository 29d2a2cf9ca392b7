"""Every expert's own factors, stored without their identities: W_e ≈ A_e V_e as in `per_expert`, in fewer parameters.

A product of rank R has R² degrees of freedom less than its two factors have numbers, so that they say R² of them twice. Pivoting
factorization (Zhao, Zhang and Cannistraci, "Pivoting Factorization", ICML 2025) leaves them out: R columns of the product, its pivots, are
stored as they are, and all others as combinations of them (`pivots`). That loses nothing, and it costs R(N + C) - R² parameters and
multiplications in place of R(N + C), and an index for each pivot: every rank but the last few is smaller than the original matrix.

Shapes: E experts, N rows and C columns of a matrix, S size of the smaller of its two spaces, R ranks.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from moesvd_core.decomposition.curves import pivoted_curve
from moesvd_core.decomposition.factors import PerExpertFactors, PivotedFactors, SideFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.per_expert import PerExpertBasis, best_directions
from moesvd_core.planning import Metric, Side


class PivotedBasis(PerExpertBasis):
    """The directions that each expert of one side keeps, best first: of the whole space.

    Attributes:
        curve: predicted loss at every rank.
    """

    @classmethod
    def made(cls, metric: LayerMetric, side: Side, kind: Metric) -> "PivotedBasis":
        """As `PerExpertBasis.made`."""
        ranks = min(metric.shape(side))
        basis_ERS, loss_ER, gain_ER = best_directions(metric, side, kind, ranks, partial(metric.outer, side))
        return cls(metric, side, kind, basis_ERS, pivoted_curve(metric, side, loss_ER, gain_ER))

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """Factors at one rank an expert; DENSE keeps the original matrix, 0 drops it."""
        own = super().factors(ranks)
        return PivotedFactors(own, self._metric.device) if isinstance(own, PerExpertFactors) else own

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, kind: Metric, tensors: Mapping[str, torch.Tensor]) -> "PivotedBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        return cls(metric, side, kind, tensors["basis"], pivoted_curve(metric, side, tensors["loss"], tensors["gain"]))
