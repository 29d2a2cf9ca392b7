"""Telling whether two models are the same one without reading all of their weights."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.headers import dtype_name
from moesvd_core.architectures.streaming import DecoderStream, LayerStream
from moesvd_core.calibration.statistics import ModelIdentity

_SAMPLES = 256
"""Tensors that are looked at, spread evenly over the model; the first row of each."""
_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Fields of a configuration that may differ between two copies of one model."""


def identify(stream: DecoderStream) -> ModelIdentity:
    """Where a model came from, and a fingerprint: the same for the same weights, another one for a fine-tuned or compressed copy.

    A stream over files and one over the loaded model look at different tensors, so their fingerprints differ.
    """
    config: dict[str, Any] = json.loads(stream.config.to_json_string(use_diff=False))
    digest = hashlib.sha256(json.dumps({key: value for key, value in config.items() if key not in _PASSING}, sort_keys=True).encode())
    for name, sample in file_samples(stream.files) if isinstance(stream, LayerStream) else _memory_samples(stream):
        digest.update(f"{name} {list(sample.shape)}\n".encode())
        digest.update(sample_bytes(sample))
    source = str(stream.files.folder) if isinstance(stream, LayerStream) else str(getattr(stream.config, "_name_or_path", ""))
    return ModelIdentity(source, digest.hexdigest(), dtype_name(stream.dtype))


def file_samples(files: ModelFiles) -> Iterator[tuple[str, torch.Tensor]]:
    """First rows of some tensors of a model's files, as stored, with their names."""
    for key in _spread(sorted(files.weight_map)):
        yield key, files.read_slice(key, 0, 1) if files.header(key)[1] else files.read(key)


def sample_bytes(sample: torch.Tensor) -> memoryview:
    """A sample's numbers as they lie in memory."""
    content: memoryview = sample.contiguous().view(-1).view(torch.uint8).numpy().data
    return content


def _memory_samples(stream: DecoderStream) -> Iterator[tuple[str, torch.Tensor]]:
    """First rows of some tensors of a loaded model, on the host, with their names."""
    tensors = stream.model.state_dict()
    for key in _spread(sorted(tensors)):
        yield key, tensors[key].detach()[:1].cpu() if tensors[key].ndim else tensors[key].detach().cpu()


def _spread(names: list[str]) -> list[str]:
    return names[:: -(-len(names) // _SAMPLES)]
