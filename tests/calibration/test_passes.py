"""Streamed calibration against the whole model with hooks, for every family."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, save_tiny, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from moesvd_core.architectures.experts_io import gate_function, read_experts, routed_tokens
from moesvd_core.architectures.find import EXPERT_LAYER, expert_layers
from moesvd_core.architectures.streaming import LayerStream, MemoryStream
from moesvd_core.calibration import Calibration, Statistics, calibrate
from moesvd_core.calibration import backward as backward_pass
from moesvd_core.calibration.text import calibration_windows
from moesvd_core.errors import InputError, StatisticsError, UnsupportedModelError
from moesvd_core.progress import Progress

torch.set_num_threads(1)
SETTINGS = Calibration(samples=5, length=24, batch=2, gradient_samples=3, drawn_labels=0)
SPREAD = [0, 1, 3]
"""Windows of the backward pass: the first of each third."""
pytestmark = pytest.mark.filterwarnings("ignore:.*causal_conv1d.*", "ignore:.*mamba.*")


def windows(model: PreTrainedModel, settings: Calibration = SETTINGS) -> torch.Tensor:
    return calibration_windows(tiny_tokenizer(), settings, model.config.get_text_config().max_position_embeddings)


def captured(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[tuple[Any, tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]]:
    """Layer, arguments, output and gradient at the output of every experts module, from one pass of the whole model."""
    layers = expert_layers(model)
    seen: dict[int, tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}
    hooks = []
    for layer in layers:
        def hook(_module: Any, args: Any, output: torch.Tensor, index: int = layer.index) -> torch.Tensor:
            seen[index] = (tuple(arg.detach() for arg in args), output)
            return output.clone()

        hooks.append(model.get_submodule(layer.name).register_forward_hook(hook))
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    for handle in hooks:
        handle.remove()
    for layer, gradient in zip(layers, gradients, strict=True):
        yield layer, *seen[layer.index], gradient


def traced(
    model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor | None = None
) -> Iterator[tuple[Any, dict[int, tuple[torch.Tensor, ...]], torch.Tensor]]:
    """Layer, (rows, x, p, δ) of every used expert, and gradient at the output of every experts module, from one backward pass of the
    whole model, in which every experts module is written out so that the gradients at the pre-activations can be seen.

    The loss is that of the text itself, or of other labels in the places of its tokens."""
    labels = ids if labels is None else labels
    layers = expert_layers(model)
    seen: dict[int, tuple[dict[int, Any], torch.Tensor]] = {}
    hooks = []
    for layer in layers:
        def written_out(module: Any, args: Any, output: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            weights, gate = read_experts(module, layer), gate_function(module, layer)
            calls, out = {}, torch.zeros_like(output).reshape(-1, layer.hidden)
            for e, rows, x, p in routed_tokens(layer, args):
                pre = x @ weights.input_END[e].T + (0 if weights.input_bias_EN is None else weights.input_bias_EN[e])
                pre.requires_grad_().retain_grad()
                y = gate(pre) @ weights.output_EDM[e].T + (0 if weights.output_bias_ED is None else weights.output_bias_ED[e])
                place = rows + e * (len(out) // layer.experts) * (layer.routing == "scaled-inputs")
                out = out.index_add(0, place, p[:, None] * y)
                calls[e] = (rows, x.detach(), p.detach(), pre)
            close(out.detach(), output.detach().reshape(out.shape))
            out = out.reshape(output.shape).requires_grad_()
            out.retain_grad()
            seen[layer.index] = calls, out
            return out.clone()

        hooks.append(model.get_submodule(layer.name).register_forward_hook(written_out))
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
    model.zero_grad()
    for handle in hooks:
        handle.remove()
    for layer in layers:
        calls, out = seen[layer.index]
        yield layer, {e: (rows, x, p, pre.grad) for e, (rows, x, p, pre) in calls.items()}, out.grad


@pytest.mark.parametrize("name", TINY)
def test_agrees_with_the_whole_model(name: str) -> None:
    model = TINY[name]()
    ids = windows(model)
    statistics = calibrate(MemoryStream(model), tiny_tokenizer(), SETTINGS)
    assert statistics.gradient == "backward" and statistics.tokens == ids.numel()
    assert list(statistics.layers) == [layer.index for layer in expert_layers(model)]
    for layer, args, _, _ in captured(model, ids):
        got = statistics.layers[layer.index]
        assert got.tokens == ids.numel() and got.count_E.sum() == ids.numel() * layer.active
        assert got.intermediate_gram_EMM is not None
        down = read_experts(model.get_submodule(layer.name), layer).output_EDM
        close(got.output_gram_EDD, down @ got.intermediate_gram_EMM @ down.transpose(1, 2))
        expected = torch.zeros_like(got.input_gram_EDD)
        for e, _rows, x, p in routed_tokens(layer, args):
            expected[e] = (p[:, None] * x).T @ (p[:, None] * x)
        close(got.input_gram_EDD, expected)
    for layer, calls, gradient in traced(model, ids[SPREAD]):
        got = statistics.layers[layer.index]
        per_token = gradient.reshape(-1, layer.hidden)[: ids[SPREAD].numel()]
        assert got.gradient_tokens == ids[SPREAD].numel() and got.gradient_gram_DD is not None
        close(got.gradient_gram_DD, per_token.T @ per_token)
        for e, (rows, x, p, delta) in calls.items():
            close(got.gradient_weight_square_E[e], p.square().sum())
            close(got.gradient_gram_EDD[e], (p[:, None] * per_token[rows]).T @ (p[:, None] * per_token[rows]))
            close(got.row_gram_ENN[e], delta.T @ delta)
            close(got.row_square_EN[e], delta.square().sum(0))
            close(got.weighted_input_gram_EDD[e], (delta.square().sum(1, keepdim=True) * x).T @ x)
        unused = [e for e in range(layer.experts) if e not in calls]
        assert not got.row_square_EN[unused].any() and not got.weighted_input_gram_EDD[unused].any()


@pytest.mark.parametrize("name", ["mixtral", "llama4_text", "nemotron_h"])
def test_reads_layers_from_files_with_the_same_result(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    streamed = calibrate(LayerStream(folder), tiny_tokenizer(), SETTINGS)
    whole = calibrate(MemoryStream(TINY[name]()), tiny_tokenizer(), SETTINGS)
    assert_same(streamed, whole)
    assert streamed.model.source == str(folder)


@pytest.mark.parametrize("gradient_samples", [None, 2])
def test_batches_do_not_change_the_result(gradient_samples: int | None) -> None:
    def measure(batch: int) -> Statistics:
        settings = Calibration(samples=5, length=24, batch=batch, gradient_samples=gradient_samples)
        return calibrate(MemoryStream(TINY["qwen3_moe"]()), tiny_tokenizer(), settings)

    one, all_at_once = measure(1), measure(5)
    for index in one.layers:
        assert torch.equal(one.layers[index].count_E, all_at_once.layers[index].count_E)
        for field in ("input_gram_EDD", "output_gram_EDD", "slope_EN", "saliency_E", "gradient_gram_DD", "row_gram_ENN"):
            close(getattr(one.layers[index], field), getattr(all_at_once.layers[index], field))


def test_a_head_in_chunks_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, drawn_labels=2)
    whole = calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), settings)
    monkeypatch.setattr(backward_pass, "CHUNK_ELEMENTS", 128 * 7)
    chunked = calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), settings)
    for index in whole.layers:
        close(chunked.layers[index].gradient_gram_DD, whole.layers[index].gradient_gram_DD)


@pytest.mark.parametrize("name", ["mixtral", "llama4_text", "gpt_oss"])
def test_sums_are_means_over_the_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every label has a gradient of its own: the text's, and (instead of drawn ones) token 7 everywhere."""
    monkeypatch.setattr(backward_pass, "_drawn", lambda _, chance_KS: torch.full_like(chance_KS, 7).long())
    model = TINY[name]()
    ids = windows(model)[SPREAD]
    both = calibrate(MemoryStream(model), tiny_tokenizer(), replace(SETTINGS, drawn_labels=1))
    of_text = calibrate(MemoryStream(model), tiny_tokenizer(), SETTINGS)
    sevens = torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], 7)], 1)
    for layer, calls, gradient in traced(model, ids, sevens):
        got, text = both.layers[layer.index], of_text.layers[layer.index]
        per_token = gradient.reshape(-1, layer.hidden)[: ids.numel()]
        assert got.gradient_tokens == text.gradient_tokens == ids.numel()
        assert torch.equal(got.gradient_weight_square_E, text.gradient_weight_square_E)
        close(2 * got.gradient_gram_DD - text.gradient_gram_DD, per_token.T @ per_token)
        for e, (rows, x, p, delta) in calls.items():
            weighted = p[:, None] * per_token[rows]
            close(2 * got.gradient_gram_EDD[e] - text.gradient_gram_EDD[e], weighted.T @ weighted)
            close(2 * got.row_gram_ENN[e] - text.row_gram_ENN[e], delta.T @ delta)
            weighted = (delta.square().sum(1, keepdim=True) * x).T @ x
            close(2 * got.weighted_input_gram_EDD[e] - text.weighted_input_gram_EDD[e], weighted)


def test_labels_are_drawn_as_often_as_the_model_predicts_them() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [5.0, -5.0, 5.0, -90.0]])
    chance = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for logits_V in logits:
        (drawn,) = backward_pass._drawn(logits_V.expand(len(chance), -1), chance[None])
        torch.testing.assert_close(drawn.bincount(minlength=4) / len(chance), logits_V.softmax(-1), rtol=0, atol=1 / 4000)
    (ends,) = backward_pass._drawn(logits[:1].expand(2, -1), torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64))
    assert ends.tolist() == [0, 3]


def test_leaves_the_model_as_it_was() -> None:
    model = TINY["mixtral"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(MemoryStream(model), tiny_tokenizer(), SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_predicts_what_a_small_error_of_the_experts_does_to_the_loss() -> None:
    """The first-order change of the loss under random noise δ on a layer's experts has variance δᵀΓδ: a check of scale and position."""
    model = tiny_model("mixtral")
    settings = Calibration(samples=4, length=24)
    gram = calibrate(MemoryStream(model), tiny_tokenizer(), settings).layers[1].gradient_gram_DD
    ids, module = windows(model, settings), model.model.layers[1].mlp.experts
    generator, size = torch.Generator().manual_seed(0), 1e-3
    changes = []
    for sign in [1.0, -1.0] * 40:
        if sign > 0:
            noise = size * torch.randn(ids.numel(), 32, generator=generator)
        handle = module.register_forward_hook(lambda _module, _args, output, noise=sign * noise: output + noise)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.double()
        handle.remove()
        changes.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item())
    first_order = (torch.tensor(changes[::2]) - torch.tensor(changes[1::2])) / 2
    assert first_order.square().mean().item() == pytest.approx(size**2 * gram.trace().item(), rel=0.5)


def test_tells_every_step() -> None:
    told: list[Progress] = []
    calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), SETTINGS, report=told.append)
    assert [progress.done for progress in told] == list(range(1, told[-1].total + 1))
    assert {progress.stage for progress in told} == {"calibrate"}
    assert told[1].message == "forward, layer 0" and told[-1].message == "backward, layer 0"


def test_names_the_layer_whose_hidden_states_are_not_finite() -> None:
    model = TINY["mixtral"]()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="layer 1"):
        calibrate(MemoryStream(model), tiny_tokenizer(), SETTINGS)


def test_names_head_weights_that_are_not_finite() -> None:
    model = TINY["mixtral"]()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(StatisticsError, match="norm and head"):
        calibrate(MemoryStream(model), tiny_tokenizer(), SETTINGS)


def test_refuses_another_dtype_than_the_opened_models() -> None:
    with pytest.raises(InputError, match=r"dtype must be that of the opened model \(torch.float32\)"):
        calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), Calibration(dtype="bfloat16"))


def test_refuses_a_model_that_is_compressed_already() -> None:
    model = TINY["mixtral"]()
    setattr(model.model.layers[1].mlp.experts, EXPERT_LAYER, expert_layers(model)[1])
    with pytest.raises(UnsupportedModelError, match="layer 1: the experts are factored already"):
        calibrate(MemoryStream(model), tiny_tokenizer(), SETTINGS)


def test_calibrates_in_bfloat16(tmp_path: Path) -> None:
    stream = LayerStream(save_tiny("mixtral", tmp_path), dtype=torch.bfloat16)
    got = calibrate(stream, tiny_tokenizer(), Calibration(samples=5, length=24, dtype="bfloat16"))
    exact = calibrate(LayerStream(tmp_path), tiny_tokenizer(), Calibration(samples=5, length=24))
    for index, layer in got.layers.items():
        trace, expected = (m.gradient_gram_DD.trace().item() for m in (layer, exact.layers[index]) if m.gradient_gram_DD is not None)
        assert trace == pytest.approx(expected, rel=0.2)
        assert layer.input_gram_EDD.dtype == torch.float32


def assert_same(one: Statistics, other: Statistics) -> None:
    for index in one.layers:
        for field, value in vars(one.layers[index]).items():
            expected = getattr(other.layers[index], field)
            assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, (index, field)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
