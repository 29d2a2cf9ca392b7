"""Putting factors into a loaded model."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.router import rerouted, router_step
from moesvd_core.checkpoint.factored import Spec, in_type, is_dense, layer_spec, layer_tensors
from moesvd_core.checkpoint.neuron_order import neuron_order
from moesvd_core.checkpoint.plugin import METHOD, attach, replace_module
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.experts import FactoredExperts
from moesvd_core.kept_router import release


def replace_experts(model: nn.Module, layer: ExpertLayer, factors: LayerFactors) -> FactoredExperts:
    """Put one layer's factors in the place of its experts, on their device and in their dtype; neurons stand as `neuron_order` wants them.

    The model does not yet know that it is factored: `compressed` tells it, for whole models.
    """
    dtype = next(model.get_submodule(layer.name).parameters()).dtype
    return replace_by_tensors(model, layer_spec(layer, factors), layer_tensors(layer, factors, dtype, neuron_order(factors)))


def replace_by_tensors(model: nn.Module, spec: Spec, tensors: Iterable[tuple[str, torch.Tensor]]) -> FactoredExperts:
    """The same from the module's description and the tensors that a checkpoint stores of it; they are cast to the experts' dtype."""
    example = next(model.get_submodule(spec["layer"]["name"]).parameters())
    factored = replace_module(model, spec, torch.device("meta"))
    factored.load_state_dict({name: in_type(tensor.to(example.device), example.dtype) for name, tensor in tensors}, assign=True)
    return factored


@contextmanager
def replaced(model: nn.Module, spec: Spec, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[FactoredExperts]:
    """Factored experts (see `replace_by_tensors`) for as long as the context lasts; then everything is as it was."""
    name = spec["layer"]["name"]
    native = model.get_submodule(name)
    try:
        yield replace_by_tensors(model, spec, tensors)
    finally:
        model.set_submodule(name, native)
        if spec.get("kept") is not None:
            release(model.get_submodule(name.rpartition(".")[0]))


@contextmanager
def changed(
    model: nn.Module, layer: ExpertLayer, factors: LayerFactors, order_EM: torch.Tensor | None = None
) -> Iterator[nn.Module]:
    """A layer as its factors make it, its router included, for as long as the context lasts; gives its experts, factored or not.

    Neurons stand as the factors count them, for whoever listens to what passes between the sides, or as `neuron_order` wants them stored
    (`order_EM`): then answers are those of `compressed` to the last bit.
    """
    with rerouted(model, layer, factors.router_EF):
        native = model.get_submodule(layer.name)
        if is_dense(factors):
            yield native
            return
        dtype = next(native.parameters()).dtype
        with replaced(model, layer_spec(layer, factors), layer_tensors(layer, factors, dtype, order_EM)) as module:
            yield module


def compressed(model: PreTrainedModel, layers: Iterable[tuple[ExpertLayer, LayerFactors]]) -> PreTrainedModel:
    """A compressed copy of a loaded model, which generates, trains and saves as the one that `from_pretrained` makes of its export.

    The copy shares every tensor that is not factored with the model it was made from (training one of them changes both); the model
    itself stays as it is. Layers left out, and those with two dense sides, keep their native experts. Small experts take memory of their
    own for a dense side as well once torch has answered with them on a CPU (`Side.arranged`).
    """
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result, refitted = copy.deepcopy(model, tensors), []
    for layer, factors in layers:
        if factors.router_EF is not None:
            router_step(result, layer).put(factors.router_EF)
            refitted.append(layer.index)
        if not is_dense(factors):
            replace_experts(result, layer, factors)
    attach(result, [module.spec for module in factored_modules(result).values()], refitted)
    return result


def factored_modules(model: nn.Module) -> dict[str, FactoredExperts]:
    """Module path -> factored experts, in the model's order.

    Told by the name of their class: a checkpoint that was loaded with remote code brings a class of its own, which serves as well.
    """
    found: Any = {name: module for name, module in model.named_modules() if type(module).__name__ == FactoredExperts.__name__}
    return dict(found)


def pack(model: nn.Module) -> int:
    """Arrange the factors of a model on a CPU for faster answers to few tokens (`FactoredExperts.pack`), until `unpack`.

    Returns:
        In how many layers there was something to pack: small experts are arranged without it, but for those of many ranks, and kernels of
        our own, where a CPU has them, read factors as they stand.

    Raises:
        ValueError: factors that are not in bfloat16 on a CPU that computes with it.
    """
    modules = factored_modules(model).values()
    for module in modules:
        module.pack()
    return sum(bool(module.packed) for module in modules)


def pack_where_possible(model: nn.Module) -> None:
    """`pack`, for models that answer and do nothing else; where there is no such order, on a card for instance, nothing happens."""
    with suppress(ValueError):
        pack(model)


def unpack(model: nn.Module) -> None:
    """Undo `pack`, exactly: packed factors can neither be trained nor saved, loaded, moved, copied or compiled, which raises an error."""
    for module in factored_modules(model).values():
        module.unpack()


def is_factored(config: Any) -> bool:
    """Whether a configuration (an object, or the content of config.json) is that of a factored checkpoint."""
    settings = config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return bool(method == METHOD)

