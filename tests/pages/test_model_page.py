"""The handlers of the first page, without a browser."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from runs.run_helpers import new_run

from moesvd_core import live
from moesvd_core.architectures.inspect import inspect
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError, RunError
from moesvd_core.progress import silent
from moesvd_core.runs import stages
from moesvd_core.runs.client import Client
from moesvd_core.runs.estimate import Estimate
from moesvd_core.runs.folder import Identity, RunFolder
from moesvd_core.runs.source import prepare
from moesvd_core.runs.workbench import Text
from pages import model
from pages.components import machine, model_facts, text
from pages.components.context import Context
from pages.components.demo import SHIPPED
from pages.components.session import ViewState
from pages.components.settings import Settings

ASSETS = Path(__file__).parents[2] / "assets"
VALUES = ("sotu", 2, None, 0, 1)
FIELDS = (*VALUES, ["auto"])
"""The same, and the methods to plan for."""


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Declared is the folder of the demo model; workers are not started."""
    made = Context(Settings(runs=tmp_path / "runs", models=(ASSETS,)))
    made.settings.runs.mkdir()
    object.__setattr__(made, "client", Client(made.settings.runs, launch=lambda run: None))
    return made


def test_a_probe_tells_facts_and_needs(context: Context) -> None:
    facts, card, needs = model._probe(context)(ViewState(), "demo-moe", *FIELDS)
    assert facts["experts"] == 8
    assert "16.3 M" in card
    assert "one layer at a time" in needs


def test_a_probe_finds_the_runs_of_a_model_however_it_is_written(context: Context, tmp_path: Path) -> None:
    def told(state: ViewState, text: str) -> str:
        return model._probe(context)(state, text, *FIELDS)[1]

    (tmp_path / "link").symlink_to(ASSETS)
    written = ("demo-moe", str(ASSETS / "demo-moe"), str(tmp_path / "link" / "demo-moe"))
    assert all("not analysed here yet" in told(ViewState(), text) for text in written)
    state, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, *VALUES)
    run = context.require_run(state)
    assert all(f"<p>run {run.name}</p>" in told(state, text) for text in written)
    assert f"begun in run {run.name}" in told(ViewState(), written[1])
    run.log.append("finished", "1", result={})
    assert all(f"analysed in run {run.name}: open it below" in told(ViewState(), text) for text in written)


@pytest.mark.parametrize(("text", "words"), [
    ("no/such", "hub cannot be asked for it"), ("/etc", "neither a model folder"), ("   ", "o model is named"), (None, "o model is named"),
    ("a" * 300, "neither a model folder"),
])
def test_a_refused_name_leaves_no_card_of_another_model(context: Context, text: str | None, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        facts, card, needs = model._probe(context)(ViewState("tiny-00000001"), text, *FIELDS)
    assert (facts, needs) == (None, "")
    assert words in card
    assert "Run tiny-00000001 is still chosen." in card
    with pytest.warns(UserWarning, match=words):
        assert "still" not in model._probe(context)(ViewState(), text, *FIELDS)[1]


def test_a_folder_that_holds_no_model_is_called_by_its_name(context: Context, tmp_path: Path) -> None:
    (tmp_path / "models" / "empty").mkdir(parents=True)
    (tmp_path / "models" / "bare").mkdir()
    (tmp_path / "models" / "bare" / "config.json").write_text('{"model_type": "mixtral"}')
    here = Context(replace(context.settings, models=(tmp_path / "models",)))
    for name, words in (
        ("empty", "o config.json in empty: this is no model folder"), ("bare", "are: holds neither model.safetensors nor"),
        (str(tmp_path / "models" / "bare"), "are: holds neither"),
    ):
        with pytest.warns(UserWarning, match=words) as warned:
            card = model._probe(here)(ViewState(), name, *FIELDS)[1]
        assert words in card
        assert str(tmp_path) not in card + str(warned[0].message), "where models lie on the machine is nobody's business"
        with pytest.raises(InputError, match=words) as raised:
            model._analyse(here)(ViewState(), name, ["auto"], False, *VALUES)
        assert str(tmp_path) not in str(raised.value)


def test_what_is_written_while_something_is_looked_up_counts_too(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks:
        model.build(context)
    names = {block["id"]: block["props"].get("elem_id") or block["props"].get("label") for block in blocks.config["components"]}
    asked = ["model-name", "Text", *model._NAMES.values(), "Plan for"]
    events = {names[place]: event for event in blocks.config["dependencies"] for place, kind in event["targets"] if kind == "input"}
    assert {events[name]["trigger_mode"] for name in asked} == {"always_last"}
    assert len({events[name]["id"] for name in asked[1:]}) == 1, "what was written last in any of them is what counts"


def test_a_name_that_no_path_can_have_is_no_model_of_a_run(context: Context) -> None:
    state, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, *VALUES)
    assert "Memory to analyse" in model._needs(context)(state, "a" * 300, inspect(ASSETS / "demo-moe").as_dict(), *FIELDS)


def test_an_empty_field_says_what_is_used(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False):
        _, *numbers, _ = model._fields(context)
    usual = model.calibration_of(context, ("sotu", None, None, None, None))
    assert [field.placeholder for field in numbers] == [str(usual.samples), "the model's", str(usual.seed), str(usual.batch)]


def test_an_analysis_is_asked_for_once(context: Context) -> None:
    state, clock = model._analyse(context)(ViewState(), "demo-moe", ["svd", "auto"], True, *VALUES)
    status = context.status(state)
    assert status is not None
    assert (status.job.action, status.state) == ("analyze", "queued")
    assert dict(status.job.arguments) == {"methods": ["auto", "svd"], "probe": True}, "the default method is what is measured"
    assert clock.active
    with pytest.raises(InputError, match="at work already"):
        model._analyse(context)(state, "demo-moe", ["auto"], False, *VALUES)


def test_the_run_shows_its_model_before_a_worker_has_looked_at_it(context: Context) -> None:
    state, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, "sotu", 7, 64, 3, 2)
    filled, name, facts, card, needs, *fields = model._run_shown(context)(state, None, ["auto"])
    assert filled == (state.run, True)
    assert name.value == "demo-moe"
    assert facts["layers"] == 8
    assert state.run in card
    assert "Memory to analyse" in needs
    assert fields == ["sotu", 7, 64, 3, 2]


def test_what_is_written_while_a_job_ends_stays(context: Context) -> None:
    """Its end brings new figures, and no other model or calibration than the fields were given when the run was opened."""
    state, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, *VALUES)
    shown = model._run_shown(context)
    filled, *_ = shown(state, None, ["auto"])
    assert all(part["__type__"] == "update" for part in shown(state, filled, ["auto"]))
    assert len(shown(state, filled, ["auto"])) == len(shown(state, None, ["auto"])) == len(shown(ViewState(), filled, ["auto"]))
    assert "No model is chosen" in shown(ViewState(), filled, ["auto"])[3]
    identity = Identity("hub-1", "owner/name", {"samples": 1}, "2026-01-01T00:00:00+00:00")
    unknown = RunFolder.create(context.settings.runs / "hub-1", identity)
    first, *_, card = shown(ViewState(unknown.name), None, ["auto"])[:4]
    assert "once the worker has looked at it" in card
    (unknown.path / "source.json").write_text((SHIPPED / "source.json").read_text())
    filled, name, facts, card, needs, *fields = shown(ViewState(unknown.name), first, ["auto"])
    assert "16.3 M" in card and facts and needs
    assert all(part["__type__"] == "update" for part in (name, *fields)), "which may have been written in meanwhile"
    assert all(part["__type__"] == "update" for part in shown(ViewState(unknown.name), filled, ["auto"]))


def test_what_it_takes_is_of_the_methods_that_would_be_planned(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = inspect(ASSETS / "demo-moe").as_dict()
    asked: list[Estimate] = []
    monkeypatch.setattr(model, "needs_html", lambda facts, needed, *_: asked.append(needed) or "")
    for methods in (["auto"], list(model.PLANNED), list(METHODS)):
        model._needs(context)(ViewState(), "demo-moe", facts, *VALUES, methods)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "require", lambda needed, *_: asked.append(needed))
        for methods in (["auto"], list(model.PLANNED), list(METHODS)):
            run = prepare(str(ASSETS / "demo-moe"), model.calibration_of(context, VALUES), root=context.settings.runs)
            stages._started(run, silent, *methods, text=Text())
    assert asked[:3] == asked[3:], "what the job would be refused for"
    assert asked[0].run_disk < asked[1].run_disk < asked[2].run_disk


def test_what_the_run_has_already_is_not_asked_for_again(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = inspect(ASSETS / "demo-moe").as_dict()
    asked: list[Estimate] = []
    monkeypatch.setattr(model, "needs_html", lambda facts, needed, *_: asked.append(needed) or "")
    state, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, *VALUES)
    model._needs(context)(state, "demo-moe", facts, *FIELDS)
    (context.require_run(state).station("statistics") / "statistics.json").write_text("{}")
    model._needs(context)(state, "demo-moe", facts, *FIELDS)
    model._needs(context)(state, "demo-moe", facts, "sotu", 3, None, 0, 1, ["auto"])  # which would be another run
    assert asked[1].run_disk < asked[0].run_disk < asked[2].run_disk


def test_a_method_that_is_ticked_brings_what_it_takes_anew(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks:
        model.build(context)
    names = {block["id"]: block["props"].get("elem_id") or block["props"].get("label") for block in blocks.config["components"]}
    (methods,) = [place for place, name in names.items() if name == "Plan for"]
    (ticked,) = [event for event in blocks.config["dependencies"] if (methods, "input") in [tuple(target) for target in event["targets"]]]
    assert [names[place] for place in ticked["outputs"]] == ["model-needs"]
    assert methods in ticked["inputs"]


def needs(facts: dict[str, Any], machine_now: machine.Machine, download: int = 0) -> str:
    return model_facts.needs_html(facts, Estimate(memory=10**9, run_disk=3 * 10**9, export_disk=0, flops=1), 60.0, machine_now, download)


def test_a_comparison_takes_what_the_live_model_is_refused_for(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = inspect(ASSETS / "demo-moe").as_dict()
    for free in (live.live_memory(facts["bytes"]) - 1, live.live_memory(facts["bytes"])):
        monkeypatch.setattr(machine, "free_for_models", lambda free=free: free)
        monkeypatch.setattr(live, "free_for_models", lambda free=free: free)
        told = needs(facts, machine.look(context.settings.runs)).partition("Memory to compare")[2].partition("</dd>")[0]
        assert f"of {text.size(free)} free" in told
        assert ("does not fit" in told) is not live.fits(facts["bytes"])
    card = machine.Machine(2, 8 * 10**9, 8 * 10**9, 80 * 10**9, 8 * 10**9, ("H100",))
    assert "80.0 GB free" in needs(facts, card).partition("Memory to compare")[2]
    assert "on the graphics card" in needs(facts, card)


def test_a_download_counts_as_far_as_the_cache_lacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**inspect(ASSETS / "demo-moe").as_dict(), "bytes": 5 * 10**9}
    assert machine.download_bytes(facts) == 0, "it is a folder of this machine"
    facts["source"] = "owner/name"
    monkeypatch.setattr(machine, "cached_model", lambda name: None)
    assert machine.download_bytes(facts) == 5 * 10**9
    (tmp_path / "model-1.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(machine, "cached_model", lambda name: tmp_path)
    assert machine.download_bytes(facts) == 5 * 10**9 - 1000
    here = machine.Machine(2, 8 * 10**9, 8 * 10**9, 8 * 10**9, 7 * 10**9)
    told = needs(facts, here, 5 * 10**9).partition("Disk to analyse")[2]
    assert "8.00 GB of 7.00 GB free <strong>does not fit: 1.00 GB short" in told
    assert "5.00 GB to download, then statistics" in told
    assert "Disk to download" not in told
    told = needs(facts, replace(here, hub_free=4 * 10**9), 5 * 10**9)
    assert "3.00 GB of 7.00 GB free" in told.partition("Disk to analyse")[2]
    assert "5.00 GB of 4.00 GB free <strong>does not fit: 1.00 GB short" in told.partition("Disk to download")[2]
    assert "download" not in needs(facts, here)


@pytest.mark.parametrize(("values", "words"), [
    (("/etc/passwd", 2, None, 0, 1), "nor a data set"),
    ((f"{'x' * 300}.txt", 2, None, 0, 1), "nor a data set"),
    (("sotu", 0, None, 0, 1), "“Windows” must be a whole number of at least 1 windows, got 0"),
    (("sotu", 2, 1, 0, 1), "“Tokens a window” must be a whole number of at least 2 tokens, got 1"),
    (("sotu", 2, 100_000, 0, 1), r"“Tokens a window” must be in \[2, 256\] tokens for this model, got 100000: give one in that range"),
])
def test_settings_that_cannot_be_used_are_explained(context: Context, values: tuple[object, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, *values)
    assert not list(context.settings.runs.iterdir())


def test_a_model_that_nobody_can_tell_of_leaves_no_run(context: Context) -> None:
    """Tests are offline: whether there is one of that name is not known, and said so."""
    with pytest.raises(InputError, match="'no/such' is no model folder, and the hub cannot be asked for it"):
        model._analyse(context)(ViewState(), "no/such", ["auto"], False, *VALUES)
    assert not list(context.settings.runs.iterdir())


def test_an_analysis_goes_on_with_the_run_that_is_shown_whatever_it_was_calibrated_with(context: Context) -> None:
    made = model.calibration_of(context, VALUES, {"drawn_labels": 0, "gradient_samples": 1})
    run = prepare(str(ASSETS / "demo-moe"), made, root=context.settings.runs)
    shown = ViewState(run.name)
    state, _ = model._analyse(context)(shown, "demo-moe", ["auto"], False, *VALUES)
    assert state.run == run.name
    others, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, *VALUES)
    assert others.run != run.name, "where no run is shown, everything is as usual"
    facts = inspect(ASSETS / "demo-moe").as_dict()
    assert model._needs(context)(shown, "demo-moe", facts, *FIELDS) != model._needs(context)(ViewState(), "demo-moe", facts, *FIELDS)
    shutil.rmtree(run.path)
    assert model._needs(context)(shown, "demo-moe", facts, *FIELDS) == model._needs(context)(ViewState(), "demo-moe", facts, *FIELDS)


def test_half_a_window_is_refused_and_not_rounded(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False):
        fields = model._fields(context)[:-1]
    for index in range(1, 5):
        values = tuple(field.preprocess(1.5 + index if place == index else VALUES[place]) for place, field in enumerate(fields))
        with pytest.raises(InputError, match=f"must be a whole number of at least .*, got {1.5 + index}"):
            model._analyse(context)(ViewState(), "demo-moe", ["auto"], False, *values)


def test_the_field_of_the_text_says_all_that_it_understands(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False):
        told = model._fields(context)[0].info
    for words in ("sotu comes with the program, and is read where this is empty", ".txt, .jsonl or .parquet file under assets", "hub"):
        assert words in told
    assert model.calibration_of(context, ("", 2, None, 0, 1)).dataset == "sotu"
    long = f"{'n' * 90}:{'c' * 90}@{'s' * 90}"  # which no file can be called
    assert model.calibration_of(context, (long, 2, None, 0, 1)).dataset == long


def test_at_least_one_method_is_planned_for(context: Context) -> None:
    with pytest.raises(InputError, match="no method is chosen"):
        model._analyse(context)(ViewState(), "demo-moe", [], False, *VALUES)


def test_the_list_of_runs_links_escapes_and_names_no_folder(context: Context) -> None:
    assert "No runs yet" in model.runs_html(context, ViewState())
    run = new_run(context.settings.runs)
    assert isinstance(run, RunFolder)
    (context.settings.runs / "broken").mkdir()
    (context.settings.runs / "broken" / "run.json").write_text("{")
    made = model.runs_html(context, ViewState("tiny-00000001"))
    assert 'href="./?run=tiny-00000001&amp;method=auto&amp;ratio=0.4"' in made
    assert made.count("class=chosen") == 1
    assert "broken/run.json is damaged" in made
    assert str(context.settings.runs) not in made


def test_a_run_of_a_name_that_no_path_can_have_takes_no_other_from_the_list(context: Context) -> None:
    new_run(context.settings.runs)
    RunFolder.create(context.settings.runs / "long-1", Identity("long-1", "a" * 300, {"samples": 1}, "2026-01-01T00:00:00+00:00"))
    made = model.runs_html(context, ViewState())
    assert "long-1" in made and "tiny-00000001" in made


def test_two_runs_of_one_model_and_calibration_are_linked_by_their_folders(context: Context) -> None:
    first = new_run(context.settings.runs)
    RunFolder.create(context.settings.runs / "mine", first.identity)
    made = model.runs_html(context, ViewState("mine"))
    assert made.count('href="./?run=tiny-00000001&amp;') == made.count('href="./?run=mine&amp;') == made.count("class=chosen") == 1


@pytest.mark.parametrize("allowed", [False, True])
def test_a_run_that_is_opened_brings_no_code_in(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    """run.json may come from anybody: it cannot allow what whoever started the server did not."""
    asked = list[bool]()
    monkeypatch.setattr(model, "inspect", lambda path, trust_remote_code: asked.append(trust_remote_code) or inspect(ASSETS / "demo-moe"))
    trusting = Context(replace(context.settings, remote_code=allowed))
    identity = Identity("a-1", str(ASSETS / "demo-moe"), {"samples": 1}, "2026-01-01T00:00:00+00:00", remote_code=True)
    run = RunFolder.create(trusting.settings.runs / "a-1", identity)
    model._run_shown(trusting)(ViewState(run="a-1"), None, ["auto"])
    assert asked == ([True] if allowed else [])
    if not allowed:
        with pytest.raises(RunError, match="say --allow-remote-code"):
            trusting.live_model(run)
        with pytest.raises(RunError, match="say --allow-remote-code"):
            trusting.client.submit(run, "plan")
