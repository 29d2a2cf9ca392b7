"""What a user imports: the stations of the pipeline on a model in memory. `moesvd_core` hands these out by name."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core import calibration as calibration_room
from moesvd_core.architectures.files import ModelFiles, resolve_model
from moesvd_core.architectures.inspect import inspect
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import DecoderStream, LayerStream, MemoryStream, as_stream
from moesvd_core.architectures.tokenizer import load_tokenizer
from moesvd_core.calibration import Calibration, Statistics
from moesvd_core.checkpoint.apply import compressed, factored_modules
from moesvd_core.checkpoint.export import export
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.errors import CheckpointError, InputError, UnsupportedModelError
from moesvd_core.evaluation.perplexity import evaluate
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress, Report, silent
from moesvd_core.same_model import same_experts

_CALIBRATE = "make them with calibrate(model, tokenizer), or Statistics.load(folder)"

__all__ = ["calibrate", "compress", "evaluate", "export", "inspect", "load_model", "plan"]


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    allow_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, in evaluation mode; original or compressed.

    Args:
        name_or_path: a folder or a hub id.
        dtype: "auto" keeps that of the files.
        device: None: the GPU where there is one, else the host.
        allow_remote_code: run code that comes with the model, if transformers does not know its type.

    Raises:
        InputError: no such model, number format or device.
        CheckpointError: a file is missing, damaged, unsafe or inconsistent.
    """
    if dtype != "auto" and not isinstance(dtype, torch.dtype) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype must be auto or a floating type of torch (bfloat16, float32 ...), got {dtype!r}")
    place = _device(device)
    folder = resolve_model(name_or_path, allow_remote_code=allow_remote_code)
    ModelFiles.open(folder, allow_remote_code=allow_remote_code)  # checks what transformers takes on trust
    tokenizer = load_tokenizer(folder, allow_remote_code=allow_remote_code)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=allow_remote_code)
    return loaded.to(place).eval(), tokenizer


def _device(asked: str | torch.device | None) -> torch.device:
    """The device that is asked for, or the usual one.

    Raises:
        InputError: it is not there, or no device at all.
    """
    try:
        place = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device must be one of this machine (cpu, cuda, cuda:0 ...), got {str(asked)!r}: {reason}") from None
    return place


def _require(name: str, value: object, kind: type, fix: str) -> None:
    """Refuse an argument of another kind than the one that belongs there.

    Raises:
        InputError: it is.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} must be of class {kind.__name__}, got {type(value).__name__}: {fix}")


def calibrate(
    model: PreTrainedModel | DecoderStream,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration | None = None,
    *,
    report: Report = silent,
    folder: Path | str | None = None,
) -> Statistics:
    """Run text through a model and learn each layer's statistics; made once, used for every ratio and method.

    Args:
        model: a loaded model, or a stream over one that is larger than the memory.
        calibration: the settings; None: `Calibration()`.
        folder: where to keep the result and to go on after an interruption; None: memory only.

    Raises:
        InputError, StatisticsError, UnsupportedModelError: see `calibration.driver`; InputError also for arguments of another kind.
    """
    settings = calibration or Calibration()
    _require("calibration", settings, Calibration, "write Calibration(samples=...)")
    if folder is not None and Path(folder).is_file():
        raise InputError(f"folder must be a folder, got the file {folder}: name another one")
    return calibration_room.calibrate(as_stream(model), tokenizer, settings, report=report, folder=folder)


def plan(statistics: Statistics, recipe: Recipe | None = None, *, report: Report = silent) -> Plan:
    """Ranks of every layer. The first plan of a method decomposes the model; further ratios take milliseconds.

    Args:
        statistics: from `calibrate`, or loaded from a folder (then the model is read from where it was calibrated).
        recipe: None: `Recipe()`, 40 % by the recommended method.

    Raises:
        InputError: names that are not known, a ratio beyond the method's reach, or arguments of another kind.
    """
    _require("statistics", statistics, Statistics, _CALIBRATE)
    asked = recipe or Recipe()
    _require("recipe", asked, Recipe, "write Recipe(ratio=...)")
    return _pipeline(statistics).plan(asked, report)


def compress(model: PreTrainedModel, statistics: Statistics, plan: Plan, *, report: Report = silent) -> PreTrainedModel:
    """A compressed copy of a loaded model: `generate`, training and `save_pretrained` work. The model itself stays as it is.

    The copy shares every tensor that is not factored with the model.

    Args:
        model: the one that was calibrated, or the same weights loaded again, in any number format; it may have been calibrated from files.

    Raises:
        InputError: the plan or the statistics are of another model, or of other weights (a fine-tuned copy is calibrated for itself); or
            arguments of another kind, or a model that is compressed already.
    """
    _require("model", model, PreTrainedModel, "load it with load_model")
    _require("statistics", statistics, Statistics, _CALIBRATE)
    _require("plan", plan, Plan, "make it with plan(statistics, recipe)")
    if factored_modules(model):
        raise InputError("model must be the original, got one whose experts are factored already: compress that which was calibrated")
    stream = MemoryStream(model)
    if list(statistics.expert_layers) != stream.expert_layers:
        raise InputError("statistics must be of the model that is compressed, got those of one with other layers: calibrate this one")
    _require_same(statistics, stream)
    pipeline = _pipeline(statistics, stream)
    pipeline.compensate(plan, report)

    def layers() -> Iterator[tuple[ExpertLayer, LayerFactors]]:
        for done, (index, layer) in enumerate(pipeline.layers.items(), start=1):
            if (factors := pipeline.factors(plan, index)) is not None:
                yield layer, factors
            report(Progress("compress", done, len(pipeline.layers), f"layer {index}"))

    return compressed(model, layers())


def _require_same(statistics: Statistics, stream: MemoryStream) -> None:
    """Refuse a model with other experts than those that the statistics are of; decompositions that stay with them are of those.

    Raises:
        InputError: it is another one.
    """
    known: DecoderStream | ModelFiles | None = statistics.stream
    if known is None and (source := _source(statistics)) is not None:
        with suppress(CheckpointError, UnsupportedModelError):
            known = ModelFiles.open(source)
    if known is None:
        statistics.stream = stream  # nothing is at hand that could tell: this is the model from now on
    elif not same_experts(stream, known):
        raise InputError(
            "statistics must be of the model that is compressed, got those of one with other weights in its experts: calibrate this one"
        )


def _pipeline(statistics: Statistics, stream: DecoderStream | None = None) -> Pipeline:
    """The pipeline of some statistics; decompositions stay with them.

    Raises:
        InputError: the model is not at hand.
    """
    if stream is None and statistics.stream is None:
        if (source := _source(statistics)) is None:
            where = f"not at {statistics.model.source!r} any more" if statistics.model.source else "in no folder: it was in memory alone"
            raise InputError(f"the model that was calibrated is {where}; load statistics with `stream=` and that model")
        statistics.stream = LayerStream(source, dtype=getattr(torch, statistics.model.dtype))
    used = stream or statistics.stream
    assert used is not None, "one of the two was given or made"  # noqa: S101
    return Pipeline(used, statistics, cache=statistics.decompositions)


def _source(statistics: Statistics) -> Path | None:
    """The folder of the model that was calibrated, if it is there."""
    source = Path(statistics.model.source)
    return source if statistics.model.source and source.is_dir() else None
