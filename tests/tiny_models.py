"""One tiny random model for every supported family, and checkpoints of it: what all tests run on.

Sizes are deliberately unequal (hidden 32, width 24) so that a transposed or swapped matrix cannot pass by accident.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import moesvd_core.architectures.deepseek  # noqa: F401 - registers the family

VOCABULARY, HIDDEN, WIDTH, DENSE_WIDTH, EXPERTS, ACTIVE, LAYERS = 128, 32, 24, 40, 4, 2, 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": ACTIVE,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": DENSE_WIDTH,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_QWEN: dict[str, Any] = {"intermediate_size": DENSE_WIDTH, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MIXTRAL: dict[str, Any] = {"intermediate_size": WIDTH, "num_local_experts": EXPERTS}

_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTRAL,
    "minimax": {**_MIXTRAL, "block_size": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "minimax_m2": {**_MIXTRAL, "rotary_dim": 8},
    "phimoe": _MIXTRAL,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "qwen3_moe": {**_QWEN, "decoder_sparse_step": 1},
    "qwen3_next": {**_QWEN, **_LINEAR_ATTENTION},
    "qwen3_5_moe_text": {**_QWEN, **_LINEAR_ATTENTION},
    "olmoe": {"intermediate_size": WIDTH, "num_experts": EXPERTS},
    "flex_olmo": {"intermediate_size": WIDTH, "num_experts": EXPERTS},
    "deepseek": _DEEPSEEK,
    "deepseek_v2": {**_DEEPSEEK, **_LATENT_ATTENTION},
    "deepseek_v3": {**_DEEPSEEK, **_LATENT_ATTENTION, "n_group": 2, "topk_group": 1},
    "glm4_moe": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "solar_open": _DEEPSEEK,
    "exaone_moe": {**_QWEN, "num_shared_experts": 1, "first_k_dense_replace": 1, "sliding_window": 16},
    "ernie4_5_moe": {
        "intermediate_size": DENSE_WIDTH,
        "moe_intermediate_size": WIDTH,
        "moe_num_experts": EXPERTS,
        "moe_k": ACTIVE,
        "moe_num_shared_experts": 1,
        "num_experts_per_tok": None,
    },
    "hunyuan_v1_moe": {"intermediate_size": WIDTH, "num_experts": EXPERTS, "moe_topk": ACTIVE, "num_experts_per_tok": None},
    "afmoe": {**_QWEN, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 16, "layer_types": None},
    "jamba": {
        "intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {**_QWEN, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "granitemoe": {**_MIXTRAL, "logits_scaling": 2.0},
    "granitemoeshared": {**_MIXTRAL, "shared_intermediate_size": 16},
    "gemma4_text": {
        "intermediate_size": DENSE_WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "top_k_experts": ACTIVE,
        "num_experts_per_tok": None,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gpt_oss": {**_MIXTRAL, "sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "nemotron_h": {
        "intermediate_size": DENSE_WIDTH,
        "moe_intermediate_size": WIDTH,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 16,
        "n_routed_experts": EXPERTS,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": None,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "llama4_text": {**_MIXTRAL, "intermediate_size_mlp": DENSE_WIDTH, "num_experts_per_tok": 1, "moe_layers": [1, 2]},
}


def tiny_config(name: str, **changes: Any) -> Any:
    """Configuration of the family's tiny model; `changes` override single fields (e.g. `num_hidden_layers=8`)."""
    fields = {**_COMMON, **_FAMILIES[name], **changes}
    return AutoConfig.for_model(name, **{key: value for key, value in fields.items() if value is not None})


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The family's tiny model in float32, in evaluation mode, with the same random weights for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor_name.endswith("bias") or (tensor.ndim > 1 and not tensor.any()):  # a forgotten zero would go unseen
                tensor.normal_(std=0.1)
    return model


TINY: dict[str, Callable[[], PreTrainedModel]] = {name: partial(tiny_model, name) for name in _FAMILIES}
"""Family name (the model type of its configuration) -> a function that makes its tiny model."""


def tiny_batch(rows: int = 2, length: int = 12, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids [rows, length] in a batch that every tiny model takes."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny vocabulary: every ASCII character is a token, 0 pads, 1 begins, 2 ends, 3 stands for the rest."""
    characters = {chr(code): code for code in range(4, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | characters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_tiny(name: str, folder: Path | str, fused: bool = False) -> Path:
    """Save the family's tiny model and the tiny tokenizer.

    Tensors carry the names of the hub, or (`fused`) those that the model has in memory, with the experts of a layer stacked.
    """
    path = Path(folder)
    TINY[name]().save_pretrained(path, save_original_format=not fused)
    tiny_tokenizer().save_pretrained(path)
    return path
