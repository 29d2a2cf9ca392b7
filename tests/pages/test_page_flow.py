"""One flow: address -> state -> header and views; and what happens to it when things go wrong."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from runs.run_helpers import new_run

from moesvd_core import atomic
from moesvd_core.errors import InputError
from moesvd_core.runs.client import Client
from pages.components import handler, page
from pages.components.context import Context, PageLink
from pages.components.header import draw as draw_header
from pages.components.page import Page
from pages.components.session import ViewState
from pages.components.settings import Settings

SKIP = gr.skip()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was shown over the page as a warning."""
    sentences: list[str] = []
    monkeypatch.setattr(handler.gr, "Warning", lambda message, **_: sentences.append(message))
    return sentences


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was shown over the page as an error."""
    sentences: list[str] = []
    monkeypatch.setattr(handler, "log_message", lambda message, *, title, level: sentences.append(f"{level} {message}"))
    return sentences


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Settings(runs=tmp_path), (PageLink("Model", "/"), PageLink("Ratio", "/ratio")))


@pytest.fixture
def laid_out(context: Context) -> Iterator[tuple[Page, list[ViewState]]]:
    """A page with one view that depends on the layer alone, and the states it was drawn for."""
    drawn: list[ViewState] = []
    with gr.Blocks(analytics_enabled=False), Page(context, "Ratio", "Purpose") as made:
        box = gr.HTML()
        made.view(lambda state: drawn.append(state) or f"layer {state.layer}", [box], fields=("layer",))
    yield made, drawn


def opened(made: Page, **query: str) -> list[Any]:
    return made._open(SimpleNamespace(query_params=query))


def test_a_page_opens_on_the_newest_run(laid_out: tuple[Page, list[ViewState]], context: Context, said: list[str]) -> None:
    new_run(context.settings.runs)
    state, _, _, head, timer, _, view = opened(laid_out[0])
    assert state.run == "tiny-00000001"
    assert "tiny-00000001" in head
    assert view == "layer None"
    assert not timer.active
    assert said == []


def test_without_runs_a_page_still_opens(laid_out: tuple[Page, list[ViewState]]) -> None:
    assert opened(laid_out[0])[0] == ViewState()


def test_a_run_that_is_gone_is_told_without_a_path(laid_out: tuple[Page, list[ViewState]], context: Context, said: list[str]) -> None:
    state = opened(laid_out[0], run="gone-1", ratio="7")[0]
    assert state.run == ""
    assert len(said) == 2
    assert "gone-1 is not here" in said[1]
    assert str(context.settings.runs) not in "".join(said)


def test_a_layer_that_the_model_has_not_is_told_and_leaves_the_address(
    laid_out: tuple[Page, list[ViewState]], context: Context, said: list[str]
) -> None:
    run = new_run(context.settings.runs)
    assert opened(laid_out[0], run=run.name, layer="99")[0].layer == 99, "nothing is known of the model yet"
    facts = {"expert_layers": [{"index": 1}, {"index": 3}]}
    atomic.write_json(run.path / "source.json", {"path": "tiny", "fingerprint": "1", "facts": facts})
    assert opened(laid_out[0], run=run.name, layer="3")[0].layer == 3
    assert said == []
    for layer in ("99", "2"):
        state = opened(laid_out[0], run=run.name, layer=layer)[0]
        assert (state.run, state.layer) == (run.name, None)
        assert "layer=" not in state.query
        assert f"layer must be one of this model&#x27;s in [1, 3], with experts, got {layer}" in said.pop()


def test_only_views_of_changed_fields_are_drawn_again(laid_out: tuple[Page, list[ViewState]], context: Context) -> None:
    made, drawn = laid_out
    new_run(context.settings.runs)
    state, shown, *_ = opened(made)
    drawn.clear()
    assert made._follow(state, shown)[-1] == SKIP
    assert made._follow(state.but(ratio=0.1), shown)[-1] == SKIP
    assert made._follow(state.but(layer=2), shown)[-1] == "layer 2"
    assert [each.layer for each in drawn] == [2]


def test_views_are_drawn_again_when_a_job_has_ended(laid_out: tuple[Page, list[ViewState]], context: Context) -> None:
    made, drawn = laid_out
    run = new_run(context.settings.runs)
    state, shown, *_ = opened(made)
    run.log.append("submitted", "1", action="analyze", arguments={})
    run.log.append("finished", "1", result={})
    drawn.clear()
    assert made._tick(state, shown)[0] == 1
    assert made._follow(state, shown)[-1] == "layer None"
    assert len(drawn) == 1


def test_a_run_that_was_deleted_in_another_tab_is_told_once_and_shown_no_more(
    laid_out: tuple[Page, list[ViewState]], context: Context, said: list[str]
) -> None:
    made, drawn = laid_out
    run = new_run(context.settings.runs)
    state, shown, *_ = opened(made, run=run.name, layer="3")
    context.client.delete(run)
    drawn.clear()
    now, _, head, timer, _, view = made._follow(state.but(ratio=0.1), shown)
    assert len(said) == 1
    assert "tiny-00000001 is not here: it was deleted" in said[0]
    assert [each.run for each in drawn] == [""]
    assert (view, timer.active) == ("layer None", False)
    assert "tiny-00000001" not in head
    assert made._follow(state.but(ratio=0.1), now)[-1] == SKIP, "nothing is drawn anew for it"


def test_a_clock_that_goes_on_tells_once_of_a_run_that_is_gone(
    laid_out: tuple[Page, list[ViewState]], context: Context, said: list[str]
) -> None:
    made, _ = laid_out
    run = new_run(context.settings.runs)
    state, shown, ended, *_ = opened(made, run=run.name)
    context.client.delete(run)
    changed, head, *_ = made._tick(state, shown)
    assert changed != ended, "which draws all views, and tells"
    assert run.name not in head
    now, ended, *_ = made._follow(state, shown)
    assert len(said) == 1
    assert made._follow(state, now)[0] == SKIP
    for _ in range(3):
        assert made._tick(state, now)[0] == ended
    assert len(said) == 1


def clocks(made: Page, state: ViewState) -> list[bool]:
    """Whether the clock of the run's own work goes, and the slow one."""
    return [timer.active for timer in made._tick(state, page._Shown(state))[2:4]]


def test_a_slow_clock_goes_while_others_work_and_on_a_page_that_watches_them(context: Context) -> None:
    own, other = (new_run(context.settings.runs, name) for name in ("own-00000001", "other-00000001"))
    drawn: list[str] = []
    with gr.Blocks(analytics_enabled=False), Page(context, "Ratio", "Purpose") as plain:
        pass
    with gr.Blocks(analytics_enabled=False), Page(context, "Model", "Purpose") as watching:
        watching.watches(lambda state, status: drawn.append(state.run) or "", [gr.HTML()])
    state = ViewState(run=own.name)
    assert (clocks(plain, state), clocks(watching, state), drawn) == ([False, False], [False, True], [own.name])
    client = Client(context.settings.runs, launch=lambda run: None)
    client.submit(other, "analyze")
    assert clocks(plain, state) == clocks(watching, state) == [False, True]
    client.submit(own, "analyze")
    assert clocks(plain, state) == clocks(watching, state) == [True, False]
    for run in (own, other):
        client.cancel(run)
    assert (clocks(plain, state), clocks(watching, state)) == ([False, False], [False, True])


def test_both_clocks_draw_the_same(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks, Page(context, "Model", "Purpose") as made:
        made.watches(lambda state, status: "", [gr.HTML()])
    triggers = [[tuple(target) for target in event["targets"]] for event in blocks.config["dependencies"]]
    (ticking,) = [targets for targets in triggers if (made.wake._id, "tick") in targets]
    assert (made._glance._id, "tick") in ticking


def test_errors_become_sentences(said: list[str], broken: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> None:
        raise InputError("ratio must be in [0, 1), got <b>9</b>")

    def stream() -> Iterator[str]:
        yield "first"
        raise ZeroDivisionError("secret detail")

    assert handler.explained(refuse)() == SKIP
    assert list(handler.explained(stream)()) == ["first", SKIP]
    assert said == ["ratio must be in [0, 1), got &lt;b&gt;9&lt;/b&gt;"]
    assert broken == ["error unexpected ZeroDivisionError: the server&#x27;s log has the details"], "which is no mild warning"
    assert "secret detail" in caplog.text


def test_a_page_needs_an_app(context: Context) -> None:
    with pytest.raises(RuntimeError, match="inside"):
        with Page(context, "Ratio", "Purpose"):
            pass


def test_links_carry_the_view_and_names_are_escaped(context: Context) -> None:
    state = ViewState("tiny-00000001", 2, "latent", 0.5)
    run = new_run(context.settings.runs)
    made = draw_header(context, "Ratio", "<b>", state, context.client.status(run))
    assert 'href="./ratio?run=tiny-00000001&amp;layer=2&amp;method=latent&amp;ratio=0.5" aria-current=page' in made
    assert "<b>" not in made


def test_the_clock_is_slow_enough_for_many_sessions() -> None:
    assert page.TICK_SECONDS >= 2
    assert page.SLOW_SECONDS >= 5 * page.TICK_SECONDS
