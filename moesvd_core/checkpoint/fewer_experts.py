"""The native form of a model whose experts were pruned: an ordinary checkpoint with fewer experts, as REAP's are.

Transformers counts experts once for the whole model, so that every layer must have kept the same number. What belongs to an expert outside
the experts module (a router's rows, a score's correction) is told by its size, and only in tensors that stand beside the experts; that
nothing was missed is proved when the written checkpoint is loaded and compared.

Shapes: E experts, K kept ones.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moesvd_core.architectures.families import Family
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
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


def rows(tensor: torch.Tensor, experts: int, kept: Sequence[int]) -> torch.Tensor:
    """A tensor that has a row for each expert with those of the kept ones; any other tensor as it is."""
    chosen = torch.tensor(list(kept), device=tensor.device)
    if tensor.ndim in (1, 2) and len(tensor) == experts:
        return tensor.index_select(0, chosen)
    return tensor.index_select(1, chosen) if tuple(tensor.shape) == (1, experts) else tensor


def layer_beside(key: str, family: Family) -> int | None:
    """The decoder layer in which a checkpoint's tensor stands beside the experts, or None where it does not."""
    places = {name.partition(".")[0] for _, name in family.disk} | {family.router.partition(".")[0]}
    found = re.search(r"(?:^|\.)layers\.(\d+)\.([^.]+)\.", key)
    return int(found[1]) if found and found[2] in places else None


def configured(config: Mapping[str, Any], experts: int, count: int) -> dict[str, Any]:
    """A checkpoint's configuration with another number of experts, whether it stands there as such or for every layer."""

    def value(name: str, each: Any) -> Any:
        if isinstance(each, dict):
            return configured(each, experts, count)
        if name not in COUNTS:
            return each
        if isinstance(each, list):
            return [count if one == experts else one for one in each]
        return count if each == experts else each

    return {name: value(name, each) for name, each in config.items()}
