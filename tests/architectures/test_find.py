"""Finding experts: the same layers and sizes in a loaded model and in one without weights, and no silent mistake."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny_models import ACTIVE, EXPERTS, HIDDEN, TINY, WIDTH, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.find import EXPERT_LAYER, decoder_layers, expert_layers, submodule
from moesvd_core.errors import UnsupportedModelError

torch.set_num_threads(1)

DENSE_FIRST = "qwen2_moe deepseek deepseek_v2 deepseek_v3 glm4_moe dots1 exaone_moe ernie4_5_moe afmoe lfm2_moe llama4_text".split()


def moe_layers(name: str) -> list[int]:
    """Layers that the tiny model's configuration gives experts."""
    if name in ("jamba", "nemotron_h"):
        return [1, 3]
    return [1, 2] if name in DENSE_FIRST else [0, 1, 2]


@pytest.mark.parametrize("name", TINY)
def test_every_layer_with_experts_is_found_with_its_sizes(name: str) -> None:
    found = expert_layers(TINY[name]())
    assert [layer.index for layer in found] == moe_layers(name)
    for layer in found:
        hidden = 16 if name == "nemotron_h" else HIDDEN  # experts between this family's latent projections
        assert (layer.experts, layer.hidden, layer.width) == (EXPERTS, hidden, WIDTH)
        assert layer.active == (1 if name == "llama4_text" else ACTIVE)


@pytest.mark.parametrize("name", TINY)
def test_a_model_without_weights_tells_the_same(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(name))
    assert expert_layers(model) == expert_layers(TINY[name]())


@pytest.mark.parametrize("name", TINY)
def test_paths_of_experts_router_and_shared_experts_exist(name: str) -> None:
    model = TINY[name]()
    family = family_of(model.config)
    path, layers = decoder_layers(model)
    assert model.get_submodule(path) is layers
    for layer in expert_layers(model):
        decoder_layer = layers[layer.index]
        assert submodule(decoder_layer, family.experts) is model.get_submodule(layer.name)
        assert submodule(decoder_layer, family.router) is not None
        if name != "granitemoe":  # its entry is shared with the variant that has one
            assert all(submodule(decoder_layer, shared) is not None for shared in family.shared)
        parameters = sum(parameter.numel() for parameter in model.get_submodule(layer.name).parameters())
        assert layer.parameters == parameters


@pytest.mark.parametrize("name", TINY)
def test_nothing_but_router_and_named_shared_modules_is_beside_the_experts(name: str) -> None:
    """A shared module that the family's entry forgets would go uncounted."""
    model = TINY[name]()
    family = family_of(model.config)
    parent, _, _ = family.experts.rpartition(".")
    named = {path.removeprefix(parent + ".") for path in (family.experts, family.router, *family.shared)}
    if parent:
        block = decoder_layers(model)[1][expert_layers(model)[0].index].get_submodule(parent)
        assert {child for child, _ in block.named_children()} - named <= {"fc1_latent_proj", "fc2_latent_proj"}


def test_a_replaced_module_is_told_by_its_own_description() -> None:
    model = TINY["mixtral"]()
    before = expert_layers(model)
    replacement = nn.Module()
    setattr(replacement, EXPERT_LAYER, asdict(before[1]))
    model.set_submodule(before[1].name, replacement)
    assert expert_layers(model) == before


def test_experts_listed_a_layer_in_the_configuration_are_counted_a_layer() -> None:
    layers = expert_layers(tiny_model("hunyuan_v1_moe", moe_topk=[1, 2, 3]))
    assert [layer.active for layer in layers] == [1, 2, 3]


def test_a_dense_model_of_a_family_with_experts_is_refused() -> None:
    model = tiny_model("gemma4_text", enable_moe_block=False)
    with pytest.raises(UnsupportedModelError, match=r"none of the 3 layers .*'gemma4_text'.* dense"):
        expert_layers(model)


@pytest.mark.parametrize("model_type", ["gemma4", "llama4", "qwen3_5_moe"])
def test_experts_of_a_multimodal_model_are_those_of_its_language_model(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, text_config=tiny_config(f"{model_type}_text").to_dict())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    path, layers = decoder_layers(model)
    assert "language_model" in path
    assert len(layers) == 3
    found, alone = expert_layers(model), expert_layers(TINY[f"{model_type}_text"]())
    assert found == [replace(layer, name=layer.name.replace("model.layers", path)) for layer in alone]


def test_a_dense_model_is_refused_and_still_has_decoder_layers() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    assert decoder_layers(model) == ("model.layers", model.model.layers)
    with pytest.raises(UnsupportedModelError, match="'llama' is dense"):
        expert_layers(model)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no list of decoder layers"):
        decoder_layers(nn.Linear(1, 1))


def test_quantised_weights_are_refused_and_our_own_format_is_not() -> None:
    model = TINY["mixtral"]()
    model.config.quantization_config = {"quant_method": "moesvd"}
    assert len(expert_layers(model)) == 3
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8\)"):
        expert_layers(model)


def test_a_module_that_contradicts_its_family_is_refused() -> None:
    model = TINY["mixtral"]()
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.experts: is_transposed must be False in family 'mixtral', got True"):
        expert_layers(model)


def test_experts_of_the_wrong_shape_are_refused_by_name() -> None:
    model = TINY["mixtral"]()
    experts = model.model.layers[2].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(EXPERTS, WIDTH, HIDDEN))
    with pytest.raises(UnsupportedModelError, match=r"layers.2.mlp.experts: down_proj must be \[4, 32, 24\]"):
        expert_layers(model)
    experts.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
    with pytest.raises(UnsupportedModelError, match="three-dimensional"):
        expert_layers(model)
