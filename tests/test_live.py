"""The live model answers as the run's worker would, keeps the original as it is, and there is one of it."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from runs.run_helpers import new_run
from runs.tiny_runs import TEXT, do, tiny_run
from safetensors.torch import load_file, save_file
from tiny_models import TINY, save_tiny, tiny_tokenizer

from moesvd_core import experts
from moesvd_core import live as live_module
from moesvd_core.architectures.inspect import inspect
from moesvd_core.checkpoint.apply import compressed, factored_modules
from moesvd_core.errors import InputError, ResourceError, RunError
from moesvd_core.evaluation.hidden import final_hidden
from moesvd_core.evaluation.perplexity import Evaluation
from moesvd_core.evaluation.speed import weight_bytes
from moesvd_core.live import LiveModel, LiveModels, fits, live_memory
from moesvd_core.planning import Recipe
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import known_plan, measurements
from moesvd_core.runs.workbench import Text

WINDOWS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(5))
ON = Text(**TEXT)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = tiny_run(tmp_path_factory.mktemp("runs") / "run")
    job = do(made, "analyze", methods=["auto", "svd"], text=TEXT)
    assert job.state == "finished", job.error
    return made


@pytest.fixture(scope="module")
def live(run: RunFolder) -> LiveModel:
    return LiveModel(run)


def test_compressed_and_original_share_all_but_the_experts(live: LiveModel) -> None:
    before = final_hidden(live.original, WINDOWS).hidden_NLd
    compressed = live.apply(live.plan(Recipe(ratio=0.3)))
    mine = {name: tensor.data_ptr() for name, tensor in live.original.named_parameters()}
    shared = [name for name, tensor in compressed.named_parameters() if tensor.data_ptr() == mine.get(name)]
    assert {name for name in mine if "experts" not in name} <= set(shared)
    assert factored_modules(compressed)
    assert not factored_modules(live.original)
    assert not torch.equal(final_hidden(compressed, WINDOWS).hidden_NLd, before)
    assert torch.equal(final_hidden(live.original, WINDOWS).hidden_NLd, before)


def test_files_that_hold_more_than_what_is_loaded_make_no_other_plan(tmp_path: Path) -> None:
    """Layers for multi-token prediction are parameters that ratios are of, though no token of text meets them."""
    file = save_tiny("glm4_moe", tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    further = {key.replace("layers.2.", "layers.3."): tensor.clone() for key, tensor in tensors.items() if "layers.2." in key}
    save_file(tensors | further, file, metadata={"format": "pt"})
    made = tiny_run(tmp_path / "run", tmp_path / "model")
    assert do(made, "analyze", methods=["svd-llm"], text=TEXT).state == "finished"
    recipe = Recipe("svd-llm", 0.15)
    plan = LiveModel(made).plan(recipe)
    assert plan == known_plan(made, recipe)
    assert plan.original_parameters == sum(tensor.numel() for tensor in (tensors | further).values())
    silent = sum(layer.parameters * (layer.experts - layer.active) // layer.experts for layer in inspect(file.parent).expert_layers)
    assert plan.original_active_parameters == sum(tensor.numel() for tensor in tensors.values()) - silent


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no kernels for bfloat16")
@pytest.mark.usefixtures("by_torch")
def test_large_factors_are_packed_on_a_cpu_and_answer_as_those_of_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "SMALL_EXPERT", 0)
    TINY["mixtral"]().bfloat16().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    made = tiny_run(tmp_path / "run", tmp_path / "model")
    assert do(made, "analyze", methods=["auto"], text=TEXT).state == "finished"
    live = LiveModel(made)
    plan = live.plan(Recipe(ratio=0.3))
    model = live.apply(plan)
    assert all(module.packed for module in factored_modules(model).values())
    plain = compressed(live.original, live._layers(plan))
    expected = final_hidden(plain, WINDOWS).hidden_NLd.float()
    assert (final_hidden(model, WINDOWS).hidden_NLd.float() - expected).norm() <= 1e-2 * expected.norm()
    assert len(model.generate(WINDOWS[:1, :8], max_new_tokens=3, do_sample=False)[0]) == 11
    assert live.measure(Recipe(ratio=0.3), ON).tokens > 0


def test_a_model_whose_experts_are_all_gone_still_answers(live: LiveModel) -> None:
    """The end of the slider: every rank is 0, and no parameter is left where packing looks for their number format."""
    plan = live.plan(Recipe("fisher", live._pipeline.max_ratio(Recipe("fisher"))))
    model = live.apply(plan)
    assert not any(list(module.parameters()) for module in factored_modules(model).values())
    assert len(model.generate(WINDOWS[:1, :8], max_new_tokens=3, do_sample=False)[0]) == 11
    assert live.measure(Recipe("fisher", plan.asked_ratio), ON).tokens > 0


def test_a_plan_whose_metric_is_not_the_methods_own_is_applied(live: LiveModel) -> None:
    plan = live.plan(Recipe("svd", 0.1, structure="kept-experts", metric="saliency"))
    assert factored_modules(live.apply(plan))
    assert live.apply(live.plan(Recipe("svd", 0.0, structure="kept-experts", metric="saliency"))) is not live.original


def test_a_model_in_use_stays_as_it_is_when_another_plan_is_applied(live: LiveModel) -> None:
    small = live.apply(live.plan(Recipe(ratio=0.1)))
    before = final_hidden(small, WINDOWS).hidden_NLd
    large = live.apply(live.plan(Recipe(ratio=0.4)))
    assert torch.equal(final_hidden(small, WINDOWS).hidden_NLd, before)
    assert not torch.equal(final_hidden(large, WINDOWS).hidden_NLd, before)
    assert live.apply(live.plan(Recipe(ratio=0.4))) is large


def test_it_measures_what_the_worker_measures_and_keeps_it(live: LiveModel, tmp_path: Path) -> None:
    recipe = Recipe(ratio=0.25)
    mine = live.measure(recipe, ON)
    other = tiny_run(tmp_path / "run", Path(live.run.identity.model))
    for action, arguments in (("analyze", {"text": TEXT}), ("measure", {"recipe": recipe.as_dict(), "text": TEXT})):
        assert do(other, action, **arguments).state == "finished"
    point, theirs = (next(row for row in measurements(each) if row.recipe == recipe) for each in (live.run, other))
    assert point == theirs
    assert Evaluation(**point.figures) == mine


def test_what_was_measured_is_read_again(live: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = live.measure(Recipe(ratio=0.15), ON)
    monkeypatch.setattr(live_module, "final_hidden", lambda *_: pytest.fail("measured a second time"))
    assert live.measure(Recipe(ratio=0.15), ON) == first


def test_threads_take_turns(live: LiveModel) -> None:
    recipes = [Recipe(method=name, ratio=ratio) for ratio in (0.12, 0.31) for name in ("auto", "svd")]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda recipe: live.measure(recipe, ON), recipes))
    for recipe, figures in zip(recipes, together, strict=True):
        (live.run.path / "evaluations" / f"{recipe.method}@{recipe.ratio:.4f}--{ON.key}.json").unlink()
        assert live.measure(recipe, ON) == figures


def test_decompositions_of_one_method_are_kept(live: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = live._pipeline.cache
    live.apply(live.plan(Recipe(ratio=0.35)))
    assert {key for key, _ in cache} == {"output-pivoted", "output-latent"}
    live.apply(live.plan(Recipe(method="svd", ratio=0.3)))
    assert {key for key, _ in cache} == {"plain-per-expert"}
    monkeypatch.setattr(live_module, "RESIDENT", 0)
    live.apply(live.plan(Recipe(ratio=0.35)))
    assert not cache


def test_one_model_is_live_and_it_is_the_last_one_asked_for(run: RunFolder, tmp_path: Path) -> None:
    other = tiny_run(tmp_path / "run", Path(run.identity.model))
    assert do(other, "analyze", text=TEXT).state == "finished"
    models = LiveModels()
    first = models.of(run)
    assert models.of(RunFolder.open(run.path)) is first
    second = models.of(other)
    assert second is not first
    assert models.of(other) is second
    assert models.of(run) is not first
    latest = models.of(other)
    again = RunFolder(other.path, replace(other.identity, created="2030-01-01T00:00:00+00:00"))
    assert models.of(again) is not latest, "the run was deleted, and made again in its folder"


def test_what_cannot_be_live_says_why(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="analyze its model first"):
        LiveModel(new_run(tmp_path))
    with pytest.raises(InputError, match="ratio must be in"):
        LiveModel(run).plan(Recipe(ratio=0.99))
    assert fits(1)
    assert not fits(2**60)
    monkeypatch.setattr(live_module, "free_for_models", lambda: 10_000)
    with pytest.raises(ResourceError, match=r"0.00 GiB are free; measure it by a job"):
        LiveModels().of(run)


def test_a_model_that_is_live_is_not_asked_to_fit_a_second_time(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card is full of the very model that would be asked."""
    models, size = LiveModels(), int(run.read_json("source.json")["facts"]["bytes"])
    monkeypatch.setattr(live_module, "free_for_models", lambda: live_memory(size))
    assert models.fits(run, size)
    models.of(run)
    monkeypatch.setattr(live_module, "free_for_models", lambda: live_memory(size) - 1)
    assert models.fits(run, size)
    assert not LiveModels().fits(run, size)
    other, held = new_run(tmp_path), weight_bytes(models.of(run).original)
    monkeypatch.setattr(live_module, "free_for_models", lambda: live_memory(size) - held)
    assert models.fits(other, size), "this one goes before the other is loaded"
    monkeypatch.setattr(live_module, "free_for_models", lambda: live_memory(size) - held - 1)
    assert not models.fits(other, size)


def test_a_forgotten_model_is_let_go_of_and_no_other(run: RunFolder, tmp_path: Path) -> None:
    models = LiveModels()
    models.forget(run)
    model = weakref.ref(models.of(run))
    models.forget(new_run(tmp_path))
    models.forget(RunFolder(run.path, replace(run.identity, created="2030-01-01T00:00:00+00:00")))
    assert models.of(run) is model()
    models.forget(RunFolder.open(run.path))
    assert model() is None


def test_a_model_forgotten_while_it_is_loaded_does_not_stay(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, begun, gate = LiveModels(), Event(), Event()

    def slow(asked: RunFolder) -> LiveModel:
        begun.set()
        assert gate.wait(20)
        return LiveModel(asked)

    for forgotten in (run, new_run(tmp_path)):
        begun.clear(), gate.clear()
        models.forget(run)
        monkeypatch.setattr(live_module, "LiveModel", slow)
        with ThreadPoolExecutor(2) as pool:
            loaded = pool.submit(models.of, run)
            assert begun.wait(20)
            try:
                pool.submit(models.forget, RunFolder.open(forgotten.path)).result(timeout=10)
            finally:
                gate.set()
            assert loaded.result().run is run, "whoever asked has it"
        monkeypatch.setattr(live_module, "LiveModel", LiveModel)
        assert (models.of(run) is loaded.result()) is (forgotten is not run)
