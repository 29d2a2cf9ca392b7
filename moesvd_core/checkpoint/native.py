"""A compressed model in memory, turned back into a native one with its factors multiplied out."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesvd_core.architectures.experts_io import write_experts
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.checkpoint.apply import factored_modules
from moesvd_core.errors import InputError
from moesvd_core.rival_sides import NarrowSide

PRUNED_IS_FACTORED = (
    "format must be factored where experts were pruned, got dense: native models have no way to say which experts a router may choose"
)


def native_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model with native experts, sharing every other tensor with it.

    Raises:
        InputError: experts were pruned.
    """
    if any(module.spec.get("kept") is not None for module in factored_modules(model).values()):
        raise InputError(PRUNED_IS_FACTORED)
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
            bias_EN: torch.Tensor | None = module.input_bias
            if bias_EN is not None and isinstance(module.input, NarrowSide):
                bias_EN = module.input.filled(bias_EN, 1)
            write_experts(native, layer, ExpertWeights(module.input.matrices(), module.output.matrices(), bias_EN, module.output_bias))
        result.set_submodule(name, native.train(module.training))
    return result  # type: ignore[no-any-return]
