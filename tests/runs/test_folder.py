"""A run folder opens as what it was made, and nothing outside the runs can be reached by an id."""

import json
import shutil
from pathlib import Path

import pytest
from run_helpers import new_run

from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.folder import STATIONS, Identity, RunFolder, list_runs, run_id, runs_root


def test_the_same_run_is_opened_again_and_another_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    again = RunFolder.create(run.path, run.identity)
    assert again.identity == run.identity
    with pytest.raises(RunError, match="holds run tiny-00000001 of tiny"):
        RunFolder.create(run.path, Identity("other-1", "other", {}, ""))


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="is not empty"):
        RunFolder.create(tmp_path, Identity("a", "a", {}, ""))


def test_what_is_left_of_a_run_that_was_killed_while_it_was_made_is_in_nobodys_way(tmp_path: Path) -> None:
    for station in STATIONS[:3]:
        (tmp_path / station).mkdir()
    assert RunFolder.create(tmp_path, Identity("a", "a", {}, "")).identity.id == "a"
    other = tmp_path / "other"
    (other / STATIONS[0] / "mine").mkdir(parents=True)
    with pytest.raises(RunError, match="is not empty"):
        RunFolder.create(other, Identity("a", "a", {}, ""))


@pytest.mark.parametrize(("content", "words"), [("{", "damaged"), ('{"a": 1}', "damaged"), ("[]", "damaged")])
def test_a_damaged_run_says_so(tmp_path: Path, content: str, words: str) -> None:
    run = new_run(tmp_path)
    (run.path / "run.json").write_text(content)
    with pytest.raises(RunError, match=words):
        RunFolder.open(run.path)


def test_a_run_of_another_format_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    fields = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(fields | {"format": 99}))
    with pytest.raises(RunError, match="format 99"):
        RunFolder.open(run.path)


@pytest.mark.parametrize("name", ["../secret", "/etc", "..", ".", "a/b", "", "a\\b", "%2e%2e", ".queue", "link"])
def test_an_id_reaches_no_folder_outside(tmp_path: Path, name: str) -> None:
    root = tmp_path / "runs"
    new_run(root)
    new_run(tmp_path, "secret")
    (root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match="no run"):
        RunFolder.named(root, name)


def test_only_known_stations_are_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no station '\.\./x'"):
        new_run(tmp_path).station("../x")


def test_a_damaged_result_names_its_file(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.read_json("plans", "a.json") is None
    (run.path / "plans" / "a.json").write_text("{")
    with pytest.raises(RunError, match=r"a\.json is damaged"):
        run.read_json("plans", "a.json")


def test_runs_are_listed_newest_first_and_damaged_ones_last(tmp_path: Path) -> None:
    for name, created in (("old", "2026-01-01"), ("new", "2026-02-01"), ("broken", "2026-03-01")):
        RunFolder.create(tmp_path / name, Identity(name, name, {}, created))
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    listed = list_runs(tmp_path)
    assert [run.identity.id for run in listed if isinstance(run, RunFolder)] == ["new", "old"]
    assert isinstance(listed[-1], RunError)
    assert list_runs(tmp_path / "nowhere") == []


def test_a_run_is_listed_by_the_name_that_opens_it(tmp_path: Path) -> None:
    for name in ("tiny-00000001", "mine", ".half.copy", "my run"):
        RunFolder.create(tmp_path / name, Identity("tiny-00000001", "tiny", {}, name))
    *listed, unnamed = list_runs(tmp_path)
    assert [run.name for run in listed if isinstance(run, RunFolder)] == ["tiny-00000001", "mine"]
    assert isinstance(unnamed, RunError) and "no run 'my run'" in str(unnamed)
    statuses = [status for status in Client(tmp_path).runs() if status.state != "damaged"]
    assert [Client(tmp_path).open(status.id).path for status in statuses] == [tmp_path / "tiny-00000001", tmp_path / "mine"]


def test_an_id_stands_for_content_and_calibration() -> None:
    assert run_id("org/Model-7B", "f", {"samples": 1}).startswith("Model-7B-")
    assert run_id("m", "f", {"samples": 1}) == run_id("m", "f", {"samples": 1})
    assert len({run_id("m", "f", {"samples": 1}), run_id("m", "g", {"samples": 1}), run_id("m", "f", {"samples": 2})}) == 3
    assert run_id("///", "f", {}).startswith("model-")


def test_the_root_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESVD_RUNS", str(tmp_path))
    assert runs_root() == tmp_path
    monkeypatch.delenv("MOESVD_RUNS")
    assert runs_root() == Path("runs")


def test_a_run_has_its_name_from_within_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    monkeypatch.chdir(run.path)
    assert (RunFolder.open(Path()).name, RunFolder.open(Path()).path) == (run.name, run.path)
    monkeypatch.chdir(run.path / "factors")
    assert RunFolder.open(Path("..")).path == run.path


def test_a_run_without_a_name_for_pages_waits_with_the_others(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    shutil.copytree(run.path, tmp_path / "my run")
    enqueue(RunFolder.open(tmp_path / "my run"), "plan", {})
    enqueue(run, "plan", {})
    assert [status.id for status in Client(tmp_path).queue()] == ["my run", run.name]


def test_code_of_a_model_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    trusting = RunFolder.create(tmp_path / "a", Identity("a", "a", {}, "", remote_code=True))
    launched = list[RunFolder]()
    with pytest.raises(RunError, match="say --allow-remote-code"):
        Client(tmp_path, launch=launched.append, remote_code=False).submit(trusting, "plan")
    assert (launched, Client(tmp_path).status(trusting).state) == ([], "new")
    Client(tmp_path, launch=launched.append, remote_code=True).submit(trusting, "plan")
    assert launched == [trusting]
