"""Between the expert tensors of a checkpoint, under the names that its files use, and canonical weights.

Checkpoints keep one matrix an expert ("per-expert") or all experts of a layer in one tensor ("stacked"); both are read, and what is written
back carries the source's own names. Shapes: E experts, d hidden size (D), m expert width (M), n input rows (N).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesvd_core.architectures.families import Family, Part
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.errors import CheckpointError


@dataclass(frozen=True)
class ExpertTensor:
    """What one tensor of a checkpoint holds: a part of one expert of a layer, or (`expert` None) of all its experts, stacked."""

    layer: int
    expert: int | None
    part: Part


def expert_tensor(key: str, family: Family) -> ExpertTensor | None:
    """What the tensor called `key` holds, or None when it belongs to no routed expert.

    Some checkpoints carry further layers behind the decoder's last (multi-token prediction), whose experts are named alike: whoever asks
    must compare `layer` with the model's own (`expert_layers`).
    """
    for part, pattern in family.disk_patterns():
        match = pattern.match(key)
        if match:
            expert = match.groupdict().get("expert")
            return ExpertTensor(int(match["layer"]), None if expert is None else int(expert), part)
    return None


def layer_tensors(keys: Iterable[str], layer: ExpertLayer, family: Family) -> dict[str, ExpertTensor]:
    """Those of a checkpoint's tensor names that hold routed experts of the layer, with what they hold."""
    found = {key: expert_tensor(key, family) for key in keys}
    return {key: tensor for key, tensor in found.items() if tensor is not None and tensor.layer == layer.index}


def from_disk(read: Callable[[str], Tensor], keys: Iterable[str], layer: ExpertLayer, family: Family) -> ExpertWeights:
    """Read one layer's experts straight from a checkpoint, in the dtype that it stores.

    Args:
        read: tensor name -> tensor.
        keys: the checkpoint's tensor names (all of them, or the layer's).

    Raises:
        CheckpointError: a tensor is missing, twice there, or of the wrong shape; the message names it.
    """
    by_place = _by_place(layer_tensors(keys, layer, family), layer)

    def part(name: Part, rows: int, columns: int) -> Tensor:
        """One part of all experts, [E, rows, columns]."""
        stacked = by_place.get((name, None))
        if stacked is not None:
            shape = (layer.experts, columns, rows) if layer.transposed else (layer.experts, rows, columns)
            tensor = _checked(read, stacked, shape)
            return tensor.transpose(1, 2) if layer.transposed else tensor
        return torch.stack([_checked(read, _key(by_place, name, expert, layer), (rows, columns)) for expert in range(layer.experts)])

    if layer.rows == "plain":
        input_END = part("up", layer.width, layer.hidden)
    elif ("gate_up", None) in by_place:
        input_END = part("gate_up", layer.input_rows, layer.hidden)
    else:
        input_END = torch.cat([part("gate", layer.width, layer.hidden), part("up", layer.width, layer.hidden)], dim=1)
    weights = ExpertWeights(input_END, part("down", layer.hidden, layer.width))
    if layer.biased:
        weights.input_bias_EN = _checked(read, _key(by_place, "gate_up_bias", None, layer), (layer.experts, layer.input_rows))
        weights.output_bias_ED = _checked(read, _key(by_place, "down_bias", None, layer), (layer.experts, layer.hidden))
    return weights


def to_disk(weights: ExpertWeights, keys: Iterable[str], layer: ExpertLayer, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Canonical weights as the tensors of a checkpoint: yields (name, contiguous tensor) for those of `keys` with its experts.

    Args:
        keys: the source checkpoint's tensor names (all of them, or the layer's); what is yielded has the same names and shapes.
    """
    for key, tensor in layer_tensors(keys, layer, family).items():
        yield key, _part(weights, tensor, layer).contiguous()


def _part(weights: ExpertWeights, tensor: ExpertTensor, layer: ExpertLayer) -> Tensor:
    """The piece of canonical weights that one tensor of a checkpoint holds."""
    bias = {"gate_up_bias": weights.input_bias_EN, "down_bias": weights.output_bias_ED}
    if tensor.part in bias:
        found = bias[tensor.part]
        if found is None:
            raise CheckpointError(f"{layer.name}: the checkpoint stores {tensor.part}, but the weights have no biases")
        return found
    piece = weights.output_EDM if tensor.part == "down" else weights.input_END
    if tensor.part == "gate":
        piece = piece[:, : layer.width]
    elif tensor.part == "up" and layer.rows != "plain":
        piece = piece[:, layer.width :]
    if tensor.expert is not None:
        return piece[tensor.expert]
    return piece.transpose(1, 2) if layer.transposed else piece


def _by_place(tensors: dict[str, ExpertTensor], layer: ExpertLayer) -> dict[tuple[Part, int | None], str]:
    """(part, expert) -> tensor name.

    Raises:
        CheckpointError: two tensors hold the same, or an expert's number is too large.
    """
    places: dict[tuple[Part, int | None], str] = {}
    for key, tensor in tensors.items():
        if tensor.expert is not None and tensor.expert >= layer.experts:
            raise CheckpointError(f"tensor '{key}' is of expert {tensor.expert}, but layer {layer.index} has {layer.experts} experts")
        known = places.setdefault((tensor.part, tensor.expert), key)
        if known != key:
            raise CheckpointError(f"tensors '{known}' and '{key}' hold the same part of layer {layer.index}'s experts")
    return places


def _key(by_place: dict[tuple[Part, int | None], str], part: Part, expert: int | None, layer: ExpertLayer) -> str:
    key = by_place.get((part, expert))
    if key is None:
        owner = "all experts" if expert is None else f"expert {expert}"
        raise CheckpointError(f"the checkpoint has no '{part}' of {owner} in layer {layer.index} ({layer.name})")
    return key


def _checked(read: Callable[[str], Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    tensor = read(key)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"tensor '{key}' must be {list(shape)}, got {list(tensor.shape)}")
    return tensor
