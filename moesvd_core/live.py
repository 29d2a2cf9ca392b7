"""A run's model in memory, original and compressed at once: for pages that must answer in seconds, one model a process.

Both share the backbone; what a plan adds is its factors, sliced from decompositions that stay in memory. A plan's model is an object of its
own and is never changed afterwards, so whoever still generates with the one before is not disturbed, and its factors go when nobody uses
them any more. What is measured here is what the run's worker would have measured, and is kept in the same files.
"""

from collections.abc import Iterator
from threading import Lock

import torch
from transformers import PreTrainedModel

from moesvd_core.api import load_model
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration.statistics import SUMMARY
from moesvd_core.checkpoint.apply import compressed, pack_where_possible
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import method
from moesvd_core.devices import unused
from moesvd_core.errors import ResourceError, RunError
from moesvd_core.evaluation.hidden import final_hidden
from moesvd_core.evaluation.perplexity import Evaluation, compare
from moesvd_core.evaluation.speed import weight_bytes
from moesvd_core.pipeline import decomposition_key, method_of_plan, single_structures
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Report, silent
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.free_memory import free_memory
from moesvd_core.runs.source import find_source
from moesvd_core.runs.workbench import Text, Workbench, plan_key

MEMORY = 2.5
"""Bytes that a live model may take for each byte of its files: the original, factors of at most its size, and room to compute."""
RESIDENT = 2**31
"""Bytes of factor files and statistics up to which a method's decompositions stay in memory; beyond, they are read for each plan."""


class LiveModel:
    """One run's model. All methods may be called from several threads; plans and measurements take turns.

    Attributes:
        run: whose model it is.
        original: the model as it was calibrated.
        tokenizer: of both.
    """

    def __init__(self, run: RunFolder) -> None:
        """Load the model.

        Raises:
            InputError: the model cannot be found or read.
            ResourceError: it does not fit beside what is in memory.
            RunError: it is not the model any more that the run was made for, or was not analysed yet.
        """
        if not is_calibrated(run):
            raise RunError(f"run {run.name} has no statistics yet: analyze its model first")
        self.run = run
        source = find_source(run)
        _require(int(source.facts["bytes"]), run)
        self._bench = Workbench(run, silent)
        self._bench.source = source
        named = self._bench.calibration.dtype
        dtype = "auto" if named is None else getattr(torch, named)
        self.original, self.tokenizer = load_model(source.path, dtype=dtype, allow_remote_code=run.identity.remote_code)
        self._bench.stream = MemoryStream(self.original)  # type: ignore[assignment] # the same manners, and nothing is exported here
        self._bench.tokenizer = self.tokenizer
        self._pipeline = self._bench.pipeline
        self._lock = Lock()
        self._applied: tuple[Plan, PreTrainedModel] | None = None

    def is_of(self, run: RunFolder) -> bool:
        """Whether this is the run's model; a run may have been deleted since, and made again in the same folder."""
        return _is_same(self.run, run)

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of a recipe; milliseconds once the run holds the method's decompositions.

        Raises:
            InputError: names that are not known, or a ratio beyond the method's reach.
        """
        with self._lock:
            return self._pipeline.plan(recipe)

    def apply(self, plan: Plan) -> PreTrainedModel:
        """The model as a plan makes it; generates like any other, beside the original. It is for answers alone: on a CPU its factors are
        packed (`checkpoint.apply.pack`), as fast as they get there.

        Raises:
            InputError: the plan is of another model.
        """
        with self._lock:
            return self._apply(plan)

    def measure(self, recipe: Recipe, text: Text | None = None, *, report: Report = silent) -> Evaluation:
        """How well a recipe's model predicts a text, beside the original; kept in the run, and read from there the next time.

        Raises:
            InputError: as `plan`, or too little text.
            EvaluationError: a window's loss is not finite.
        """
        text = text or Text()
        with self._lock:
            plan = self._pipeline.plan(recipe)
            evaluation = self._bench.known(plan_key(recipe), text)
            if evaluation is None:
                original = self._bench.original_hidden(text)
                final = final_hidden(self._apply(plan), original.window_NL, report=report)
                evaluation = compare(final, original, text.dataset)
            self._bench.record(recipe, plan, text, evaluation)
            return evaluation

    def _apply(self, plan: Plan) -> PreTrainedModel:
        if self._applied is None or self._applied[0] != plan:
            self._applied = None  # its factors may go before the new ones come
            self._keep_method_of(plan)
            model = compressed(self.original, self._layers(plan))
            pack_where_possible(model)
            self._applied = plan, model
        return self._applied[1]

    def _layers(self, plan: Plan) -> Iterator[tuple[ExpertLayer, LayerFactors]]:
        for index, layer in self._pipeline.layers.items():
            if (factors := self._pipeline.factors(plan, index)) is not None:
                yield layer, factors

    def _keep_method_of(self, plan: Plan) -> None:
        """Let the decompositions of other methods go; keep this one's where that is little."""
        factored = [layer for layer in plan.layers if layer.selected]
        if not factored:
            return
        cache, chosen = self._pipeline.cache, method_of_plan(plan, factored)
        if set(chosen.structures) < set(own := method(plan.method).structures):
            chosen = chosen.customised(structures=own)  # the next plan may want those that this one does without
        keys = {decomposition_key(single) for single in single_structures(chosen)}
        for other in [entry for entry in cache if entry[0] not in keys]:
            del cache[other]
        folders = [self.run.path / "factors" / key for key in keys]
        size = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
        self._pipeline.resident = size < RESIDENT


class LiveModels:
    """The live model of this process: at most one, that of the run asked for last."""

    def __init__(self) -> None:
        self._lock = Lock()  # held for as long as a model is loaded
        self._guard = Lock()  # of the two below, held for a moment
        self._live: LiveModel | None = None
        self._loading: RunFolder | None = None  # whose model is to stay once it is loaded

    def of(self, run: RunFolder) -> LiveModel:
        """The run's model; loads it, and lets go of another run's, where it is not the one in memory.

        Raises:
            InputError, ResourceError, RunError: as `LiveModel`.
        """
        with self._lock:
            live = self._live
            if live is None or not live.is_of(run):
                live = None  # nobody but those who still use it holds the old one while the new one is loaded
                with self._guard:
                    self._live, self._loading = None, run
                live = LiveModel(run)
                with self._guard:
                    if self._loading is run:
                        self._live = live
            return live

    def forget(self, run: RunFolder) -> None:
        """Let go of the run's model, also of one that is being loaded just now, without waiting for it."""
        with self._guard:
            if self._live is not None and self._live.is_of(run):
                self._live = None
            if self._loading is not None and _is_same(self._loading, run):
                self._loading = None

    def fits(self, run: RunFolder, files_bytes: int) -> bool:
        """Whether the model of a run, of so many bytes, is live or can be now; what is loaded already is not asked to fit a second time,
        and another run's model goes before this one is loaded."""
        live = self._live  # without the lock, which is held for as long as a model is loaded
        if live is None:
            return fits(files_bytes)
        return live.is_of(run) or live_memory(files_bytes) <= free_for_models() + weight_bytes(live.original)


def _is_same(one: RunFolder, other: RunFolder) -> bool:
    return (one.path, one.identity) == (other.path, other.identity)


def is_calibrated(run: RunFolder) -> bool:
    """Whether the run holds all statistics of its model."""
    return (run.path / "statistics" / SUMMARY).exists()


def fits(files_bytes: int) -> bool:
    """Whether a model of so many bytes can be live on this machine now."""
    return live_memory(files_bytes) <= free_for_models()


def live_memory(files_bytes: int) -> int:
    """Bytes that a live model of so many bytes on disk may take."""
    return round(MEMORY * files_bytes)


def _require(files_bytes: int, run: RunFolder) -> None:
    if not fits(files_bytes):
        raise ResourceError(
            f"not enough memory to hold the model of run {run.name}: about {live_memory(files_bytes) / 2**30:.2f} GiB are needed and "
            f"{free_for_models() / 2**30:.2f} GiB are free; measure it by a job of the run, which needs one layer at a time"
        )


def free_for_models() -> int:
    """Bytes free where live models are put: on the graphics card where there is one, else on the host."""
    if torch.cuda.is_available():
        return unused(torch.device("cuda"))  # with what torch still holds of a model that was let go
    return free_memory()
