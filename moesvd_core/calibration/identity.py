"""Telling whether two models are the same one without reading all of their weights."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

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
    for name, sample in _samples(stream):
        digest.update(f"{name} {list(sample.shape)}\n".encode())
        digest.update(sample.contiguous().view(-1).view(torch.uint8).numpy().data)
    source = str(stream.files.folder) if isinstance(stream, LayerStream) else str(getattr(stream.config, "_name_or_path", ""))
    return ModelIdentity(source, digest.hexdigest(), str(stream.dtype).removeprefix("torch."))


def _samples(stream: DecoderStream) -> Iterator[tuple[str, torch.Tensor]]:
    """First rows of some tensors, as stored, on the host."""
    if isinstance(stream, LayerStream):
        for key in _spread(sorted(stream.files.weight_map)):
            shape = stream.files.header(key)[1]
            yield key, stream.files.read_slice(key, 0, 1) if shape else stream.files.read(key)
    else:
        tensors = stream.model.state_dict()
        for key in _spread(sorted(tensors)):
            yield key, tensors[key].detach()[:1].cpu() if tensors[key].ndim else tensors[key].detach().cpu()


def _spread(names: list[str]) -> list[str]:
    return names[:: -(-len(names) // _SAMPLES)]
