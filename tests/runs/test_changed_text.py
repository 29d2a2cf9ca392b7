"""A text file that was changed is another text, although its name is the same."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import CALIBRATION, RECIPE, TEXT, do, tiny_run

from moesvd_core.calibration.text import load_texts, text_version
from moesvd_core.errors import RunError
from moesvd_core.runs.workbench import Text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("we the people of this state. " * 200, encoding="utf-8")
    return path


def test_files_have_versions_and_nothing_else_has(file: Path) -> None:
    before = text_version(str(file))
    assert len(before) == 8 and text_version(str(file)) == before
    file.write_text("other words", encoding="utf-8")
    assert text_version(str(file)) not in ("", before)
    assert [text_version(name) for name in ("sotu", "owner/set", str(file.parent / "none.txt"))] == ["", "", ""]
    assert load_texts(str(file)) == ["other words"]


def test_figures_on_a_changed_file_are_measured_again_and_older_ones_are_gone(file: Path, tmp_path: Path) -> None:
    run, text = tiny_run(tmp_path / "run"), {**TEXT, "dataset": str(file)}
    first = do(run, "measure", recipe=RECIPE, text=text)
    assert do(run, "measure", recipe=RECIPE, text=text).result == first.result
    assert do(run, "measure", recipe=RECIPE, text=TEXT).state == "finished"  # on another text: stays
    kept = {each.name for each in run.station("evaluations").glob("*--sotu-*")}
    earlier = Text(**text).key
    file.write_text("nothing of what was said before holds any more. " * 200, encoding="utf-8")
    again = do(run, "measure", recipe=RECIPE, text=text)
    assert again.state == "finished", again.error
    assert again.result["file"] != first.result["file"]
    assert run.read_json(*again.result["file"].split("/"))["perplexity"] > 0
    names = {each.name for each in run.station("evaluations").iterdir()}
    assert kept <= names and not [name for name in names if earlier in name]


def test_a_run_is_of_the_text_that_it_was_calibrated_on(file: Path, tmp_path: Path) -> None:
    calibration = replace(CALIBRATION, dataset=str(file))
    run = tiny_run(tmp_path / "run", calibration=calibration)
    assert tiny_run(tmp_path / "run", calibration=calibration).identity.id == run.identity.id
    file.write_text("nothing of what was said before holds any more. " * 200, encoding="utf-8")
    with pytest.raises(RunError, match="name another folder"):
        tiny_run(tmp_path / "run", calibration=calibration)
    assert tiny_run(tmp_path / "other", calibration=calibration).identity.id != run.identity.id
