"""Proof that an export is what it should be, from its files alone: it is opened, checked and run as a stranger would run it.

Whoever writes an export says what it must answer. Beside a tolerance that only goes with answers that were computed in the same way: two
ways to compute attention round differently, and where two experts score nearly alike, that is enough for a router to choose the other one.
So an export of a streamed checkpoint is streamed again, and one of a model in memory runs like that model, tensors being equal bit for bit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesvd_core.architectures.disk_names import expert_tensor
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.headers import dtype_name
from moesvd_core.architectures.skeleton import skeleton
from moesvd_core.architectures.streaming import DecoderStream, LayerStream
from moesvd_core.checkpoint.manifest import check_manifest
from moesvd_core.errors import CheckpointError
from moesvd_core.progress import Progress, Report, silent

CHECKED_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
_COARSE = 2e-2


@dataclass(frozen=True)
class Verification:
    """What was checked.

    Attributes:
        files: files whose checksum was compared.
        tensors: tensors with the right name and shape, and no NaN or Inf.
        logit_difference: largest difference to the expected logits, relative to the largest of those; None when none were given.
    """

    files: int
    tensors: int
    logit_difference: float | None


def check_batch(config: Any) -> dict[str, Tensor]:
    """A few token ids [1, T] spread over the vocabulary, the same for every call."""
    vocabulary: int = config.get_text_config().vocab_size
    return {"input_ids": (torch.arange(CHECKED_TOKENS)[None] * 7919 + 3) % vocabulary}


@torch.no_grad()
def run_layers(stream: DecoderStream, batch: dict[str, Tensor], layers: Iterable[int]) -> Tensor:
    """Logits [1, T, V] of a batch that passes the decoder layer by layer, each loaded once."""
    hidden_BTD, calls = stream.embed(batch)
    for index in layers:
        hidden_BTD = stream.run_layer(index, hidden_BTD, calls[index])
    return stream.head(hidden_BTD, batch)


def verify(
    path: Path | str,
    *,
    expected: Tensor | None = None,
    like: PreTrainedModel | None = None,
    source: ModelFiles | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    report: Report = silent,
) -> Verification:
    """Check an export: checksums, tensor names and shapes against the model that its configuration describes, and a run through all layers.

    Args:
        expected: logits [1, T, V] that `check_batch` must give, within the rounding of the dtype.
        like: the model that was written: all its tensors must be found again bit for bit, and the export runs as this one did.
        source: the checkpoint that was compressed: if it fits the model class that its configuration names, the export must fit it too.
        dtype: floating type to run in; None takes that of the export.
        device: where it runs, layer by layer.

    Raises:
        CheckpointError: anything is not as it should be.
    """
    files = check_manifest(Path(path))
    stream = LayerStream(path, dtype=dtype, device=device, like=like)
    _refuse_leftovers(stream)
    batch = check_batch(stream.config)
    left = {} if like is None else like.state_dict()

    def counted() -> Iterable[int]:
        for index in range(len(stream.layers)):
            with stream.layer(index):
                if like is not None:
                    _take_equal(path, stream.model, left)
                yield index
            report(Progress("verify", index + 1, len(stream.layers), f"layer {index} loads and runs"))

    logits = run_layers(stream, batch, counted())
    if left:
        raise CheckpointError(f"{path}: tensor '{next(iter(left))}' of the model that was written is missing; make the export again")
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{path}: the model answers with NaN or Inf; make the export again")
    if like is not None:
        _check_fit(stream, None)
    elif source is not None:
        _check_fit_of_source(stream, source)
    fix = "make the export again" if like is None else _fix(stream.model, like)
    difference = None if expected is None else _compare(path, logits, expected, stream.dtype, fix)
    return Verification(files, len(stream.files.weight_map), difference)


def _fix(loaded: nn.Module, like: PreTrainedModel) -> str:
    """What to do where a model that has all tensors of another one answers otherwise: what no file holds can differ, if it was cast."""
    usual = dict(loaded.named_buffers())
    for name, buffer in like.named_buffers():
        if name in usual and usual[name].dtype != buffer.dtype:
            was, now = dtype_name(usual[name].dtype), dtype_name(buffer.dtype)
            return f"'{name}' of the model that was written is in {now}, {was} once it is loaded: load it with dtype= instead of casting it"
    return "make the export again"


def _take_equal(path: Path | str, model: nn.Module, left: dict[str, Tensor]) -> None:
    """Take those tensors out of a model's that are loaded again; each must be the same. What it has on no device cannot be compared."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or name not in left:
            continue
        given = left.pop(name)
        if not given.is_meta and not torch.equal(given.to(tensor.device), tensor):
            raise CheckpointError(f"{path}: reloaded, tensor '{name}' is not that of the model that was written; make the export again")


def _check_fit_of_source(stream: LayerStream, source: ModelFiles) -> None:
    """The class that the configuration names may see more than text, and then has the language model in another place."""
    named = (stream.files.config.get("architectures") or [None])[0]
    kind = getattr(transformers, named, None) if isinstance(named, str) else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        return
    try:
        _check_fit(stream, kind)
    except Exception:
        try:
            LayerStream(source, kind=kind)
        except Exception:  # whatever it is: the original is no model of that class either
            return
        raise


def _check_fit(stream: LayerStream, kind: type[PreTrainedModel] | None) -> None:
    """Tensors and places must go together in a model of another class (as `skeleton` takes it) than the one that ran too."""
    if (kind or type(skeleton(stream.files)[0])).__name__ != type(stream.model).__name__:
        _refuse_leftovers(LayerStream(stream.files, dtype=stream.dtype, kind=kind))


def _refuse_leftovers(stream: LayerStream) -> None:
    """Every expert's tensor must have a place in the model (others may be left over: many checkpoints bring heads that are not used)."""
    layers = stream.expert_layers
    family = family_of(stream.config)
    for key in stream.unused:
        tensor = expert_tensor(key, family)
        if any(key.startswith(f"{layer.name}.") or (tensor and tensor.layer == layer.index) for layer in layers):
            raise CheckpointError(f"{stream.files.folder}: tensor '{key}' has no place in the model; make the export again")


def _compare(path: Path | str, logits: Tensor, expected: Tensor, dtype: torch.dtype, fix: str) -> float:
    difference = ((logits.float() - expected.float().to(logits.device)).abs().max() / expected.float().abs().max().clamp(min=1e-12)).item()
    tolerance = _TOLERANCE.get(dtype, _COARSE)
    if not difference <= tolerance:
        raise CheckpointError(
            f"{path}: reloaded, the model's logits differ by {difference:.1e} of the largest from those before, "
            f"allowed is {tolerance:.0e}; {fix}"
        )
    return difference
