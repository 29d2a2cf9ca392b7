"""The sizes that ratios are counted against, from the headers of a model's files or from the model itself."""

from math import prod
from typing import Any

import torch

from moesvd_core.architectures.disk_names import expert_tensor
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.inspect import text_parameters
from moesvd_core.architectures.streaming import DecoderStream, LayerStream
from moesvd_core.planning import ModelShape


def expert_dtype(stream: DecoderStream, files: ModelFiles | None = None) -> torch.dtype:
    """Floating type in which the model's experts are stored; a stream may compute in another.

    Args:
        files: as in `shape_of`.
    """
    files = stream.files if isinstance(stream, LayerStream) else files
    if files is not None:
        family = family_of(stream.config)
        return next(files.header(key)[0] for key in files.weight_map if expert_tensor(key, family))
    return next(stream.model.get_submodule(stream.expert_layers[0].name).parameters()).dtype


def shape_of(stream: DecoderStream, dtype: torch.dtype | None = None, files: ModelFiles | None = None) -> ModelShape:
    """The model's size.

    Args:
        dtype: floating type of the export; None: that of the files, whatever the model is computed in.
        files: those that the model was loaded from, which may hold tensors that it has no place for; None: those of the stream, or what is
            in memory where it has none.
    """
    layers = stream.expert_layers
    files = stream.files if isinstance(stream, LayerStream) else files
    if files is not None:
        stored = [files.header(key) for key in files.weight_map]
    else:
        tensors = {tensor.data_ptr(): tensor for tensor in stream.model.state_dict().values() if tensor.numel()}  # tied ones once
        stored = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors.values()]
    main = expert_dtype(stream, files)
    written = dtype or main
    silent_parameters = sum(layer.parameters * (layer.experts - layer.active) // layer.experts for layer in layers)
    embedding: Any = stream.model.get_input_embeddings().weight
    head = stream.model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding
    return ModelShape(
        parameters=sum(prod(shape) for _, shape in stored),
        active_parameters=text_parameters(stream.model) - silent_parameters,
        bytes=sum((written if own == main else own).itemsize * prod(shape) for own, shape in stored),
        expert_parameters=sum(layer.parameters for layer in layers),
        bytes_per_expert_parameter=written.itemsize,
        embedding_parameters=0 if tied else embedding.numel(),
    )
