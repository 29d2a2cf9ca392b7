"""Who asks, and what a tab looks at whose state the server has forgotten."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.context import LocalContext
from runs.run_helpers import new_run

from moesvd_core.runs.folder import Identity, RunFolder
from pages import compare, ratio
from pages.components import handler, reach
from pages.components.context import Context
from pages.components.handler import explained
from pages.components.session import ViewState
from pages.components.settings import Settings
from pages.components.visitor import remembered, visitor

HERS = "hers-00000001"


@pytest.fixture
def bob() -> Iterator[None]:
    """An event of Bob, from a page whose address names a run."""
    asked = SimpleNamespace(username="bob", query_params={"run": HERS, "layer": "2", "ratio": "0.3", "__theme": "dark"})
    token = LocalContext.request.set(asked)  # type: ignore[arg-type]
    yield
    LocalContext.request.reset(token)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """With a run of Ann."""
    RunFolder.create(tmp_path / HERS, Identity(HERS, "tiny", {"samples": 1}, "2026-01-01T00:00:00+00:00", owner="ann"))
    return Context(Settings(runs=tmp_path))


def test_without_a_login_there_is_no_name() -> None:
    assert visitor() == ""
    assert remembered(ViewState()) == ViewState()


@pytest.mark.usefixtures("bob")
def test_a_forgotten_view_is_that_of_the_address() -> None:
    assert visitor() == "bob"
    assert remembered(ViewState()) == ViewState(run=HERS, layer=2, ratio=0.3)
    known = ViewState(run="other-1", method="svd")
    assert remembered(known) == known
    assert explained(lambda state: state.but(layer=5))(ViewState()) == ViewState(run=HERS, layer=5, ratio=0.3)
    assert remembered(ViewState(run="deleted-1", ratio=0.2).without_run()) == ViewState(ratio=0.2), "and not the run that is gone"


@pytest.mark.usefixtures("bob")
def test_who_looks_at_the_run_of_another_adds_nothing_to_it(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(handler.gr, "Warning", lambda message, **_: said.append(message))
    monkeypatch.setattr(reach, "reach", lambda run, method: 0.8)
    monkeypatch.setattr(ratio, "answers_at_once", lambda context, run: True)
    before = sorted(path for path in context.settings.runs.rglob("*"))
    words, by_job = ratio._measured(context)(ViewState(run=HERS))
    assert "belongs to ann" in words
    assert not by_job.interactive
    assert ratio._measure_at_once(context)(ViewState(run=HERS), words) == (gr.skip(), gr.skip(), gr.skip())
    round_ = SimpleNamespace(run=HERS, vote=lambda choice: SimpleNamespace(preferred="original"))
    explained(compare._cast(context, "left"))(round_)
    explained(ratio._measure(context))(ViewState(run=HERS))
    assert len(said) == 2
    assert all("belongs to ann, who alone changes it" in sentence for sentence in said)
    assert sorted(path for path in context.settings.runs.rglob("*")) == before


@pytest.mark.usefixtures("bob")
def test_a_run_of_nobody_is_everybody_s(context: Context) -> None:
    new_run(context.settings.runs)
    assert context.client.owns(context.client.open("tiny-00000001"))
    assert not context.client.owns(context.client.open(HERS))
