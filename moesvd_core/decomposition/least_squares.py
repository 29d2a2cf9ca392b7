"""Least squares from sums over tokens: what to add to a matrix so that it meets its targets better, as far as the tokens can tell.

Shapes: F features, D targets a token, lower-case n: tokens.
"""

from dataclasses import dataclass

import torch

from moesvd_core.decomposition.grams import ridged

RIDGE = 1e-4
"""Ridge on the features' Gram, as a share of its mean diagonal."""


@dataclass
class FitSums:
    """Sums of one fit, float64, over tokens with features φ and targets t; each weighs p².

    Attributes:
        tokens: n.
        gram_FF: Σ p² φ φᵀ.
        error_DF: Σ p² (t − B φ) φᵀ, B the matrix that is there before the fit.
        error_square: Σ p² ‖t − B φ‖².
    """

    tokens: int
    gram_FF: torch.Tensor
    error_DF: torch.Tensor
    error_square: float

    @classmethod
    def of(cls, feature_nF: torch.Tensor, error_nD: torch.Tensor) -> "FitSums":
        """Of some tokens' features p φ and errors p (t − B φ), multiplied in their own precision."""
        square = float(error_nD.double().square().sum())
        return cls(len(feature_nF), (feature_nF.T @ feature_nF).double(), (error_nD.T @ feature_nF).double(), square)

    def plus(self, other: "FitSums") -> "FitSums":
        """Sums over both."""
        return FitSums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def change(self) -> torch.Tensor:
        """What the fit adds to B, [D, F], shrunk by its adjusted R²; zero where the tokens are too few to tell."""
        features = len(self.gram_FF)
        if self.tokens <= features + 1 or self.error_square <= 0:
            return torch.zeros_like(self.error_DF)
        change_DF: torch.Tensor = torch.linalg.solve(ridged(self.gram_FF, RIDGE), self.error_DF.T).T
        explained = float((change_DF * self.error_DF).sum()) / self.error_square
        adjusted = 1 - (1 - explained) * (self.tokens - 1) / (self.tokens - features - 1)
        return change_DF * (max(0.0, adjusted / explained) if explained > 0 else 0.0)
