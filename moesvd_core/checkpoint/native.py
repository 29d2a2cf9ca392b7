"""A compressed model in memory, turned back into a native one with its factors multiplied out."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesvd_core.architectures.experts_io import write_experts
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.checkpoint.apply import factored_modules


def native_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model with native experts, sharing every other tensor with it."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result: Any = copy.deepcopy(model, tensors)
    quantizer = getattr(result, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(result)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(result.config, dtype=model.dtype)
    for name, module in factored_modules(result).items():
        layer = ExpertLayer(**module.expert_layer)
        device = next((parameter.device for parameter in module.parameters()), model.device)
        native = skeleton.get_submodule(name).to_empty(device=device)
        with torch.no_grad():
            weights = ExpertWeights(module.input.matrices(), module.output.matrices(), module.input_bias, module.output_bias)
            write_experts(native, layer, weights)
        result.set_submodule(name, native.train(module.training))
    return result  # type: ignore[no-any-return]
