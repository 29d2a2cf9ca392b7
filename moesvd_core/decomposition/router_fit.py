"""A router that reads a changed stream, and should choose as before: its matrix in closed form.

Where the original reads x, the compressed model reads x̃. The logits come closest to the original's by

    R* = argmin Σ ‖R x − R* x̃‖² = R E[x x̃ᵀ] E[x̃ x̃ᵀ]^{-1},

every token weighing the same. In that form an unchanged stream would give R but for rounding and ridge; summed up are the differences
R x − R x̃ instead, and what they explain is added to R, shrunk as compensation is: nothing at all where nothing has changed.

Shapes: T tokens, E experts, F features that the router reads (the hidden size).
"""

import torch

from moesvd_core.decomposition.least_squares import FitSums


class RouterFit:
    """Gathers one router's sums while both streams run, and fits its matrix.

    Args:
        weight_EF: the original's, R.
    """

    def __init__(self, weight_EF: torch.Tensor) -> None:
        self._weight_EF = weight_EF.to(torch.promote_types(weight_EF.dtype, torch.float32))
        self._sums: FitSums | None = None

    @torch.no_grad()
    def add(self, x_TF: torch.Tensor, changed_TF: torch.Tensor) -> None:
        """Add tokens.

        Args:
            x_TF: what the original's router reads, x.
            changed_TF: what the compressed model's reads of the same tokens, x̃.
        """
        changed_TF = changed_TF.to(self._weight_EF)
        added = FitSums.of(changed_TF, (x_TF.to(self._weight_EF) - changed_TF) @ self._weight_EF.T)
        self._sums = added if self._sums is None else self._sums.plus(added)

    def weight(self) -> torch.Tensor | None:
        """The fitted matrix R* [E, F], on the host; None where the router stays as it is: no difference, or too few tokens to tell."""
        change_EF = None if self._sums is None else self._sums.change()
        if change_EF is None or not bool(change_EF.any()):
            return None
        return (self._weight_EF + change_EF.to(self._weight_EF)).cpu()
