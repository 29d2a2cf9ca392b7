"""The stations put together: a calibrated model on one side, plans and their factors on the other.

A layer is decomposed once for each metric and structure, whichever methods and ratios ask for it: every plan is a slice of that. What was
decomposed is kept in a folder (a run) or in memory (a session), layer by layer, so that work which was interrupted goes on where it was.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesvd_core.architectures.disk_names import expert_tensor
from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import DecoderStream, LayerCall, LayerStream
from moesvd_core.calibration.states import DiskStates, MemoryStates
from moesvd_core.calibration.statistics import Statistics
from moesvd_core.checkpoint.apply import replaced_experts
from moesvd_core.compensation import Compensation, batches_of
from moesvd_core.curve_files import load_curves, save_curves
from moesvd_core.decomposition.compensation import fitted_tensors, is_changed, with_fitted
from moesvd_core.decomposition.decompose import Decomposition, decompose
from moesvd_core.decomposition.decompose import load as load_decomposition
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS, Method, method
from moesvd_core.errors import InputError, RunError, StatisticsError
from moesvd_core.planning import LayerPlan, ModelShape, Plan, Recipe, SideCurve, SidePlan, layer_plans, max_ratio, plans
from moesvd_core.progress import Progress, Report, silent
from moesvd_core.sensitivity import LayerSensitivity, scores, sensitivities
from moesvd_core.tensor_files import MADE_AGAIN, load_tensors, save_tensors

Cache = MutableMapping[tuple[str, int], Decomposition]
"""Decompositions by key (`decomposition_key`) and layer."""


def method_of(recipe: Recipe, methods: Mapping[str, Method] = METHODS) -> Method:
    """The named method with the recipe's own choices.

    Args:
        methods: what names stand for.

    Raises:
        InputError: no such method, metric, structure or allocation.
    """
    structures = None if recipe.structure is None else (recipe.structure,)
    return method(recipe.method, methods).customised(metric=recipe.metric, structures=structures, allocation=recipe.allocation)


def expert_dtype(stream: DecoderStream) -> torch.dtype:
    """Floating type in which the model's experts are stored; a stream may compute in another."""
    if isinstance(stream, LayerStream):
        family = family_of(stream.config)
        return next(stream.files.header(key)[0] for key in stream.files.weight_map if expert_tensor(key, family))
    return next(stream.model.get_submodule(stream.expert_layers[0].name).parameters()).dtype


def shape_of(stream: DecoderStream, dtype: torch.dtype | None = None) -> ModelShape:
    """The sizes that ratios are counted against, from the headers of the files or from the model itself.

    Args:
        dtype: floating type of the export; None: that of the files, whatever the model is computed in.
    """
    layers = stream.expert_layers
    if isinstance(stream, LayerStream):
        stored = [stream.files.header(key) for key in stream.files.weight_map]
    else:
        tensors = {tensor.data_ptr(): tensor for tensor in stream.model.state_dict().values() if tensor.numel()}  # tied ones once
        stored = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors.values()]
    main = expert_dtype(stream)
    written = dtype or main
    parameters = sum(prod(shape) for _, shape in stored)
    silent_parameters = sum(layer.parameters * (layer.experts - layer.active) // layer.experts for layer in layers)
    embedding: Any = stream.model.get_input_embeddings().weight
    head = stream.model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding
    return ModelShape(
        parameters=parameters,
        active_parameters=parameters - silent_parameters,
        bytes=sum((written if own == main else own).itemsize * prod(shape) for own, shape in stored),
        expert_parameters=sum(layer.parameters for layer in layers),
        bytes_per_expert_parameter=written.itemsize,
        embedding_parameters=0 if tied else embedding.numel(),
    )


@dataclass
class Pipeline:
    """A calibrated model, ready to be planned and factored.

    Attributes:
        stream: the model.
        statistics: what calibration learned about it.
        folder: where decompositions (`factors/`) and curves (`curves/`) are kept; None: in `cache`.
        dtype: floating type of what is written; None: that of the source.
        cache: decompositions of this session.
        compensated: fitted factors of this session, by plan (`compensation_key`) and layer, where there is no folder.
        resident: keep decompositions in `cache` although there is a folder: for whoever changes the ratio often, and has the memory.
        methods: what the names of recipes and plans stand for.
    """

    stream: DecoderStream
    statistics: Statistics
    folder: Path | None = None
    dtype: torch.dtype | None = None
    cache: Cache = field(default_factory=dict)
    compensated: dict[tuple[str, int], LayerFactors] = field(default_factory=dict)
    resident: bool = False
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)

    @cached_property
    def layers(self) -> dict[int, ExpertLayer]:
        """Layers with routed experts, by index."""
        return {layer.index: layer for layer in self.statistics.expert_layers}

    @cached_property
    def shape(self) -> ModelShape:
        """The model's size."""
        return shape_of(self.stream, self.dtype)

    @cached_property
    def sensitivities(self) -> list[LayerSensitivity]:
        """S_L and its parts of every layer."""
        return sensitivities(self.statistics.layers)

    # -- decomposition ---------------------------------------------------------------------------------------------------------------

    def curves(self, method: Method, report: Report = silent) -> list[SideCurve]:
        """What every structure of the method loses at every rank, of all layers; layers are decomposed where that was not done yet."""
        found: dict[tuple[int, str], list[SideCurve]] = {}
        missing = []
        for index in self.layers:
            for single in single_structures(method):
                curves = self._kept_curves(single, index)
                if curves is None:
                    missing.append((index, single))
                else:
                    found[index, single.structures[0]] = curves
        for done, (index, single) in enumerate(missing, start=1):
            with self.stream.layer(index):
                found[index, single.structures[0]] = self._decomposition(index, single).curves
            report(Progress("decompose", done, len(missing), f"layer {index}, {single.structures[0]}, {single.metric} metric"))
        return [curve for key in sorted(found) for curve in found[key]]

    def _kept_curves(self, single: Method, index: int) -> list[SideCurve] | None:
        if self.folder is not None:
            return load_curves(self._file("curves", single, index))
        kept = self.cache.get((decomposition_key(single), index))
        return None if kept is None else kept.curves

    def _decomposition(self, index: int, single: Method) -> Decomposition:
        """One layer by one structure, from the session, the folder, or made now. Needs the layer's weights: ask inside `stream.layer`."""
        key = (decomposition_key(single), index)
        if key in self.cache:
            return self.cache[key]
        layer = self.layers[index]
        weights = read_experts(self.stream.model.get_submodule(layer.name), layer)
        statistics = self.statistics.layers[index]
        file = None if self.folder is None else self._file("factors", single, index)
        if file is not None and file.exists():
            made = load_decomposition(file, weights, layer, statistics, single)
        else:
            made = decompose(weights, layer, statistics, single, device=self.stream.device)
        if file is None or self.resident:
            self.cache[key] = made
        if file is not None:
            if not file.exists():
                made.save(file)
            if not (curves := self._file("curves", single, index)).exists():
                save_curves(curves, made.curves)  # last: a layer with curves has its factors
        return made

    def _file(self, station: str, single: Method, index: int) -> Path:
        folder = (self.folder or Path()) / station / decomposition_key(single)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"layer-{index:03d}.safetensors"

    # -- planning --------------------------------------------------------------------------------------------------------------------

    def plans(self, recipe: Recipe, ratios: Sequence[float], report: Report = silent) -> list[Plan]:
        """Plans of a recipe at many ratios; the recipe's own is not looked at.

        Raises:
            InputError: a ratio beyond the method's reach, or names that are not known.
        """
        chosen, filled = self._filled(recipe)
        made = plans(self.curves(chosen, report), self.shape, filled, ratios, scores(self.sensitivities, chosen.allocation))
        return [replace(plan, metric=chosen.metric, compensate=recipe.compensate) for plan in made]

    def plan(self, recipe: Recipe, report: Report = silent) -> Plan:
        """The plan of a recipe at its ratio.

        Raises:
            InputError: as `plans`.
        """
        return self.plans(recipe, [recipe.ratio], report)[0]

    def max_ratio(self, recipe: Recipe, report: Report = silent) -> float:
        """The largest ratio that the recipe reaches."""
        chosen, filled = self._filled(recipe)
        return max_ratio(self.curves(chosen, report), self.shape, filled)

    def layer_plans(self, recipe: Recipe, report: Report = silent) -> dict[int, Plan]:
        """For each layer the plan that cuts it alone by the recipe's ratio of its own experts."""
        chosen, filled = self._filled(recipe)
        made = layer_plans(self.curves(chosen, report), self.shape, filled)
        return {index: replace(plan, metric=chosen.metric) for index, plan in made.items()}

    def _filled(self, recipe: Recipe) -> tuple[Method, Recipe]:
        chosen = method_of(recipe, self.methods)
        return chosen, replace(recipe, allocation=chosen.allocation)

    # -- factors ---------------------------------------------------------------------------------------------------------------------

    def factors(self, plan: Plan, index: int) -> LayerFactors | None:
        """What a plan stores for one layer, or None where it stays as it is. Ask inside `stream.layer(index)`.

        Raises:
            InputError: the plan is of another model.
            RunError: the plan is to be compensated, and was not yet.
        """
        factors = self._planned_factors(plan, index)
        if factors is None or not plan.compensate or not _is_changed(plan, index):
            return factors
        fitted = self._fitted_factors(plan, index, factors)
        if fitted is None:
            raise RunError(f"layer {index} of the plan is not compensated yet: call `compensate` first, or plan without compensation")
        return fitted

    def compensate(self, plan: Plan, report: Report = silent) -> None:
        """Refine a plan's shared bases and fit its factors to the compressed stream, where it asks for that and it was not done before.

        Goes on where it was interrupted when there is a folder.

        Raises:
            StatisticsError: the token ids of the calibration were not kept.
        """
        if not plan.compensate or all(self._is_fitted(plan, layer.layer) for layer in plan.layers):
            return
        window_NL = self.statistics.window_NL
        if window_NL is None:
            raise StatisticsError("compensation reads the calibration text again, and these statistics do not hold it: calibrate again")
        chosen = method(plan.method, self.methods)

        def finished(index: int) -> LayerFactors | None:
            if not (_is_changed(plan, index) and self._is_fitted(plan, index)):
                return None  # before slices are made that nobody needs
            return self._fitted_factors(plan, index, self._planned_factors(plan, index))

        work = None if self.folder is None else self.folder / "work" / f"compensate-{compensation_key(plan)}"
        Compensation(
            stream=self.stream,
            batches=batches_of(window_NL),
            statistics=self.statistics.layers.__getitem__,
            factors=lambda index: self._planned_factors(plan, index, refined=chosen.alternate),
            kind=plan.metric or chosen.metric,
            states=MemoryStates() if work is None else DiskStates(work),
            finished=finished,
            keep=lambda index, factors: self._keep_fitted(plan, index, factors),
        ).run(report)
        if work is not None:
            shutil.rmtree(work)

    def _is_fitted(self, plan: Plan, index: int) -> bool:
        """Whether nothing is left to fit in a layer."""
        if not _is_changed(plan, index):
            return True
        file = self._fitted_file(plan, index)
        return (compensation_key(plan), index) in self.compensated if file is None else file.exists()

    def _fitted_factors(self, plan: Plan, index: int, planned: LayerFactors | None) -> LayerFactors | None:
        """What `_keep_fitted` kept, in the place of the planned factors; None where there is nothing."""
        file = self._fitted_file(plan, index)
        if file is None:
            return self.compensated.get((compensation_key(plan), index))
        if planned is None or not file.exists():
            return None
        return with_fitted(planned, load_tensors(file, error_type=RunError, fix=MADE_AGAIN)[0])

    def _keep_fitted(self, plan: Plan, index: int, factors: LayerFactors) -> None:
        if not _is_changed(plan, index):
            return
        file = self._fitted_file(plan, index)
        if file is None:
            self.compensated[compensation_key(plan), index] = factors
        elif not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, fitted_tensors(factors), {})

    def _fitted_file(self, plan: Plan, index: int) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / "factors" / f"compensated-{compensation_key(plan)}" / f"layer-{index:03d}.safetensors"

    def _planned_factors(self, plan: Plan, index: int, *, refined: bool = False) -> LayerFactors | None:
        """Slices of the layer's decompositions.

        Args:
            refined: with shared bases that are refined at their rank; in factors that were fitted they are already.
        """
        layer_plan = _layer_plan(plan, index)
        if layer_plan is None or not layer_plan.selected:
            return None
        if index not in self.layers:
            raise InputError(f"the plan decomposes layer {index}, but this model has experts in layers {sorted(self.layers)}: plan again")
        base = method(plan.method, self.methods).customised(metric=plan.metric)
        dense = SidePlan("dense", (), 0, 0.0)
        sides: dict[str, SidePlan] = {"input": layer_plan.input, "output": layer_plan.output}
        made: LayerFactors | None = None
        for structure in sorted({side.structure for side in sides.values()} - {"dense"}):
            its = {name: side if side.structure == structure else dense for name, side in sides.items()}
            part = self._decomposition(index, base.alone(structure)).materialise(replace(layer_plan, **its), refined=refined)  # type: ignore[arg-type]
            names = [name for name, side in sides.items() if side.structure == structure]
            made = part if made is None else replace(made, **{name: getattr(part, name) for name in names})
        return made

    def compressed(self, plan: Plan) -> "CompressedStream":
        """The model as the plan makes it, layer by layer, nothing written."""
        return CompressedStream(self, plan)


class CompressedStream:
    """A `DecoderStream` whose layers carry a plan's factors for as long as they are used; the model below stays as it is.

    Raises (all methods):
        InputError: the plan is of another model.
    """

    def __init__(self, pipeline: Pipeline, plan: Plan) -> None:
        self._pipeline, self._plan, self._stream = pipeline, plan, pipeline.stream
        self._held: dict[int, int] = {}
        self.model, self.layers, self.config = self._stream.model, self._stream.layers, self._stream.config
        self.device, self.dtype = self._stream.device, self._stream.dtype
        self.embed, self.head = self._stream.embed, self._stream.head

    @property
    def expert_layers(self) -> list[ExpertLayer]:
        """Layers with routed experts."""
        return self._stream.expert_layers

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its factors; nested uses make them once."""
        with self._stream.layer(index) as module:
            factors = None if self._held.get(index) else self._pipeline.factors(self._plan, index)
            if factors is None:
                yield module
                return
            layer = self._pipeline.layers[index]
            with replaced_experts(self.model, layer, factors):
                self._held[index] = 1
                try:
                    yield module
                finally:
                    del self._held[index]

    def run_layer(self, index: int, hidden_BTD: Tensor, call: LayerCall) -> Tensor:
        """Hidden states [B, T, D] after the layer."""
        with self.layer(index):
            return self._stream.run_layer(index, hidden_BTD, call)


def single_structures(method: Method) -> list[Method]:
    """A method cut into one for each structure, so that methods which share one share its decompositions."""
    return [method.alone(structure) for structure in method.structures]


def decomposition_key(single: Method) -> str:
    """Name under which a method of one structure keeps its decompositions: what decides them and nothing else."""
    options = {"refit": single.refit, "unshrunk": not single.shrink, "screened": single.screen}
    return "-".join([single.metric, single.structures[0], *(name for name, chosen in options.items() if chosen)])


def compensation_key(plan: Plan) -> str:
    """Name under which a plan's fitted factors are kept: what decides them and nothing else."""
    decided = ["refined bases", plan.method, plan.metric, [(layer.layer, vars(layer.input), vars(layer.output)) for layer in plan.layers]]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:16]


def _layer_plan(plan: Plan, index: int) -> LayerPlan | None:
    return next((layer for layer in plan.layers if layer.layer == index), None)


def _is_changed(plan: Plan, index: int) -> bool:
    """Whether compensation changes one of the plan's layers."""
    layer = _layer_plan(plan, index)
    return layer is not None and layer.selected and is_changed(layer)
