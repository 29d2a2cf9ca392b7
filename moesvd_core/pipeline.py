"""The stations put together: a calibrated model on one side, plans and their factors on the other.

A layer is decomposed once for each metric and structure, whichever methods and ratios ask for it: every plan is a slice of that. What was
decomposed is kept in a folder (a run) or in memory (a session), layer by layer, so that work which was interrupted goes on where it was.
"""

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
from moesvd_core.calibration.states import DiskStates, MemoryStates, before
from moesvd_core.calibration.statistics import Statistics
from moesvd_core.checkpoint.apply import changed
from moesvd_core.checkpoint.neuron_order import neuron_order
from moesvd_core.compensation import Compensation, batches_of
from moesvd_core.curve_files import load_curves, save_curves
from moesvd_core.decomposition.decompose import Decomposition, decompose, is_outdated
from moesvd_core.decomposition.decompose import load as load_decomposition
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS, Method, method
from moesvd_core.errors import InputError, RunError, StatisticsError
from moesvd_core.fitted import FittedLayers, fit_key, is_fitted, is_refitted
from moesvd_core.planning import ModelShape, Plan, Recipe, SideCurve, SidePlan, layer_plans, max_ratio, plans
from moesvd_core.progress import Progress, Report, silent
from moesvd_core.sensitivity import LayerSensitivity, scores, sensitivities

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
        resident: keep decompositions in `cache` although there is a folder: for whoever changes the ratio often, and has the memory.
        methods: what the names of recipes and plans stand for.
    """

    stream: DecoderStream
    statistics: Statistics
    folder: Path | None = None
    dtype: torch.dtype | None = None
    cache: Cache = field(default_factory=dict)
    resident: bool = False
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)

    @cached_property
    def fitted(self) -> FittedLayers:
        """What was fitted of finished plans."""
        return FittedLayers(None if self.folder is None else self.folder / "factors")

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
        kept = file is not None and file.exists() and not is_outdated(file)
        if file is not None and kept:
            made = load_decomposition(file, weights, layer, statistics, single, device=self.stream.device)
        else:
            made = decompose(weights, layer, statistics, single, device=self.stream.device)
        if file is None or self.resident:
            made.release()  # those of all layers would not fit
            self.cache[key] = made
        if file is not None:
            if not kept:
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
        return [replace(plan, metric=chosen.metric, compensate=recipe.compensate, refit_router=recipe.refit_router) for plan in made]

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
            RunError: the plan is to be compensated, or its routers refitted, and that was not done yet.
        """
        if not is_fitted(plan, index):
            return self._planned_factors(plan, index)
        fitted = self._fitted_factors(plan, index)
        if fitted is None:
            fix = "call `compensate` first, or plan without compensation and refitted routers"
            raise RunError(f"layer {index} of the plan is not fitted yet: {fix}")
        return fitted

    def compensate(self, plan: Plan, report: Report = silent) -> None:
        """Refine a plan's shared bases, fit its factors to the compressed stream, and refit its routers, as far as it asks for that.

        What was done before is not done again, and it goes on where it was interrupted when there is a folder.

        Raises:
            StatisticsError: the token ids of the calibration were not kept.
            UnsupportedModelError: routers that cannot be refitted.
        """
        if all(self.fitted.has(plan, index) for index in self.layers):
            return
        window_NL = self.statistics.window_NL
        if window_NL is None:
            raise StatisticsError("compensation reads the calibration text again, and these statistics do not hold it: calibrate again")
        chosen = method(plan.method, self.methods)
        work = None if self.folder is None else self.folder / "work" / f"compensate-{fit_key(plan)}"
        Compensation(
            stream=self.stream,
            batches=batches_of(window_NL),
            statistics=self.statistics.layers.__getitem__,
            factors=lambda index: self._planned_factors(plan, index, refined=plan.compensate and chosen.alternate),
            kind=plan.metric or chosen.metric,
            states=before(self.stream.device, MemoryStates()) if work is None else DiskStates(work),
            finished=lambda index: self._fitted_factors(plan, index) if is_fitted(plan, index) else None,
            keep=lambda index, factors: self.fitted.keep(plan, index, factors),
            fits_outputs=plan.compensate,
            refits=lambda index: is_refitted(plan, index),
        ).run(report)
        if work is not None:
            shutil.rmtree(work)

    def _fitted_factors(self, plan: Plan, index: int) -> LayerFactors | None:
        """A layer as it was fitted; None where it was not yet."""
        if not self.fitted.has(plan, index):
            return None  # before slices are made that nobody needs
        planned = self._planned_factors(plan, index)
        if planned is None:
            layer = self.layers[index]
            planned = LayerFactors.unchanged(index, read_experts(self.stream.model.get_submodule(layer.name), layer))
        return self.fitted.of(plan, index, planned)

    def _planned_factors(self, plan: Plan, index: int, *, refined: bool = False) -> LayerFactors | None:
        """Slices of the layer's decompositions.

        Args:
            refined: with shared bases that are refined at their rank; in factors that were fitted they are already.
        """
        layer_plan = plan.layer(index)
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
            decomposition = self._decomposition(index, base.alone(structure))  # type: ignore[arg-type]
            part = decomposition.materialise(replace(layer_plan, **its), refined=refined, on_host=True)  # type: ignore[arg-type]
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
            with changed(self.model, layer, factors, neuron_order(factors)):
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
