"""Where a finished analysis leads."""

from pathlib import Path

from runs.run_helpers import new_run

import app
from pages.components import answers, next_steps, sensitivity_figures
from pages.components.context import Context, PageLink
from pages.components.session import ViewState
from pages.components.settings import Settings


def test_every_other_page_is_named_with_what_it_answers() -> None:
    assert set(next_steps.ANSWERS) == {path for _, path, _ in app.PAGES} - {"/"}


def test_pages_are_offered_once_there_is_something_to_see_and_keep_the_view(tmp_path: Path) -> None:
    context = Context(Settings(runs=tmp_path), tuple(PageLink(title, path) for title, path, _ in app.PAGES))
    run = new_run(tmp_path)
    state = ViewState(run=run.identity.id, layer=3, ratio=0.25)
    assert next_steps.html(context, ViewState(), None) == ""
    run.log.append("submitted", "1", action="analyze", arguments={})
    assert next_steps.html(context, state, context.status(state)) == ""
    run.log.append("started", "1")
    run.log.append("finished", "1", result={})
    shown = next_steps.html(context, state, context.status(state))
    assert shown.count("<a ") == len(next_steps.ANSWERS)
    assert f'href="./ratio?run={run.identity.id}&amp;layer=3' in shown
    assert "ratio=0.25" in shown


def test_an_answer_that_nobody_asked_for_says_how_to_have_one() -> None:
    assert "Press “Ask both”" in answers.panel("Original", kind="original")
    assert "Press" not in answers.panel("Original", "my fellow", kind="original")


def test_every_metric_is_explained() -> None:
    told = sensitivity_figures.glossary()
    assert all(f"<dt>{metric.title}</dt>" in told for metric in sensitivity_figures.METRICS.values())
