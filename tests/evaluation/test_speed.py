"""Counted operations and bytes against arithmetic; times only for being there."""

import pytest
import torch
from tiny_factors import RANK, layer_factors, model_factors
from tiny_models import TINY

from moesvd_core import experts, grouped
from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.errors import InputError
from moesvd_core.evaluation.speed import SpeedTest, measure_speed, weight_bytes

torch.set_num_threads(1)
SHORT = SpeedTest(prompt_tokens=16, new_tokens=2, repeats=2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_operations_are_those_of_the_matrices(implementation: str) -> None:
    model = TINY["mixtral"]().eval()
    model.set_experts_implementation(implementation)
    config = model.config
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    tokens = SHORT.prompt_tokens
    attention = 2 * d * (2 * heads + 2 * keys) + 4 * tokens * heads
    experts = 2 * d * config.num_local_experts + config.num_experts_per_tok * 6 * d * config.intermediate_size
    head = 2 * d * config.vocab_size / tokens  # of the last token only
    result = measure_speed({"model": model}, SHORT)["model"]
    assert result.flops_per_token == pytest.approx(config.num_hidden_layers * (attention + experts) + head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_of_factored_experts_are_those_of_their_factors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FEW_MULTIPLICATIONS": -1, "JOINED_PAIRS": 1 << 20, "PRODUCT_COST": 1 << 40}.items():  # rows are filled up
        monkeypatch.setattr(experts, name, value)
    model = TINY["mixtral"]().to(dtype).eval()
    layers = [
        (layer, layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), "equal", "equal"))
        for layer in expert_layers(model)
    ]
    student = compressed(model, layers)
    d, m, k = model.config.hidden_size, model.config.intermediate_size, model.config.num_experts_per_tok
    asking = [parameter.requires_grad for parameter in student.parameters()]
    test = SpeedTest(prompt_tokens=60, new_tokens=1, repeats=1, batch=4)
    result = measure_speed({"original": model, "factored": student}, test)
    fewer = len(layers) * k * (6 * d * m - 2 * RANK * (2 * d + 3 * m))
    assert result["original"].flops_per_token - result["factored"].flops_per_token == pytest.approx(fewer)
    again = measure_speed({"factored": student}, test)["factored"]
    assert again.flops_per_token == result["factored"].flops_per_token, "however experts have arranged their factors"
    assert [parameter.requires_grad for parameter in student.parameters()] == asking


@pytest.mark.parametrize("form", ["ragged", "pivoted"])
def test_rows_that_a_gpu_is_given_and_does_not_multiply_do_not_count(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["mixtral"]().eval()
    student = compressed(model, model_factors(model, forms=((form, form),)))
    counted = []
    for tail in (False, True):  # one product for every rank there is, of all rows each time: those of other ranks stand behind
        monkeypatch.setattr(grouped, "keeps_tail", lambda group_P, tail=tail: tail)
        counted.append(measure_speed({"factored": student}, SHORT)["factored"].flops_per_token)
    assert counted[1] == counted[0]


def test_peak_holds_the_weights_and_what_lives_beside_them() -> None:
    model = TINY["mixtral"]().eval()
    result = measure_speed({"model": model}, SHORT)["model"]
    expected = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    assert result.weight_bytes == expected == weight_bytes(model)
    cache = 2 * model.config.num_hidden_layers * SHORT.prompt_tokens * model.config.num_key_value_heads * model.config.head_dim * 4
    assert expected + cache < result.peak_bytes < expected + 40 * cache


def test_tied_weights_count_once() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    tied = torch.nn.ModuleList([layer, torch.nn.Linear(4, 4, bias=False)])
    tied[1].weight = layer.weight
    assert weight_bytes(tied) == 64


def test_every_model_is_measured() -> None:
    result = measure_speed({"a": TINY["mixtral"]().eval(), "b": TINY["gpt_oss"]().eval()}, SHORT)
    assert list(result) == ["a", "b"]
    assert all(0 < rate.low <= rate.median <= rate.high for each in result.values() for rate in (each.prefill, each.decode))
    assert all(each.experts_prefill.median > each.prefill.median for each in result.values()), "experts take a part of the time"


def test_operations_of_a_token_do_not_depend_on_the_number_of_prompts() -> None:
    model = TINY["mixtral"]().eval()
    one, three = (measure_speed({"model": model}, SpeedTest(16, 2, 1, batch=batch))["model"] for batch in (1, 3))
    assert three.flops_per_token == pytest.approx(one.flops_per_token)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "the clock is taken off"


def test_refuses_what_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="at least one model"):
        measure_speed({})
    with pytest.raises(InputError, match=r"at most 64 for a, got 60 \+ 8"):
        measure_speed({"a": TINY["mixtral"]()}, SpeedTest(prompt_tokens=60, new_tokens=8))
    for name, wrong in (("repeats", 0), ("repeats", True), ("prompt_tokens", 1.5), ("new_tokens", "3"), ("batch", None)):
        with pytest.raises(InputError, match=f"^{name} must be a whole number of at least 1, got {wrong!r}"):
            SpeedTest(**{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed must be a whole number of at least 0, got -1"):
        SpeedTest(seed=-1)
