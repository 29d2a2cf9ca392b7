"""The linear step of every family's router is found, its input is that of the matrix, and another matrix goes in and out again."""

from functools import partial

import pytest
import torch
from tiny_models import EXPERTS, HIDDEN, TINY, tiny_batch
from torch import nn
from transformers import PreTrainedModel

from moesvd_core.architectures.router import rerouted, router_input, router_step
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.errors import UnsupportedModelError


def logits_of(stream: MemoryStream, index: int) -> dict[str, torch.Tensor]:
    """What a router's linear step reads and makes of it, by hand: the arguments of the one linear product with a row for each expert."""
    seen: dict[str, torch.Tensor] = {}
    real = nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if len(weight) == EXPERTS and weight.shape[1] == HIDDEN:
            seen["input"] = x.reshape(-1, HIDDEN)
        return real(x, weight, bias)

    hidden_BTD, calls = stream.embed(tiny_batch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        stream.run_layer(index, hidden_BTD, calls[index])
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_what_the_router_of_every_family_multiplies(name: str, dtype: torch.dtype) -> None:
    model = TINY[name]().to(dtype)
    stream = MemoryStream(model)
    hidden_BTD, calls = stream.embed(tiny_batch())
    for layer in stream.expert_layers:
        step = router_step(model, layer)
        assert step.weight.data_ptr() == dict(model.named_parameters())[step.name].data_ptr()
        found_TF = router_input(step, partial(stream.run_layer, layer.index, hidden_BTD, calls[layer.index]))
        assert torch.equal(found_TF.float(), logits_of(stream, layer.index)["input"].float())


@torch.no_grad()
def test_nothing_behind_the_router_is_computed() -> None:
    model = TINY["mixtral"]()
    stream = MemoryStream(model)
    hidden_BTD, calls = stream.embed(tiny_batch())
    layer = stream.expert_layers[1]
    asked: list[int] = []
    model.get_submodule(layer.name).register_forward_pre_hook(lambda *_: asked.append(1))
    router_input(router_step(model, layer), partial(stream.run_layer, 1, hidden_BTD, calls[1]))
    assert not asked
    stream.run_layer(1, hidden_BTD, calls[1])
    assert asked, "and its hook is gone"


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_another_matrix_answers_until_the_context_ends(name: str) -> None:
    model = TINY[name]()
    layer = MemoryStream(model).expert_layers[-1]
    before, step = model(**tiny_batch()).logits, router_step(model, layer)
    own = dict(model.named_parameters())[step.name]
    with rerouted(model, layer, -step.weight.double()):
        assert router_step(model, layer).weight.dtype == own.dtype
        assert not torch.allclose(model(**tiny_batch()).logits, before)
    assert dict(model.named_parameters())[step.name] is own
    assert torch.equal(model(**tiny_batch()).logits, before)
    with rerouted(model, layer, None):
        assert torch.equal(model(**tiny_batch()).logits, before)


def router(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule("model.layers.1.mlp.gate")


def test_a_router_of_another_kind_is_refused() -> None:
    model = TINY["mixtral"]()
    stream = MemoryStream(model)
    layer = stream.expert_layers[1]
    router(model).other = nn.Parameter(torch.zeros(EXPERTS, 3))
    with pytest.raises(UnsupportedModelError, match=r"1\.mlp\.gate \(MixtralTopKRouter\) must hold one matrix .* got 2: leave refit"):
        router_step(model, layer)


@torch.no_grad()
def test_a_router_that_does_more_than_multiply_is_refused() -> None:
    model = TINY["mixtral"]()
    stream = MemoryStream(model)
    hidden_BTD, calls = stream.embed(tiny_batch())
    step = router_step(model, stream.expert_layers[1])
    gate, native = router(model), router(model).forward
    gate.forward = lambda x_TD: native(x_TD.square())  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match=r"must multiply what it gets by model\.layers\.1\.mlp\.gate\.weight to be"):
        router_input(step, partial(stream.run_layer, 1, hidden_BTD, calls[1]))
    with pytest.raises(UnsupportedModelError, match="was not used when its layer ran"):
        router_input(step, lambda: None)
