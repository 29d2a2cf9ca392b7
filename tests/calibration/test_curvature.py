"""What the backward pass sums up for one layer: against definitions written out, and damage named. Whole models: `test_passes`."""

from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_model

from moesvd_core.architectures.experts_io import gate_function, read_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.calibration.curvature import LayerCurvature
from moesvd_core.errors import StatisticsError

torch.set_num_threads(1)
TOKENS, ACTIVE, USED = 200, 2, 3


def experts(name: str = "mixtral") -> tuple[torch.nn.Module, ExpertLayer]:
    model = TINY[name]()
    layer = expert_layers(model)[0]
    return model.get_submodule(layer.name), layer


def call(layer: ExpertLayer) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Random arguments for an experts module of which only the first three experts are called, and a gradient at its output."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(USED, generator=generator)[:ACTIVE] for _ in range(TOKENS)])
    args = torch.randn(TOKENS, layer.hidden, generator=generator), index, torch.rand(TOKENS, ACTIVE, generator=generator)
    return args, torch.randn(TOKENS, layer.hidden, generator=generator)


def measure(module: torch.nn.Module, layer: ExpertLayer, args: Any, gradient_TD: torch.Tensor, *, row_gram: bool = True) -> dict[str, Any]:
    curvature = LayerCurvature(module, layer, row_gram=row_gram)
    for part in (slice(0, 70), slice(70, TOKENS)):
        curvature.add(tuple(arg[part] for arg in args), gradient_TD[None, part])
    return curvature.finish()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_sums_are_what_their_definitions_say(name: str) -> None:
    module, layer = experts(name)
    args, gradient_TD = call(layer)
    got = measure(module, layer, args, gradient_TD)
    assert got["gradient_tokens"] == TOKENS
    close(got["gradient_gram_DD"], gradient_TD.double().T @ gradient_TD.double())
    weights, gate = read_experts(module, layer), gate_function(module, layer)
    for e in range(USED):
        rows, slots = (args[1] == e).nonzero(as_tuple=True)
        x, p, g = args[0][rows].double(), args[2][rows, slots].double()[:, None], gradient_TD[rows].double()
        bias = 0 if weights.input_bias_EN is None else weights.input_bias_EN[e].double()
        pre = (x @ weights.input_END[e].double().T + bias).requires_grad_()
        (p * g * (gate(pre) @ weights.output_EDM[e].double().T)).sum().backward()
        delta = pre.grad
        close(got["gradient_weight_square_E"][e], p.square().sum())
        close(got["gradient_gram_EDD"][e], (p * g).T @ (p * g))
        close(got["row_gram_ENN"][e], delta.T @ delta)
        close(got["row_square_EN"][e], delta.square().sum(0))
        weighted = torch.stack([row.square().sum() * torch.outer(each, each) for row, each in zip(delta, x, strict=True)]).sum(0)
        close(got["weighted_input_gram_EDD"][e], weighted)
    assert all(not got[field][USED:].any() for field in got if field.rpartition("_")[2].startswith("E"))


def test_wide_experts_keep_the_squares_of_their_rows_only() -> None:
    module, layer = experts()
    args, gradient_TD = call(layer)
    narrow, wide = measure(module, layer, args, gradient_TD), measure(module, layer, args, gradient_TD, row_gram=False)
    assert wide["row_gram_ENN"] is None
    assert torch.equal(wide["row_square_EN"], narrow["row_square_EN"])
    close(narrow["row_gram_ENN"].diagonal(dim1=1, dim2=2), narrow["row_square_EN"])


def test_half_precision_is_summed_in_full() -> None:
    """Ten thousand equal tokens: a sum in bfloat16 would stop growing after a few hundred."""
    model = tiny_model("mixtral").bfloat16()
    layer = expert_layers(model)[0]
    curvature = LayerCurvature(model.get_submodule(layer.name), layer, row_gram=True)
    one = (torch.ones(1, layer.hidden).bfloat16(), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bfloat16())
    curvature.add(one, torch.ones(1, 1, layer.hidden))
    single = curvature.finish()
    for _ in range(10):
        curvature.add(tuple(arg.repeat(1000, 1) for arg in one), torch.ones(1, 1000, layer.hidden))
    for field in ("gradient_gram_EDD", "row_square_EN", "weighted_input_gram_EDD"):
        close(curvature.finish()[field][0], 10_001 * single[field][0].double(), relative=1e-3)


def test_names_the_layer_whose_gradients_are_not_finite() -> None:
    module, layer = experts()
    args, gradient_TD = call(layer)
    gradient_TD[3, 5] = float("nan")
    with pytest.raises(StatisticsError, match="layer 0: the gradient at its experts' output"):
        measure(module, layer, args, gradient_TD)


def test_names_the_expert_inside_which_gradients_overflow() -> None:
    module, layer = experts()
    with torch.no_grad():
        read_experts(module, layer).output_EDM[2] *= 1e30
    with pytest.raises(StatisticsError, match="layer 0, expert 2: the gradient at its neurons"):
        measure(module, layer, *call(layer))


def close(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=relative, atol=relative * expected.abs().max().item())
