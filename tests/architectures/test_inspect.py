"""What `inspect` tells must agree with the loaded model and the files, for folders and for models that are still on the hub."""

import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file
from tiny_factors import model_factors
from tiny_models import ACTIVE, EXPERTS, TINY, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.inspect import inspect
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.errors import CheckpointError, UnreachableHubError, UnsupportedModelError

torch.set_num_threads(1)

SHARED = {"qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "solar_open"} | {
    "exaone_moe", "ernie4_5_moe", "hunyuan_v1_moe", "afmoe", "granitemoeshared", "nemotron_h", "llama4_text"
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_facts_of_a_folder_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model, facts = TINY[name](), inspect(save_tiny(name, tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    layers = expert_layers(model)
    assert facts.expert_layers == tuple(layers)
    assert (facts.model_type, facts.layers, facts.moe_layers) == (name, len(list(model.model.layers)), len(layers))
    assert facts.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert facts.expert_parameters == sum(layer.parameters for layer in layers)
    silent = sum(layer.parameters // layer.experts * (layer.experts - layer.active) for layer in layers)
    assert facts.active_parameters == facts.parameters - silent
    assert facts.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (facts.dtype, facts.context_length) == ("float32", 64)
    assert facts.shared_experts == (1 if name in SHARED else 0)
    assert not facts.factored


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_factored_checkpoint_is_told_by_what_it_stores(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    factors = model_factors(model, leave=1)
    compressed(model, factors).save_pretrained(tmp_path)
    facts = inspect(tmp_path)
    assert facts.factored
    assert facts.expert_layers == tuple(expert_layers(model))
    first = facts.expert_layers[0]
    stored = sum(side.input.parameters + side.output.parameters for _, side in factors) + 2 * EXPERTS * first.bias_parameters
    assert facts.expert_parameters == first.parameters + stored
    assert facts.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    # 8 x 32 of each basis is met by every token: layer 1 has a latent input, layer 2 a latent output.
    own = facts.expert_parameters - 2 * 8 * 32
    assert facts.active_parameters == pytest.approx(facts.parameters - own * (EXPERTS - ACTIVE) / EXPERTS, abs=2)


def test_facts_are_plain_data(tmp_path: Path) -> None:
    facts = json.loads(json.dumps(inspect(save_tiny("mixtral", tmp_path)).as_dict()))
    assert (facts["family"], facts["experts"], facts["active"]) == ("mixtral", EXPERTS, ACTIVE)
    assert facts["expert_layers"][1]["name"] == "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [moe]\n---\n# Title\n", "apache-2.0"),
        ("# Title\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system [echo]\n---\n", None),
        ("---\nlicense: mit\n", None),
    ],
    ids=["named", "not in front", "not a name", "code", "unclosed"],
)
def test_the_licence_comes_from_the_front_of_the_model_card(card: str, licence: str | None, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    facts = inspect(tmp_path)
    assert facts.licence == licence
    assert any("licence" in warning for warning in facts.warnings) == (licence is None)


def test_layers_for_multi_token_prediction_are_no_decoder_layers(tmp_path: Path) -> None:
    file = save_tiny("deepseek_v3", tmp_path) / "model.safetensors"
    active = inspect(tmp_path).active_parameters
    tensors = load_file(file)
    further = {key.replace("layers.2.", "layers.3."): tensor.clone() for key, tensor in tensors.items() if "layers.2.mlp.experts" in key}
    save_file(tensors | further, file, metadata={"format": "pt"})
    facts = inspect(tmp_path)
    assert (facts.layers, facts.moe_layers) == (3, 2)
    assert facts.parameters == sum(tensor.numel() for tensor in (tensors | further).values())
    assert facts.active_parameters == active
    assert any("multi-token" in warning for warning in facts.warnings)


@pytest.mark.parametrize("kind", ["Gemma4", "Qwen3_5Moe"])
def test_what_sees_pictures_is_no_active_parameter(kind: str, tmp_path: Path) -> None:
    """Some of these models are loaded with all they have, of others only what reads text."""
    seen, text = {
        "Gemma4": ({
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "head_dim": 8,
        }, "gemma4_text"),
        "Qwen3_5Moe": (
            {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}, "qwen3_5_moe_text",
        ),
    }[kind]  # fmt: skip
    own = tiny_config(text).to_dict()
    config = getattr(transformers, f"{kind}Config")(text_config=own, vision_config=seen, tie_word_embeddings=False)
    getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config).save_pretrained(tmp_path / "whole")
    facts, alone = inspect(tmp_path / "whole"), inspect(save_tiny(text, tmp_path / "text"))
    assert facts.active_parameters == alone.active_parameters
    assert facts.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "whole" / "model.safetensors").values())
    assert facts.parameters > alone.parameters


def test_code_that_a_known_model_type_brings_is_warned_of_and_not_run(tmp_path: Path) -> None:
    config = save_tiny("deepseek", tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    facts = inspect(tmp_path)
    assert facts.family == "deepseek"
    assert any("code of its own" in warning for warning in facts.warnings)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'llama' is dense"):
        inspect(tmp_path)


def test_a_quantised_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = save_tiny("deepseek_v3", tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedModelError, match=r"quantised .*fp8.* bfloat16"):
        inspect(tmp_path)


def test_an_average_is_told_where_layers_answer_with_different_numbers_of_experts(tmp_path: Path) -> None:
    model = tiny_model("hunyuan_v1_moe", moe_topk=[1, 2, 3])
    model.save_pretrained(tmp_path)
    facts = inspect(tmp_path)
    own = facts.expert_layers[0].parameters // EXPERTS
    assert facts.active_parameters == facts.parameters - (3 + 2 + 1) * own


@dataclass
class FakeHub:
    """Stands in for the hub: one repository, made of a local folder, or an error for every question."""

    folder: Path
    gated: bool = False
    error: Exception | None = None
    sha: str = "0123abc"
    card_data: dict[str, str] | None = field(default_factory=lambda: {"license": "mit"})

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, revision: str(self.folder / file))
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", self.metadata)

    def model_info(self, repository: str) -> "FakeHub":
        if self.error is not None:
            raise self.error
        return self

    def metadata(self, repository: str, revision: str) -> Any:
        assert revision == self.sha
        infos, offset = {}, 0
        for key, tensor in load_file(self.folder / "model.safetensors").items():
            infos[key] = TensorInfo(dtype="F32", shape=list(tensor.shape), data_offsets=(offset, offset + tensor.nbytes))
            offset += tensor.nbytes
        file = SafetensorsFileMetadata(metadata={}, tensors=infos)
        return SafetensorsRepoMetadata(None, False, dict.fromkeys(infos, "model.safetensors"), {"model.safetensors": file})


def test_a_model_on_the_hub_is_told_like_its_folder_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = inspect(save_tiny("qwen2_moe", tmp_path / "whole"))
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "hub")
    fake = FakeHub(tmp_path / "whole", gated=True)
    fake.install(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, revision: str(tmp_path / "hub" / file))
    facts = inspect("owner/name")
    expected = here.as_dict() | {"source": "owner/name", "licence": "mit", "warnings": facts.warnings}
    assert facts.as_dict() == expected
    assert [warning.split(":")[0] for warning in facts.warnings] == ["The model is gated"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.HFValidationError("bad"), "neither a model folder nor a model of the hub"),
        (hub.NotASafetensorsRepoError("none"), "no readable safetensors"),
        (hub.OfflineModeIsEnabled("offline"), "the hub cannot be asked for it"),
        (ConnectionError("no route"), "the hub cannot be asked for it"),
        (RuntimeError("an error of the HTTP client"), "the hub cannot be asked for it"),
    ],
)
def test_what_the_hub_cannot_tell_is_one_error_with_the_reason(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(tmp_path, error=error).install(monkeypatch)
    with pytest.raises(CheckpointError, match=message):
        inspect("owner/name")


def test_a_model_that_was_fetched_earlier_is_told_while_the_hub_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    here = inspect(save_tiny("qwen2_moe", snapshot))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("moesvd_core.architectures.hub_download.snapshot_download", partial(snapshot_download, cache_dir=tmp_path))
    FakeHub(tmp_path, error=ConnectionError("no route")).install(monkeypatch)
    assert inspect("owner/name").as_dict() == here.as_dict() | {"source": "owner/name"}
    with pytest.raises(UnreachableHubError, match="the hub cannot be asked"):
        inspect("owner/another")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UnreachableHubError, match="the hub cannot be asked"):
        inspect("owner/name")


@pytest.mark.parametrize("name", ["/no/such/folder", "a\0b", "../x/y"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a model folder nor|no such model folder"):
        inspect(name)
