"""An export that is asked for again: one that is whole stays, one that is damaged is written anew, and nothing else is ever replaced."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import RECIPE, TEXT, analysed_tiny_run, contents, do

from moesvd_core.checkpoint.card import CARD
from moesvd_core.checkpoint.manifest import MANIFEST, check_manifest, write_manifest
from moesvd_core.checkpoint.staging import FACTS
from moesvd_core.runs.exports import list_exports
from moesvd_core.runs.folder import RunFolder


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with an export."""
    torch.set_num_threads(1)
    run = analysed_tiny_run(tmp_path_factory.mktemp("again") / "run")
    assert do(run, "export", recipe=RECIPE, output=str(run.path / "exports" / "made")).state == "finished"
    return run


@pytest.fixture
def run(analysed: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(analysed.path, tmp_path / "run")))


def flip(folder: Path) -> None:
    """One bit of the weights."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)


def weights_as_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


DAMAGE = {
    "bit": flip,
    "missing": lambda folder: (folder / "config.json").unlink(),
    "manifest": lambda folder: (folder / MANIFEST).write_text("x"),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "unreadable": weights_as_a_folder,
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_of_the_run_is_written_anew(damage: str, overwrite: bool, run: RunFolder) -> None:
    output = run.path / "exports" / "made"
    before = contents(output)
    DAMAGE[damage](output)
    job = do(run, "export", recipe=RECIPE, output=str(output), overwrite=overwrite)
    assert job.state == "finished", job.error
    assert contents(output) == before
    check_manifest(output)


def test_a_damaged_export_elsewhere_is_replaced_only_where_that_is_allowed(run: RunFolder, tmp_path: Path) -> None:
    output = Path(shutil.copytree(run.path / "exports" / "made", tmp_path / "out"))
    before = contents(output)
    flip(output)
    damaged = contents(output)
    job = do(run, "export", recipe=RECIPE, output=str(output))
    assert (job.state, job.error_kind) == ("failed", "CheckpointError")
    assert "holds this very export, but damaged" in job.error and "name another folder or allow overwriting" in job.error
    assert contents(output) == damaged
    assert do(run, "export", recipe=RECIPE, output=str(output), overwrite=True).state == "finished"
    assert contents(output) == before


def test_what_is_no_part_of_a_damaged_export_is_not_deleted_unasked(run: RunFolder) -> None:
    output = run.path / "exports" / "made"
    (output / "notes.txt").write_text("mine")
    job = do(run, "export", recipe=RECIPE, output=str(output))
    assert (job.state, job.error_kind) == ("failed", "CheckpointError")
    assert "notes.txt: is not listed" in job.error
    assert (output / "notes.txt").read_text() == "mine"


def test_another_number_format_is_another_export(run: RunFolder) -> None:
    output = run.path / "exports" / "made"
    assert json.loads((output / "moesvd.json").read_text())["dtype"] == "float32"
    job = do(run, "export", recipe=RECIPE, output=str(output), dtype="bfloat16")
    assert job.state == "failed" and "holds an earlier export: name another or allow overwriting" in job.error
    job = do(run, "export", recipe=RECIPE, output=str(output), dtype="bfloat16", overwrite=True)
    assert job.state == "finished", job.error
    assert json.loads((output / "moesvd.json").read_text())["dtype"] == "bfloat16"
    written = (output / "model.safetensors").stat().st_mtime_ns
    assert do(run, "export", recipe=RECIPE, output=str(output), dtype="bfloat16").state == "finished"
    assert (output / "model.safetensors").stat().st_mtime_ns == written, "the very same is left alone"
    assert do(run, "export", recipe=RECIPE, output=str(output), overwrite=True).state == "finished"
    assert json.loads((output / "moesvd.json").read_text())["dtype"] == "float32"


def test_an_older_export_that_names_no_number_format_is_read_and_not_taken_for_the_one_asked_for(run: RunFolder) -> None:
    output = run.path / "exports" / "made"
    facts = json.loads((output / "moesvd.json").read_text())
    (output / "moesvd.json").write_text(json.dumps({name: value for name, value in facts.items() if name != "dtype"}))
    write_manifest(output)
    [listed] = list_exports(run)
    assert listed.name == "made" and not isinstance(listed, Exception)
    job = do(run, "export", recipe=RECIPE, output=str(output))
    assert "holds an earlier export" in job.error
    assert do(run, "export", recipe=RECIPE, output=str(output), overwrite=True).state == "finished"


def test_what_is_measured_later_is_put_on_the_card_of_an_export_that_is_there(run: RunFolder) -> None:
    output = run.path / "exports" / "made"
    weights = (output / "model.safetensors").stat()
    assert "perplexity" not in (output / CARD).read_text(encoding="utf-8")
    job = do(run, "compress", recipe=RECIPE, output=str(output), overwrite=True, text=TEXT)
    assert job.state == "finished", job.error
    card, facts = (output / CARD).read_text(encoding="utf-8"), json.loads((output / FACTS).read_text(encoding="utf-8"))
    assert "perplexity (sotu, 4 windows of 24 tokens)" in card
    assert [row[0].partition(" ")[0] for row in facts["figures"]] == ["perplexity", "KL", "same"]
    after = (output / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    check_manifest(output)
    described = contents(output)
    assert do(run, "export", recipe=RECIPE, output=str(output), overwrite=True).state == "finished"
    assert contents(output) == described, "the same figures are no reason to write anything"
