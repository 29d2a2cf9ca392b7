"""Dense exports of pruned experts, where other sizes of the model happen to be the number of its experts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_factors import kept_factors
from tiny_models import EXPERTS, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import expert_layers
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export, export_streamed

torch.set_num_threads(1)
KEPT = (0, 2)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3_next", {"shared_expert_intermediate_size": EXPERTS}),
        ("qwen2_moe", {"shared_expert_intermediate_size": EXPERTS}),
        ("deepseek_v2", {"moe_intermediate_size": EXPERTS}),
        ("llama4_text", {"intermediate_size": EXPERTS}),
    ],
)
def test_only_what_belongs_to_an_expert_goes_with_it(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    model = tiny_model(name, **sizes)
    model.save_pretrained(tmp_path / "source", save_original_format=True)
    layers = [(layer, kept_factors(layer, read_experts(model.get_submodule(layer.name), layer), KEPT)) for layer in expert_layers(model)]
    small = compressed(model, layers)
    with torch.no_grad():
        expected = small(**tiny_batch()).logits
    factors = {layer.index: found for layer, found in layers}
    files = ModelFiles.open(tmp_path / "source")
    streamed = export_streamed(files, lambda layer: factors[layer.index], tmp_path / "streamed", format="dense")
    for made in (streamed, export(small, None, tmp_path / "memory", format="dense")):
        loaded, info = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            torch.testing.assert_close(loaded(**tiny_batch()).logits, expected, atol=1e-5, rtol=1e-5)
    source = load_file(tmp_path / "source" / "model.safetensors")
    shared = [key for key in source if "shared" in key]
    assert shared
    assert all(torch.equal(load_file(streamed.path / "model.safetensors")[key], source[key]) for key in shared)
