"""Exports of models that see images too: they load as the whole model and as its language model alone, whichever the original loads as."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_factors import model_factors
from tiny_models import tiny_batch, tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import expert_layers
from moesvd_core.checkpoint import export as export_module
from moesvd_core.checkpoint.apply import compressed, factored_modules
from moesvd_core.checkpoint.export import export, export_streamed
from moesvd_core.errors import CheckpointError

torch.set_num_threads(1)
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
_EYES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama4": ("Llama4Config", "Llama4ForConditionalGeneration", {
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_output_dim": 32,
        "projector_input_dim": 32, "projector_output_dim": 32,
    }),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration", {"depth": 2, "num_heads": 4, "out_hidden_size": 32}),
    "gemma4": ("Gemma4Config", "Gemma4ForConditionalGeneration", {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    }),
}  # fmt: skip
"""Family -> class of its configuration, class of the model, and a tiny vision tower."""
_LOAD = """
import json, sys
sys.modules["moesvd_core"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
folder, batch, output = sys.argv[1:]
found = {}
for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found[name] = model(**load_file(batch)).logits
save_file(found, output)
"""


@cache
def whole(name: str) -> PreTrainedModel:
    """The family's tiny model with its eyes."""
    torch.manual_seed(0)
    config, kind, vision = _EYES[name]
    text = tiny_config(f"{name}_text").to_dict()
    settings = getattr(transformers, config)(text_config=text, vision_config=_VISION | vision)
    model: PreTrainedModel = getattr(transformers, kind)._from_config(settings, dtype=torch.float32)
    return model.eval()


def expected(name: str) -> Tensor:
    return logits(compressed(whole(name), model_factors(whole(name), leave=1)))


def logits(of: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        answer: Tensor = of(**tiny_batch()).logits
    return answer


def factored(name: str, root: Path) -> Path:
    """A factored export of the checkpoint, the first routed layer left as it is."""
    whole(name).save_pretrained(root / "source")
    tiny_tokenizer().save_pretrained(root / "source")
    factors = {layer.index: found for layer, found in model_factors(whole(name), leave=1)}
    return export_streamed(ModelFiles.open(root / "source"), lambda layer: factors.get(layer.index), root / "factored").path


@pytest.mark.parametrize("name", _EYES)
def test_loads_as_the_whole_model_and_as_its_language_model(name: str, tmp_path: Path) -> None:
    made = factored(name, tmp_path)
    for kind in (AutoModelForImageTextToText, getattr(transformers, _EYES[name][1])):
        model, info = kind.from_pretrained(made, output_loading_info=True)
        assert type(model).__name__ == _EYES[name][1]
        assert not any(info.values())
        assert len(factored_modules(model)) == len(model_factors(whole(name), leave=1))
        assert torch.allclose(logits(model), expected(name), atol=1e-5)
        assert {type(model.get_submodule(layer.name)).__name__ for layer in expert_layers(model)[1:]} == {"FactoredExperts"}
        eyes = {key: tensor for key, tensor in model.state_dict().items() if "vis" in key}
        assert eyes
        assert all(torch.equal(tensor, whole(name).state_dict()[key]) for key, tensor in eyes.items())
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(made)), expected(name), atol=1e-5)


@pytest.mark.parametrize("name", _EYES)
def test_loads_as_both_by_trust_alone(name: str, tmp_path: Path) -> None:
    made = factored(name, tmp_path)
    save_file(tiny_batch(), tmp_path / "batch.safetensors")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LOAD, made, tmp_path / "batch.safetensors", tmp_path / "logits.safetensors"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, answer in load_file(tmp_path / "logits.safetensors").items():
        assert torch.allclose(answer, expected(name), atol=1e-5), kind


@pytest.mark.parametrize("format", ["factored", "dense"])
@pytest.mark.parametrize("name", _EYES)
def test_what_was_loaded_as_the_whole_model_is_exported_as_such(name: str, format: str, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(factored(name, tmp_path))
    made = export(model, None, tmp_path / "again", format=format)
    assert made.verification.logit_difference <= 1e-6
    assert json.loads((made.path / "config.json").read_text())["architectures"] == [_EYES[name][1]]
    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        assert torch.allclose(logits(kind.from_pretrained(made.path)), expected(name), atol=1e-5)


def test_an_export_that_only_the_language_model_could_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module._Streamed, "_place", lambda self, layer: layer.name)
    with pytest.raises(CheckpointError, match="no tensor makes parameter language_model"):
        factored("llama4", tmp_path)
    assert not (tmp_path / "factored").exists()
