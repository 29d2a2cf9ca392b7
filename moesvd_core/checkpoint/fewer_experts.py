"""The native form of a model whose experts were pruned: an ordinary checkpoint with fewer experts, as REAP's are.

Transformers counts experts once for the whole model, so that every layer must have kept the same number. What belongs to an expert outside
the experts module (a router's rows, a score's correction) is told by the shapes that the model with fewer experts has: a size that happens
to be that of the experts stays. That nothing was missed is proved when the written checkpoint is loaded and compared.

Shapes: E experts, K kept ones.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.errors import InputError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Configuration fields that count routed experts."""
_GROUPS = ("n_group",)
Kept = Mapping[int, Sequence[int]]
"""Experts that each layer keeps, by the layer's index."""


def check(layers: Sequence[ExpertLayer], kept: Kept, config: Mapping[str, Any]) -> int:
    """How many experts every layer keeps.

    Raises:
        InputError: not every layer keeps the same number, or the router looks for groups of experts, which must stay whole.
    """
    counts = sorted({len(kept.get(layer.index, range(layer.experts))) for layer in layers})
    if len(counts) > 1:
        raise InputError(
            f"format must be factored where layers keep different numbers of experts, got dense with {counts[0]} to {counts[-1]} kept: "
            "choose a ratio at which all keep the same number, or the factored format"
        )
    if any((config.get(name) or 1) > 1 for name in _GROUPS):
        raise InputError("format must be factored where experts were pruned and the router looks for groups of experts, got dense")
    return counts[0]


def of_layer(weights: ExpertWeights, kept: Sequence[int]) -> ExpertWeights:
    """The experts that are kept, [K, ...]."""
    chosen = list(kept)
    biases = [None if bias is None else bias[chosen] for bias in (weights.input_bias_EN, weights.output_bias_ED)]
    return ExpertWeights(weights.input_END[chosen], weights.output_EDM[chosen], *biases)


def smaller(model: PreTrainedModel, experts: int, count: int) -> PreTrainedModel:
    """The native model with `count` experts in the place of `experts`, without weights."""
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    for name in COUNTS:
        if (found := getattr(text, name, None)) is not None:
            setattr(text, name, _counted(found, experts, count))
    with torch.device("meta"):
        made: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    return made


def rows(tensor: torch.Tensor, shape: Sequence[int], kept: Sequence[int]) -> torch.Tensor:
    """What is left of a tensor that has a row or a column for each expert, in the shape that it has in the smaller model."""
    chosen = torch.tensor(list(kept), device=tensor.device)
    for dim, size in enumerate(shape):
        if tensor.shape[dim] != size:
            tensor = tensor.index_select(dim, chosen)
    return tensor


def beside(stream: LayerStream, count: int) -> dict[str, tuple[int, torch.Size]]:
    """Tensors of a checkpoint outside the experts that have something for each expert: their layer, and their shape for `count` experts."""
    layers = stream.expert_layers
    small = smaller(stream.model, layers[0].experts, count).state_dict()
    found = {}
    for name, tensor in stream.model.state_dict().items():
        layer = next((layer for layer in layers if name.startswith(f"{layer.name.rpartition('.')[0]}.")), None)
        if layer is not None and not name.startswith(f"{layer.name}.") and small[name].shape != tensor.shape:
            found[stream.key_of(name)] = layer.index, small[name].shape
    return found


def configured(config: Mapping[str, Any], experts: int, count: int) -> dict[str, Any]:
    """A checkpoint's configuration with another number of experts, whether it stands there as such or for every layer."""

    def value(name: str, each: Any) -> Any:
        if isinstance(each, dict):
            return configured(each, experts, count)
        return _counted(each, experts, count) if name in COUNTS else each

    return {name: value(name, each) for name, each in config.items()}


def _counted(found: Any, experts: int, count: int) -> Any:
    """A number of experts, or that of every layer, where there are fewer."""
    if isinstance(found, list):
        return [count if one == experts else one for one in found]
    return count if found == experts else found
