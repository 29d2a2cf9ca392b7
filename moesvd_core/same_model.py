"""Telling whether a loaded model is the one that statistics are of, from a few rows of every layer's experts.

Fingerprints (`calibration.identity`) differ between files and memory, and between number formats; the numbers themselves do not, but for
what the coarser format rounds off.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from moesvd_core.architectures.disk_names import ExpertTensor, expert_tensor, to_disk
from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.architectures.streaming import DecoderStream, LayerStream, MemoryStream


def same_experts(stream: MemoryStream, known: DecoderStream | ModelFiles) -> bool:
    """Whether a loaded model has the experts of another one, of equal layout, in memory or in files, in whichever number format."""
    files = known.files if isinstance(known, LayerStream) else known
    if isinstance(files, ModelFiles):
        return all(_agree(own, other) for own, other in _beside_files(stream, files))
    return stream.model is files.model or all(_agree(own, other) for own, other in _beside_model(stream, files))


def _beside_model(stream: MemoryStream, known: DecoderStream) -> Iterator[tuple[Tensor, Tensor]]:
    """First rows of some experts of every layer, of both models."""
    for layer in stream.expert_layers:
        with known.layer(layer.index):
            other = read_experts(known.model.get_submodule(layer.name), layer)
            own = _experts(stream, layer)
            for expert in _some(layer):
                yield own.input_END[expert, :1], other.input_END[expert, :1]
                yield own.output_EDM[expert, :1], other.output_EDM[expert, :1]


def _beside_files(stream: MemoryStream, files: ModelFiles) -> Iterator[tuple[Tensor, Tensor]]:
    """First rows of some experts' tensors of every layer, as the model would store them and as the files do."""
    family = family_of(stream.config)
    by_layer: dict[int, dict[str, ExpertTensor]] = defaultdict(dict)
    for key in files.weight_map:
        if (tensor := expert_tensor(key, family)) is not None:
            by_layer[tensor.layer][key] = tensor
    for layer in stream.expert_layers:
        keys = {key: tensor for key, tensor in by_layer[layer.index].items() if tensor.expert is None or tensor.expert in _some(layer)}
        for key, own in to_disk(_experts(stream, layer), keys, layer, family):
            shape = files.header(key)[1]
            if tuple(own.shape) != shape:
                yield own, torch.empty(0)
                continue
            for row in (0,) if keys[key].expert is not None else _some(layer):  # rows of a stack are experts
                yield own[row : row + 1], files.read_slice(key, row, row + 1)


def _experts(stream: MemoryStream, layer: ExpertLayer) -> ExpertWeights:
    return read_experts(stream.model.get_submodule(layer.name), layer)


def _some(layer: ExpertLayer) -> tuple[int, ...]:
    return tuple(sorted({0, layer.experts // 2, layer.experts - 1}))


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, as far as the coarser of their formats tells."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return torch.equal(one.cpu(), other.cpu())
    limits = [torch.finfo(tensor.dtype) for tensor in (one, other)]
    step, least = max(limit.eps for limit in limits), max(limit.smallest_normal * limit.eps for limit in limits)
    return torch.allclose(one.cpu().double(), other.cpu().double(), rtol=step, atol=least)
