"""Every sum against its definition, written out for one expert at a time."""

from typing import Any

import pytest
import torch
from tiny_models import EXPERTS, TINY, tiny_model

from moesvd_core.architectures.experts_io import gate_function, read_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.calibration.moments import LayerMoments
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.errors import StatisticsError

torch.set_num_threads(1)
TOKENS, ACTIVE = 300, 2


def experts(name: str) -> tuple[torch.nn.Module, ExpertLayer]:
    model = TINY[name]()
    layer = expert_layers(model)[0]
    return model.get_submodule(layer.name), layer


def call(layer: ExpertLayer, *, used: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random arguments for an experts module of which only the first `used` experts are called."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(used, generator=generator)[:ACTIVE] for _ in range(TOKENS)])
    return torch.randn(TOKENS, layer.hidden, generator=generator), index, torch.rand(TOKENS, ACTIVE, generator=generator)


def measure(module: torch.nn.Module, layer: ExpertLayer, args: Any, *, threshold: float = 2.0) -> LayerStatistics:
    moments = LayerMoments(module, layer, threshold=threshold, intermediate=True)
    half = TOKENS // 2
    moments.add(tuple(arg[:half] for arg in args), half)
    moments.add(tuple(arg[half:] for arg in args), TOKENS - half)
    return moments.finish()


def neurons(module: torch.nn.Module, layer: ExpertLayer, args: Any, expert: int) -> tuple[torch.Tensor, ...]:
    """Inputs x, weights p, pre-activations, neurons h and outputs y (without bias) of one expert's tokens, in float64."""
    hidden, index, weight = args
    rows, slots = (index == expert).nonzero(as_tuple=True)
    weights = read_experts(module, layer)
    x, p = hidden[rows].double(), weight[rows, slots].double()
    pre = x @ weights.input_END[expert].double().T
    if weights.input_bias_EN is not None:
        pre = pre + weights.input_bias_EN[expert].double()
    h = gate_function(module, layer)(pre)
    return x, p, pre, h, h @ weights.output_EDM[expert].double().T


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_sums_are_what_their_definitions_say(name: str) -> None:
    module, layer = experts(name)
    args = call(layer)
    got = measure(module, layer, args)
    bias = read_experts(module, layer).output_bias_ED
    assert got.tokens == TOKENS and got.layer == layer.index
    for e in range(EXPERTS):
        x, p, _, h, y = neurons(module, layer, args, e)
        weighted = p[:, None]
        assert got.count_E[e] == len(p)
        close(got.weight_square_E[e], (p * p).sum())
        close(got.input_gram_EDD[e], (weighted * x).T @ (weighted * x))
        close(got.output_gram_EDD[e], (weighted * y).T @ (weighted * y))
        assert got.intermediate_gram_EMM is not None
        close(got.intermediate_gram_EMM[e], (weighted * h).T @ (weighted * h))
        close(got.input_mean_ED[e], x.abs().mean(0))
        close(got.intermediate_mean_EM[e], h.abs().mean(0))
        answer = y if bias is None else y + bias[e]
        close(got.saliency_E[e], (p * answer.norm(dim=1)).mean())
        if bias is not None:
            assert got.output_sum_ED is not None and got.output_sum_ED.dtype == torch.float32
            close(got.output_sum_ED[e], (p[:, None].square() * y).sum(0))
    assert (got.output_sum_ED is None) == (bias is None)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_slope_is_the_derivative_of_each_rows_neuron(name: str) -> None:
    """By central differences, one row at a time."""
    module, layer = experts(name)
    args = call(layer)
    got = measure(module, layer, args)
    gate, step = gate_function(module, layer), 1e-6
    _, p, pre, _, _ = neurons(module, layer, args, 1)
    for row, neuron in enumerate(layer.neuron_of_row().tolist()):
        shift = torch.zeros_like(pre)
        shift[:, row] = step
        slope = (gate(pre + shift) - gate(pre - shift))[:, neuron] / (2 * step)
        close(got.slope_EN[1, row], (p * slope).square().sum(), relative=1e-3)


@pytest.mark.parametrize("threshold", [0.5, 2.0, 4.0])
def test_outlier_share_is_that_of_eq_10(threshold: float) -> None:
    module, layer = experts("mixtral")
    args = call(layer)
    got = measure(module, layer, args, threshold=threshold)
    for e in range(EXPERTS):
        h = neurons(module, layer, args, e)[3].abs()
        share = (h > threshold * h.mean()).double().mean()
        assert abs(got.outlier_E[e] - share) < 1e-3  # a bin holds about 0.5 % of the values, of which a part is counted


def test_owl_ratio_counts_weights_far_above_the_mean() -> None:
    module, layer = experts("mixtral")
    with torch.no_grad():
        read_experts(module, layer).input_END[2, 0, :10] = 50.0
    args = call(layer)
    scores = []
    for e, matrix in enumerate(read_experts(module, layer).input_END):
        x = neurons(module, layer, args, e)[0]
        scores.append(matrix.double().abs() * x.square().mean(0).sqrt())
    score = torch.stack(scores)
    assert measure(module, layer, args).input_outlier == pytest.approx((score > 5 * score.mean()).double().mean().item(), abs=1e-12)


def test_principal_rank_counts_singular_values_above_a_hundredth() -> None:
    module, layer = experts("mixtral")
    weights = read_experts(module, layer)
    with torch.no_grad():
        weights.input_END[0] = weights.input_END[0, :, :1] @ weights.input_END[0, :1]  # rank one
        weights.output_EDM[0] = 0
        weights.output_EDM[0, :4, :4] = torch.diag(torch.tensor([1.0, 0.5, 0.02, 0.005]))
    rank_E = measure(module, layer, call(layer)).principal_rank_E
    assert rank_E[0] == 1 + 3
    values = [torch.linalg.svdvals(matrix[1]) for matrix in (weights.input_END, weights.output_EDM)]
    assert rank_E[1] == sum((value > 1e-2 * value.max()).sum() for value in values)


def test_experts_without_tokens_stay_zero_and_finite() -> None:
    module, layer = experts("mixtral")
    got = measure(module, layer, call(layer, used=3))
    assert got.count_E[3] == 0 and got.count_E[:3].sum() == TOKENS * ACTIVE
    for name in ("input_gram_EDD", "output_gram_EDD", "input_mean_ED", "outlier_E", "saliency_E", "slope_EN"):
        assert (getattr(got, name)[3] == 0).all(), name
    assert got.principal_rank_E[3] > 0


@pytest.mark.parametrize(
    ("field", "what"), [("input_END", "input matrix"), ("output_EDM", "output matrix"), ("input_bias_EN", "input bias")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_layer_and_expert_of_a_weight_that_is_not_finite(field: str, what: str, value: float) -> None:
    module, layer = experts("gpt_oss")
    with torch.no_grad():
        getattr(read_experts(module, layer), field)[2, ..., 5] = value
    with pytest.raises(StatisticsError, match=f"layer 0, expert 2: the {what}"):
        LayerMoments(module, layer, threshold=2.0, intermediate=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_layer_and_expert_of_an_activation_that_is_not_finite(value: float) -> None:
    module, layer = experts("mixtral")
    args = call(layer)
    args[0][7, 3] = value
    expert = int(args[1][7].min())
    with pytest.raises(StatisticsError, match=f"layer 0, expert {expert}: an input activation"):
        measure(module, layer, args)


def test_half_precision_is_summed_in_full() -> None:
    """Ten thousand equal tokens: a sum in bfloat16 would stop growing after a few hundred."""
    module = tiny_model("mixtral").bfloat16().get_submodule("model.layers.0.mlp.experts")
    layer = expert_layers(tiny_model("mixtral"))[0]
    moments = LayerMoments(module, layer, threshold=2.0, intermediate=False)
    hidden = torch.ones(1000, layer.hidden, dtype=torch.bfloat16)
    for _ in range(10):
        moments.add((hidden, torch.zeros(1000, 1, dtype=torch.int64), torch.ones(1000, 1, dtype=torch.bfloat16)), 1000)
    assert (moments.finish().input_gram_EDD[0] == 10_000).all()


def close(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=relative, atol=relative * expected.abs().max().item())
