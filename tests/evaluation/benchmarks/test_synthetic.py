"""Random layers and models are what they claim to be: real statistics, a loadable checkpoint, counted sizes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.synthetic import ModelSize, expert_output, random_layer, write_random_mixtral

torch.set_num_threads(1)


def test_statistics_are_those_of_the_layer() -> None:
    sample = random_layer(16, 24, 4, active=2, tokens=4000)
    statistics = sample.statistics
    assert statistics.count_E.tolist() == [4000] * 4
    assert statistics.tokens == 8000
    second = torch.stack([x_TD.T @ x_TD / len(x_TD) for x_TD in sample.held_out])
    mean = statistics.input_gram_EDD / statistics.weight_square_E[:, None, None]
    assert torch.allclose(mean, second, atol=0.2 * float(second.abs().max())), "fresh tokens come from the same distribution"
    y_TD = expert_output(sample.weights.input_END[1], sample.weights.output_EDM[1], sample.held_out[1])
    power = float(statistics.output_gram_EDD[1].trace() / statistics.weight_square_E[1])
    assert power == pytest.approx(float(y_TD.square().sum(-1).mean()), rel=0.2)


def test_slopes_and_row_gradients_are_derivatives() -> None:
    sample = random_layer(8, 6, 1, active=1, tokens=1)
    value, vector = torch.linalg.eigh(sample.statistics.input_gram_EDD[0])  # rank one: x is its only direction, up to its sign
    x_D = vector[:, -1] * value[-1].sqrt()
    slopes = []
    for sign in (1, -1):
        pre_N = (sample.weights.input_END[0] @ (sign * x_D)).requires_grad_()
        gate_M, up_M = pre_N.chunk(2)
        (torch.nn.functional.silu(gate_M) * up_M).sum().backward()
        assert pre_N.grad is not None
        slopes.append(pre_N.grad.square())
    assert any(torch.allclose(sample.statistics.slope_EN[0], slope_N, rtol=1e-3, atol=1e-5) for slope_N in slopes)
    statistics = sample.statistics
    assert statistics.row_square_EN is not None and statistics.row_gram_ENN is not None and statistics.gradient_gram_DD is not None
    along_M = torch.linalg.eigh(statistics.gradient_gram_DD)[1][:, -1] @ sample.weights.output_EDM[0]  # rank one, too
    squares_N = statistics.slope_EN[0] * statistics.gradient_gram_DD.trace() * along_M.square().repeat(2)
    assert torch.allclose(statistics.row_square_EN[0], squares_N, rtol=1e-3, atol=1e-4 * float(squares_N.max()))
    assert torch.allclose(statistics.row_gram_ENN[0].diagonal(), statistics.row_square_EN[0], rtol=1e-4)


def test_a_random_checkpoint_loads_and_has_the_size_asked_for(tmp_path: Path) -> None:
    size = ModelSize(hidden=64, width=32, experts=4, bytes=400_000, vocabulary=300, context=64)
    write_random_mixtral(tmp_path, size)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert 400_000 <= stored < 400_000 + 2 * size.layer_bytes
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.bfloat16
    assert float(model.model.layers[0].mlp.experts.down_proj.detach().float().std()) == pytest.approx(0.02, rel=0.1)


def test_its_tokenizer_takes_any_text(tmp_path: Path) -> None:
    write_random_mixtral(tmp_path, ModelSize(hidden=64, width=8, experts=2, layers=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Fellow citizens — naïve 🙂\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)


@pytest.mark.parametrize("wrong", [{"hidden": 100}, {"vocabulary": 100}, {"experts": 1}, {"layers": 0}])
def test_refuses_sizes_that_make_no_model(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must"):
        ModelSize(**wrong)
    with pytest.raises(InputError, match=r"active must be in \[1, 2\]"):
        random_layer(8, 8, 2, active=3)
