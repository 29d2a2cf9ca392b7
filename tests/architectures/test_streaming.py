"""A decoder run layer by layer gives what the whole model gives, in the memory of one layer, and reports every damaged tensor."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, HIDDEN, LAYERS, TINY, WIDTH, save_tiny, tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.headers import read_header
from moesvd_core.architectures.loading import WeightLoader
from moesvd_core.architectures.streaming import DecoderStream, LayerStream, MemoryStream
from moesvd_core.errors import CheckpointError, InputError, MoesvdError, UnsupportedModelError

torch.set_num_threads(1)


def logits(stream: DecoderStream, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the stream's decoder answers, every layer loaded and freed in turn."""
    with torch.no_grad():
        hidden, calls = stream.embed(batch)
        for index, call in enumerate(calls):
            hidden = stream.run_layer(index, hidden, call)
        return stream.head(hidden, batch)


def whole(folder: Path, **options: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("mixtral", tmp_path / "model")


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a folder's single file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")


class TestParity:
    @pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
    @pytest.mark.parametrize("name", TINY)
    def test_every_family_answers_as_the_whole_model(self, name: str, fused: bool, tmp_path: Path) -> None:
        model = whole(save_tiny(name, tmp_path, fused))
        batch = tiny_batch()
        with torch.no_grad():
            expected = model(**batch).logits
        stream = LayerStream(tmp_path)
        torch.testing.assert_close(logits(stream, batch), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(logits(MemoryStream(model), batch), expected, rtol=0, atol=1e-6)
        assert stream.expert_layers == expert_layers(model)

    @pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "glm4_moe", "minimax_m2", "jamba", "gpt_oss", "nemotron_h"])
    def test_in_bfloat16_each_parameter_has_the_type_that_the_whole_model_gives_it(self, name: str, tmp_path: Path) -> None:
        model = whole(save_tiny(name, tmp_path), dtype=torch.bfloat16)
        stream = LayerStream(tmp_path, dtype=torch.bfloat16)
        batch = tiny_batch()
        with torch.no_grad():
            assert torch.equal(logits(stream, batch), model(**batch).logits)
        for index in range(len(stream.layers)):
            with stream.layer(index) as layer:
                for key, value in model.get_submodule(f"model.layers.{index}").state_dict().items():
                    assert torch.equal(layer.state_dict()[key], value) and layer.state_dict()[key].dtype == value.dtype

    def test_shards_and_tied_embeddings(self, tmp_path: Path) -> None:
        tiny_model("mixtral", tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 5
        model, stream = whole(tmp_path), LayerStream(tmp_path)
        with torch.no_grad():
            assert torch.equal(logits(stream, tiny_batch()), model(**tiny_batch()).logits)
        assert stream.model.lm_head.weight is stream.model.model.embed_tokens.weight

    def test_padding_reaches_the_layers(self, folder: Path) -> None:
        batch = tiny_batch()
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :4] = 0
        with torch.no_grad():
            expected = whole(folder)(**batch).logits
        assert torch.equal(logits(LayerStream(folder), batch), expected)
        assert not torch.equal(logits(LayerStream(folder), tiny_batch()), expected)

    def test_the_head_may_be_given_tokens_in_chunks(self, folder: Path) -> None:
        stream, batch = LayerStream(folder), tiny_batch()
        hidden = torch.randn(2, 12, HIDDEN)
        with torch.no_grad():
            parts = [stream.head(hidden[:, a:b], {"input_ids": batch["input_ids"][:, a:b]}) for a, b in [(0, 5), (5, 6), (6, 12)]]
            torch.testing.assert_close(torch.cat(parts, 1), stream.head(hidden, batch), rtol=0, atol=1e-6)

    def test_the_computing_type_can_differ_from_the_stored_one(self, tmp_path: Path) -> None:
        tiny_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path)
        assert LayerStream(tmp_path).dtype == torch.bfloat16
        stream = LayerStream(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            expected = whole(tmp_path, dtype=torch.float32)(**tiny_batch()).logits
        assert stream.dtype == torch.float32 and torch.equal(logits(stream, tiny_batch()), expected)

    def test_gradients_flow_through_head_and_layers(self, folder: Path) -> None:
        model, stream, batch = whole(folder), LayerStream(folder), tiny_batch()
        entering = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=entering).logits.square().sum().backward()
        hidden, calls = stream.embed(batch)
        states = [hidden]
        with torch.no_grad():
            for index, call in enumerate(calls):
                states.append(stream.run_layer(index, states[-1], call))
        last = states[-1].requires_grad_()
        (gradient,) = torch.autograd.grad(stream.head(last, batch).square().sum(), last)
        for index in reversed(range(LAYERS)):
            state = states[index].requires_grad_()
            (gradient,) = torch.autograd.grad(stream.run_layer(index, state, calls[index]), state, gradient)
        torch.testing.assert_close(gradient, entering.grad, rtol=1e-4, atol=1e-5)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A model whose loading joins tensors other than experts: the three convolutions of a linear attention become one."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("olmo_hybrid", **sizes, **linear, **tokens)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


class TestConversions:
    def test_tensors_that_loading_joins_give_the_whole_models_answer(self, converted: Path) -> None:
        with torch.no_grad():
            expected = whole(converted)(**tiny_batch()).logits
        torch.testing.assert_close(logits(LayerStream(converted), tiny_batch()), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("edit", "reason"),
        [
            (lambda tensors, key: tensors.pop(key), r"k_conv1d\.weight' and its like make model\.layers\.1\..* asks for"),
            (lambda tensors, key: tensors.update({key: tensors[key][:, :, :-1]}), r"and its like cannot be made into model\.layers\.1\."),
            (lambda tensors, key: tensors[key].view(-1)[0].fill_(float("nan")), r"q_conv1d\.weight' holds NaN or Inf"),
        ],
    )
    def test_a_damaged_part_of_them_is_named(self, edit: Any, reason: str, converted: Path) -> None:
        change(converted, lambda tensors: edit(tensors, "model.layers.1.linear_attn.q_conv1d.weight"))
        stream = LayerStream(converted)
        with pytest.raises(CheckpointError, match=reason), stream.layer(1):
            pass


class TestMemory:
    def test_a_layer_has_weights_only_inside_its_context(self, folder: Path) -> None:
        stream = LayerStream(folder)
        for index in (1, 0, 1):
            with stream.layer(index) as layer:
                assert all(parameter.device.type == "cpu" for parameter in layer.parameters())
                others = [other for other in stream.layers if other is not layer]
                assert all(parameter.is_meta for other in others for parameter in other.parameters())
            assert all(parameter.is_meta for parameter in stream.layers.parameters())
        assert not any(p.is_meta for n, p in stream.model.named_parameters() if ".layers." not in n)

    def test_nested_uses_load_a_layer_once_and_free_it_at_the_end(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded: list[int | None] = []
        load = WeightLoader.load
        monkeypatch.setattr(WeightLoader, "load", lambda self, layer: loaded.append(layer) or load(self, layer))
        stream = LayerStream(folder)
        hidden, calls = stream.embed(tiny_batch())
        with stream.layer(1) as layer:
            stream.run_layer(1, hidden, calls[1])
            stream.run_layer(1, hidden, calls[1])
            assert not next(layer.parameters()).is_meta
        assert next(layer.parameters()).is_meta and loaded == [None, 1]

    def test_an_error_inside_the_context_frees_the_layer_too(self, folder: Path) -> None:
        stream = LayerStream(folder)
        with pytest.raises(RuntimeError, match="mine"), stream.layer(0):
            raise RuntimeError("mine")
        assert all(parameter.is_meta for parameter in stream.layers.parameters())

    def test_nothing_stays_mapped(self, folder: Path) -> None:
        stream = LayerStream(folder)
        with stream.layer(0):
            assert str(folder) not in Path("/proc/self/maps").read_text()

    def test_the_peak_is_one_layer_and_what_lies_outside(self, tmp_path: Path) -> None:
        folders = {fused: tmp_path / str(fused) for fused in (False, True)}
        layer_bytes = max(write_large(folder, layers=3, fused=fused) for fused, folder in folders.items())
        command = [sys.executable, "-c", MEASURE, *map(str, folders.values())]
        measured = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert len(measured) == 2
        for line in measured:
            peak, kept = map(int, line.split())
            assert layer_bytes / 2 < peak < layer_bytes + SLACK, (peak, layer_bytes)
            assert kept < (32 << 20) + SLACK < layer_bytes  # malloc keeps freed blocks of up to 32 MiB for the next layer


SLACK = 16 << 20
"""Bytes; a staged piece, and pages of the libraries that are touched for the first time."""
MEASURE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from moesvd_core.architectures.streaming import LayerStream
def status(field):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
for folder in sys.argv[1:]:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark counts from here
    stream = LayerStream(folder)
    for index in range(len(stream.layers)):
        with stream.layer(index):
            pass
    print(status("VmHWM") - before, status("VmRSS") - before)
"""


def write_large(folder: Path, *, layers: int, fused: bool) -> int:
    """A Mixtral of random bfloat16 experts that are large beside all else, one shard a layer; returns the bytes of one layer."""
    model = tiny_model("mixtral", hidden_size=512, intermediate_size=5632, num_hidden_layers=1).to(torch.bfloat16)
    model.save_pretrained(folder, save_original_format=not fused)
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for index in range(layers):
        shard = {key.replace(".0.", f".{index}.", 1): value for key, value in tensors.items() if ".layers." in key or not index}
        save_file(shard, folder / f"{index}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{index}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return sum(parameter.nbytes for parameter in model.model.layers[0].parameters())


class TestManners:
    @pytest.mark.parametrize("index", [-1, LAYERS])
    def test_a_layer_that_is_not_there_is_refused(self, index: int, folder: Path) -> None:
        for stream in (LayerStream(folder), MemoryStream(TINY["mixtral"]())):
            with pytest.raises(InputError, match=rf"layer must be in \[0, {LAYERS - 1}\], got {index}"), stream.layer(index):
                pass

    @pytest.mark.parametrize("order", [[0, 1, 1, 2], [1, 0, 2], [1, 2]])
    def test_a_decoder_that_is_no_straight_line_of_layers_is_refused(self, order: list[int]) -> None:
        model = TINY["mixtral"]()
        stream = MemoryStream(model)
        model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in order)
        with pytest.raises(UnsupportedModelError, match=r"does not pass hidden states straight .* layers cannot be run one at a time"):
            stream.embed(tiny_batch())

    def test_a_decoder_that_changes_the_hidden_states_between_layers_is_refused(self) -> None:
        model = TINY["mixtral"]()
        model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        with pytest.raises(UnsupportedModelError, match="seen at layer 1"):
            MemoryStream(model).embed(tiny_batch())

    def test_a_model_in_memory_is_left_as_it_was(self) -> None:
        model = TINY["mixtral"]()
        marked = model.model.layers[0].forward
        model.model.layers[0].forward = marked  # as hooks of other libraries do
        stream = MemoryStream(model)
        logits(stream, tiny_batch())
        with pytest.raises(RuntimeError):
            stream.head(torch.zeros(2, 12, HIDDEN + 1), tiny_batch())
        with pytest.raises(IndexError):
            stream.embed({"input_ids": torch.full((1, 4), 10_000)})
        assert model.model.layers[0].__dict__["forward"] == marked
        assert "forward" not in model.model.layers[1].__dict__

    @pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "jamba", "gemma4_text"])
    def test_the_state_of_random_numbers_is_left_alone(self, name: str, tmp_path: Path) -> None:
        save_tiny(name, tmp_path)
        before = torch.get_rng_state()
        logits(LayerStream(tmp_path), tiny_batch())
        assert torch.equal(torch.get_rng_state(), before)


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


class TestDamage:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_value_that_is_not_finite_names_its_tensor(self, value: float, dtype: torch.dtype, folder: Path) -> None:
        change(folder, lambda tensors: tensors[EXPERT].view(-1)[17].fill_(value))
        stream = LayerStream(folder, dtype=dtype)
        with stream.layer(0):
            pass
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{EXPERT}' holds NaN or Inf"), stream.layer(1):
            pass
        assert all(parameter.is_meta for parameter in stream.layers[1].parameters())

    def test_one_value_that_is_not_finite_outside_the_layers_is_found_at_once(self, folder: Path) -> None:
        change(folder, lambda tensors: tensors["model.embed_tokens.weight"][3, 3].fill_(float("nan")))
        with pytest.raises(CheckpointError, match=r"tensor 'model\.embed_tokens\.weight' holds NaN or Inf"):
            LayerStream(folder)

    @pytest.mark.parametrize("key", [EXPERT, "model.norm.weight", "lm_head.weight", "model.layers.2.self_attn.q_proj.weight"])
    def test_a_missing_tensor_is_named_before_any_layer_is_read(self, key: str, folder: Path) -> None:
        change(folder, lambda tensors: tensors.pop(key))
        with pytest.raises(CheckpointError, match=r"expert 2 of 4 is missing" if key == EXPERT else rf"no tensor makes parameter {key}"):
            LayerStream(folder)

    @pytest.mark.parametrize("key", [EXPERT, "model.layers.2.self_attn.q_proj.weight"])
    @pytest.mark.parametrize("form", [lambda t: t[:-1], lambda t: t[:, :-1], lambda t: t.T.repeat(2, 1), lambda t: t[0], lambda t: t[None]])
    def test_a_wrong_shape_is_named_before_any_layer_is_read(self, form: Any, key: str, folder: Path) -> None:
        change(folder, lambda tensors: tensors.update({key: form(tensors[key])}))
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{key}' has shape"):
            LayerStream(folder)

    def test_experts_that_are_all_too_wide_contradict_the_configuration(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for field, value in {"intermediate_size": WIDTH + 8, "num_local_experts": EXPERTS + 1, "hidden_size": HIDDEN * 2}.items():
            (folder / "config.json").write_text(json.dumps(config | {field: value}))
            with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor"):
                LayerStream(folder)

    @pytest.mark.parametrize("number", ["7", "4", "x", "02"])
    def test_an_expert_under_another_number_is_not_taken_for_the_missing_one(self, number: str, folder: Path) -> None:
        change(folder, lambda tensors: tensors.update({EXPERT.replace(".2.w1", f".{number}.w1"): tensors.pop(EXPERT)}))
        with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.1\.block_sparse_moe\.experts\."):
            LayerStream(folder)

    def test_an_expert_too_many_is_refused(self, folder: Path) -> None:
        change(folder, lambda tensors: tensors.update({EXPERT.replace(".2.", f".{EXPERTS}."): tensors[EXPERT].clone()}))
        with pytest.raises(CheckpointError, match=r"experts \[0, 1, 2, 3, 4\] instead of 0 to 3"):
            LayerStream(folder)

    def test_a_parameter_that_is_stored_twice_is_refused(self, folder: Path) -> None:
        fused = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(EXPERTS, 2 * WIDTH, HIDDEN)}
        change(folder, lambda tensors: tensors.update(fused))
        with pytest.raises(CheckpointError, match="makes the same parameter"):
            LayerStream(folder)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.complex64, torch.bool])
    def test_weights_that_are_stored_as_something_else_than_numbers_are_refused(self, dtype: torch.dtype, folder: Path) -> None:
        change(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
        with pytest.raises(CheckpointError, match=rf"tensor '{EXPERT}' is stored as {dtype}, the model needs torch\.float32"):
            LayerStream(folder)

    def test_a_tensor_without_a_place_is_told_and_does_no_harm(self, folder: Path) -> None:
        before = logits(LayerStream(folder), tiny_batch())
        change(folder, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
        stream = LayerStream(folder)
        assert stream.unused == ("extra.weight",)
        assert torch.equal(logits(stream, tiny_batch()), before)

    def test_flipped_bits_of_the_header_are_found_or_change_nothing(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        content, expected = file.read_bytes(), logits(LayerStream(folder), tiny_batch())
        header_bits = 8 * (8 + int.from_bytes(content[:8], "little"))
        check_flips(folder, file, random.Random(0).sample(range(header_bits), 60), expected)

    def test_flipped_bits_of_the_configuration_are_found_or_leave_the_weights_in_place(self, folder: Path) -> None:
        file = folder / "config.json"
        check_flips(folder, file, random.Random(1).sample(range(8 * file.stat().st_size), 60), None)

    def test_a_configuration_of_a_million_layers_is_not_built(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
        with pytest.raises(CheckpointError, match=r"config\.json: asks for 1000000000 layers"):
            LayerStream(folder)

    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"model_type": "unheard_of"}, UnsupportedModelError),
            ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModelError),
            ({"quantization_config": {"quant_method": "moesvd", "layers": [{"layer": 3}]}}, CheckpointError),
            ({"hidden_size": "many"}, CheckpointError),
            ({"hidden_size": -1}, CheckpointError),
            ({"num_attention_heads": 0}, CheckpointError),
            ({"hidden_act": "no such function"}, CheckpointError),
            ({"dtype": "no such type"}, CheckpointError),
            ({"architectures": None, "model_type": "vit"}, CheckpointError),
        ],
    )
    def test_a_configuration_that_makes_no_model_is_named(self, fields: dict[str, Any], error: type[Exception], folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(error, match=r"config\.json"):
            LayerStream(folder)

    def test_a_dense_model_runs_but_has_no_expert_layers(self, tmp_path: Path) -> None:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
        model.save_pretrained(tmp_path)
        stream = LayerStream(tmp_path)
        with torch.no_grad():
            assert torch.equal(logits(stream, tiny_batch()), model(**tiny_batch()).logits)
        with pytest.raises(UnsupportedModelError):
            _ = stream.expert_layers

    def test_no_other_configuration_is_read_than_the_checked_one(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        other = folder / "config.4.0.0.json"
        other.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        (folder / "config.json").write_text(json.dumps(config | {"configuration_files": [other.name]}))
        assert LayerStream(folder).config.rms_norm_eps == config["rms_norm_eps"]
        other.rename(folder.parent / other.name)
        other.symlink_to(folder.parent / other.name)
        with pytest.raises(CheckpointError, match=r"config\.4\.0\.0\.json: points outside the model folder"):
            LayerStream(folder)

    def test_code_of_the_model_runs_when_it_is_trusted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        folder = tmp_path / "model"
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
        model.save_pretrained(folder)
        (folder / "own_code.py").write_text(OWN_CODE)
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "of_their_own"}))
        with pytest.raises(UnsupportedModelError, match="brings code of its own"):
            LayerStream(folder)
        stream = LayerStream(folder, allow_remote_code=True)
        assert type(stream.model).__name__ == "OwnForCausalLM"
        with torch.no_grad():
            assert torch.equal(logits(stream, tiny_batch()), model(**tiny_batch()).logits)

    def test_code_beside_the_model_is_not_run(self, folder: Path) -> None:
        trap = folder.parent / "sprung"
        (folder / "modeling_x.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
        for allowed in (False, True):
            assert torch.isfinite(logits(LayerStream(folder, allow_remote_code=allowed), tiny_batch())).all()
        assert not trap.exists()


LLAMA = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "of_their_own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def check_flips(folder: Path, file: Path, bits: list[int], expected: torch.Tensor | None) -> None:
    """Flip one bit at a time: either a typed error about this folder, or a model that runs (and answers as before, if `expected`)."""
    content = file.read_bytes()
    refused = 0
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            answer = logits(LayerStream(folder), tiny_batch())
        except MoesvdError as error:
            assert str(folder) in str(error) or "layers" in str(error)
            refused += 1
            continue
        assert expected is None or torch.equal(answer, expected)
    file.write_bytes(content)
    assert refused > len(bits) // 4


def test_a_folder_that_was_opened_before_is_not_checked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ModelFiles.open(folder)
    monkeypatch.setattr(ModelFiles, "open", None)
    assert LayerStream(files).files is files


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system that cannot be asked to read ahead")
def test_the_next_layer_is_fetched_while_one_is_worked_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append((start, length)))
    stream = LayerStream(folder)
    stored = read_header(folder / "model.safetensors").items()
    layers = [
        sorted((tensor.start, tensor.stop - tensor.start) for key, tensor in stored if f"layers.{index}." in key) for index in range(LAYERS)
    ]
    for index, following in ((0, 1), (1, 2), (2, None), (2, None), (1, 0), (0, None)):  # up, and down again
        asked.clear()
        with stream.layer(index), stream.layer(index):
            assert sorted(asked) == ([] if following is None else layers[following])
