"""Deleting one export, without a browser: the run stays with the others."""

import threading
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from run_exports import NAME, add_export
from runs.run_helpers import new_run

from moesvd_core.errors import InputError, MoesvdError, ResourceError, RunError
from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.exports import list_exports
from moesvd_core.runs.folder import Identity, RunFolder
from pages import export
from pages.components.context import Context
from pages.components.export_deletion import ExportDeletion
from pages.components.page import Page
from pages.components.session import ViewState
from pages.components.settings import Settings

OTHER = "tiny-auto-20-dense"
RUN = "tiny-00000001"
VIEW = ViewState(RUN)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """With two exports."""
    made = new_run(tmp_path)
    add_export(made, size=2_000_000)
    add_export(made, OTHER)
    return made


@pytest.fixture
def context(run: RunFolder) -> Context:
    made = Context(Settings(runs=run.path.parent))
    object.__setattr__(made, "client", Client(run.path.parent, launch=lambda run: None))
    return made


def deletion_of(context: Context) -> ExportDeletion:
    with gr.Blocks(analytics_enabled=False), Page(context, "Export", "Purpose") as page:
        return ExportDeletion(page, gr.Dropdown([]), export._listed(context))


def names(run: RunFolder) -> list[str]:
    return sorted(each.name for each in list_exports(run))


def test_the_question_says_what_goes_and_what_stays(context: Context, run: RunFolder) -> None:
    asked, box, question = deletion_of(context)._ask(VIEW, NAME)
    assert (asked, box.visible) == (NAME, True)
    assert f"Delete export {NAME}? 2.00 MB in 4 files go with it; the run stays" in question
    assert names(run) == sorted([NAME, OTHER])


def test_a_deleted_export_leaves_the_others(context: Context, run: RunFolder) -> None:
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and NAME not in str(path)}
    choice, asked, box, question = deletion_of(context)._delete(VIEW, NAME)
    assert ([value for _, value in choice.choices], choice.value) == ([OTHER], OTHER)
    assert (asked, box.visible, question) == ("", False, "")
    left = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert left == {path: content for path, content in kept.items() if path.name != ".lock"}
    choice, *_ = deletion_of(context)._delete(VIEW, OTHER)
    assert (choice.choices, choice.value, choice.visible) == ([], None, False)


@pytest.mark.parametrize("lost", ["README.md", "SHA256SUMS", "moesvd.json"])
def test_a_damaged_export_is_deleted_like_any_other(context: Context, run: RunFolder, lost: str) -> None:
    (run.path / "exports" / NAME / lost).unlink()
    asked, _, question = deletion_of(context)._ask(VIEW, NAME)
    assert asked == NAME and f"Delete export {NAME}? 2.00 MB in 3 files go with it" in question
    choice, *_ = deletion_of(context)._delete(VIEW, NAME)
    assert ([value for _, value in choice.choices], names(run)) == ([OTHER], [OTHER])
    assert not (run.path / "exports" / NAME).exists()


@pytest.mark.parametrize("name", ["", "gone", "../exports", "..", ".hidden", "<img src=x>"])
def test_what_is_no_export_is_not_deleted(context: Context, run: RunFolder, name: str) -> None:
    for act in (deletion_of(context)._ask, deletion_of(context)._delete):
        with pytest.raises(MoesvdError, match=r"has no export|no export is to be deleted"):
            act(VIEW, name)
    assert names(run) == sorted([NAME, OTHER])


def test_an_export_that_is_written_anew_stays_and_the_others_need_not(context: Context, run: RunFolder) -> None:
    enqueue(run, "export", {"output": str((run.path / "exports" / NAME).absolute())})
    with pytest.raises(RunError, match="is being written anew: wait"):
        deletion_of(context)._ask(VIEW, NAME)
    with pytest.raises(RunError, match="is being written anew: wait"):
        context.client.delete_export(run, NAME)
    deletion_of(context)._delete(VIEW, OTHER)
    assert names(run) == [NAME]


def test_an_export_that_is_pushed_stays_and_the_others_need_not(context: Context, run: RunFolder) -> None:
    released = threading.Event()
    context.pushes.start(run.path / "exports" / NAME, "owner/name", lambda: str(released.wait(20)))
    with pytest.raises(RunError, match="is being pushed to the hub: wait"):
        deletion_of(context)._delete(VIEW, NAME)
    deletion_of(context)._delete(VIEW, OTHER)
    assert names(run) == [NAME]
    released.set()


def test_only_whose_run_it_is_deletes_from_it(run: RunFolder) -> None:
    root = run.path.parent
    hers = RunFolder.create(root / "hers-1", Identity("hers-1", "tiny", {"samples": 1}, "2026-01-01T00:00:00+00:00", owner="ann"))
    add_export(hers)
    bob = Client(root, who=lambda: "bob")
    for place, words in ((hers, "belongs to ann"), (run, "is everybody's")):
        with pytest.raises(RunError, match=words):
            bob.delete_export(place, NAME)
    Client(root, who=lambda: "ann").delete_export(hers, NAME)
    assert (names(hers), names(run)) == ([], sorted([NAME, OTHER]))


def test_a_public_demo_has_no_button_and_deletes_nothing(context: Context, run: RunFolder) -> None:
    demo = Context(replace(context.settings, public_demo=True))
    labels = []
    for each in (context, demo):
        with gr.Blocks(analytics_enabled=False) as blocks:
            export.build(each)
        labels.append("Delete this export" in [block.value for block in blocks.blocks.values() if isinstance(block, gr.Button)])
    assert labels == [True, False]
    for act in (lambda: deletion_of(demo)._delete(VIEW, NAME), lambda: demo.client.delete_export(run, NAME)):
        with pytest.raises(InputError, match="public demo"):
            act()
    assert names(run) == sorted([NAME, OTHER])


def test_an_export_is_never_half_there(context: Context, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where removing its files fails, its name is gone already; the next deletion takes the rest away."""
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as broken:
        broken.setattr("shutil.rmtree", refuse)
        with pytest.raises(ResourceError, match=r"cannot be deleted \(Permission denied\): remove it by hand"):
            context.client.delete_export(run, NAME)
    assert names(run) == [OTHER]
    assert len(list((run.path / "exports").iterdir())) == 2
    add_export(run)
    context.client.delete_export(run, NAME)
    assert [path.name for path in (run.path / "exports").iterdir()] == [OTHER]
