"""A compressed model in memory, turned back into a native one with its factors multiplied out."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moesvd_core.architectures.experts_io import write_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.checkpoint import fewer_experts
from moesvd_core.checkpoint.apply import factored_modules
from moesvd_core.experts import FactoredExperts
from moesvd_core.rival_sides import NarrowSide


def native_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model with native experts, sharing every other tensor with it; where experts were pruned, with fewer of them.

    Raises:
        InputError: layers keep different numbers of experts, or factors are packed.
    """
    modules = factored_modules(model)
    layers = {name: ExpertLayer(**module.expert_layer) for name, module in modules.items()}
    kept = {layers[name].index: module.spec["kept"] for name, module in modules.items() if module.spec.get("kept") is not None}
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result: Any = copy.deepcopy(model, tensors)
    quantizer = getattr(result, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(result)
    if kept:
        return _with_fewer(result, layers, kept)
    with torch.device("meta"):
        skeleton: Any = type(model)._from_config(result.config, dtype=model.dtype)
    for name, module in factored_modules(result).items():
        _write(result, skeleton, name, layers[name], module, multiplied_out(module))
    return result  # type: ignore[no-any-return]


def multiplied_out(module: FactoredExperts) -> ExpertWeights:
    """The experts that a factored module stands for."""
    bias_EN: torch.Tensor | None = module.input_bias
    if bias_EN is not None and isinstance(module.input, NarrowSide):
        bias_EN = module.input.filled(bias_EN, 1)
    return ExpertWeights(module.input.matrices(), module.output.matrices(), bias_EN, module.output_bias)


def _with_fewer(model: Any, layers: dict[str, ExpertLayer], kept: fewer_experts.Kept) -> PreTrainedModel:
    """The native model of the kept experts. Its other tensors are the model's own, but for those that had a row for each expert."""
    every = [*layers.values(), *(layer for layer in expert_layers(model) if layer.name not in layers)]
    count = fewer_experts.check(every, kept, model.config.get_text_config().to_dict())
    result: Any = fewer_experts.smaller(model, every[0].experts, count)
    for name, module in factored_modules(model).items():
        layer = replace(layers[name], experts=count)
        _write(result, result, name, layer, module, fewer_experts.of_layer(multiplied_out(module), kept[layer.index]))
    held = dict(model.named_modules())
    for path, target in result.named_modules():
        if any(path == name or path.startswith(f"{name}.") for name in layers):
            continue
        index = next((layer.index for name, layer in layers.items() if f"{path}.".startswith(f"{name.rpartition('.')[0]}.")), None)
        for own, source in ((target._parameters, held[path]._parameters), (target._buffers, held[path]._buffers)):
            for leaf, tensor in source.items():
                own[leaf] = tensor if index is None or tensor is None else _rows(tensor, own[leaf], kept[index])
    result.generation_config = model.generation_config
    return result.train(model.training)  # type: ignore[no-any-return]


def _rows(tensor: torch.Tensor, target: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """A tensor in the shape that the smaller model has for it."""
    if tensor.shape == target.shape:
        return tensor
    cut = fewer_experts.rows(tensor.detach(), target.shape, kept)
    return torch.nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else cut


def _write(model: Any, skeleton: Any, name: str, layer: ExpertLayer, module: FactoredExperts, weights: ExpertWeights) -> None:
    """Put a native module in the place of a factored one."""
    device = next((parameter.device for parameter in module.parameters()), model.device)
    native = skeleton.get_submodule(name).to_empty(device=device)
    with torch.no_grad():
        write_experts(native, layer, weights)
    model.set_submodule(name, native.train(module.training))
