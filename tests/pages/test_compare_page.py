"""The handlers of the compare page on a tiny model, without a browser."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from runs.run_helpers import new_run
from runs.tiny_runs import TEXT, analysed_tiny_run, do

from moesvd_core import atomic
from moesvd_core.errors import InputError, MoesvdError, RunError
from moesvd_core.evaluation.generation import Sampling, answer
from moesvd_core.planning import Recipe
from moesvd_core.runs.client import Client
from moesvd_core.runs.jobs import read_jobs
from moesvd_core.runs.process import this_process
from moesvd_core.runs.votes import read_votes
from pages import compare
from pages.components.context import Context
from pages.components.rounds import Round
from pages.components.session import ViewState
from pages.components.settings import Settings

RUN = "run"
EVIL = "<img src=x onerror=alert(1)>"
SETTINGS = (12, 0.9, 0.95, 3, False)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """One analysed run; workers are not started."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    analysed_tiny_run(root / RUN)
    context = Context(Settings(runs=root))
    object.__setattr__(context, "client", Client(root, launch=lambda run: None))
    return context


def state(**changes: Any) -> ViewState:
    return ViewState(**{"run": RUN, "ratio": 0.3, **changes})


def asked(context: Context, prompt: str = "once upon a time", *, blind: bool = False, view: ViewState | None = None) -> Round:
    *_, last = compare._ask(context)(view or state(), prompt, blind, *SETTINGS)
    assert isinstance(last[0], Round)
    return last[0]


def test_both_answers_are_those_of_the_models_with_this_seed(context: Context) -> None:
    now = asked(context)
    live = context.live.of(context.client.open(RUN))
    expected = [
        list(answer(model, live.tokenizer, "once upon a time", Sampling(*SETTINGS)))[-1].tokens
        for model in (live.original, live.apply(live.plan(Recipe(ratio=0.3))))
    ]
    assert now.original is not None
    assert now.compressed is not None
    assert [now.original.tokens, now.compressed.tokens] == expected
    assert now.weights[0] > now.weights[1]
    assert now.over


def test_answers_come_as_they_are_written(context: Context) -> None:
    frames = list(compare._ask(context)(state(), "once upon a time", False, *SETTINGS))
    assert "Loading the model" in frames[0][1]
    assert all(len(frame) == 4 + len(compare.CHOICES) for frame in frames)
    assert 'aria-busy="false"' in frames[-1][2]


def test_another_ratio_gives_another_model(context: Context) -> None:
    small, large = asked(context, view=state(ratio=0.1)), asked(context, view=state(ratio=0.4))
    assert small.original is not None
    assert large.original is not None
    assert small.original.tokens == large.original.tokens
    assert small.weights[1] > large.weights[1]


def blind_round(context: Context) -> Round:
    """A blind round whose answers differ."""
    for prompt in ("once upon a time", "my fellow", "tonight", "the people", "we"):
        now = asked(context, prompt, blind=True, view=state(ratio=0.4))
        if now.open:
            return now
    raise AssertionError("the compressed model answers all prompts as the original does")


def test_a_vote_is_kept_in_the_run_and_told_at_once(context: Context) -> None:
    run, now = context.client.open(RUN), blind_round(context)
    before = len(read_votes(run))
    after, told, left, _, *rest = compare._cast(context, "left")(now)
    votes = read_votes(run)
    assert len(votes) == before + 1
    assert votes[-1].preferred == now.left
    assert (votes[-1].method, votes[-1].ratio) == ("auto", 0.4)
    assert "You preferred" in told
    assert {"A: Original" in left, "A: Compressed" in left} == {True, False}
    *buttons, table = rest
    assert not any(button.interactive for button in buttons)
    assert "auto 40 %" in table
    with pytest.raises(InputError, match="nothing to vote on"):
        compare._cast(context, "left")(after)
    with pytest.raises(InputError, match="ask blind first"):
        compare._cast(context, "left")(None)
    assert len(read_votes(run)) == before + 1


def test_the_answers_are_ended_before_it_is_shown_that_they_were_stopped(context: Context) -> None:
    """A token that came behind it would be shown as one of an answer that goes on."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        compare.build(context)
    (stop,) = [block["id"] for block in blocks.config["components"] if block["props"].get("elem_id") == "stop"]
    pressed = [event for event in blocks.config["dependencies"] if (stop, "click") in [tuple(target) for target in event["targets"]]]
    ending, showing = ([place for place, event in enumerate(pressed) if event[what]] for what in ("cancels", "backend_fn"))
    assert len(ending) == len(showing) == 1
    assert ending < showing


def test_a_round_that_was_stopped_carries_no_vote(context: Context) -> None:
    now = blind_round(context)
    assert now.original is not None
    cut = replace(now, original=replace(now.original, finished=""))
    stopped, told, *_ = compare._stopped(cut)
    assert "Stopped" in told
    assert not stopped.open
    assert compare._stopped(None)[0] is None


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ("  ", SETTINGS, "must not be empty"),
        ("word " * 2000, SETTINGS, "fewer than"),
        ("x" * 1_000_000, SETTINGS, "at most 100,000 characters, got 1,000,000"),
        ("x", (None, 0.9, 0.95, 3, False), "a field under"),
        ("x", (0, 0.9, 0.95, 3, False), r"“Tokens” must be in \[1, 4096\], got 0"),
        ("x", (2.5, 0.9, 0.95, 3, False), "“Tokens” must be a whole number of at least 1, got 2.5"),
        ("x", (5, 0.9, 0.95, 2.5, False), "“Seed” must be a whole number of at least 0, got 2.5"),
        ("x", (5, -1, 0.95, 3, False), "“Temperature” must be in"),
        ("x", (5, float("nan"), 0.95, 3, False), "“Temperature” must be in"),
        ("x", (5, 0.9, 0, 3, False), "“Top p” must be in"),
        ("x", (5, 0.9, 0.95, -1, False), "“Seed” must be a whole number of at least 0, got -1"),
        ("x", (5, 0.9, 0.95, 10**20, False), "“Seed” must be at most 4,294,967,295, got 100,000,"),
        ("x", (5, 0.9, 0.95, 3, True), "no chat template"),
    ],
)
def test_what_cannot_be_asked_is_explained(context: Context, prompt: str, settings: tuple[Any, ...], words: str) -> None:
    frames: list[tuple[Any, ...]] = []
    with pytest.raises(InputError, match=words):
        for frame in compare._ask(context)(state(), prompt, False, *settings):
            frames.append(frame)
    assert frames[-1][:2] == (None, "")  # nothing is loaded or waited for any more


def test_a_run_without_analysis_is_explained(context: Context, tmp_path: Path) -> None:
    new_run(context.settings.runs, "fresh-1")
    with pytest.raises(RunError, match="no statistics yet"):
        list(compare._ask(context)(state(run="fresh-1"), "x", False, *SETTINGS))
    with pytest.raises(MoesvdError, match="no run is chosen"):
        compare._score(context)(ViewState(), "some words")


def test_the_server_decomposes_for_nobody(context: Context) -> None:
    run = context.client.open(RUN)
    before = {path.name for path in (run.path / "factors").iterdir()}
    for ask in (lambda view: list(compare._ask(context)(view, "x", False, *SETTINGS)), lambda view: compare._score(context)(view, "a b c")):
        with pytest.raises(InputError, match="svd is not planned yet: press “Plan this method” on the Ratio page first"):
            ask(state(method="svd"))
        with pytest.raises(InputError, match=r"ratio must be in \[0, 0\.\d+\] for auto on this model, got 0.99"):
            ask(state(ratio=0.99))
    assert {path.name for path in (run.path / "factors").iterdir()} == before
    frames: list[Any] = []
    with pytest.raises(InputError):
        frames += compare._ask(context)(state(method="svd"), "x", False, *SETTINGS)
    assert all("Loading" not in frame[1] for frame in frames)


def test_a_run_at_work_says_that_what_is_needed_is_being_made(context: Context) -> None:
    run = new_run(context.settings.runs, "busy-00000001")
    for action, arguments, words in (
        ("similarity", {}, "no statistics yet: press “Analyse” on the Model page"),
        ("analyze", {"methods": ["svd"]}, r"are still being made \(.+\): ask again when that is done"),
    ):
        run.log.append("submitted", str(len(read_jobs(run.log)) + 1), action=action, arguments=arguments)
        with pytest.raises(RunError, match=words):
            list(compare._ask(context)(state(run=run.name), "x", False, *SETTINGS))
    (run.station("statistics") / "statistics.json").write_text("{}")
    with pytest.raises(RunError, match=r"svd is still being planned \(.+\): ask again when that is done"):
        compare._score(context)(state(run=run.name, method="svd"), "a b c")
    with pytest.raises(InputError, match="owl is not planned yet"):
        compare._score(context)(state(run=run.name, method="owl"), "a b c")


def test_time_left_is_told_with_what_is_being_made(context: Context) -> None:
    run = new_run(context.settings.runs, "busy-00000002")
    atomic.write_json(run.worker_file, this_process().as_dict())
    run.log.append("submitted", "1", action="analyze", arguments={})
    run.log.append("started", "1")
    for done in (1, 2, 3):
        run.log.append("progress", "1", stage="calibrate", done=done, total=4, message="")
    with pytest.raises(RunError, match=r"are still being made \(calibrate 75 %, \d+ s left in this stage\)"):
        compare._score(context)(state(run=run.name), "a b c")


def test_a_text_is_coloured_token_by_token(context: Context) -> None:
    text = f"my fellow {EVIL} we the people"
    shown = compare._score(context)(state(ratio=0.4), text)
    assert "<img" not in shown
    assert "Perplexity, compressed" in shown
    tokens = context.live.of(context.client.open(RUN)).tokenizer(text)["input_ids"]
    assert shown.partition("scored-legend")[0].partition('class="scored"')[2].count("<span class=") == len(tokens) - 1
    for text, words in (("", "text must have 2 to"), ("x" * 1_000_000, "at most 100,000 characters")):
        with pytest.raises(InputError, match=words):
            compare._score(context)(state(), text)


def test_a_measurement_is_asked_of_the_worker_and_shown(context: Context) -> None:
    run = context.client.open(RUN)
    for evil in ("/etc/passwd", "../run.json"):
        with pytest.raises(InputError, match="nor a data set"):
            compare._measure(context)(state(), evil, 4)
    for windows in (2.5, 0):
        with pytest.raises(InputError, match=f"“Windows” must be a whole number of at least 1, got {windows}"):
            compare._measure(context)(state(), "sotu", windows)
    with pytest.raises(InputError, match=r"ratio must be in \[0, 0\.\d+\] for auto on this model, got 0.99"):
        compare._measure(context)(state(ratio=0.99), "sotu", 4)
    assert compare._measure(context)(state(), "sotu", 4).active
    status = context.client.status(run)
    assert status.job is not None
    assert dict(status.job.arguments) == {
        "recipe": Recipe(ratio=0.3).as_dict(), "text": {"dataset": "sotu", "windows": 4, "length": None},
    }
    context.client.cancel(run)
    compare._measure(context)(state(), "sotu", None)
    status = context.client.status(run)
    assert status.job is not None
    assert status.job.arguments["text"]["windows"] == 64, "as the empty field says, and not the whole text"
    context.client.cancel(run)
    do(run, "measure", recipe=Recipe(ratio=0.3).as_dict(), text=TEXT)
    shown = compare._measured(context, state())
    assert "auto 3" in shown
    assert "class=chosen" in shown


def test_an_empty_field_says_what_is_used(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks:
        compare.build(context)
    (windows,) = [block["props"] for block in blocks.config["components"] if block["props"].get("label") == "Windows"]
    assert (windows["value"], windows["placeholder"]) == (64, "64")


def test_prompts_suit_the_model(context: Context) -> None:
    assert tuple(pick.value for pick in compare._prompts(context)(state())) == compare.PROMPTS
    assert tuple(pick.value for pick in compare._prompts(context)(ViewState())) == compare.DEMO_PROMPTS
