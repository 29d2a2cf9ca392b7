"""How alike the experts of a layer are: CKA of their matrices and of what the SVD makes of them, and how far their subspaces overlap.

An expert's matrix W = U Σ Vᵀ lies between two axes: hidden *channels*, which mean the same to every expert, and *neurons*, which every
expert orders as it likes. CKA compares two experts along one axis: it takes that axis' entries for samples, and asks whether the experts
see the same samples as neighbours. Over channels the factor is V on the input side and U on the output side; over neurons the other one.

A figure of similarity says little without its control. Two random matrices of 14336 × 4096 reach a biased CKA of 0.22 over their rows,
their U's 0.29, and the V's of *any* two square bases exactly 1, since every full basis has the Gram I: figures like those of the paper's
Table C. Hence the debiased estimator, every rank instead of the full one, and two controls: random matrices of the same shape, and the
experts' own matrices with each one's samples shuffled (same spectrum, no alignment).

Kornblith et al. 2019 (linear CKA), Song et al. 2012 Eq. 5 (unbiased HSIC), Nguyen et al. 2020 (debiased CKA).

Shapes: E experts compared, P = E(E-1)/2 pairs in the order of `numpy.triu_indices(E, 1)`, S samples on an axis, R directions, G kernels:
first the weights' own (every direction by its σ²), then the leading directions alone, one kernel a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesvd_core.errors import InputError, StatisticsError, require_seed, require_whole

Axis = Literal["channels", "neurons"]
AXES: tuple[Axis, Axis] = ("channels", "neurons")
Estimator = Literal["debiased", "biased"]
ESTIMATORS: tuple[Estimator, Estimator] = ("debiased", "biased")
Matrix = Literal["W", "U", "V"]
Side = Literal["input", "output"]
Source = Literal["experts", "shuffled", "random"]
"""What was compared: the experts; the control with each one's samples in an order of its own; the control of random matrices."""

RANK_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
"""Ranks at which bases are compared, as shares of the largest."""
MOST_EXPERTS = 4096
"""Experts a layer that anybody may ask to compare."""
SMALLEST = 1e-6
"""Singular values below this share of the largest carry no direction: they come from a Gram, which squares them."""
DEFINED = 1e-6
"""A kernel whose unbiased HSIC with itself is below this share of its own size has nothing off its diagonal: CKA is undefined."""


@dataclass(frozen=True)
class Sampling:
    """Which experts are compared; a layer of 128 has 8128 pairs, and a few of them tell its mean.

    Attributes:
        experts: at most so many a layer, drawn once for all layers; every pair of them is compared; 2 to 4096.
        seed: of the draw and of the controls.

    Raises:
        InputError: a value out of its bounds.
    """

    experts: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("experts", self.experts, 2, most=MOST_EXPERTS)
        require_seed(self.seed)

    def draw(self, experts: int) -> tuple[int, ...]:
        """The experts to compare out of so many, ascending."""
        order = torch.randperm(experts, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return tuple(sorted(order[: self.experts]))


@dataclass(frozen=True)
class AxisSimilarity:
    """All pairs compared along one axis.

    Attributes:
        debiased_GP: debiased CKA, at most 1 and about 0 for unrelated experts; NaN where it is undefined (a full basis).
        biased_GP: CKA of centred Grams, as it is usually reported; in [0, 1], above 0 for unrelated experts.
        overlap_GP: ‖B_rᵀ B'_r‖² / r, the share of one subspace that lies in the other, [ranks, P]; r / S for unrelated experts.
    """

    debiased_GP: NDArray[np.float64]
    biased_GP: NDArray[np.float64]
    overlap_GP: NDArray[np.float64]

    def pairs(self, estimator: Estimator, kernel: int) -> NDArray[np.float64]:
        """CKA of every pair [P] under one kernel: 0 for the weights, 1 + i for the bases at the i-th rank."""
        chosen: NDArray[np.float64] = (self.debiased_GP if estimator == "debiased" else self.biased_GP)[kernel]
        return chosen


@dataclass(frozen=True)
class SideSimilarity:
    """One side of one layer, or a control for it.

    Attributes:
        side: "input" (gate and up, stacked) or "output" (down).
        rows, columns: shape of one expert's matrix.
        total: experts of the layer.
        experts: those that were compared.
        ranks: at which bases were compared, ascending.
        channels, neurons: along the two axes.
    """

    side: Side
    rows: int
    columns: int
    total: int
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    channels: AxisSimilarity
    neurons: AxisSimilarity

    def axis(self, axis: Axis) -> AxisSimilarity:
        """What was found along an axis."""
        return self.channels if axis == "channels" else self.neurons

    def square(self, pair_P: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of pairs as a symmetric matrix [E, E]; an expert is as similar to itself as can be, 1."""
        count = len(self.experts)
        square_EE = np.ones((count, count))
        upper = np.triu_indices(count, 1)
        square_EE[upper] = pair_P
        square_EE.T[upper] = pair_P
        return square_EE

    def summary(self) -> dict[str, Any]:
        """Means over the pairs with their standard deviations, as plain data, by axis and estimator: one value a kernel."""
        axes = {}
        for name in AXES:
            found = self.axis(name)
            axes[name] = {
                "debiased": _moments(found.debiased_GP),
                "biased": _moments(found.biased_GP),
                "overlap": _moments(found.overlap_GP),
            }
        plain = {name: getattr(self, name) for name in ("side", "rows", "columns", "total")}
        return plain | {"experts": list(self.experts), "ranks": list(self.ranks), "axes": axes}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, rounded to five decimals."""
        whole = asdict(self) | {"experts": list(self.experts), "ranks": list(self.ranks)}
        return whole | {name: {key: _rounded(value) for key, value in whole[name].items()} for name in AXES}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SideSimilarity":
        """What `as_dict` described; KeyError, TypeError or ValueError when it did not."""
        axes = {str(name): AxisSimilarity(**{key: np.array(rows, dtype=np.float64) for key, rows in data[name].items()}) for name in AXES}
        plain = {name: data[name] for name in ("side", "rows", "columns", "total")}
        experts, ranks = tuple(data["experts"]), tuple(data["ranks"])
        return cls(**plain, experts=experts, ranks=ranks, channels=axes["channels"], neurons=axes["neurons"])


def axis_of(matrix: Matrix, side: Side) -> Axis:
    """The axis along which a matrix is compared: W along the channels, which experts share; U and V along the one they have."""
    if matrix == "W":
        return "channels"
    return "neurons" if (matrix == "U") == (side == "input") else "channels"


def compare(matrix_ERC: Tensor, side: Side, sampling: Sampling | None = None) -> dict[Source, SideSimilarity]:
    """Compare a layer's experts with each other, and the control that shuffles each one's samples.

    Args:
        matrix_ERC: every expert's matrix, [n, d] on the input side, [d, m] on the output side; on any device.

    Raises:
        InputError: fewer than two experts, or an axis of fewer than four entries.
        StatisticsError: an expert of zeros, NaN or Inf; the message names it.
    """
    return _compare(matrix_ERC, side, sampling or Sampling(), ("experts", "shuffled"))


def _compare(
    matrix_ERC: Tensor, side: Side, sampling: Sampling, sources: Sequence[Source], ranks: tuple[int, ...] = ()
) -> dict[Source, SideSimilarity]:
    """As `compare`, for some of "experts" and "shuffled".

    Args:
        ranks: at which bases are compared; shares of what all experts reach, if none are given.
    """
    total, rows, columns = matrix_ERC.shape
    if total < 2 or min(rows, columns) < 4:
        raise InputError(f"comparing needs at least 2 experts of at least 4 x 4, got {total} of {rows} x {columns}")
    experts = sampling.draw(total)
    own = [_thin_svd(matrix_ERC[expert], f"expert {expert}, {side} side") for expert in experts]
    reach = min(each.rank for each in own)
    ranks = ranks or tuple(sorted({max(1, round(share * reach)) for share in RANK_SHARES}))
    found: dict[Source, dict[str, AxisSimilarity]] = {source: {} for source in sources}
    for axis in AXES:
        of_rows = (axis == "neurons") == (side == "input")
        for source, axes in found.items():
            shuffles = _generator(sampling.seed) if source == "shuffled" else None
            made = (
                _kernels(each.basis(matrix_ERC[expert], of_rows=of_rows), each.value_R, ranks, shuffles)
                for expert, each in zip(experts, own, strict=True)
            )
            axes[axis] = _all_pairs(list(made), ranks)  # no name for the list: all bases would stay until the next ones are made
    return {
        source: SideSimilarity(side, rows, columns, total, experts, ranks, channels=axes["channels"], neurons=axes["neurons"])
        for source, axes in found.items()
    }


def random_control(like: SideSimilarity, sampling: Sampling | None = None, device: torch.device | str = "cpu") -> SideSimilarity:
    """As many matrices of independent normal numbers as `like` compared, of the same shape, compared at the same ranks; for its layer.

    Experts may reach fewer directions than their shape has room for, and half of those are fewer than half of a random matrix's.
    """
    sampling = sampling or Sampling()
    shape = (len(like.experts), like.rows, like.columns)
    matrix_ERC = torch.randn(shape, generator=_generator(sampling.seed)).to(device)
    found = _compare(matrix_ERC, like.side, Sampling(len(like.experts), sampling.seed), ("experts",), like.ranks)["experts"]
    return replace(found, total=like.total)


@dataclass(frozen=True)
class _ThinSvd:
    """The SVD of one expert's matrix, kept as one basis; the larger one is made from it when it is needed.

    Attributes:
        small_SR: orthonormal columns over the smaller axis, singular values descending; float64.
        value_R: singular values, float64; 0 where there is no direction.
        rank: directions that there are.
        over_rows: `small_SR` spans the rows (U), not the columns (V).
    """

    small_SR: Tensor
    value_R: Tensor
    rank: int
    over_rows: bool

    def basis(self, matrix_RC: Tensor, *, of_rows: bool) -> Tensor:
        """Orthonormal columns over the rows (U) or the columns (V) of the matrix, float64."""
        if of_rows == self.over_rows:
            return self.small_SR
        other = matrix_RC.double().T if self.over_rows else matrix_RC.double()
        inverse_R = torch.where(self.value_R > 0, 1 / self.value_R, 0.0)
        return other @ (self.small_SR * inverse_R)


def _thin_svd(matrix_RC: Tensor, where: str) -> _ThinSvd:
    """From the eigenvectors of the smaller of the two Grams, in float64: a tall matrix costs no more than its short side."""
    exact_RC = matrix_RC.double()
    over_rows = matrix_RC.shape[0] < matrix_RC.shape[1]
    gram = exact_RC @ exact_RC.T if over_rows else exact_RC.T @ exact_RC
    if not torch.isfinite(gram).all() or not gram.diagonal().sum() > 0:
        raise StatisticsError(f"{where} is all zeros or not finite: a direction cannot be told; check the model's files")
    square_R, basis_SR = torch.linalg.eigh(gram)
    value_R = square_R.flip(0).clamp(min=0).sqrt()
    value_R = torch.where(value_R > SMALLEST * value_R[0], value_R, 0.0)
    basis_SR = torch.where(value_R > 0, basis_SR.flip(1), 0.0)
    return _ThinSvd(basis_SR, value_R, int((value_R > 0).sum()), over_rows)


@dataclass(frozen=True)
class _Kernels:
    """G Grams between the samples of one expert, K_g = B diag(w_g) Bᵀ, never written out; all in float64.

    Where one channel outweighs the others, unbiased HSIC is a small difference of large sums, and float32 would leave no digit of it.

    Attributes:
        basis_SR: B, orthonormal columns.
        weight_GR: w_g.
        diagonal_GS: the diagonal of each K.
        sum_GS: K 1.
    """

    basis_SR: Tensor
    weight_GR: Tensor
    diagonal_GS: Tensor
    sum_GS: Tensor

    def own(self) -> tuple[Tensor, Tensor]:
        """Unbiased and biased HSIC of every kernel with itself, [G]; NaN where a kernel has nothing off its diagonal."""
        trace_G = self.weight_GR.square().sum(1)
        unbiased_G, biased_G = _hsic(self, self, trace_G)
        return torch.where(unbiased_G > DEFINED * trace_G, unbiased_G, torch.nan), biased_G


def _kernels(basis_SR: Tensor, value_R: Tensor, ranks: Sequence[int], shuffles: torch.Generator | None) -> _Kernels:
    """The kernel of the weights and one for each rank; with `shuffles`, of samples in a random order."""
    if shuffles is not None:
        basis_SR = basis_SR[torch.randperm(len(basis_SR), generator=shuffles).to(basis_SR.device)]
    square_R = value_R.square()
    place_R = torch.arange(len(value_R), device=value_R.device)
    weight_GR = torch.stack([square_R / square_R.max(), *[(place_R < rank).double() for rank in ranks]])
    return _Kernels(
        basis_SR,
        weight_GR,
        diagonal_GS=weight_GR @ basis_SR.square().T,
        sum_GS=(weight_GR * basis_SR.sum(0)) @ basis_SR.T,
    )


def _hsic(first: _Kernels, second: _Kernels, trace_G: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased and biased HSIC of two experts' kernels [G], up to the factors 1/S(S-3) and 1/S²; trace_G = tr K L."""
    samples = first.diagonal_GS.shape[1]
    off_trace_G = trace_G - (first.diagonal_GS * second.diagonal_GS).sum(1)
    first_GS, second_GS = first.sum_GS - first.diagonal_GS, second.sum_GS - second.diagonal_GS  # K̃ 1: without the diagonal
    pooled_G = first_GS.sum(1) * second_GS.sum(1) / ((samples - 1) * (samples - 2))
    unbiased_G = off_trace_G + pooled_G - 2 / (samples - 2) * (first_GS * second_GS).sum(1)
    centred_G = first.sum_GS.sum(1) * second.sum_GS.sum(1) / samples**2
    biased_G = trace_G + centred_G - 2 / samples * (first.sum_GS * second.sum_GS).sum(1)
    return unbiased_G, biased_G


def _all_pairs(kernels: Sequence[_Kernels], ranks: Sequence[int]) -> AxisSimilarity:
    """Every pair of experts. One product of two bases gives all kernels: tr K L = Σ_ij w_i (BᵀB')²_ij w'_j."""
    own = [each.own() for each in kernels]
    rows = []
    for first, second in combinations(range(len(kernels)), 2):
        a, b = kernels[first], kernels[second]
        square_RR = (a.basis_SR.T @ b.basis_SR).square()
        trace_G = ((a.weight_GR @ square_RR) * b.weight_GR).sum(1)
        pair = [value / (mine * other).sqrt() for value, mine, other in zip(_hsic(a, b, trace_G), own[first], own[second], strict=True)]
        overlap_G = trace_G[1:] / torch.tensor(ranks, device=trace_G.device)
        rows.append([each.cpu().numpy() for each in (*pair, overlap_G)])
    debiased_GP, biased_GP, overlap_GP = (np.stack(values, axis=1) for values in zip(*rows, strict=True))
    return AxisSimilarity(debiased_GP, biased_GP, overlap_GP)


def _generator(seed: int) -> torch.Generator:
    """Randomness of its own, on the host, so that every device draws the same."""
    return torch.Generator().manual_seed(seed)


def _moments(value_GP: NDArray[np.float64]) -> dict[str, list[float | None]]:
    return {"mean": _rounded(value_GP.mean(axis=1)), "deviation": _rounded(value_GP.std(axis=1))}


def _rounded(value: NDArray[np.float64]) -> list[Any]:
    """Nested lists with five decimals; what is undefined is None."""

    def plain(item: Any) -> Any:
        return [plain(each) for each in item] if isinstance(item, list) else None if item != item else item

    return list(plain(np.round(value, 5).tolist()))
