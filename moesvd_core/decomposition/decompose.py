"""One layer, one method: curves for every plan, and the factors of whichever plan is chosen.

Factors are nested, so the eigendecompositions are made once; a plan only slices them, and refits what has to be refitted.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.decomposition.base_delta import BaseDeltaBasis, have_in_common
from moesvd_core.decomposition.factors import DenseFactors, LayerFactors, SideFactors
from moesvd_core.decomposition.kept_experts import KeptExpertsBasis
from moesvd_core.decomposition.kept_neurons import KeptNeuronsBasis
from moesvd_core.decomposition.latent import LatentBasis
from moesvd_core.decomposition.merged import MergedBasis
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.per_expert import PerExpertBasis
from moesvd_core.decomposition.pivoted import PivotedBasis
from moesvd_core.decomposition.registry import Method
from moesvd_core.decomposition.shared_v import SharedVBasis
from moesvd_core.devices import on_card
from moesvd_core.errors import InputError, RunError, StatisticsError
from moesvd_core.planning import COUPLED, DENSE, SIDES, LayerPlan, Side, SideCurve, SidePlan, Structure
from moesvd_core.tensor_files import MADE_AGAIN, has_format, load_tensors, save_tensors

FORMAT = "moesvd-decomposition-2"
"""Version of the file of `Decomposition.save`."""


class Basis(Protocol):
    """One side of one layer in one structure, decomposed."""

    @property
    def curve(self) -> SideCurve:
        """Predicted loss at every rank."""

    def factors(self, ranks: tuple[int, ...]) -> SideFactors:
        """What is stored at these ranks."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep."""


@runtime_checkable
class CoupledBasis(Basis, Protocol):
    """A side that goes together with the other one; the two say the same of what both need."""

    def biases(self, ranks: tuple[int, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Input and output bias that go with the factors of both sides at these ranks."""


class Decomposition:
    """One layer, decomposed by one method: every rank of every structure that the method has on offer."""

    def __init__(self, metric: LayerMetric, method: Method, bases: Mapping[tuple[Side, Structure], Basis]) -> None:
        self.method = method
        self._metric = metric
        self._bases = bases

    @property
    def statistics(self) -> LayerStatistics:
        """What calibration collected for the layer."""
        return self._metric.statistics

    @property
    def curves(self) -> list[SideCurve]:
        """Predicted losses and costs, input side first, one for each structure that the method has on offer."""
        return [basis.curve for basis in self._bases.values()]

    def materialise(self, plan: LayerPlan, *, refined: bool = False, on_host: bool = False) -> LayerFactors:
        """The factors that a plan asks for: slices, refitted where the structure says so.

        Args:
            refined: take shared bases that are the better for being of the plan's rank alone, where the structure has them.
            on_host: bring factors to the host, each side as soon as it is made, and not leave them where the work is done. What stays
                dense is the original, wherever that is.

        Raises:
            InputError: the plan is of another layer, asks for a structure that was not decomposed, for ranks that there are not, or for
                different ranks on two sides that go together.
        """
        weights, layer = self._metric.weights, self._metric.layer.index
        if plan.layer != layer:
            raise InputError(f"plan must be of layer {layer}, which was decomposed, got that of layer {plan.layer}")
        sides = self._side("input", plan.input, refined, on_host), self._side("output", plan.output, refined, on_host)
        coupled = next((each.structure for each in (plan.input, plan.output) if each.structure in COUPLED), None)
        if coupled is None:
            return LayerFactors(layer, *sides, weights.input_bias_EN, weights.output_bias_ED)
        ranks = plan.input.ranks
        if (plan.input.structure, ranks) != (plan.output.structure, plan.output.ranks):
            raise InputError(f"both sides of layer {layer} must have the same {coupled} ranks, got {ranks} and {plan.output.ranks}")
        basis = self._bases["input", coupled]
        assert isinstance(basis, CoupledBasis)  # noqa: S101 - `COUPLED` names the structures whose bases are
        kept = tuple(expert for expert, rank in enumerate(ranks) if rank == DENSE) if coupled == "kept-experts" else None
        return LayerFactors(layer, *sides, *basis.biases(ranks), kept)

    def _side(self, side: Side, plan: SidePlan, refined: bool, on_host: bool) -> SideFactors:
        if plan.structure == "dense":
            return DenseFactors(self._metric.stored(side))
        basis = self._bases.get((side, plan.structure))
        if basis is None:
            offered = ", ".join(self.method.structures)
            raise InputError(f"structure must be dense or one of {offered} for {self.method.name}, got {plan.structure}")
        slots, most = basis.curve.gain_SR.shape
        if len(plan.ranks) != slots or not all(-1 <= rank <= most for rank in plan.ranks):
            raise InputError(f"{side} ranks of layer {self._metric.layer.index} must be {slots} numbers in [-1, {most}], got {plan.ranks}")
        made = basis.refined(plan.ranks) if refined and isinstance(basis, LatentBasis) else basis.factors(plan.ranks)
        return made.on_host() if on_host else made

    def release(self) -> None:
        """Let go of what lies on a card, before others are decomposed; factors can be asked for as before, a little later."""
        self._metric.release()
        for basis in self._bases.values():
            if isinstance(basis, LatentBasis):
                basis.release()

    def save(self, path: Path) -> None:
        """Keep the eigendecompositions in a safetensors file with a digest, whole or not at all, so that another plan is a slice away.

        Raises:
            ResourceError: the disk is full.
            OSError: the file cannot be written.
        """
        save_tensors(path, self._tensors(), {"format": FORMAT, **_identity(self._metric.layer, self.method)})

    def packed(self) -> "PackedDecomposition":
        """The eigendecompositions alone, as `save` would write them, without the layer's weights and statistics."""
        return PackedDecomposition(self.method, self.curves, list(self._bases), self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{side}.{structure}.{name}": tensor
            for (side, structure), basis in self._bases.items()
            for name, tensor in basis.tensors().items()
        }


@dataclass(frozen=True)
class PackedDecomposition:
    """A decomposition to be kept where its layer's weights and statistics are not: those of all layers need not fit into memory.

    Attributes:
        method: by which it was made.
        curves: as of the decomposition.
        offered: sides and structures that were decomposed.
        tensors: what a file would hold.
    """

    method: Method
    curves: list[SideCurve]
    offered: Sequence[tuple[Side, Structure]]
    tensors: Mapping[str, torch.Tensor]

    def unpacked(
        self, weights: ExpertWeights, statistics: LayerStatistics, layer: ExpertLayer, *, device: torch.device | str = "cpu"
    ) -> Decomposition:
        """The decomposition, with the weights and statistics that it was made of."""
        metric = LayerMetric(weights, layer, statistics, device, shrink=self.method.shrink)
        return Decomposition(metric, self.method, {each: _loaded(metric, *each, self.method, self.tensors) for each in self.offered})


def decompose(
    weights: ExpertWeights, layer: ExpertLayer, statistics: LayerStatistics, method: Method, *, device: torch.device | str = "cpu"
) -> Decomposition:
    """Decompose one layer by one method.

    Args:
        weights: its experts, in canonical form; kept by reference, since factors are made from them.
        layer: their layout.
        statistics: what calibration collected for it.
        method: from `registry.method`, possibly customised.
        device: where the work is done; what is kept of it is on the host. Where a card finds losses that are no numbers, the host does it
            again, and a warning says so.

    Raises:
        CheckpointError: a weight is not finite.
        StatisticsError: statistics that cannot be used.
    """
    try:
        return _decomposed(weights, layer, statistics, method, device)
    except StatisticsError as error:
        if not on_card(torch.device(device)):
            raise
        found = str(error)
    made = _decomposed(weights, layer, statistics, method, "cpu")  # out of the handler, which would keep what lies on the card
    warnings.warn(f"layer {layer.index} was decomposed on the host, which takes longer: on {device}, {found}", stacklevel=2)
    return made


def _decomposed(
    weights: ExpertWeights, layer: ExpertLayer, statistics: LayerStatistics, method: Method, device: torch.device | str
) -> Decomposition:
    metric = LayerMetric(weights, layer, statistics, device, shrink=method.shrink)
    made = {structure: _made(metric, structure, method) for structure in method.structures}
    keys = [(side, structure) for side in SIDES for structure in method.structures]
    return Decomposition(metric, method, {(side, structure): made[structure][side] for side, structure in keys if side in made[structure]})


def is_outdated(path: Path) -> bool:
    """Whether a file is of an earlier version, whose decomposition has to be made again."""
    return not has_format(path, FORMAT)


def load(
    path: Path,
    weights: ExpertWeights,
    layer: ExpertLayer,
    statistics: LayerStatistics,
    method: Method,
    *,
    device: torch.device | str = "cpu",
) -> Decomposition:
    """Read what `Decomposition.save` wrote, for the same weights, statistics and method.

    Raises:
        RunError: the file is missing, damaged, or of another layer or method.
    """
    metric = LayerMetric(weights, layer, statistics, device, shrink=method.shrink)
    tensors, facts = load_tensors(path, error_type=RunError, fix=MADE_AGAIN)
    expected = {"format": FORMAT, **_identity(layer, method)}
    if facts != expected:
        raise RunError(f"{path.name} holds {facts}, wanted {expected}; decompose layer {layer.index} again")
    try:
        keys = [(side, structure) for side in SIDES for structure in method.structures]
        bases = {each: _loaded(metric, *each, method, tensors) for each in keys if _is_offered(metric, *each, method)}
    except KeyError as error:
        raise RunError(f"{path.name} lacks {error}; decompose layer {layer.index} again") from error
    return Decomposition(metric, method, bases)


def _is_offered(metric: LayerMetric, side: Side, structure: Structure, method: Method) -> bool:
    """Whether a side is decomposed at all: a base may be screened for experts that have something in common."""
    return structure != "base-delta" or not method.screen or have_in_common(metric.stored(side))


def _made(metric: LayerMetric, structure: Structure, method: Method) -> Mapping[Side, Basis]:
    kind = method.metric
    match structure:
        case "per-expert":
            return {side: PerExpertBasis.made(metric, side, kind) for side in SIDES}
        case "pivoted":
            return {side: PivotedBasis.made(metric, side, kind) for side in SIDES}
        case "latent":
            return LatentBasis.both(metric, kind)
        case "shared-v":
            return {side: SharedVBasis.made(metric, side, kind, refit=method.refit) for side in SIDES}
        case "base-delta":
            return {side: BaseDeltaBasis.made(metric, side, kind) for side in SIDES if _is_offered(metric, side, structure, method)}
        case "kept-neurons":
            return {side: KeptNeuronsBasis.made(metric, side, kind) for side in SIDES}
        case "kept-experts":
            return {side: KeptExpertsBasis.made(metric, side, kind) for side in SIDES}
        case "merged-experts":
            return MergedBasis.both(metric, kind)


def _loaded(metric: LayerMetric, side: Side, structure: Structure, method: Method, file: Mapping[str, torch.Tensor]) -> Basis:
    prefix = f"{side}.{structure}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in file.items() if name.startswith(prefix)}
    match structure:
        case "per-expert":
            return PerExpertBasis.loaded(metric, side, method.metric, tensors)
        case "pivoted":
            return PivotedBasis.loaded(metric, side, method.metric, tensors)
        case "latent":
            return LatentBasis.loaded(metric, side, method.metric, tensors)
        case "shared-v":
            return SharedVBasis.loaded(metric, side, method.metric, tensors, refit=method.refit)
        case "base-delta":
            return BaseDeltaBasis.loaded(metric, side, method.metric, tensors)
        case "kept-neurons":
            return KeptNeuronsBasis.loaded(metric, side, tensors)
        case "kept-experts":
            return KeptExpertsBasis.loaded(metric, side, tensors)
        case "merged-experts":
            return MergedBasis.loaded(metric, side, tensors)


def _identity(layer: ExpertLayer, method: Method) -> dict[str, str]:
    return {
        "layer": str(layer.index),
        "shape": f"{layer.experts}x{layer.hidden}x{layer.width}",
        "metric": method.metric,
        "structures": " ".join(method.structures),
        "refit": str(method.refit),
        **({} if method.shrink else {"shrink": "False"}),
    }
