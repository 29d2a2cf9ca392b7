"""Reading experts: canonical weights, gate and routed tokens together must give the native module's output, in every family."""

from typing import Any

import pytest
import torch
from tiny_models import EXPERTS, HIDDEN, TINY, tiny_batch
from torch import Tensor, nn

from moesvd_core.architectures.experts_io import gate_function, read_experts, routed_tokens, write_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.errors import InputError

torch.set_num_threads(1)


def recorded_calls(model: Any, layers: list[ExpertLayer]) -> dict[int, tuple[tuple[Tensor, ...], Tensor]]:
    """Layer index -> (positional arguments, output) of its experts module on a small batch."""
    calls = {}

    def recorder(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls[index] = args, output

        return hook

    handles = [model.get_submodule(layer.name).register_forward_hook(recorder(layer.index)) for layer in layers]
    with torch.no_grad():
        model(**tiny_batch())
    for handle in handles:
        handle.remove()
    return calls


def output_of(weights: ExpertWeights, module: nn.Module, layer: ExpertLayer, args: tuple[Tensor, ...]) -> Tensor:
    """The layer's output, expert by expert, from canonical weights: [T, d], for scaled inputs [E·T, d]."""
    gate = gate_function(module, layer)
    output = torch.zeros_like(args[0])
    for expert, rows_n, x_nD, p_n in routed_tokens(layer, args):
        pre_nN = x_nD @ weights.input_END[expert].T
        if weights.input_bias_EN is not None:
            pre_nN = pre_nN + weights.input_bias_EN[expert]
        y_nD = gate(pre_nN) @ weights.output_EDM[expert].T
        if weights.output_bias_ED is not None:
            y_nD = y_nD + weights.output_bias_ED[expert]
        start = expert * (args[0].shape[0] // layer.experts) if layer.routing == "scaled-inputs" else 0
        output[rows_n + start] += p_n[:, None] * y_nD
    return output


@pytest.mark.parametrize("name", TINY)
def test_canonical_weights_gate_and_routed_tokens_give_the_native_output(name: str) -> None:
    model = TINY[name]()
    layers = expert_layers(model)
    calls = recorded_calls(model, layers)
    for layer in layers:
        module = model.get_submodule(layer.name)
        args, output = calls[layer.index]
        weights = read_experts(module, layer)
        assert output.abs().max() > 1e-4
        torch.testing.assert_close(output_of(weights, module, layer, args), output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_reading_copies_nothing_and_writing_is_its_inverse(name: str) -> None:
    model = TINY[name]()
    layer = expert_layers(model)[-1]
    module = model.get_submodule(layer.name)
    weights = read_experts(module, layer)
    assert weights.input_END.shape == (layer.experts, layer.input_rows, layer.hidden)
    assert weights.output_EDM.shape == (layer.experts, layer.hidden, layer.width)
    stored = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    fields = [tensor for tensor in vars(weights).values() if tensor is not None]
    assert {tensor.untyped_storage().data_ptr() for tensor in fields} == stored
    assert not any(tensor.requires_grad for tensor in fields)

    changed = ExpertWeights(*(None if tensor is None else torch.randn_like(tensor) for tensor in vars(weights).values()))
    write_experts(module, layer, changed)
    for name_, tensor in vars(read_experts(module, layer)).items():
        assert tensor is None or torch.equal(tensor, getattr(changed, name_))


@pytest.mark.parametrize("name", TINY)
def test_every_token_is_routed_as_often_as_the_router_said(name: str) -> None:
    model = TINY[name]()
    layers = expert_layers(model)
    for layer, (args, _) in zip(layers, recorded_calls(model, layers).values(), strict=True):
        routed = list(routed_tokens(layer, args))
        experts = [expert for expert, *_ in routed]
        assert experts == sorted(set(experts))
        assert sum(len(rows) for _, rows, _, _ in routed) == 24 * layer.active
        for _, rows_n, x_nD, p_n in routed:
            assert rows_n.dtype == torch.int64
            assert torch.equal(rows_n, rows_n.sort().values)
            assert x_nD.shape == (len(rows_n), layer.hidden)
            assert p_n.shape == (len(rows_n),)


def test_experts_that_an_expert_parallel_router_sent_elsewhere_are_left_out() -> None:
    layer = expert_layers(TINY["mixtral"]())[0]
    hidden_TD, index_Tk = torch.randn(3, HIDDEN), torch.tensor([[0, EXPERTS], [EXPERTS, 3], [0, 3]])
    routed = [(expert, rows.tolist()) for expert, rows, _, _ in routed_tokens(layer, (hidden_TD, index_Tk, torch.ones(3, 2)))]
    assert routed == [(0, [0, 2]), (3, [1, 2])]


def test_a_call_of_another_form_is_refused() -> None:
    mixtral, llama4 = expert_layers(TINY["mixtral"]())[0], expert_layers(TINY["llama4_text"]())[0]
    with pytest.raises(InputError, match=r"3 positional arguments .* got 1"):
        list(routed_tokens(mixtral, (torch.zeros(4, HIDDEN),)))
    with pytest.raises(InputError, match="multiple of 4, got 1 with 5 rows"):
        list(routed_tokens(llama4, (torch.zeros(5, HIDDEN),)))


def test_writing_other_shapes_or_without_biases_is_refused() -> None:
    model = TINY["gpt_oss"]()
    layer = expert_layers(model)[0]
    module = model.get_submodule(layer.name)
    weights = read_experts(module, layer)
    with pytest.raises(InputError, match="both biases must be given"):
        write_experts(module, layer, ExpertWeights(weights.input_END, weights.output_EDM))
    before = weights.input_END.clone()
    wrong = ExpertWeights(before + 1, weights.output_EDM.transpose(1, 2), weights.input_bias_EN, weights.output_bias_ED)
    with pytest.raises(InputError, match=r"output_EDM must be \[4, 32, 24\], got \[4, 24, 32\]"):
        write_experts(module, layer, wrong)
    assert torch.equal(weights.input_END, before)  # nothing was written by halves
