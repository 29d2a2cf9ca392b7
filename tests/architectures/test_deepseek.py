"""DeepSeek-MoE-16B as a native model: its checkpoints load as they are, and its experts do what their published code does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ACTIVE, EXPERTS, TINY, save_tiny, tiny_batch, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from moesvd_core.architectures import deepseek
from moesvd_core.errors import UnsupportedModelError

torch.set_num_threads(1)

PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 102400,
}
"""Configuration of deepseek-ai/deepseek-moe-16b-base."""


def test_the_published_configuration_makes_the_published_model_without_running_its_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, deepseek.DeepseekConfig)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 16_375_728_128
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (10944, 2048)
    assert model.model.layers[27].mlp.shared_experts.gate_proj.weight.shape == (2816, 2048)


def test_a_layer_adds_the_k_best_experts_with_their_plain_softmax_scores_to_the_shared_one() -> None:
    block = TINY["deepseek"]().model.layers[1].mlp
    x_TD = torch.randn(5, 32)
    with torch.no_grad():
        score_TE = (x_TD @ block.gate.weight.T).softmax(-1)
        expected_TD = block.shared_experts(x_TD)
        for token, best in enumerate(score_TE.topk(ACTIVE).indices):
            for expert in best:
                gate_M, up_M = (block.experts.gate_up_proj[expert] @ x_TD[token]).chunk(2)
                hidden_M = torch.nn.functional.silu(gate_M) * up_M
                expected_TD[token] += score_TE[token, expert] * (block.experts.down_proj[expert] @ hidden_M)
        torch.testing.assert_close(block(x_TD[None])[0], expected_TD, rtol=1e-5, atol=1e-6)


def test_new_models_start_with_random_experts_and_routers() -> None:
    torch.manual_seed(0)
    block = AutoModelForCausalLM.from_config(tiny_config("deepseek")).model.layers[2].mlp
    for tensor in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert 0.1 < float(tensor.detach().std()) < 0.2  # initializer_range is 0.15


def test_it_generates_with_a_cache_what_it_generates_without(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny("deepseek", tmp_path), dtype=torch.float32)
    batch = tiny_batch(rows=1)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(batch["input_ids"])}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"scoring_func": "sigmoid"}])
def test_variants_that_route_otherwise_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="norm_topk_prob false and scoring_func 'softmax'"):
        AutoModelForCausalLM.from_config(tiny_config("deepseek", **changes))


def test_models_without_experts_or_with_every_other_layer_follow_the_configuration() -> None:
    every_other = AutoModelForCausalLM.from_config(tiny_config("deepseek", moe_layer_freq=2))
    assert [hasattr(layer.mlp, "experts") for layer in every_other.model.layers] == [False, False, True]
    dense = AutoModelForCausalLM.from_config(tiny_config("deepseek", n_routed_experts=None))
    assert not any(hasattr(layer.mlp, "experts") for layer in dense.model.layers)


def test_registering_again_changes_nothing() -> None:
    deepseek.register()
    model = AutoModelForCausalLM.from_config(tiny_config("deepseek"))
    assert isinstance(model, deepseek.DeepseekForCausalLM)
    assert model.model.layers[1].mlp.experts.num_experts == EXPERTS
