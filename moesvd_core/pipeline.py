"""The stations put together: a calibrated model on one side, plans and their factors on the other.

A layer is decomposed once for each metric and structure, whichever methods and ratios ask for it: every plan is a slice of that. What was
decomposed is kept in a folder (a run) or in memory (a session), layer by layer, so that work which was interrupted goes on where it was.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.architectures.streaming import DecoderStream, LayerCall, LayerStream
from moesvd_core.calibration.states import DiskStates, MemoryStates, before
from moesvd_core.calibration.statistics import LayerFolder, LayerStatistics, Statistics
from moesvd_core.checkpoint.apply import changed
from moesvd_core.checkpoint.neuron_order import neuron_order
from moesvd_core.compensation import Compensation, batches_of
from moesvd_core.curve_files import are_current, load_curves, save_curves
from moesvd_core.decomposition.decompose import Decomposition, PackedDecomposition, decompose, is_outdated
from moesvd_core.decomposition.decompose import load as load_decomposition
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS, Method, method
from moesvd_core.errors import InputError, RunError, StatisticsError
from moesvd_core.fitted import FittedLayers, fit_key, is_fitted, is_refitted
from moesvd_core.planning import LayerPlan, ModelShape, Plan, Recipe, SideCurve, SidePlan, Structure, layer_plans, max_ratio, plans
from moesvd_core.progress import Progress, Report, silent
from moesvd_core.sensitivity import LayerSensitivity, scores, sensitivities
from moesvd_core.sizes import shape_of

Cache = MutableMapping[tuple[str, int], Decomposition | PackedDecomposition]
"""Decompositions by key (`decomposition_key`) and layer."""
Materials = Callable[[], tuple[ExpertWeights, LayerStatistics]]
"""What a layer's decompositions are made of."""


def method_of(recipe: Recipe, methods: Mapping[str, Method] = METHODS) -> Method:
    """The named method with the recipe's own choices.

    Args:
        methods: what names stand for.

    Raises:
        InputError: no such method, metric, structure or allocation; or a base alone, where one is made only if experts have much in common.
    """
    structures = None if recipe.structure is None else (recipe.structure,)
    chosen = method(recipe.method, methods).customised(metric=recipe.metric, structures=structures, allocation=recipe.allocation)
    if chosen.screen and chosen.structures == ("base-delta",):
        fix = f"leave it out, or name method d2-moe with metric {chosen.metric}"
        raise InputError(f"structure base-delta is one of several for {recipe.method}, where experts have much in common: {fix}")
    return chosen


def method_of_plan(plan: Plan, layers: Iterable[LayerPlan], methods: Mapping[str, Method] = METHODS) -> Method:
    """The method that made some layers of a plan, with the structures that they have; one of them at least must be factored.

    A recipe's own metric and structure belong together: neither need go with what the named method has in the other's place.
    """
    used = {side.structure for layer in layers for side in (layer.input, layer.output)} - {"dense"}
    structures = tuple(structure for structure in get_args(Structure) if structure in used)
    return method(plan.method, methods).customised(metric=plan.metric, structures=structures)


@dataclass
class Pipeline:
    """A calibrated model, ready to be planned and factored.

    Attributes:
        stream: the model.
        statistics: what calibration learned about it.
        folder: where decompositions (`factors/`) and curves (`curves/`) are kept; None: in `cache`.
        dtype: floating type of what is written; None: that of the source.
        cache: decompositions of this session; packed, where weights or statistics are read layer by layer and would pile up in it.
        resident: keep decompositions in `cache` although there is a folder: for whoever changes the ratio often, and has the memory.
        methods: what the names of recipes and plans stand for.
        files: the model's files, where `stream` is over what was loaded from them: they may hold more than what was loaded, and ratios are
            of all of it; None: those of the stream, where it has some.
    """

    stream: DecoderStream
    statistics: Statistics
    folder: Path | None = None
    dtype: torch.dtype | None = None
    cache: Cache = field(default_factory=dict)
    resident: bool = False
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    files: ModelFiles | None = None

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
        return shape_of(self.stream, self.dtype, self.files)

    @cached_property
    def sensitivities(self) -> list[LayerSensitivity]:
        """S_L and its parts of every layer."""
        return sensitivities(self.statistics.layers)

    # -- decomposition ---------------------------------------------------------------------------------------------------------------

    def curves(self, method: Method, report: Report = silent) -> list[SideCurve]:
        """What every structure of the method loses at every rank, of all layers; layers are decomposed where that was not done yet."""
        found: dict[tuple[int, str], list[SideCurve]] = {}
        missing: dict[int, list[Method]] = {}
        for index in self.layers:
            for single in single_structures(method):
                curves = self._kept_curves(single, index)
                if curves is None:
                    missing.setdefault(index, []).append(single)
                else:
                    found[index, single.structures[0]] = curves
        done, total = 0, sum(map(len, missing.values()))
        for index, singles in missing.items():
            with self.stream.layer(index):
                materials = self._materials(index)
                for single in singles:
                    found[index, single.structures[0]] = self._decomposition(index, single, materials).curves
                    done += 1
                    report(Progress("decompose", done, total, f"layer {index}, {single.structures[0]}, {single.metric} metric"))
        return [curve for key in sorted(found) for curve in found[key]]

    def _kept_curves(self, single: Method, index: int) -> list[SideCurve] | None:
        if self.folder is not None:
            return load_curves(self._file("curves", single, index))
        kept = self.cache.get((decomposition_key(single), index))
        return None if kept is None else kept.curves

    def _materials(self, index: int) -> Materials:
        """A layer's weights and statistics for all that is asked of it while it is loaded: read when they are needed, and once."""

        @lru_cache(maxsize=1)
        def read() -> tuple[ExpertWeights, LayerStatistics]:
            layer = self.layers[index]
            held = (kept.statistics for (_, at), kept in self.cache.items() if at == index and isinstance(kept, Decomposition))
            weights = read_experts(self.stream.model.get_submodule(layer.name), layer)
            return weights, next(held, None) or self.statistics.layers[index]

        return read

    def _decomposition(self, index: int, single: Method, materials: Materials | None = None) -> Decomposition:
        """One layer by one structure, from the session, the folder, or made now. Needs the layer's weights: ask inside `stream.layer`.

        Args:
            materials: from `_materials`, for whoever asks for several structures.
        """
        materials = materials or self._materials(index)
        key, layer, device = (decomposition_key(single), index), self.layers[index], self.stream.device
        held = self.cache.get(key)
        if held is not None:
            return held.unpacked(*materials(), layer, device=device) if isinstance(held, PackedDecomposition) else held
        weights, statistics = materials()
        file = None if self.folder is None else self._file("factors", single, index)
        kept = file is not None and file.exists() and not is_outdated(file)
        if file is not None and kept:
            made = load_decomposition(file, weights, layer, statistics, single, device=device)
        else:
            made = decompose(weights, layer, statistics, single, device=device)
        if file is None or self.resident:
            made.release()  # those of all layers would not fit
            self.cache[key] = made if self.resident or not self._read_in_turn else made.packed()
        if file is not None:
            curves = self._file("curves", single, index)
            if not kept:
                curves.unlink(missing_ok=True)  # of factors that are outdated
                made.save(file)
            if not are_current(curves):
                save_curves(curves, made.curves)  # last: a layer with curves has its factors
        return made

    @property
    def _read_in_turn(self) -> bool:
        """Whether layers are read from files one after the other, weights or statistics: what is kept must not hold them all."""
        return isinstance(self.stream, LayerStream) or isinstance(self.statistics.layers, LayerFolder)

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
        work = self._fitting_work(plan)
        if all(self.fitted.has(plan, index) for index in self.layers):
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)  # it ended between the last layer and this
            return
        window_NL = self.statistics.window_NL
        if window_NL is None:
            raise StatisticsError("compensation reads the calibration text again, and these statistics do not hold it: calibrate again")
        chosen = method(plan.method, self.methods)
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

    def _fitting_work(self, plan: Plan) -> Path | None:
        """Folder of the hidden states of a plan that is being fitted. Those of other plans go: nobody else is at work in the folder, so
        they were given up; whoever comes back to such a plan finds its fitted layers, and runs the text through them again.
        """
        if self.folder is None:
            return None
        own = self.folder / "work" / f"compensate-{fit_key(plan)}"
        for other in own.parent.glob("compensate-*"):
            if other != own:
                shutil.rmtree(other)
        return own

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
        sides: dict[str, SidePlan] = {"input": layer_plan.input, "output": layer_plan.output}
        dense, materials = SidePlan("dense", (), 0, 0.0), self._materials(index)
        made: LayerFactors | None = None
        for single in single_structures(method_of_plan(plan, [layer_plan], self.methods)):
            structure = single.structures[0]
            its = {name: side if side.structure == structure else dense for name, side in sides.items()}
            decomposition = self._decomposition(index, single, materials)
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
