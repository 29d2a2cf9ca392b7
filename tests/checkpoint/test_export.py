"""What an export holds, what can be done with it once it is loaded, and that it is whole or not there."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_factors import kept_factors, layer_factors, model_factors
from tiny_models import TINY, save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moesvd_core import experts
from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.inspect import inspect
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.checkpoint.apply import compressed, factored_modules
from moesvd_core.checkpoint.card import CardFacts, Counts, describe_again, model_card
from moesvd_core.checkpoint.export import export, export_streamed
from moesvd_core.checkpoint.verify import verify
from moesvd_core.checkpoint.writer import ShardWriter
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.errors import CheckpointError, InputError, ResourceError
from moesvd_core.pivoted_side import index_type
from moesvd_core.progress import Progress

torch.set_num_threads(1)
ON_DISK = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"), "cpu")
ON_DISK |= dict.fromkeys(("model.layers.1", "model.layers.2"), "disk")
"""Where a model is loaded to whose last two layers stay on the disk."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("source") / "tiny-mixtral")


def factors_of(layer: ExpertLayer) -> LayerFactors | None:
    """Factors of the tiny Mixtral's second and third layer."""
    return {found.index: factors for found, factors in model_factors(TINY["mixtral"](), leave=1)}.get(layer.index)


@pytest.fixture(scope="module")
def factored(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_streamed(ModelFiles.open(source), factors_of, tmp_path_factory.mktemp("factored") / "export").path


@pytest.fixture(scope="module")
def model(factored: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(factored)


def logits(of: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return of(**tiny_batch()).logits


def test_counts_are_those_of_the_files(source: Path, factored: Path) -> None:
    facts = json.loads((factored / "moesvd.json").read_text())
    stored = load_file(factored / "model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert facts["bytes"] == sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert facts["original_parameters"] == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert facts["ratio"] == 1 - facts["parameters"] / facts["original_parameters"] > 0
    original = tiny_model("mixtral")
    kept = sum(layer.parameters for layer, _ in model_factors(original, leave=1))
    made = sum(factors.parameters for _, factors in model_factors(original, leave=1))
    assert facts["original_parameters"] - facts["parameters"] == kept - made


def test_tokenizer_and_settings_come_along(source: Path, factored: Path) -> None:
    assert AutoTokenizer.from_pretrained(factored)("My fellow").input_ids == tiny_tokenizer()("My fellow").input_ids
    assert (factored / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    config = json.loads((factored / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_moesvd.MixtralForCausalLM"}
    assert [spec["layer"]["index"] for spec in config["quantization_config"]["layers"]] == [1, 2]


def test_generates(model: PreTrainedModel) -> None:
    ids = tiny_batch()["input_ids"]
    written = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (2, ids.shape[1] + 5)
    expected = ids
    for _ in range(5):  # the cache must not change what is generated
        scores_BV = model(expected).logits[:, -1]
        scores_BV[:, 2] = -torch.inf
        expected = torch.cat([expected, scores_BV.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, expected)


def test_trains_and_saves_again(factored: Path, tmp_path: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(factored).train()
    before = logits(trained.eval())
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained.train()(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for module in factored_modules(trained).values() for parameter in module.parameters())
    optimiser.step()
    after = logits(trained.eval())
    assert not torch.allclose(before, after, atol=1e-4)
    trained.save_pretrained(tmp_path / "plain")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(logits(again), after, atol=1e-6)
    assert export(trained, tiny_tokenizer(), tmp_path / "export").verification.logit_difference <= 1e-6


@pytest.mark.parametrize("format", ["factored", "dense"])
def test_a_model_in_memory_is_verified_in_the_way_it_runs_itself(tmp_path: Path, format: str) -> None:
    """In bfloat16 another way to compute attention or experts makes some router choose another expert: that is no damage."""
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 96, "num_local_experts": 8, "num_hidden_layers": 12}
    tiny_model("mixtral", **sizes, initializer_range=0.06).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "source", **ways).eval()
    made = export(compressed(whole, model_factors(whole, leave=6)), None, tmp_path / "out", format=format)
    assert made.verification.logit_difference <= 1e-6
    usual = verify(made.path, dtype=torch.bfloat16)
    assert usual.tensors == made.verification.tensors


def test_what_a_model_keeps_in_float32_is_compared_as_such(tmp_path: Path) -> None:
    save_tiny("deepseek_v3", tmp_path / "source")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16).eval()
    bias_E = whole.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias_E.dtype == torch.float32
    bias_E += 1e-4  # which bfloat16 would lose
    made = export(compressed(whole, model_factors(whole)), None, tmp_path / "out")
    assert made.verification.logit_difference <= 1e-6


def test_a_model_whose_rotary_frequencies_were_rounded_by_a_cast_is_told_so(tmp_path: Path) -> None:
    """No file holds them: loaded again they are what they should be, and a router that is close to chance chooses another expert."""
    cast = tiny_model("mixtral", num_local_experts=8).to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"'model\.rotary_emb\.inv_freq' .* is in bfloat16, float32 once it is loaded: load it with"):
        export(compressed(cast, model_factors(cast, forms=(("many-ranks", "basis"),))), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_with_another_tensor_than_the_model_s_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TINY["mixtral"]()
    factored = compressed(whole, model_factors(whole))
    saved = type(factored).save_pretrained

    def save_another(self: PreTrainedModel, *args: object, **kwargs: object) -> None:
        norm_D = self.model.norm.weight.data
        norm_D[0] += 1e-6  # no answer shows it
        saved(self, *args, **kwargs)
        norm_D[0] -= 1e-6

    monkeypatch.setattr(type(factored), "save_pretrained", save_another)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is not that of the model that was written"):
        export(factored, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "granitemoe"])
def test_a_saved_mixture_of_native_and_factored_layers_still_fails_without_the_plug_in(name: str, tmp_path: Path) -> None:
    whole = TINY[name]()
    compressed(whole, model_factors(whole, leave=1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("cached", [0, 1 << 19], ids=["each expert through both sides", "side by side"])
def test_loads_with_device_maps_and_from_disk(
    factored: Path, model: PreTrainedModel, tmp_path: Path, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "CACHED_NUMBERS", cached)
    monkeypatch.setattr(experts, "SMALL_EXPERT", cached)
    expected = logits(model)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(factored, device_map="auto")), expected, atol=1e-6)
    offloaded = AutoModelForCausalLM.from_pretrained(factored, device_map=ON_DISK, offload_folder=tmp_path)
    assert offloaded.model.layers[1].mlp.experts.input.right_0.device.type == "meta"
    assert torch.allclose(logits(offloaded), expected, atol=1e-6)


def test_loads_in_bfloat16(factored: Path, model: PreTrainedModel) -> None:
    short = AutoModelForCausalLM.from_pretrained(factored, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}
    difference = logits(short).float() - logits(model)
    assert difference.norm() <= 0.05 * logits(model).norm()


def test_loads_without_its_head(factored: Path, model: PreTrainedModel) -> None:
    headless = AutoModel.from_pretrained(factored)
    with torch.no_grad():
        assert torch.allclose(headless(**tiny_batch())[0], model.model(**tiny_batch())[0], atol=1e-6)


def test_streams_layer_by_layer(factored: Path, model: PreTrainedModel) -> None:
    stream = LayerStream(factored)
    hidden, calls = stream.embed(tiny_batch())
    for index, call in enumerate(calls):
        hidden = stream.run_layer(index, hidden, call)
    assert torch.allclose(stream.head(hidden, tiny_batch()), logits(model), atol=1e-6)


def test_exports_in_another_dtype_only_what_the_model_is_made_of(tmp_path: Path) -> None:
    source = save_tiny("deepseek_v3", tmp_path / "source")
    factors = {layer.index: found for layer, found in model_factors(TINY["deepseek_v3"]())}
    made = export_streamed(ModelFiles.open(source), lambda layer: factors[layer.index], tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(made.path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(made.path).dtype == torch.bfloat16
    assert json.loads((made.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert made.verification.logit_difference <= 1e-6


def pivoted_factors(layer: ExpertLayer) -> LayerFactors:
    native = TINY["mixtral"]().get_submodule(layer.name)
    return layer_factors(layer, read_experts(native, layer), *(("pivoted", "pivoted-equal"), ("pivoted-full", "pivoted"))[layer.index % 2])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices_of_pivots_pass_every_way_of_writing_and_loading(source: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    made = export_streamed(ModelFiles.open(source), pivoted_factors, tmp_path / "made", dtype=dtype, shard_size=20_000)
    stored = {name: tensor for path in made.path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in stored.values()} == {dtype, index_type(dtype)}
    assert made.counts.bytes == sum(tensor.nbytes for tensor in stored.values())
    factors = [pivoted_factors(layer) for layer in LayerStream(source).expert_layers]
    assert made.counts.original_parameters - made.counts.parameters == 3 * 4 * 3 * 32 * 24 - sum(each.parameters for each in factors)
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype, index_type(dtype)}
    expected = logits(loaded)
    again = export(loaded, None, tmp_path / "again")
    assert (again.counts.parameters, again.counts.bytes) == (made.counts.parameters, made.counts.bytes)
    assert (again.counts.original_parameters, again.counts.original_bytes) == (
        made.counts.original_parameters, made.counts.original_parameters * dtype.itemsize
    )
    for device_map in ("auto", ON_DISK):
        placed = AutoModelForCausalLM.from_pretrained(again.path, device_map=device_map, offload_folder=tmp_path / "offloaded")
        assert (logits(placed) - expected).norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * expected.norm()
    dense = export(loaded, None, tmp_path / "dense", format="dense")
    assert dense.counts.ratio == 0
    difference = logits(AutoModelForCausalLM.from_pretrained(dense.path)).float() - expected.float()
    assert difference.norm() <= (1e-6 if dtype == torch.float32 else 0.05) * expected.float().norm()


def test_shards_are_indexed_and_load(source: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "sharded", shard_size=20_000)
    shards = sorted(path.name for path in made.path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert all((made.path / shard).stat().st_size < 30_000 for shard in shards)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(made.path)), logits(model), atol=1e-6)


def test_the_files_of_a_real_model_agree_with_the_figures_to_a_thousandth(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "assets" / "demo-moe"
    stream = LayerStream(demo)

    def made_of(layer: ExpertLayer) -> LayerFactors:
        return layer_factors(layer, read_experts(stream.model.get_submodule(layer.name), layer), "latent", "dense")

    made = export_streamed(stream, made_of, tmp_path / "out")
    assert (made.path / "model.safetensors").stat().st_size == pytest.approx(made.counts.bytes, rel=1e-3)
    assert made.counts.original_bytes == stream.files.bytes


def test_the_hub_s_names_are_kept_by_a_dense_export_of_a_model_in_memory(source: Path, tmp_path: Path) -> None:
    whole = TINY["mixtral"]()
    made = export(compressed(whole, model_factors(whole)), None, tmp_path / "dense", format="dense")
    assert load_file(made.path / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    assert made.counts.ratio == 0
    assert not (made.path / "modeling_moesvd.py").exists()
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())


@pytest.mark.parametrize("broken", ["factors", "verify"])
def test_nothing_is_left_of_an_export_that_fails(source: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layer: ExpertLayer) -> LayerFactors | None:
        if layer.index == 2:
            raise KeyboardInterrupt
        return factors_of(layer)

    def refuse(progress: Progress) -> None:
        if progress.stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if broken == "factors":
            export_streamed(ModelFiles.open(source), fail, tmp_path / "out")
        else:
            export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out", report=refuse)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept(source: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "side-4").write_bytes(b"half")
    export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_a_clean_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(ResourceError, match=r"disk is full \([\d,]+ bytes are free\); free space or choose another folder"):
        export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_exports_are_replaced_and_only_when_asked(source: Path, tmp_path: Path) -> None:
    files, out = ModelFiles.open(source), tmp_path / "out"
    export_streamed(files, factors_of, out)
    with pytest.raises(InputError, match="holds an earlier export"):
        export_streamed(files, factors_of, out)
    export_streamed(files, factors_of, out, format="dense", overwrite=True)
    assert json.loads((out / "moesvd.json").read_text())["format"] == "dense"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds files that are no export"):
        export_streamed(files, factors_of, foreign, overwrite=True)
    with pytest.raises(InputError, match="must be a folder"):
        export_streamed(files, factors_of, foreign / "thesis.txt")
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_refuses_what_makes_no_sense(source: Path, factored: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format must be one of factored, dense, got 'gguf'"):
        export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out", format="gguf")
    with pytest.raises(InputError, match="must be an uncompressed model"):
        export_streamed(ModelFiles.open(factored), factors_of, tmp_path / "out")
    with pytest.raises(InputError, match="must have factored experts"):
        export(TINY["mixtral"](), None, tmp_path / "out")


def test_side_files_are_copied_but_nothing_from_outside(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    (source / "LICENSE").write_text("Apache-2.0")
    (source / "helper.py").write_text("raise SystemExit")
    made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out")
    assert (made.path / "LICENSE").read_text() == "Apache-2.0"
    assert not (made.path / "helper.py").exists()
    secret = tmp_path / "secret.txt"
    secret.write_text("token")
    (source / "vocab.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match="points outside the model folder"):
        export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out2")


def test_the_card_says_what_was_made_and_quotes_what_comes_from_outside(source: Path, tmp_path: Path) -> None:
    facts = CardFacts(
        source="<script>alert(1)</script>|x", method="auto", command="moesvd compress m --ratio 0.4", licence="apache-2.0",
        figures=(("perplexity, sotu, 300 windows of 256 tokens", "40.0", "42.1"),), plan={"ratio": 0.4},
    )  # fmt: skip
    made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out", card=facts)
    card = (made.path / "README.md").read_text()
    assert "<script>" not in card
    assert "license: apache-2.0" in card
    assert "| perplexity, sotu, 300 windows of 256 tokens | 40.0 | 42.1 |" in card
    assert "`moesvd compress m --ratio 0.4`" in card
    assert f"{made.counts.parameters:,}" in card
    assert json.loads((made.path / "moesvd.json").read_text())["plan"] == {"ratio": 0.4}


def test_the_card_of_a_dense_export_tells_the_plan_s_ratio_and_counts_whole_matrices(source: Path, tmp_path: Path) -> None:
    original = inspect(source)
    facts = CardFacts("tiny", plan={"ratio": 0.4, "original_active_parameters": original.active_parameters, "active_parameters": 7})
    made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "dense", format="dense", card=facts)
    card = (made.path / "README.md").read_text()
    assert "# tiny, compressed by 40.0 %, then multiplied out\n" in card
    assert "2 of 3 layers are stored as whole matrices (dense format)" in card
    assert "As factors the model would store 40.0 % fewer parameters" in card
    assert "0.0 %" not in card.replace("40.0 %", "") and "Low-rank factors stand in" not in card
    active = f"{original.active_parameters:,}"
    assert f"| active parameters a token | {active} | {active} |" in card
    assert json.loads((made.path / "moesvd.json").read_text())["active_parameters"] == inspect(made.path).active_parameters
    unknown = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "unknown", format="dense", card=CardFacts("tiny"))
    assert "# tiny, compressed, then multiplied out\n" in (unknown.path / "README.md").read_text()


def test_the_facts_name_the_number_format_of_the_experts(source: Path, tmp_path: Path) -> None:
    for dtype, name in ((None, "float32"), (torch.bfloat16, "bfloat16")):
        made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / name, dtype=dtype)
        assert json.loads((made.path / "moesvd.json").read_text())["dtype"] == name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert json.loads((export(model, None, tmp_path / "again").path / "moesvd.json").read_text())["dtype"] == "bfloat16"


def test_the_card_of_fewer_whole_experts_says_what_they_save() -> None:
    counts = Counts(75, 100, 150, 200, 2, 3, active_parameters=39)
    plan = {"ratio": 0.24, "original_active_parameters": 40, "active_parameters": 40}
    card = model_card(CardFacts("tiny", plan=plan), counts, "dense")
    assert "there are fewer experts, so it stores 25.0 % fewer parameters. As factors the model would store 24.0 % fewer" in card
    assert "saves no memory" not in card and "and shapes" not in card
    assert "| active parameters a token | 40 | 39 |" in card


def test_the_card_says_bit_for_bit_only_where_it_is(source: Path, tmp_path: Path) -> None:
    rest = "shared experts, attention and everything else are those of"

    def card_of(name: str, **settings: object) -> str:
        factors = settings.pop("factors", factors_of)
        return (export_streamed(ModelFiles.open(source), factors, tmp_path / name, **settings).path / "README.md").read_text()

    assert f"; routers, {rest} the original, bit for bit." in card_of("same", dtype=torch.float32)
    assert f"; routers, {rest} the original, cast from float32 to float16." in card_of("half", dtype=torch.float16)
    whole = TINY["mixtral"]()
    layers = expert_layers(whole)
    kept = {layer.index: kept_factors(layer, read_experts(whole.get_submodule(layer.name), layer), (0, 2)) for layer in layers}
    gone = f"routers (without their part for the experts that are gone), {rest}"
    card = card_of("fewer", format="dense", factors=lambda layer: kept[layer.index])
    assert "3 of 3 layers have fewer routed experts (dense format), none of which was factored; " in card
    assert f"; {gone} the original, bit for bit." in card
    assert "multiplied out" not in card and "As factors" not in card
    in_memory = compressed(whole, [(layer, kept[layer.index]) for layer in layers])
    made = export(in_memory, None, tmp_path / "memory", format="dense")
    assert f"{gone} the model that was exported, bit for bit." in (made.path / "README.md").read_text()
    made = export(in_memory, None, tmp_path / "factors")
    assert f"; routers, {rest} the model that was exported, bit for bit." in (made.path / "README.md").read_text()


def test_figures_come_onto_the_card_of_an_export_that_says_less_of_itself(source: Path, tmp_path: Path) -> None:
    made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out").path
    facts = json.loads((made / "moesvd.json").read_text())
    (made / "moesvd.json").write_text(json.dumps({key: facts[key] for key in facts.keys() - {"fewer_experts", "cast", "in_memory"}}))
    describe_again(made, CardFacts("tiny", figures=(("perplexity", "40.0", "42.1"),)))
    assert "| perplexity | 40.0 | 42.1 |" in (made / "README.md").read_text()
    verify(made)


def test_the_card_of_factors_counts_experts_by_use(source: Path, tmp_path: Path) -> None:
    facts = CardFacts(source="tiny", plan={"ratio": 0.4, "original_active_parameters": 1000, "active_parameters": 700})
    made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out", card=facts)
    card = (made.path / "README.md").read_text()
    assert f"# tiny, compressed by {100 * made.counts.ratio:.1f} %\n" in card
    assert "| active parameters a token (experts by use) | 1,000 | 700 |" in card


def test_verification_tells_a_changed_file_from_a_wrong_answer(factored: Path, tmp_path: Path) -> None:
    found = verify(factored)
    assert found.logit_difference is None
    with safe_open(factored / "model.safetensors", "pt") as stream:
        assert found.tensors == len(stream.keys())
    with pytest.raises(CheckpointError, match="logits differ by"):
        verify(factored, expected=torch.randn(1, 16, 128))


def test_a_file_of_the_source_that_cannot_be_read_is_the_one_that_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(found: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), found)

    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(CheckpointError, match=rf"{source}/.*json: cannot be read \(Permission denied\)"):
        export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "differs from its checksum"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "listed in the manifest, but missing"),
        (lambda folder: (folder / "evil.py").write_text(""), "not listed in the manifest"),
        (lambda folder: (folder / "SHA256SUMS").write_text("../x"), "is no checksum and file name"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "no complete export"),
    ],
)
def test_verification_names_the_damaged_file(source: Path, tmp_path: Path, damage: object, message: str) -> None:
    made = export_streamed(ModelFiles.open(source), factors_of, tmp_path / "out")
    damage(made.path)
    with pytest.raises(CheckpointError, match=message):
        verify(made.path)


def test_a_checkpoint_of_a_newer_format_is_refused(factored: Path, tmp_path: Path) -> None:
    config = json.loads((factored / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version must be 1 for this version of moesvd, got 2: update moesvd"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
