"""Compare: original and compressed answer the same prompt side by side; a text coloured by what changed; figures on data; blind votes."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from moesvd_core.errors import InputError
from moesvd_core.evaluation.generation import Sampling, side_by_side, warm_up
from moesvd_core.evaluation.speed import weight_bytes
from moesvd_core.evaluation.text_scores import token_scores
from moesvd_core.runs.known import measurements, refuse_unreachable
from moesvd_core.runs.votes import add_vote, read_votes
from moesvd_core.runs.workbench import Text
from pages.components import answers, jobs, token_colors
from pages.components.context import Context
from pages.components.live_recipe import live_recipe
from pages.components.measured import measured_html
from pages.components.numbers import named
from pages.components.page import QUIET, Page
from pages.components.places import DEMO_MODEL
from pages.components.recipe_controls import RecipeControls, recipe_of
from pages.components.rounds import CHOICES, Round, drawn
from pages.components.session import ViewState
from pages.components.text import empty, notice, recipe_name
from pages.components.vote_parts import votes_html

DEMO_PROMPTS = (
    "My fellow Americans, tonight", "Once upon a time there was", "The state of our Union is", "It was a cold evening in the winter of",
)
PROMPTS = (
    "The three most important inventions of the last century are", "Once upon a time there was", "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain because",
)
SCORED = (
    "My fellow Americans, tonight I can report to you that the state of our Union is strong. We have created new jobs, and we have "
    "cut the deficit. But there is much more to do, and we will do it together."
)
LONGEST = 100_000
"""Characters of a prompt or a text; the fields of the page end there, but fields can be forged."""
FRAME_SECONDS = 0.08
_NAMES = {"new_tokens": "Tokens", "temperature": "Temperature", "top_p": "Top p", "seed": "Seed", "windows": "Windows"}
"""Of numbers: setting -> field."""
_HEAVY: Mapping[str, Any] = {**QUIET, "concurrency_id": "gpu", "concurrency_limit": 1}


def build(context: Context) -> None:
    """Lay out the page."""
    with Page(context, "Compare", "Original and compressed, asked the same with the same seed.") as page:
        round_ = gr.State(None)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=7, min_width=300):
                prompt = gr.Textbox(DEMO_PROMPTS[0], label="Prompt", lines=2, max_lines=8, max_length=LONGEST, elem_id="prompt")
                with gr.Row(elem_classes="picks"):
                    picks = [gr.Button(text, size="sm", min_width=60) for text in DEMO_PROMPTS]
            with gr.Column(scale=5, min_width=300):
                RecipeControls(page)
                with gr.Row(elem_classes="actions"):
                    ask = gr.Button("Ask both", variant="primary", elem_id="ask", min_width=140)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80, scale=0)
                    blind = gr.Checkbox(False, label="Blind", elem_id="blind", min_width=90, scale=0)
                settings = _settings()
        told = gr.HTML("", elem_id="told", min_height=44)
        with gr.Row(elem_classes="answers"):
            left = gr.HTML(answers.panel("Original", kind="original"), elem_id="left")
            right = gr.HTML(answers.panel("Compressed", kind="compressed"), elem_id="right")
        with gr.Row(visible=False, elem_classes="votes") as ballot:
            names = ("A is better", "No difference", "B is better")
            buttons = [gr.Button(name, interactive=False, elem_id=f"vote-{choice}") for name, choice in zip(names, CHOICES, strict=True)]
        with gr.Tabs():
            with gr.Tab("A given text"):
                text = gr.Textbox(SCORED, label="Text", lines=3, max_lines=12, max_length=LONGEST, elem_id="scored-text")
                score = gr.Button("Colour by change", elem_id="score", scale=0, min_width=180)
                scored = gr.HTML(_nothing_scored(), elem_id="scored", min_height=200)
            with gr.Tab("Figures on data"):
                with gr.Row(elem_classes="columns"):
                    with gr.Column(scale=4, min_width=280):
                        dataset = gr.Textbox("sotu", label="Text", info=context.text_help)
                        windows = gr.Number(Text.windows, label=_NAMES["windows"], placeholder=str(Text.windows))
                        measure = gr.Button("Measure this plan", elem_id="measure")
                    with gr.Column(scale=8, min_width=300):
                        jobs.Panel(page)
                measured = gr.HTML("", elem_id="measured")
            with gr.Tab("Blind votes"):
                votes = gr.HTML("", elem_id="votes", min_height=160)

        page.view(_prompts(context), picks, fields=("run",))
        page.view(lambda state: _measured(context, state), [measured], fields=("run", "method", "ratio", "flops_ratio"))
        page.view(lambda state: _votes(context, state), [votes], fields=("run",))
        for pick in picks:
            pick.click(lambda text: text, pick, prompt, **QUIET)
        blind.input(lambda on: gr.Row(visible=on), blind, ballot, **QUIET)
        shown = [round_, told, left, right, *buttons]
        waiting = [told, *buttons]
        asked = gr.on([ask.click, prompt.submit], lambda: (notice("Waiting for the model."), *_closed()), None, waiting, **QUIET)
        running = asked.then(page.changes(_ask(context)), [page.state, prompt, blind, *settings], shown, **_HEAVY)
        stop.click(None, cancels=[running], **QUIET)  # first: what would come behind the last word would take its place
        stop.click(page.changes(_stopped), round_, shown, **QUIET)
        for choice, button in zip(CHOICES, buttons, strict=True):
            button.click(page.changes(_cast(context, choice)), round_, [*shown, votes], **QUIET)
        score.click(page.changes(_score(context)), [page.state, text], scored, **{**_HEAVY, "show_progress": "minimal"})
        measure.click(page.changes(_measure(context)), [page.state, dataset, windows], page.wake, **QUIET)


def _settings() -> list[Any]:
    """What decides an answer: length, temperature, top-p, seed, chat template."""
    with gr.Accordion("How to answer", open=False):
        with gr.Row():
            tokens = gr.Number(96, label=_NAMES["new_tokens"], min_width=90)
            temperature = gr.Number(0.7, label=_NAMES["temperature"], step=0.1, min_width=90)
            top_p = gr.Number(0.95, label=_NAMES["top_p"], step=0.05, min_width=90)
            seed = gr.Number(0, label=_NAMES["seed"], min_width=90)
        chat = gr.Checkbox(False, label="Use the tokenizer's chat template")
    return [tokens, temperature, top_p, seed, chat]


def _ask(context: Context) -> Callable[..., Any]:
    def ask(*asked: Any) -> Iterator[tuple[Any, ...]]:
        """Both answers as they come, some ten times a second; after a question that is refused nothing is waited for any more."""
        try:
            yield from answered(*asked)
        except Exception:
            yield _round_shown(None)
            raise

    def answered(state: ViewState, prompt: str, blind: bool, *settings: Any) -> Iterator[tuple[Any, ...]]:
        if None in settings:
            raise InputError("tokens, temperature, top p and seed must be numbers: a field under “How to answer” is empty")
        with named(_NAMES):
            sampling = Sampling(*settings)
        _refuse_long("prompt", prompt)
        run, recipe = live_recipe(context, state)
        yield None, notice("Loading the model."), gr.skip(), gr.skip(), *_closed()
        live = context.live_model(run)
        model = live.apply(live.plan(recipe))
        warm_up([live.original, model], live.tokenizer, prompt, sampling)
        weights = weight_bytes(live.original), weight_bytes(model)
        left = drawn() if blind else "original"
        now = Round(run.name, recipe_name(recipe), recipe.ratio, prompt, sampling, left, blind, weights)
        last = 0.0
        for original, compressed in side_by_side([live.original, model], live.tokenizer, prompt, sampling):
            now = now.reached(original, compressed, live.tokenizer)
            if now.over or time.monotonic() - last >= FRAME_SECONDS:
                last = time.monotonic()
                yield _round_shown(now)

    return ask


def _refuse_long(name: str, text: str) -> None:
    if len(text) > LONGEST:
        raise InputError(f"{name} must have at most {LONGEST:,} characters, got {len(text):,}: shorten it")


def _round_shown(now: Round | None) -> tuple[Any, ...]:
    if now is None:
        return (None, "", gr.skip(), gr.skip(), *_closed())
    told = now.told()
    return (now, notice(told) if told else "", *now.panels(), *(gr.Button(interactive=now.open) for _ in CHOICES))


def _closed() -> list[Any]:
    return [gr.Button(interactive=False) for _ in CHOICES]


def _stopped(now: Round | None) -> tuple[Any, ...]:
    """The round as it was when the visitor had seen enough."""
    return _round_shown(None if now is None else replace(now, stopped=True))


def _cast(context: Context, choice: str) -> Callable[..., Any]:
    def cast(now: Round | None) -> tuple[Any, ...]:
        """Write the vote down, then tell whose answer was whose."""
        if now is None:
            raise InputError("there is nothing to vote on: ask blind first")
        context.require_rights()
        vote = now.vote(choice)
        run = context.client.open(now.run)
        context.client.require_own(run)
        add_vote(run, vote)
        return (*_round_shown(replace(now, judged=vote.preferred)), votes_html(read_votes(run)))

    return cast


def _score(context: Context) -> Callable[..., Any]:
    def score(state: ViewState, text: str) -> str:
        """The text coloured by what compression changed."""
        _refuse_long("text", text)
        run, recipe = live_recipe(context, state)
        live = context.live_model(run)
        model = live.apply(live.plan(recipe))
        scores = token_scores(model, live.original, live.tokenizer, text)
        first = live.tokenizer.decode(live.tokenizer(text, verbose=False)["input_ids"][:1], skip_special_tokens=True)
        return f"{token_colors.summary(scores)}{token_colors.colored(scores, str(first))}{token_colors.table(scores)}"

    return score


def _nothing_scored() -> str:
    advice = "Both models read the text above; each word is coloured by how much less or more probable it became."
    return empty("No text was scored yet", advice)


def _measure(context: Context) -> Callable[..., Any]:
    def measure(state: ViewState, dataset: str, windows: Any) -> Any:
        """Ask the worker to measure the view's plan; an empty field has its usual value, and not all windows of the text."""
        run = context.require_run(state)
        with named(_NAMES):
            text = Text(dataset=context.find_text(dataset), windows=Text.windows if windows is None else windows)
        refuse_unreachable(run, recipe_of(state))
        context.client.submit(run, "measure", recipe=recipe_of(state).as_dict(), text=vars(text))
        return gr.Timer(active=True)

    return measure


def _prompts(context: Context) -> Callable[[ViewState], Any]:
    def prompts(state: ViewState) -> tuple[Any, ...]:
        """Prompts that suit the run's model: the demo model writes in the style of two kinds of books."""
        run = context.open(state)
        demo = run is None or context.model_name(run.identity.model).rpartition("/")[2] == DEMO_MODEL
        return tuple(gr.Button(text) for text in (DEMO_PROMPTS if demo else PROMPTS))

    return prompts


def _measured(context: Context, state: ViewState) -> str:
    run = context.open(state)
    return measured_html([] if run is None else measurements(run), recipe_of(state))


def _votes(context: Context, state: ViewState) -> str:
    run = context.open(state)
    return votes_html([] if run is None else read_votes(run))
