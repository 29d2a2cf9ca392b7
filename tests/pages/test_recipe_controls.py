"""One ratio is shown, planned and in the address: at most what the method reaches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from planned_run import RUN, add_curves, planned_run

from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import reach
from pages import compare, export, ratio
from pages.components.context import Context
from pages.components.page import Page
from pages.components.reach import reach_percent, within_reach
from pages.components.recipe_controls import RecipeControls, recipe_of
from pages.components.session import ViewState
from pages.components.settings import Settings


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Settings(runs=tmp_path / "runs"))


@pytest.fixture
def run(context: Context) -> RunFolder:
    return planned_run(context.settings.runs)


def events(blocks: gr.Blocks, place: int, kind: str) -> list[Any]:
    """Handlers of a component's event."""
    return [made.fn for made in blocks.fns.values() if (place, kind) in made.targets]


def test_a_view_asks_for_no_more_than_its_method_reaches(run: RunFolder) -> None:
    most = reach_percent(run, "svd")
    assert most is not None and most == int(100 * (reach(run, "svd") or 0)) < 77
    asked = ViewState(run=RUN, method="svd", ratio=0.77, layer=1)
    assert within_reach(run, asked) == asked.but(ratio=most / 100)
    for kept in (asked.but(ratio=0.2), asked.but(method="owl")):  # within reach, and of a method whose reach is not known
        assert within_reach(run, kept) == kept


def test_operations_are_saved_at_most_as_far_as_can_be(run: RunFolder) -> None:
    add_curves(run, "auto")
    bounded = within_reach(run, ViewState(run=RUN, flops_ratio=0.99)).flops_ratio
    assert bounded is not None and bounded < 0.99
    assert within_reach(run, ViewState(run=RUN, flops_ratio=0.2)).flops_ratio == 0.2


@pytest.mark.parametrize("build", [ratio.build, compare.build, export.build])
def test_on_every_page_a_chosen_method_brings_the_ratio_within_its_reach(context: Context, run: RunFolder, build: Any) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks:
        build(context)
    (method,) = [block._id for block in blocks.blocks.values() if getattr(block, "elem_id", None) in ("recipe-method", "ratio-method")]
    (choose,) = events(blocks, method, "input")
    with pytest.warns(UserWarning, match="svd removes at most"):
        chosen = choose(ViewState(run=RUN, ratio=0.77), "svd")
    assert chosen == ViewState(run=RUN, method="svd", ratio=(reach_percent(run, "svd") or 0) / 100)
    assert choose(ViewState(ratio=0.77), "svd").ratio == 0.77


@pytest.mark.parametrize("build", [compare.build, export.build])
def test_no_slider_has_a_button_that_moves_it_and_nothing_else(context: Context, build: Any) -> None:
    """Gradio draws one to reset a slider, of which no event tells, unless it is given a list of none."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        build(context)
    drawn = [block["props"]["buttons"] for block in blocks.config["components"] if block["type"] == "slider"]
    assert drawn == [[], []]


def test_an_address_that_asks_for_too_much_is_opened_within_reach(context: Context, run: RunFolder) -> None:
    add_curves(run, "auto")
    with gr.Blocks(analytics_enabled=False), Page(context, "Similarity", "Purpose") as page:
        pass
    most = (reach_percent(run, "svd") or 0) / 100
    with pytest.warns(UserWarning, match=rf"ratio must be in \[0, {most:g}\], got 0.77: svd removes at most {100 * most:.0f} %"):
        state = page._open(SimpleNamespace(query_params={"run": RUN, "method": "svd", "ratio": "0.77"}))[0]
    with pytest.warns(UserWarning, match=r"flops_ratio must be in \[0, 0\.\d+\], got 0\.99: auto saves at most \d+ %"):
        page._open(SimpleNamespace(query_params={"run": RUN, "ratio": "0.2", "flops_ratio": "0.99"}))
    assert state == ViewState(run=RUN, method="svd", ratio=most)
    assert f"ratio={most:g}" in page._look(state)[2]


def test_a_view_whose_method_turns_out_to_reach_less_is_brought_within_reach(context: Context, run: RunFolder) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks, Page(context, "Export", "Purpose") as page:
        controls = RecipeControls(page)
    beyond = page._views[1]
    state = ViewState(run=RUN, method="svd", ratio=0.77)
    assert beyond.values(state) == [state]
    (bring,) = events(blocks, beyond.outputs[0]._id, "change")
    brought = bring(state)
    assert brought == state.but(ratio=(reach_percent(run, "svd") or 0) / 100)
    assert beyond.values(brought) == [None]
    assert recipe_of(brought).ratio == brought.ratio == controls._values(brought)[1].value / 100
