"""The handlers of the ratio page, without a browser."""

import errno
import json
from collections.abc import Iterator
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from planned_run import NLL, RUN, add_curves, figures, measured, planned_run
from runs.run_helpers import new_run
from runs.tiny_runs import TEXT, do, tiny_run

from moesvd_core import atomic
from moesvd_core.errors import EvaluationError, InputError, RunError
from moesvd_core.live import LiveModel
from moesvd_core.planning import Recipe
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.jobs import read_jobs
from moesvd_core.runs.workbench import Text
from pages import ratio
from pages.components import handler, machine, ratio_figures, ratio_stage
from pages.components.context import Context
from pages.components.session import ViewState
from pages.components.settings import Settings

STATE = ViewState(run=RUN)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    made = Context(Settings(runs=tmp_path / "runs"))
    object.__setattr__(made, "client", Client(made.settings.runs, launch=lambda run: None))
    return made


@pytest.fixture
def run(context: Context) -> RunFolder:
    return planned_run(context.settings.runs)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is measured while a person waits."""
    monkeypatch.setattr(machine, "seconds", lambda flops: 1e6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """With a run of a model that can be measured."""
    torch.set_num_threads(1)
    made = Context(Settings(runs=tmp_path_factory.mktemp("runs")))
    job = do(tiny_run(made.settings.runs / "run"), "analyze", methods=["auto"], text=TEXT)
    assert job.state == "finished", job.error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratio, "TEXT", Text(**TEXT))
        yield made


def test_the_stage_gets_the_plans_of_the_views_method(run: RunFolder) -> None:
    data = json.loads(ratio_stage.drawing(run, STATE.but(method="svd", ratio=0.31, layer=2)))
    assert {name: data[name] for name in ("run", "method", "percent", "layer")} == {"run": RUN, "method": "svd", "percent": 31, "layer": 2}
    assert data["table"]


def test_the_stage_gets_the_law_once_measured_plans_tell_one(run: RunFolder) -> None:
    table = run.read_json("plans", "all-auto.json")["plans"]
    for percent in (20, 30, 40):
        assert json.loads(ratio_stage.drawing(run, STATE))["law"] is None
        measured(run, Recipe(ratio=percent / 100), 3 * table[percent]["predicted_loss"])
    law = json.loads(ratio_stage.drawing(run, STATE))["law"]
    assert (law["factor"], law["power"], law["points"]) == (pytest.approx(3), pytest.approx(1), 3)


def test_an_empty_stage_says_what_to_do(run: RunFolder, context: Context) -> None:
    for found, state, words in (
        (None, ViewState(), "Model page"), (run, STATE.but(method="owl"), "Plan this method"),
        (new_run(context.settings.runs), STATE, "end of its analysis"),
    ):
        data = json.loads(ratio_stage.drawing(found, state))
        assert data["table"] is None
        assert words in " ".join(data["empty"])


def test_a_stage_of_an_analysis_that_failed_says_so_until_it_is_asked_again(context: Context) -> None:
    run = new_run(context.settings.runs)
    run.log.append("submitted", "1", action="analyze", arguments={})
    run.log.append("failed", "1", error="no room", error_kind="RunError")
    said = " ".join(json.loads(ratio_stage.drawing(run, STATE))["empty"])
    assert "analysis of this run failed" in said
    assert "Model page" in said
    run.log.append("submitted", "2", action="analyze", arguments={})
    assert "end of its analysis" in " ".join(json.loads(ratio_stage.drawing(run, STATE))["empty"])


def test_letting_go_of_the_slider_changes_the_view() -> None:
    assert ratio._released(SimpleNamespace(percent=31, flops=0), STATE) == STATE.but(ratio=0.31)
    assert ratio._released(SimpleNamespace(percent=31, flops=25), STATE) == STATE.but(ratio=0.31, flops_ratio=0.25)
    svd = STATE.but(method="svd")
    assert ratio._released(SimpleNamespace(percent=31, flops=25), svd).flops_ratio is None  # another method was chosen meanwhile
    for wrong in (81, -1, "31", 3.5, None):
        with pytest.raises(InputError, match=r"whole percent in \[0, 80\]"):
            ratio._released(SimpleNamespace(percent=wrong, flops=0), STATE)
    for wrong in (100, -1, "31", 3.5, None):
        with pytest.raises(InputError, match=r"operations saved must be a whole percent in \[0, 100\)"):
            ratio._released(SimpleNamespace(percent=31, flops=wrong), STATE)


def test_a_bound_on_operations_brings_plans_of_its_own(run: RunFolder) -> None:
    add_curves(run, "auto")
    free, tight = (json.loads(ratio_stage.drawing(run, STATE.but(flops_ratio=share))) for share in (None, 0.2))
    assert (free["flops"], tight["flops"], free["flopsMost"]) == (0, 20, tight["flopsMost"])
    assert free["table"] != tight["table"]
    assert not json.loads(ratio_stage.drawing(run, STATE.but(method="svd")))["weighs"]
    assert ratio.recipe_of(run, STATE.but(flops_ratio=0.2)) == Recipe(ratio=0.4, flops_ratio=0.2)


def test_more_operations_than_experts_do_are_the_most(run: RunFolder) -> None:
    add_curves(run, "auto")
    most = json.loads(ratio_stage.drawing(run, STATE))["flopsMost"]
    with pytest.warns(UserWarning, match=rf"flops_ratio must be in \[0, {most / 100:g}\], got 0.99"):
        data = json.loads(ratio_stage.drawing(run, STATE.but(flops_ratio=0.99)))
    assert data["flops"] == most
    assert ratio.recipe_of(run, STATE.but(flops_ratio=0.99)) == Recipe(ratio=0.4, flops_ratio=most / 100)


def test_a_bound_on_operations_without_curves_says_how_to_have_them(context: Context, run: RunFolder) -> None:
    state = STATE.but(flops_ratio=0.2)
    data = json.loads(ratio_stage.drawing(run, state))
    assert data["table"] is None
    assert "layer-000.safetensors is missing: plan auto again" in data["empty"][1]
    assert ratio._method_shown(context)(state)[2].interactive
    add_curves(run, "auto")
    assert not ratio._method_shown(context)(state)[2].interactive


def test_a_layer_can_be_lit_and_put_out() -> None:
    lit = ratio._layer_chosen(SimpleNamespace(layer=1), STATE)
    assert lit.layer == 1
    assert ratio._layer_chosen(SimpleNamespace(layer=None), lit).layer is None
    for wrong in ("1", 2.5, -1):
        with pytest.raises(InputError, match="layer must be"):
            ratio._layer_chosen(SimpleNamespace(layer=wrong), STATE)


def test_methods_that_were_not_planned_can_be(context: Context, run: RunFolder) -> None:
    shown, about, plan = ratio._method_shown(context)(STATE)
    assert shown.value == "auto"
    assert ("auto", "auto") in shown.choices
    assert ("owl (not planned)", "owl") in shown.choices
    assert "the recommended choice" in about
    assert not plan.interactive
    assert ratio._method_shown(context)(STATE.but(method="owl"))[2].interactive
    ratio._plan(context)(STATE.but(method="owl"))
    job = read_jobs(run.log)["1"]
    assert (job.action, job.arguments) == ("analyze", {"methods": ["owl"]})


def test_a_ratio_beyond_the_methods_reach_is_its_largest(run: RunFolder) -> None:
    most = run.read_json("plans", "all-svd.json")["max_ratio"]
    assert ratio.recipe_of(run, STATE.but(method="svd", ratio=0.8)) == Recipe(method="svd", ratio=int(100 * most) / 100)
    assert ratio.recipe_of(run, STATE.but(method="owl")) is None


@pytest.mark.usefixtures("slow")
def test_slow_models_are_measured_by_a_job(context: Context, run: RunFolder) -> None:
    panel, button = ratio._measured(context)(STATE)
    assert "A job of the run can do it" in panel
    assert button.interactive
    assert all(part["__type__"] == "update" for part in ratio._measure_at_once(context)(STATE, panel))
    ratio._measure(context)(STATE)
    job = read_jobs(run.log)["1"]
    assert (job.action, job.arguments["recipe"]["ratio"], job.arguments["text"]["windows"]) == ("measure", 0.4, 32)
    assert not ratio._measured(context)(STATE)[1].interactive  # it waits already
    with pytest.raises(InputError, match="owl is not planned yet"):
        ratio._measure(context)(STATE.but(method="owl"))
    with pytest.raises(RunError, match="no run is chosen"):
        ratio._measure(context)(ViewState())


def test_nothing_is_measured_at_once_beside_a_job_or_without_statistics(context: Context, run: RunFolder) -> None:
    assert not ratio.answers_at_once(context, run)
    (run.station("statistics") / "statistics.json").write_text("{}")
    assert ratio.answers_at_once(context, run)
    context.client.submit(run, "evaluate")
    assert not ratio.answers_at_once(context, run)


def test_a_small_model_is_measured_when_the_slider_is_let_go(tiny: Context) -> None:
    state = ViewState(run="run", ratio=0.2)
    waiting, button = ratio._measured(tiny)(state)
    assert "Measuring auto at 20 %" in waiting
    assert not button.interactive
    panel, curve, newest = ratio._measure_at_once(tiny)(state, waiting)
    assert newest == Recipe(ratio=0.2)
    assert "Measured at 20 % by auto" in panel
    assert "4 windows of 24 tokens" in panel
    assert "auto" in [trace["name"] for trace in json.loads(curve)["figure"]["data"] if trace["mode"] == "markers"]
    assert ratio._measured(tiny)(state)[0] == panel
    assert all(part["__type__"] == "update" for part in ratio._measure_at_once(tiny)(state, panel))  # it is known already


@pytest.mark.parametrize(("error", "words"), [
    (RunError("it is not the model any more"), "it is not the model any more."),
    (EvaluationError("window 3 has no finite loss"), "window 3 has no finite loss."),
    (OSError(errno.ENOSPC, "No space left on device", "/srv/runs/x"), "the disk is full: make room, then ask again."),
    (ZeroDivisionError("secret"), "unexpected ZeroDivisionError: the server&#x27;s log has the details."),
])
def test_a_measurement_that_fails_is_told_in_the_card_and_not_tried_again(
    tiny: Context, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    state, tried = ViewState(run="run", ratio=0.17), []
    said: list[str] = []
    monkeypatch.setattr(handler.gr, "Warning", said.append)
    monkeypatch.setattr(handler, "log_message", lambda message, **_: said.append(message))

    def fail(*_: Any) -> None:
        tried.append(1)
        raise error

    monkeypatch.setattr(LiveModel, "measure", fail)
    waiting = ratio._measured(tiny)(state)[0]
    card, curve, newest = ratio._measure_at_once(tiny)(state, waiting)
    assert said == [words.removesuffix(".")]
    assert f"Auto at 17 % could not be measured: {words}" in card
    assert curve["__type__"] == newest["__type__"] == "update"
    assert "…" not in card and "/srv" not in card and "secret" not in card
    assert all(part["__type__"] == "update" for part in ratio._measure_at_once(tiny)(state, card))
    assert len(tried) == 1


def test_a_card_that_tells_of_the_plan_before_keeps_no_plan_from_being_measured(tiny: Context) -> None:
    """Its measurement may end after the slider was let go elsewhere."""
    before, state = (ViewState(run="run", ratio=share) for share in (0.15, 0.16))
    late = ratio._measure_at_once(tiny)(before, ratio._measured(tiny)(before)[0])[0]
    assert "Measured at 16 % by auto" in ratio._measure_at_once(tiny)(state, late)[0]


def test_a_card_that_waits_says_what_has_come_between(tiny: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ViewState(run="run", ratio=0.18)
    waiting = ratio._measured(tiny)(state)[0]
    with monkeypatch.context() as patch:
        patch.setattr(ratio, "answers_at_once", lambda *_: False)  # a job was asked for meanwhile
        card, *others = ratio._measure_at_once(tiny)(state, waiting)
    assert "A job of the run can do it" in card
    assert all(part["__type__"] == "update" for part in others)
    again = ratio._measure_at_once(tiny)(state, waiting)[0]
    monkeypatch.setattr(LiveModel, "measure", lambda *_: pytest.fail("another tab had measured it"))
    assert ratio._measure_at_once(tiny)(state, waiting)[0] == again


def test_what_was_measured_at_once_brings_predictions_anew(context: Context, run: RunFolder) -> None:
    """The head's figures and the curve's caption are told by the same law."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        ratio.build(context)
    events = blocks.config["dependencies"]
    names = {block["id"]: block["props"].get("elem_id") for block in blocks.config["components"]}
    measuring = next(event for event in events if [names[place] for place in event["outputs"]][:2] == ["ratio-measured", "ratio-curve"])
    newest = measuring["outputs"][2]
    (redrawing,) = [event for event in events if (newest, "change") in [tuple(target) for target in event["targets"]]]
    assert [names[place] for place in redrawing["outputs"]] == ["ratio-control"]
    table = run.read_json("plans", "all-auto.json")["plans"]
    for percent in (20, 30, 40):
        measured(run, Recipe(ratio=percent / 100), 3 * table[percent]["predicted_loss"])
    assert json.loads(ratio._plans(context)(STATE))["law"]["points"] == 3
    assert "fitted to 3 measured plans" in json.loads(ratio._curve(context)(STATE))["caption"]


def test_views_without_a_run_say_so(context: Context) -> None:
    assert "No run is chosen" in ratio._curve(context)(ViewState())
    assert "Measured" in ratio._measured(context)(ViewState())[0]
    assert ratio._measure_at_once(context)(ViewState(), "")[0]["__type__"] == "update"


def drawn(run: RunFolder, method: str = "auto") -> dict[str, Any]:
    return json.loads(ratio_figures.curve(run, method, Text()))


def test_the_curve_has_every_method_and_every_measured_point(run: RunFolder) -> None:
    for method, percent, added in (("auto", 20, 0.01), ("auto", 40, 0.05), ("svd", 20, 0.2)):
        measured(run, Recipe(method=method, ratio=percent / 100), added)
    data = drawn(run)
    lines = [trace["name"] for trace in data["figure"]["data"] if trace["mode"] == "lines"]
    assert lines == ["svd", "auto"]  # the view's method on top
    points = {trace["name"]: trace["y"] for trace in data["figure"]["data"] if trace["mode"] == "markers"}
    assert points["auto"] == pytest.approx([exp(NLL + 0.01), exp(NLL + 0.05)])
    assert points["original"] == pytest.approx([exp(NLL)])
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    assert len({(row["method"], row["ratio"]) for row in rows if row["measured perplexity"] is not None}) == 3
    assert next(row for row in rows if row["loss added, nats"] == pytest.approx(0.2))["method"] == "svd"


def test_points_of_other_windows_stand_on_the_same_original(run: RunFolder) -> None:
    measured(run, Recipe(ratio=0.3), 0.02, Text(windows=8))
    measured(run, Recipe(ratio=0.3), 0.03, Text(windows=16))
    points = [trace for trace in drawn(run)["figure"]["data"] if trace["mode"] == "markers" and trace["name"] == "auto"]
    assert points[0]["y"] == pytest.approx([exp(NLL + 0.03)])  # what was measured on more counts
    assert ratio_figures.is_measured(run, Recipe(ratio=0.3), Text())
    assert "16 windows" in ratio_figures.measured_html(run, Recipe(ratio=0.3), Text(), "")
    assert not ratio_figures.is_measured(run, Recipe(ratio=0.3), Text(dataset="other.txt"))


def test_what_was_drawn_stays_where_it_is_when_a_plan_is_measured_on_less_text(run: RunFolder) -> None:
    measured(run, Recipe(ratio=0.2), 0.02)
    before, few = drawn(run), Text(windows=1)
    harder = {**figures(few, NLL + 0.1), "tokens": 1}
    atomic.write_json(run.station("evaluations") / f"original--{few.key}.json", harder)
    after = json.loads(ratio_figures.curve(run, "auto", few))
    assert after["figure"]["data"] == before["figure"]["data"]
    place = after["columns"].index("measured perplexity")
    assert [row[place] for row in after["rows"] if row[place]] == pytest.approx([exp(NLL + 0.02)])


def test_predictions_are_scaled_to_what_was_measured(run: RunFolder) -> None:
    table = run.read_json("plans", "all-auto.json")["plans"]
    points = [place for place in range(len(table)) if 0.001 < table[place]["predicted_loss"] < 0.1][:4]
    assert len(points) >= 3
    for place in points[:2]:
        measured(run, Recipe(ratio=place / 100), 3 * table[place]["predicted_loss"])
    assert "fitted" not in drawn(run)["caption"]
    measured(run, Recipe(ratio=points[2] / 100), 3 * table[points[2]]["predicted_loss"])
    data = drawn(run)
    assert "fitted to 3 measured plans (auto: off by 0 % in the median)" in data["caption"]
    line = next(trace for trace in data["figure"]["data"] if trace["mode"] == "lines" and trace["name"] == "auto")
    assert line["y"][points[0]] == pytest.approx(exp(NLL + 3 * table[points[0]]["predicted_loss"]))


def test_a_bound_on_operations_has_a_line_and_points_of_its_own(run: RunFolder) -> None:
    add_curves(run, "auto")
    name = "auto, 20 % fewer operations"
    measured(run, Recipe(ratio=0.2), 0.01)
    measured(run, Recipe(ratio=0.2, flops_ratio=0.2), 0.02)
    data = json.loads(ratio_figures.curve(run, "auto", Text(), 0.2))
    assert [trace["name"] for trace in data["figure"]["data"] if trace["mode"] == "lines"] == ["svd", "auto", name]
    points = {trace["name"]: trace["y"] for trace in data["figure"]["data"] if trace["mode"] == "markers"}
    assert (points["auto"], points[name]) == (pytest.approx([exp(NLL + 0.01)]), pytest.approx([exp(NLL + 0.02)]))
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    saved = [row["operations a token"] for row in rows if row["method"] == name]
    assert max(saved) <= 0.8 * max(row["operations a token"] for row in rows if row["method"] == "auto")
    assert name not in [trace["name"] for trace in drawn(run)["figure"]["data"]]  # nor is its point among those of auto
    assert {trace["name"]: trace["y"] for trace in drawn(run)["figure"]["data"] if trace["mode"] == "markers"}["auto"] == points["auto"]


def test_before_the_original_is_measured_there_is_no_curve(run: RunFolder) -> None:
    for file in (run.path / "evaluations").glob("original--*"):
        file.unlink()
    assert "once the original is measured" in drawn(run)["advice"]
