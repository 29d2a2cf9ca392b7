"""Actions from a model to an export, on a tiny model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import CALIBRATION, RECIPE, TEXT, do, tiny_run
from transformers import AutoModelForCausalLM

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.inspect import inspect
from moesvd_core.errors import InputError, RunError, UnreachableHubError
from moesvd_core.planning import Plan, Recipe
from moesvd_core.planning.loss_law import ENOUGH
from moesvd_core.progress import Progress
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import measurements
from moesvd_core.runs.source import prepare
from moesvd_core.runs.stages import PROBES
from moesvd_core.runs.workbench import plan_key


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    return tiny_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def compressed(run: RunFolder) -> Path:
    output = run.path.parent / "compressed"
    job = do(run, "compress", recipe=RECIPE, output=str(output), text=TEXT, command="moesvd compress tiny")
    assert job.state == "finished", job.error
    return output


def test_compress_ends_in_a_model_that_transformers_loads(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape[1] == 6
    assert "`moesvd compress tiny`" in (compressed / "README.md").read_text()


def test_the_card_tells_of_fewer_gradients(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", calibration=replace(CALIBRATION, gradient_samples=2))
    assert do(run, "compress", recipe=RECIPE, output=str(tmp_path / "out"), text=TEXT).state == "finished"
    assert "6 windows of 24 tokens, gradients of 2 of them, seed 0" in (tmp_path / "out" / "README.md").read_text()


def test_the_record_counts_what_the_files_hold(run: RunFolder, compressed: Path) -> None:
    job = do(run, "compress", recipe=RECIPE, output=str(compressed), text=TEXT)
    files = ModelFiles.open(compressed)
    record = job.result
    assert record["bytes"] == files.bytes
    assert record["ratio"] >= 0.2
    plan = run.read_json(*record["file"].split("/"))
    assert abs(plan["bytes"] - files.bytes) <= 1e-3 * files.bytes
    assert {"perplexity", "perplexity_stderr", "kl_mean", "top1_agreement", "tokens", "layers", "expert_ratio"} <= set(plan)


def test_asking_again_finds_everything_and_leaves_the_export_alone(run: RunFolder, compressed: Path) -> None:
    before = (compressed / "model.safetensors").stat()
    stages: list[str] = []
    job = do(run, "compress", lambda progress: stages.append(progress.stage), recipe=RECIPE, output=str(compressed), text=TEXT)
    assert job.state == "finished"
    assert set(stages) == {"inspect", "verify"}
    assert (compressed / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_another_ratio_needs_no_calibration_and_no_decomposition(run: RunFolder, compressed: Path) -> None:
    stages: list[str] = []
    job = do(run, "measure", lambda progress: stages.append(progress.stage), recipe={"method": "auto", "ratio": 0.3}, text=TEXT)
    assert job.result["ratio"] >= 0.3
    assert not {"calibrate", "decompose"} & set(stages)
    assert run.read_json("evaluations", job.result["file"].split("/")[1])["kl_mean"] > 0


def run_active(run: RunFolder) -> int:
    """Active parameters of the run's original model."""
    return int(run.read_json("source.json")["facts"]["active_parameters"])


def test_a_dense_export_is_as_large_as_the_original(run: RunFolder, compressed: Path) -> None:
    output = run.path.parent / "dense"
    job = do(run, "export", recipe=RECIPE, output=str(output), format="dense")
    assert job.result["ratio"] == 0
    assert job.result["active_parameters"] == inspect(output).active_parameters == run_active(run)
    dense, factored = AutoModelForCausalLM.from_pretrained(output), AutoModelForCausalLM.from_pretrained(compressed)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(dense(ids).logits, factored(ids).logits, rtol=1e-4, atol=1e-4)


def test_analyze_leaves_what_the_pages_show(run: RunFolder) -> None:
    job = do(run, "analyze", methods=["auto", "moe-svd"], text=TEXT)
    assert job.result["perplexity"] > 1
    table = run.read_json("plans", "all-auto.json")
    assert table["plans"][0]["ratio"] == 0
    assert len(table["plans"]) == sum(ratio / 100 <= table["max_ratio"] for ratio in range(81))
    assert Plan.from_dict(table["plans"][20]).ratio >= 0.2
    rows = run.read_json("evaluations", "sensitivity.json")
    assert len(rows["layers"]) == 3 and rows["layers"][0]["measured_nll"] is None
    assert len(rows["experts"]) == 12


def test_analyze_measures_as_many_plans_as_a_law_takes(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    assert do(run, "analyze", methods=["latent", "svd"], text=TEXT).state == "finished"
    assert [each.recipe for each in measurements(run)] == []
    job = do(run, "analyze", methods=["latent", "svd"], text=TEXT, probe=True)
    assert job.state == "finished", job.error
    measured = [each for each in measurements(run) if each.recipe is not None]
    reach = job.result["methods"]["latent"]["max_ratio"]
    assert len(measured) == len(PROBES) == ENOUGH
    assert {each.recipe.method for each in measured if each.recipe} == {"latent"}
    assert [each.recipe.ratio for each in measured if each.recipe] == pytest.approx([share * reach for share in PROBES], abs=0.01)


def test_sensitivity_measures_every_layer_alone(run: RunFolder) -> None:
    job = do(run, "sensitivity", recipe={"method": "auto", "ratio": 0.5}, text=TEXT)
    rows = run.read_json(*job.result["file"].split("/"))
    assert all(row["measured_kl"] > 0 and row["predicted"] > 0 for row in rows["layers"])
    assert {row["metric"] for row in rows["correlations"]} == {"f", "r", "a", "S_L", "OWL", "predicted"}


@pytest.mark.parametrize(
    ("action", "arguments", "words"),
    [
        ("compress", {"recipe": {"ratio": 0.99}}, r"ratio must be in \[0, 0\.\d+\] for auto on this model, got 0.99"),
        ("compress", {"recipe": {"method": "magic"}}, "method must be one of auto"),
        ("compress", {"recipe": RECIPE, "format": "zip"}, "format must be one of factored, dense, got 'zip'"),
        ("compress", {"recipe": RECIPE, "dtype": "int3"}, "dtype must be one of float32"),
        ("compress", {"recipe": RECIPE, "text": {"window": 3}}, "text has no setting 'window'"),
        ("plan", {"recipe": RECIPE, "colour": "red"}, "this action has no argument 'colour'"),
        ("measure", {"recipe": {"method": "svd", "ratio": 0.6}}, r"ratio must be in \[0, 0\.\d+\] for svd"),
    ],
)
def test_what_cannot_be_done_is_told(run: RunFolder, compressed: Path, action: str, arguments: dict[str, object], words: str) -> None:
    job = do(run, action, **arguments)
    assert (job.state, job.error_kind) == ("failed", "InputError")
    with pytest.raises(InputError, match=words):
        raise InputError(job.error)


def test_an_occupied_output_is_refused_before_any_work(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    stages: list[str] = []
    job = do(run, "compress", lambda progress: stages.append(progress.stage), recipe=RECIPE, output=str(tmp_path / "full"))
    assert "holds files that are no export" in job.error
    assert stages == []


def test_another_plan_does_not_replace_an_export_unasked(run: RunFolder, compressed: Path) -> None:
    job = do(run, "export", recipe={"method": "auto", "ratio": 0.25}, output=str(compressed))
    assert "holds an earlier export" in job.error


def test_a_model_that_changed_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    assert do(run, "plan", recipe=RECIPE).state == "finished"
    config = tmp_path / "model-mixtral" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    job = do(run, "plan", recipe=RECIPE)
    assert job.error_kind == "RunError"
    assert "is not the model any more" in job.error


def test_a_copy_of_the_model_finds_the_same_run_and_another_calibration_does_not(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    copy = tmp_path / "elsewhere" / "model-mixtral"
    shutil.copytree(tmp_path / "model-mixtral", copy)
    assert prepare(str(copy), CALIBRATION, folder=run.path).identity == run.identity
    with pytest.raises(RunError, match="holds run"):
        prepare(str(copy), replace(CALIBRATION, seed=1), folder=run.path)


def test_a_run_of_the_hub_is_opened_again_without_asking_the_hub(tmp_path: Path) -> None:
    """It holds the facts that its model was found to have; there is none of a model that nobody can tell of."""
    with pytest.raises(UnreachableHubError, match="the hub cannot be asked"):
        prepare("owner/name", CALIBRATION, root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    trusting = prepare("owner/name", CALIBRATION, root=tmp_path, allow_remote_code=True)
    assert prepare("owner/name", CALIBRATION, root=tmp_path, allow_remote_code=True).identity == trusting.identity
    facts = {"factored": False, "context_length": 64, "parameters": 1000, "expert_parameters": 800}
    (trusting.path / "source.json").write_text(json.dumps({"path": "x", "fingerprint": "1", "facts": facts}))
    again = {"folder": trusting.path, "allow_remote_code": True}
    assert prepare("owner/name", CALIBRATION, **again, recipe=Recipe(ratio=0.7)).path == trusting.path
    with pytest.raises(InputError, match=r"ratio must be in \[0, 0.8\] for auto on this model, got 0.9"):
        prepare("owner/name", CALIBRATION, **again, recipe=Recipe(ratio=0.9))


def test_keys_of_recipes_differ_where_the_recipes_do() -> None:
    recipes = [Recipe(), Recipe(ratio=0.41), Recipe(method="latent"), Recipe(block=16), Recipe(metric="input")]
    assert len({plan_key(recipe) for recipe in recipes}) == len(recipes)
    assert plan_key(Recipe(method="auto", ratio=0.4)) == "auto@0.4000"


def test_progress_is_told_by_stage(tmp_path: Path) -> None:
    seen: list[Progress] = []
    do(tiny_run(tmp_path / "run"), "compress", seen.append, recipe=RECIPE, output=str(tmp_path / "out"), text=TEXT)
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["inspect", "calibrate", "decompose", "evaluate original", "evaluate auto@0.2000", "export", "verify"]
    assert all(0 <= progress.done <= progress.total for progress in seen)
