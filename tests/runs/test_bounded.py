"""Plans with a bound on operations are those that the engine makes, though neither model nor statistics are looked at."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from planned_run import add_curves, planned_run
from tiny_runs import TEXT, do, tiny_run

from moesvd_core.errors import InputError, RunError
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import silent
from moesvd_core.runs.bounded import bounded_table, has_curves, most_flops_ratio, plan_at_once
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.workbench import Workbench


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Analysed."""
    torch.set_num_threads(1)
    made = tiny_run(tmp_path_factory.mktemp("runs") / "run")
    job = do(made, "analyze", methods=["auto"], text=TEXT)
    assert job.state == "finished", job.error
    return made


def test_they_are_the_engines(run: RunFolder) -> None:
    recipe = Recipe(flops_ratio=0.3)
    made = [Plan.from_dict(plan) for plan in bounded_table(run, "auto", 0.3)["plans"]]
    assert made == Workbench(run, silent).pipeline.plans(recipe, [plan.asked_ratio for plan in made])
    assert all(plan.flops <= 0.7 * plan.original_flops + 1 for plan in made)
    assert plan_at_once(run, Recipe(ratio=0.2, flops_ratio=0.3, compensate=True)) == made[20]


def test_what_the_experts_do_is_the_most(run: RunFolder) -> None:
    most = most_flops_ratio(run, "auto")
    assert 0 < most < 1
    assert bounded_table(run, "auto", most - 1e-6)["plans"]
    with pytest.raises(InputError, match="whose experts do no more"):
        bounded_table(run, "auto", most + 1e-6)


def test_the_model_is_not_needed_and_a_missing_curve_is_named(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder.open(Path(shutil.copytree(run.path, tmp_path / "run")))
    for needless in ("statistics", "factors"):
        shutil.rmtree(copy.path / needless)
    source = json.loads((copy.path / "source.json").read_text())
    (copy.path / "source.json").write_text(json.dumps({**source, "path": "gone"}))
    assert bounded_table(copy, "auto", 0.3) == bounded_table(run, "auto", 0.3)
    gone = sorted(copy.path.glob("curves/*/layer-*"))[1]
    gone.unlink()
    assert not has_curves(copy, "auto")
    with pytest.raises(RunError, match=f"{gone.name} is missing: plan auto again"):
        bounded_table(copy, "auto", 0.3)


def test_methods_that_are_not_planned_or_do_not_weigh_operations(tmp_path: Path) -> None:
    planned = planned_run(tmp_path)
    assert most_flops_ratio(planned, "svd") == most_flops_ratio(planned, "latent") == 0
    assert plan_at_once(planned, Recipe(method="latent", flops_ratio=0.2)) is None
    with pytest.raises(RunError, match="latent is not planned"):
        bounded_table(planned, "latent", 0.2)
    add_curves(planned, "svd")
    with pytest.raises(InputError, match="flops_ratio needs greedy allocation"):
        bounded_table(planned, "svd", 0.2)
