"""Names on disk, checked against what `save_pretrained` really writes in every family, stacked and per expert."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, HIDDEN, TINY, WIDTH, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesvd_core.architectures.disk_names import ExpertTensor, expert_tensor, from_disk, layer_tensors, to_disk
from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.errors import CheckpointError

torch.set_num_threads(1)

STACKED_ON_THE_HUB = {"granitemoe", "granitemoeshared", "gemma4_text", "gpt_oss", "llama4_text"}


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize("name", TINY)
def test_expert_tensors_on_disk_are_told_from_all_others_and_read_as_the_model_reads_them(name: str, fused: bool, tmp_path: Path) -> None:
    model = TINY[name]()
    family, layers = family_of(model.config), expert_layers(model)
    tensors = load_file(save_tiny(name, tmp_path, fused) / "model.safetensors")

    of_experts = [key for key in tensors if expert_tensor(key, family)]
    assert sum(tensors[key].numel() for key in of_experts) == sum(layer.parameters for layer in layers)
    per_expert = not fused and name not in STACKED_ON_THE_HUB
    assert all((expert_tensor(key, family).expert is not None) == per_expert for key in of_experts)

    rewritten: dict[str, Tensor] = {}
    for layer in layers:
        weights = from_disk(tensors.__getitem__, tensors, layer, family)
        expected = read_experts(model.get_submodule(layer.name), layer)
        for field, tensor in vars(expected).items():
            assert (tensor is None) == (getattr(weights, field) is None)
            assert tensor is None or torch.equal(getattr(weights, field), tensor)
        rewritten |= dict(to_disk(weights, tensors, layer, family))
    assert rewritten.keys() == set(of_experts)
    for key, tensor in rewritten.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, tensors[key])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "nemotron_h"])
def test_changed_weights_written_under_disk_names_are_what_the_model_loads(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    family, layer = family_of(model.config), expert_layers(model)[0]
    tensors = load_file(save_tiny(name, tmp_path) / "model.safetensors")
    weights = from_disk(tensors.__getitem__, tensors, layer, family)
    weights.input_END, weights.output_EDM = torch.randn_like(weights.input_END), torch.randn_like(weights.output_EDM)
    save_file(tensors | dict(to_disk(weights, tensors, layer, family)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    read = read_experts(reloaded.get_submodule(layer.name), layer)
    assert torch.equal(read.input_END, weights.input_END)
    assert torch.equal(read.output_EDM, weights.output_EDM)


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("mixtral", "model.layers.12.block_sparse_moe.experts.7.w3.weight", ExpertTensor(12, 7, "up")),
        ("qwen3_5_moe_text", "model.language_model.layers.4.mlp.experts.gate_up_proj", ExpertTensor(4, None, "gate_up")),
        ("llama4_text", "language_model.model.layers.3.feed_forward.experts.down_proj", ExpertTensor(3, None, "down")),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", ExpertTensor(0, None, "down_bias")),
        ("qwen3_next", "mtp.layers.0.mlp.experts.3.up_proj.weight", None),
        ("deepseek_v3", "model.layers.3.mlp.shared_experts.up_proj.weight", None),
        ("deepseek_v3", "model.layers.0.mlp.up_proj.weight", None),
        ("deepseek_v3", "model.layers.3.mlp.experts.5.up_proj.weight_scale_inv", None),
        ("mixtral", "model.layers.12.block_sparse_moe.experts.7.w3.weight.extra", None),
    ],
)
def test_single_names(name: str, key: str, expected: ExpertTensor | None) -> None:
    assert expert_tensor(key, family_of(TINY[name]().config)) == expected


def mixtral_layer() -> tuple[ExpertLayer, dict[str, Tensor]]:
    """A layer's description and its tensors under hub names."""
    shapes = {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}
    names = {f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": shape for e in range(EXPERTS) for w, shape in shapes.items()}
    return expert_layers(TINY["mixtral"]())[0], {name: torch.zeros(shape) for name, shape in names.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.block_sparse_moe.experts.2.w3.weight"), "no 'up' of expert 2 in layer 0"),
        (lambda t: t.update({"model.layers.0.block_sparse_moe.experts.1.w2.weight": torch.zeros(3, 3)}), r"experts.1.w2.weight' must be"),
        (lambda t: t.update({"model.layers.0.block_sparse_moe.experts.4.w2.weight": torch.zeros(3, 3)}), "of expert 4, but layer 0 has 4"),
        (lambda t: t.update({"layers.0.block_sparse_moe.experts.1.w2.weight": torch.zeros(3, 3)}), "hold the same part of layer 0"),
    ],
    ids=["missing", "shape", "too many", "twice"],
)
def test_tensors_that_do_not_fit_are_named(change: object, message: str) -> None:
    layer, tensors = mixtral_layer()
    family = family_of(TINY["mixtral"]().config)
    assert len(layer_tensors(tensors, layer, family)) == 3 * EXPERTS
    change(tensors)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        from_disk(tensors.__getitem__, tensors, layer, family)
