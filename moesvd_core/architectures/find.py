"""Finding a model's decoder layers and the routed experts in them; works on models without weights (meta device) too."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moesvd_core.architectures.families import Family, family_of, text_config
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.errors import UnsupportedModelError
from moesvd_core.kept_router import router_groups

EXPERT_LAYER = "expert_layer"
"""Attribute under which a module that replaces an experts module keeps the fields of its `ExpertLayer`: its own tensors no longer tell."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Module path and list of the decoder layers.

    They are searched by structure, because `get_decoder()` of some families (llama4) returns the whole model: of all lists called
    "layers", the one with routed experts, and among those (or where there are none) the longest.

    Raises:
        UnsupportedModelError: the model has no list of layers.
    """
    lists = [
        (name, module) for name, module in model.named_modules() if name.split(".")[-1] == "layers" and isinstance(module, nn.ModuleList)
    ]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers called 'layers'")
    return max(lists, key=lambda item: (_has_experts(item[1]), len(item[1])))


def _has_experts(layers: nn.ModuleList) -> bool:
    return any(name.split(".")[-1] == "experts" for name, _ in layers.named_modules())


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Every layer with routed experts, in order. Layers whose experts were already replaced are told by the replacement.

    Raises:
        UnsupportedModelError: the model is dense, of a family that cannot be factored, or quantised.
    """
    config: Any = model.config
    family = family_of(config)
    _refuse_quantised(config)
    prefix, layers = decoder_layers(model)
    found = []
    for index, decoder_layer in enumerate(layers):
        module = submodule(decoder_layer, family.experts)
        if module is not None:
            layer = _layer(module, index, f"{prefix}.{index}.{family.experts}", family, _active(config, family, index))
            groups, chosen = router_groups(submodule(decoder_layer, family.router))
            found.append(replace(layer, groups=groups, chosen_groups=chosen))
    if not found:
        raise UnsupportedModelError(
            f"none of the {len(layers)} layers of this '{text_config(config).model_type}' model has routed experts: it is dense"
        )
    return found


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None where a part of the path is missing."""
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def _layer(module: nn.Module, index: int, name: str, family: Family, active: int) -> ExpertLayer:
    """Describe one experts module by the shapes of its tensors: configuration fields have other names in every family."""
    replaced = getattr(module, EXPERT_LAYER, None)
    if isinstance(replaced, dict):
        return ExpertLayer(**(replaced | {"name": name}))  # a model of another class has it in another place
    matrix = getattr(module, family.input_parameter, None)
    down = getattr(module, "down_proj", None)
    if not isinstance(matrix, torch.Tensor) or not isinstance(down, torch.Tensor) or matrix.ndim != 3 or down.ndim != 3:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) must hold three-dimensional {family.input_parameter} and down_proj, "
            f"got {', '.join(f'{key} {list(value.shape)}' for key, value in module.named_parameters()) or 'no parameters'}"
        )
    _check_flags(module, name, family)
    experts, rows, hidden = (matrix.transpose(1, 2) if family.transposed else matrix).shape
    width = rows if family.rows == "plain" else rows // 2
    expected = (experts, width, hidden) if family.transposed else (experts, hidden, width)
    if tuple(down.shape) != expected:
        raise UnsupportedModelError(
            f"{name}: down_proj must be {list(expected)} beside a {family.input_parameter} {list(matrix.shape)}, got {list(down.shape)}"
        )
    return ExpertLayer(
        index=index,
        name=name,
        experts=experts,
        hidden=hidden,
        width=width,
        active=active,
        rows=family.rows,
        transposed=family.transposed,
        biased=family.biased,
        routing=family.routing,
    )


def _check_flags(module: nn.Module, name: str, family: Family) -> None:
    """Compare what transformers says of the module with the family's entry: a silent difference would factor the wrong matrix."""
    expected = {
        "has_gate": family.rows != "plain",
        "is_concatenated": family.rows != "interleaved",
        "is_transposed": family.transposed,
        "has_bias": family.biased,
        "has_post_expert_norm": False,
    }
    for flag, value in expected.items():
        if getattr(module, flag, value) != value:
            raise UnsupportedModelError(f"{name}: {flag} must be {value} in family '{family.name}', got {getattr(module, flag)}")


def _active(config: Any, family: Family, index: int) -> int:
    """Experts that answer each token; some configurations list them a layer."""
    active: int | list[int] = getattr(text_config(config), family.active)
    return active[index] if isinstance(active, list) else active


def quantisation(config: Any) -> str | None:
    """Method with which a checkpoint's weights are quantised ("fp8", "mxfp4" ...), or None; our own factored format is not one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = getattr(method, "value", method)
    return None if method == "moesvd" else str(method)


def _refuse_quantised(config: Any) -> None:
    method = quantisation(config)
    if method is not None:
        raise UnsupportedModelError(
            f"the weights are quantised ({method}), and factors need them as numbers; use a bfloat16 copy of the model"
        )
