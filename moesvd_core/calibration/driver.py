"""Calibrating a model: which steps are done in which order, where their results are kept, and how an interrupted calibration goes on.

In a folder, every finished step is noted (`work/progress.json`) after its results are on disk. A second call with the same settings goes
on behind the last noted step; on a CPU the result is the same to the last bit.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from moesvd_core.architectures.find import EXPERT_LAYER
from moesvd_core.architectures.streaming import DecoderStream, require_known
from moesvd_core.atomic import sweep, write_json
from moesvd_core.calibration.backward import NotDifferentiableError, backward_steps, passing
from moesvd_core.calibration.forward import forward_steps
from moesvd_core.calibration.identity import identify
from moesvd_core.calibration.job import Job, Step
from moesvd_core.calibration.probe import probe_steps
from moesvd_core.calibration.settings import Calibration
from moesvd_core.calibration.states import DiskStates, MemoryStates, States, before
from moesvd_core.calibration.statistics import SUMMARY, LayerFolder, LayerStatistics, Statistics
from moesvd_core.calibration.text import calibration_windows
from moesvd_core.errors import InputError, RunError, StatisticsError, UnsupportedModelError
from moesvd_core.progress import Progress, Report, silent

HOST_BYTES = 4 * 2**30
"""Hidden states beyond this go to a temporary folder instead of host memory when no folder is given, where a card has no room for them."""
_WORK, _PROGRESS = "work", "progress.json"

GradientKind = Literal["backward", "probe"]


def calibrate(
    stream: DecoderStream,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    *,
    report: Report = silent,
    folder: Path | str | None = None,
) -> Statistics:
    """Run text through the model and learn each layer's statistics.

    Args:
        stream: the model, layer by layer.
        tokenizer: its tokenizer.
        calibration: the settings.
        report: called after every step with stage "calibrate".
        folder: where to keep the result and what is needed to go on after an interruption; None: memory only. A folder with a finished
            calibration of the same model, settings and text is read instead of calibrating again.

    Raises:
        InputError: settings that the model or the text do not allow, or a tokenizer of another model's.
        StatisticsError: weights or activations that are NaN or infinite, or damaged files in the folder.
        RunError: the folder holds another calibration.
        ResourceError: the disk is full.
        UnsupportedModelError: the model has no routed experts, or they are factored already.
    """
    if calibration.dtype is not None and stream.dtype != getattr(torch, calibration.dtype):
        raise InputError(f"dtype must be that of the opened model ({stream.dtype}) or None, got {calibration.dtype}: open the model in it")
    _refuse_factored(stream)
    positions = getattr(stream.config.get_text_config(), "max_position_embeddings", None)
    window_NL = calibration_windows(tokenizer, calibration, positions)
    require_known(stream.model, window_NL)
    planned = Statistics(
        layers={},
        expert_layers=tuple(stream.expert_layers),
        calibration=calibration,
        model=identify(stream),
        text=hashlib.sha256(window_NL.numpy().data).hexdigest(),
        windows=window_NL.shape[0],
        length=window_NL.shape[1],
        gradient="backward" if calibration.gradient else "probe",
        window_NL=window_NL,
        stream=stream,
    )
    path = None if folder is None else Path(folder)
    if path is not None and (path / SUMMARY).exists():
        finished = _finished(path, planned)
        shutil.rmtree(path / _WORK, ignore_errors=True)  # left over if the process ended right after the summary was written
        return finished
    with _workplace(path, _state_bytes(stream, window_NL, calibration), stream.device) as place:
        job = Job(
            stream=stream,
            calibration=calibration,
            batches=window_NL.split(calibration.batch),
            experts={layer.index: layer for layer in planned.expert_layers},
            states=place.states,
            layers=place.layers,
        )
        result = replace(planned, layers=place.layers, gradient=_run(job, place, planned, report))
        if path is not None:
            result.save(path)
    return result


def _refuse_factored(stream: DecoderStream) -> None:
    for layer in stream.expert_layers:
        if hasattr(stream.model.get_submodule(layer.name), EXPERT_LAYER):
            raise UnsupportedModelError(f"layer {layer.index}: the experts are factored already; calibrate the original model")


@dataclass
class _Workplace:
    """Where one calibration's results and progress are kept.

    Attributes:
        progress: file that notes finished steps; None in memory.
    """

    states: States
    layers: MutableMapping[int, LayerStatistics]
    progress: Path | None = None

    def read(self, planned: Statistics) -> tuple[int, GradientKind]:
        """Steps finished before, and how gradient Grams are made.

        Raises:
            RunError: they belong to another calibration.
            StatisticsError: the note is damaged.
        """
        if self.progress is None or not self.progress.exists():
            return 0, planned.gradient
        try:
            data = json.loads(self.progress.read_text(encoding="utf-8"))
            done, gradient, summary = int(data["done"]), data["gradient"], data["summary"]
        except (ValueError, KeyError, TypeError) as error:
            raise StatisticsError(f"{self.progress} is damaged ({error}): remove the folder and calibrate again") from error
        _require_same(self.progress.parent.parent, summary, planned)
        return done, gradient

    def write(self, done: int, gradient: GradientKind, planned: Statistics) -> None:
        """Note that so many steps are finished."""
        if self.progress is not None:
            write_json(self.progress, {"done": done, "gradient": gradient, "summary": planned.summary()})


@contextmanager
def _workplace(folder: Path | None, size: int, device: torch.device) -> Iterator[_Workplace]:
    """A place to work in; what lies in it besides the result is removed when the work ends well, and kept in a folder otherwise."""
    if folder is not None:
        work = folder / _WORK
        states = DiskStates(work)
        sweep(folder)
        sweep(work)
        yield _Workplace(states, LayerFolder(folder), work / _PROGRESS)
        shutil.rmtree(work)
    elif size > HOST_BYTES:
        with TemporaryDirectory(prefix="moesvd-") as temporary:
            yield _Workplace(before(device, DiskStates(Path(temporary))), {})
    else:
        yield _Workplace(before(device, MemoryStates()), {})


def _run(job: Job, place: _Workplace, planned: Statistics, report: Report) -> GradientKind:
    """Do the steps that are not done yet; a model with a layer that has no backward pass is probed instead, in all of its layers."""
    done, gradient = place.read(planned)
    while True:
        steps = _steps(job, gradient)
        try:
            for number, step in enumerate(steps, 1):
                if number <= done:
                    continue
                step.run()
                done = number
                place.write(done, gradient, planned)
                for name in step.obsolete:
                    job.states.drop(name)
                report(Progress("calibrate", done, len(steps), step.name))
            return gradient
        except NotDifferentiableError as error:
            warnings.warn(f"{error}: one probe a layer measures how the loss bends instead, which tells less", stacklevel=2)
            gradient, done = "probe", job.depth + 1  # the forward pass stands
            place.write(done, gradient, planned)
            for name in passing(job):
                job.states.drop(name)


def _steps(job: Job, gradient: GradientKind) -> list[Step]:
    if gradient == "backward":
        return [*forward_steps(job, keep_from=min(job.experts)), *backward_steps(job)]
    return [*forward_steps(job, keep_from=job.depth), *probe_steps(job)]


def _finished(folder: Path, planned: Statistics) -> Statistics:
    statistics = Statistics.load(folder, stream=planned.stream)
    _require_same(folder, statistics.summary(), planned)
    return statistics


def _require_same(folder: Path, summary: dict[str, Any], planned: Statistics) -> None:
    """Compare what a folder holds with what is asked for; where a model lies and how its gradients came about may differ."""
    theirs, ours = _flat(summary), _flat(planned.summary())
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise RunError(
                f"{folder} holds another calibration: {name} is {theirs.get(name)} there, {ours.get(name)} is asked for; "
                "choose another folder, or the same settings, text and model"
            )


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    # Through JSON and back, since a read summary has lists where a new one has tuples.
    plain = json.loads(json.dumps({key: value for key, value in summary.items() if key != "gradient"}))
    settings = {f"{part}.{name}": value for part in ("calibration", "model") for name, value in plain.pop(part).items()}
    return {name: value for name, value in {**plain, **settings}.items() if name != "model.source"}


def _state_bytes(stream: DecoderStream, window_NL: torch.Tensor, calibration: Calibration) -> int:
    """Bytes of the hidden states of all layers, and of the gradients on their way: before a layer and behind it, for every label."""
    states = len(stream.layers) + 2 * (1 + calibration.drawn_labels)
    return states * window_NL.numel() * int(stream.config.get_text_config().hidden_size) * stream.dtype.itemsize
