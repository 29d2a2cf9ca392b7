"""The handlers of the first page, without a browser."""

import shutil
from pathlib import Path

import gradio as gr
import pytest
from runs.run_helpers import new_run

from moesvd_core.architectures.inspect import inspect
from moesvd_core.errors import InputError
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.source import prepare
from pages import model
from pages.components.context import Context
from pages.components.session import ViewState
from pages.components.settings import Settings

ASSETS = Path(__file__).parents[2] / "assets"
VALUES = ("sotu", 2, None, 0, 1)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Declared is the folder of the demo model; workers are not started."""
    made = Context(Settings(runs=tmp_path / "runs", models=(ASSETS,)))
    made.settings.runs.mkdir()
    object.__setattr__(made, "client", Client(made.settings.runs, launch=lambda run: None))
    return made


def test_a_probe_tells_facts_and_needs(context: Context) -> None:
    facts, card, needs = model._probe(context)(ViewState(), "demo-moe", *VALUES)
    assert facts["experts"] == 8
    assert "16.3 M" in card
    assert "one layer at a time" in needs


def test_a_probe_finds_the_runs_of_a_model_however_it_is_written(context: Context, tmp_path: Path) -> None:
    def told(state: ViewState, text: str) -> str:
        return model._probe(context)(state, text, *VALUES)[1]

    (tmp_path / "link").symlink_to(ASSETS)
    written = ("demo-moe", str(ASSETS / "demo-moe"), str(tmp_path / "link" / "demo-moe"))
    assert all("not analysed here yet" in told(ViewState(), text) for text in written)
    state, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], *VALUES)
    run = context.require_run(state)
    assert all(f"<p>run {run.name}</p>" in told(state, text) for text in written)
    assert f"begun in run {run.name}" in told(ViewState(), written[1])
    run.log.append("finished", "1", result={})
    assert all(f"analysed in run {run.name}: open it below" in told(ViewState(), text) for text in written)


@pytest.mark.parametrize(("text", "words"), [
    ("no/such", "hub cannot be asked for it"), ("/etc", "neither a model folder"), ("   ", "o model is named"), (None, "o model is named"),
])
def test_a_refused_name_leaves_no_card_of_another_model(context: Context, text: str | None, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        facts, card, needs = model._probe(context)(ViewState("tiny-00000001"), text, *VALUES)
    assert (facts, needs) == (None, "")
    assert words in card
    assert "Run tiny-00000001 is still chosen." in card
    with pytest.warns(UserWarning, match=words):
        assert "still" not in model._probe(context)(ViewState(), text, *VALUES)[1]


def test_a_name_counts_that_is_written_while_another_is_looked_up(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks:
        model.build(context)
    (name,) = [block["id"] for block in blocks.config["components"] if block["props"].get("elem_id") == "model-name"]
    (looking,) = [event for event in blocks.config["dependencies"] if (name, "input") in [tuple(target) for target in event["targets"]]]
    assert looking["trigger_mode"] == "always_last"


def test_an_analysis_is_asked_for_once(context: Context) -> None:
    state, clock = model._analyse(context)(ViewState(), "demo-moe", ["auto"], *VALUES)
    status = context.status(state)
    assert status is not None
    assert (status.job.action, dict(status.job.arguments), status.state) == ("analyze", {"methods": ["auto"]}, "queued")
    assert clock.active
    with pytest.raises(InputError, match="at work already"):
        model._analyse(context)(state, "demo-moe", ["auto"], *VALUES)


def test_the_run_shows_its_model_before_a_worker_has_looked_at_it(context: Context) -> None:
    state, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], "sotu", 7, 64, 3, 2)
    name, facts, card, needs, *fields = model._run_shown(context)(state)
    assert name.value == "demo-moe"
    assert facts["layers"] == 8
    assert state.run in card
    assert "Memory to analyse" in needs
    assert fields == ["sotu", 7, 64, 3, 2]


@pytest.mark.parametrize(("values", "words"), [
    (("/etc/passwd", 2, None, 0, 1), "nor a data set"),
    (("sotu", 0, None, 0, 1), "“Windows” must be a whole number of at least 1 windows, got 0"),
    (("sotu", 2, 1, 0, 1), "“Tokens a window” must be a whole number of at least 2 tokens, got 1"),
    (("sotu", 2, 100_000, 0, 1), r"“Tokens a window” must be in \[2, 256\] tokens for this model, got 100000: give one in that range"),
])
def test_settings_that_cannot_be_used_are_explained(context: Context, values: tuple[object, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        model._analyse(context)(ViewState(), "demo-moe", ["auto"], *values)
    assert not list(context.settings.runs.iterdir())


def test_a_model_that_nobody_can_tell_of_leaves_no_run(context: Context) -> None:
    """Tests are offline: whether there is one of that name is not known, and said so."""
    with pytest.raises(InputError, match="'no/such' is no model folder, and the hub cannot be asked for it"):
        model._analyse(context)(ViewState(), "no/such", ["auto"], *VALUES)
    assert not list(context.settings.runs.iterdir())


def test_an_analysis_goes_on_with_the_run_that_is_shown_whatever_it_was_calibrated_with(context: Context) -> None:
    made = model.calibration_of(context, VALUES, {"drawn_labels": 0, "gradient_samples": 1})
    run = prepare(str(ASSETS / "demo-moe"), made, root=context.settings.runs)
    shown = ViewState(run.name)
    state, _ = model._analyse(context)(shown, "demo-moe", ["auto"], *VALUES)
    assert state.run == run.name
    others, _ = model._analyse(context)(ViewState(), "demo-moe", ["auto"], *VALUES)
    assert others.run != run.name, "where no run is shown, everything is as usual"
    facts = inspect(ASSETS / "demo-moe").as_dict()
    assert model._needs(context)(shown, "demo-moe", facts, *VALUES) != model._needs(context)(ViewState(), "demo-moe", facts, *VALUES)
    shutil.rmtree(run.path)
    assert model._needs(context)(shown, "demo-moe", facts, *VALUES) == model._needs(context)(ViewState(), "demo-moe", facts, *VALUES)


def test_half_a_window_is_refused_and_not_rounded(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False):
        fields = model._fields(context)[:-1]
    for index in range(1, 5):
        values = tuple(field.preprocess(1.5 + index if place == index else VALUES[place]) for place, field in enumerate(fields))
        with pytest.raises(InputError, match=f"must be a whole number of at least .*, got {1.5 + index}"):
            model._analyse(context)(ViewState(), "demo-moe", ["auto"], *values)


def test_the_field_of_the_text_says_all_that_it_understands(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False):
        told = model._fields(context)[0].info
    for words in ("sotu comes with the program, and is read where this is empty", ".txt, .jsonl or .parquet file under assets", "hub"):
        assert words in told
    assert model.calibration_of(context, ("", 2, None, 0, 1)).dataset == "sotu"


def test_at_least_one_method_is_planned_for(context: Context) -> None:
    with pytest.raises(InputError, match="no method is chosen"):
        model._analyse(context)(ViewState(), "demo-moe", [], *VALUES)


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


def test_two_runs_of_one_model_and_calibration_are_linked_by_their_folders(context: Context) -> None:
    first = new_run(context.settings.runs)
    RunFolder.create(context.settings.runs / "mine", first.identity)
    made = model.runs_html(context, ViewState("mine"))
    assert made.count('href="./?run=tiny-00000001&amp;') == made.count('href="./?run=mine&amp;') == made.count("class=chosen") == 1
