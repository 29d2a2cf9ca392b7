"""What a run knows is read from its files, without a model."""

from pathlib import Path

import pytest
import torch
from planned_run import cut_alone, measured, planned_run
from run_helpers import new_run
from tiny_runs import TEXT, do, tiny_run

from moesvd_core.errors import RunError
from moesvd_core.planning import Recipe
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import analysed, known_plan, loss_laws, measurements, reach
from moesvd_core.runs.workbench import Text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    made = tiny_run(tmp_path_factory.mktemp("runs") / "run")
    for action, arguments in (
        ("analyze", {"text": TEXT}),
        ("measure", {"recipe": {"method": "auto", "ratio": 0.3}, "text": TEXT}),
        ("measure", {"recipe": {"method": "auto", "ratio": 0.1234}, "text": TEXT}),
    ):
        job = do(made, action, **arguments)
        assert job.state == "finished", job.error
    return made


def test_plans_of_whole_percents_come_from_the_analysis(run: RunFolder) -> None:
    most = reach(run, "auto")
    assert most is not None
    assert analysed(run) == ["auto"]
    assert reach(run, "latent") is None
    plan = known_plan(run, Recipe(ratio=0.2))
    assert plan is not None
    assert (plan.method, plan.asked_ratio) == ("auto", 0.2)
    assert 0.2 <= plan.ratio < 0.25
    assert known_plan(run, Recipe(ratio=0.2, block=4)) is None
    assert known_plan(run, Recipe(ratio=0.2034)) is None


def test_a_plan_that_was_asked_for_is_known_by_its_recipe(run: RunFolder) -> None:
    plan = known_plan(run, Recipe(ratio=0.1234))
    assert plan is not None
    assert plan.asked_ratio == 0.1234


def test_measurements_stand_beside_the_original_in_order_of_their_ratio(run: RunFolder) -> None:
    original, small, large = measurements(run)
    assert (original.recipe, original.ratio, original.figures["kl_mean"]) == (None, 0.0, None)
    assert (small.recipe, large.recipe) == (Recipe(ratio=0.1234), Recipe(ratio=0.3))
    assert original.bytes > small.bytes > large.bytes
    assert large.figures["kl_mean"] > 0
    assert {row.figures["windows"] for row in (original, small, large)} == {4}


def test_a_table_that_was_made_again_is_read_again(run: RunFolder) -> None:
    file = run.path / "plans" / "all-auto.json"
    whole = file.read_bytes()
    assert known_plan(run, Recipe(ratio=0.2)) is not None
    file.write_text('{"max_ratio": 0.5, "plans": []}')
    assert (reach(run, "auto"), known_plan(run, Recipe(ratio=0.2))) == (0.5, None)
    file.write_bytes(whole)


def test_the_law_of_losses_is_the_methods_own_once_enough_of_its_plans_were_measured(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    losses = {name: run.read_json("plans", f"all-{name}.json")["plans"] for name in ("auto", "svd")}

    def note(method: str, percent: int, times: float, **text: int) -> None:
        measured(run, Recipe(method=method, ratio=percent / 100), times * losses[method][percent]["predicted_loss"], Text(**text))

    for percent in (20, 30):
        note("auto", percent, 3)
    assert loss_laws(run, ["auto"], "sotu").get("auto") is None
    note("svd", 30, 3)
    law = loss_laws(run, ["auto"], "sotu").get("auto")
    assert law is not None and law.points == 3 and law.shared, "of all methods, while each has too few"
    note("auto", 40, 2, windows=8)
    note("auto", 40, 3)
    law = loss_laws(run, ["auto"], "sotu").get("auto")
    assert law is not None
    assert (law.points, law.shared) == (3, False)
    assert (law.factor, law.power) == (pytest.approx(3), pytest.approx(1)), "the largest part of the text counts"
    assert loss_laws(run, ["auto"], "other.txt") == {}


def test_a_law_learns_of_layers_from_an_analysis_of_sensitivity(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    plans = run.read_json("plans", "all-auto.json")["plans"]
    for percent in (20, 30, 40):
        measured(run, Recipe(ratio=percent / 100), 3 * plans[percent]["predicted_loss"])
    plain = loss_laws(run, ["auto"], "sotu")["auto"]
    assert (plain.points, plain.layers) == (3, {})
    cut_alone(run, {0: (0.001, 0.006), 1: (0.001, 0.003), 2: (0.001, 0.0015)}, windows=16)
    cut_alone(run, {0: (0.001, 0.001)}, windows=4)
    cut_alone(run, {0: (0.001, 0.001), 1: (0.001, 0.001)}, dataset="other.txt")
    (run.station("evaluations") / "sensitivity-auto@0.7000.json").write_text("{")
    law = loss_laws(run, ["auto", "svd"], "sotu")
    assert (law["auto"].points, law["svd"].points) == (6, 3), "cuts tell of their own method"
    assert law["auto"].layers[0] > 1.5 > 1.1 > law["auto"].layers[1] > 0.9 > 0.6 > law["auto"].layers[2]


def test_cuts_that_cannot_be_told_from_none_say_nothing(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    plans = run.read_json("plans", "all-auto.json")["plans"]
    for percent in (20, 30, 40):
        measured(run, Recipe(ratio=percent / 100), 3 * plans[percent]["predicted_loss"])
    cut_alone(run, {0: (0.001, 0.003), 1: (0.001, 0.003), 2: (0.001, -0.0001)})
    law = loss_laws(run, ["auto"], "sotu")["auto"]
    assert (law.points, law.layers) == (5, {}), "two cuts are too few to tell layers apart"


def test_a_method_that_was_not_analysed_is_not_known(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert (reach(run, "latent"), known_plan(run, Recipe(method="latent")), measurements(run)) == (None, None, [])


def test_a_damaged_plan_is_an_error_and_a_damaged_measurement_is_not(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.station("plans") / "all-auto.json").write_text("{")
    (run.station("evaluations") / "plan.auto@0.4000--sotu-64xdefault-000000.json").write_text("{")
    (run.station("evaluations") / "plan.auto@0.5000--sotu-64xdefault-000000.json").write_text("{}")
    with pytest.raises(RunError, match="is damaged"):
        reach(run, "auto")
    assert measurements(run) == []
