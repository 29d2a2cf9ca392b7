"""Deleting from the list of runs, without a browser: who may, what is said before, and what is shown after."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.context import LocalContext
from run_exports import NAME, add_export
from runs.run_helpers import new_run

from moesvd_core.errors import InputError, MoesvdError, RunError
from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.folder import Identity, RunFolder
from pages import model
from pages.components import tables
from pages.components.context import Context
from pages.components.page import Page
from pages.components.run_deletion import RunDeletion
from pages.components.session import ViewState
from pages.components.settings import Settings

OLD, NEW = "tiny-00000001", "tiny-00000002"
DELETES = '<button type="button" class="quiet" data-row="{0}" aria-label="Delete run {0}">Delete</button>'


def deletion_of(context: Context) -> RunDeletion:
    with gr.Blocks(analytics_enabled=False), Page(context, "Model", "Purpose") as page:
        return RunDeletion(page, tables.pressed_in("runs"), lambda state: model.runs_html(context, state))


def pressed(run: object) -> gr.SelectData:
    return gr.SelectData(None, {"index": 0, "value": run})


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Two runs of nobody, the second one newer."""
    new_run(tmp_path, OLD)
    RunFolder.create(tmp_path / NEW, Identity(NEW, "tiny", {"samples": 1}, "2026-02-01T00:00:00+00:00"))
    made = Context(Settings(runs=tmp_path))
    object.__setattr__(made, "client", Client(tmp_path, launch=lambda run: None))
    return made


@pytest.fixture
def as_bob() -> Iterator[None]:
    token = LocalContext.request.set(SimpleNamespace(username="bob", query_params={}))  # type: ignore[arg-type]
    yield
    LocalContext.request.reset(token)


def test_every_run_of_ones_own_has_a_button(context: Context) -> None:
    (context.settings.runs / "broken").mkdir()
    (context.settings.runs / "broken" / "run.json").write_text("{")
    made = model.runs_html(context, ViewState())
    assert all(DELETES.format(name) in made for name in (OLD, NEW))
    assert made.count("<tr>") == 4
    assert made.count("data-row") == 2, "a damaged run has no name to delete it by"


def test_the_question_says_what_goes(context: Context) -> None:
    add_export(context.client.open(OLD), size=3_000_000)
    asked, box, question = deletion_of(context)._ask(pressed(OLD))
    assert (asked, box.visible) == (OLD, True)
    assert f"Delete run {OLD} of tiny? 3.00 MB go with it: its analysis, 1 export. Nothing brings them back." in question
    assert 'role="alert"' in question
    assert context.client.open(OLD)


def test_the_run_that_is_shown_gives_way_to_another(context: Context) -> None:
    state, runs, asked, box, question = deletion_of(context)._delete(ViewState(NEW, layer=3, method="svd", ratio=0.2), NEW)
    assert state == ViewState(OLD, method="svd", ratio=0.2)
    assert (NEW in runs, OLD in runs) == (False, True)
    assert (asked, box.visible, question) == ("", False, "")
    assert [status.id for status in context.client.runs()] == [OLD]


def test_a_deleted_run_s_model_leaves_the_memory(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(context.live, "forget", lambda run: forgotten.append(run.name))
    deletion_of(context)._delete(ViewState(NEW), OLD)
    assert forgotten == [OLD]


def test_another_run_than_the_one_that_is_shown_changes_the_list_alone(context: Context) -> None:
    before = ViewState(NEW, layer=3)
    state, runs, *_ = deletion_of(context)._delete(before, OLD)
    assert state is before
    assert OLD not in runs


def test_without_the_last_run_the_page_is_as_at_the_start(context: Context) -> None:
    deletion = deletion_of(context)
    state, *_ = deletion._delete(ViewState(NEW), NEW)
    state, runs, *_ = deletion._delete(state, OLD)
    assert state == ViewState()
    assert "No runs yet" in runs


@pytest.mark.parametrize("name", ["", "../outside", "gone-1", "<img src=x>", None, {"run": OLD}])
def test_what_is_no_run_is_not_asked_about(context: Context, name: object) -> None:
    with pytest.raises(MoesvdError, match=r"no run is chosen|run gone-1 is not here|run must be an id|run None is not here"):
        deletion_of(context)._ask(pressed(name))


@pytest.mark.parametrize(("asked", "words"), [("", "press Delete beside one first"), ("gone-1", "run gone-1 is not here")])
def test_what_was_not_asked_about_is_not_deleted(context: Context, asked: str, words: str) -> None:
    """The server has forgotten the tab since, or the run was deleted in another one."""
    with pytest.raises(MoesvdError, match=words):
        deletion_of(context)._delete(ViewState(NEW), asked)
    assert len(context.client.runs()) == 2


def test_a_run_at_work_stays(context: Context) -> None:
    enqueue(context.client.open(OLD), "analyze", {})
    for act in (lambda deletion: deletion._ask(pressed(OLD)), lambda deletion: deletion._delete(ViewState(), OLD)):
        with pytest.raises(RunError, match="is at work: cancel it before"):
            act(deletion_of(context))
    assert len(context.client.runs()) == 2


def test_a_run_stays_while_an_export_of_it_is_pushed(context: Context) -> None:
    import threading

    run, released = context.client.open(OLD), threading.Event()
    export = add_export(run)
    context.pushes.start(run.path / "exports" / NAME, "owner/name", lambda: str(released.wait(20)))
    with pytest.raises(RunError, match="is being pushed to the hub: wait"):
        deletion_of(context)._delete(ViewState(), OLD)
    assert export.is_dir()
    deletion_of(context)._ask(pressed(NEW))
    released.set()


@pytest.mark.usefixtures("as_bob")
def test_a_run_of_another_login_or_of_everybody_has_no_button_and_stays(tmp_path: Path) -> None:
    for name, owner in (("hers-1", "ann"), ("his-1", "bob"), ("ours-1", "")):
        RunFolder.create(tmp_path / name, Identity(name, "tiny", {"samples": 1}, "2026-01-01T00:00:00+00:00", owner=owner))
    context = Context(Settings(runs=tmp_path))
    made = model.runs_html(context, ViewState())
    assert [DELETES.format(name) in made for name in ("hers-1", "his-1", "ours-1")] == [False, True, False]
    deletion = deletion_of(context)
    for act in (lambda: deletion._ask(pressed("hers-1")), lambda: deletion._delete(ViewState(), "hers-1")):
        with pytest.raises(RunError, match="belongs to ann, who alone changes it"):
            act()
    with pytest.raises(RunError, match="is everybody's, and no login deletes from it"):
        deletion._delete(ViewState(), "ours-1")
    deletion._delete(ViewState(), "his-1")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["hers-1", "ours-1"]


def test_a_public_demo_deletes_nothing(context: Context) -> None:
    demo = Context(replace(context.settings, public_demo=True))
    assert "data-row" not in model.runs_html(demo, ViewState())
    deletion = deletion_of(demo)
    for act in (lambda: deletion._ask(pressed(OLD)), lambda: deletion._delete(ViewState(), OLD)):
        with pytest.raises(InputError, match="public demo"):
            act()
    with pytest.raises(InputError, match="public demo"):
        demo.client.delete(demo.client.open(OLD))
    assert len(demo.client.runs()) == 2
