"""A name from outside reaches the listed files of a finished export of its own run, and nothing else."""

from pathlib import Path

import pytest
from run_exports import add_export
from run_helpers import new_run

from moesvd_core.checkpoint.manifest import MANIFEST
from moesvd_core.errors import CheckpointError, MoesvdError, RunError
from moesvd_core.planning import Recipe
from moesvd_core.runs.exports import ExportFolder, export_name, list_exports, open_export


def test_an_export_is_listed_with_its_facts_and_checksums(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert list_exports(run) == []
    folder = add_export(run)
    (found,) = list_exports(run)
    assert isinstance(found, ExportFolder)
    assert found == open_export(run, folder.name)
    assert {file.name for file in found.files} == {"model.safetensors", MANIFEST, "moesvd.json", "README.md"}
    assert found.files[0].sha256 == "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"  # of 1000 zero bytes
    assert found.size == sum(path.stat().st_size for path in folder.iterdir())
    assert (found.facts["ratio"], found.card()) == (0.41, (folder / "README.md").read_text(encoding="utf-8"))
    assert found.file("model.safetensors") == folder / "model.safetensors"


TRAVERSAL = [
    "..", "../..", "../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "tiny-auto-40-factored/../../run.json", "a\0b", "", ".",
    "..\\..\\etc", "....//....//etc", "~root",
]


@pytest.mark.parametrize("name", TRAVERSAL)
def test_nothing_is_reached_by_a_name_that_is_a_path(tmp_path: Path, name: str) -> None:
    run = new_run(tmp_path)
    folder = add_export(run)
    with pytest.raises(RunError, match="has no export"):
        open_export(run, name)
    with pytest.raises(RunError, match="has no file"):
        open_export(run, folder.name).file(name)


def test_what_is_not_listed_or_not_finished_does_not_exist(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    folder = add_export(run)
    (folder / "notes.txt").write_text("not of the export")
    with pytest.raises(RunError, match="no file"):
        open_export(run, folder.name).file("notes.txt")
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    assert list_exports(run) == []
    with pytest.raises(RunError, match="never finished"):
        open_export(run, f".{folder.name}.partial")


def test_links_lead_nowhere(tmp_path: Path) -> None:
    run, other = new_run(tmp_path), new_run(tmp_path, "other-00000002")
    folder = add_export(other)
    (run.station("exports") / "linked").symlink_to(folder)
    assert list_exports(run) == []
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / other.path / "run.json")
    with pytest.raises(CheckpointError, match=r"README\.md: is missing, or no regular file"):
        open_export(other, folder.name)
    exports = run.path / "exports"
    (exports / "linked").unlink()
    exports.rmdir()
    exports.symlink_to(folder.parent)
    assert list_exports(run) == []


@pytest.mark.parametrize("damage", ["manifest", "facts", "missing", "no manifest", "no facts"])
def test_a_damaged_export_is_told_and_does_not_hide_the_others(tmp_path: Path, damage: str) -> None:
    run = new_run(tmp_path)
    add_export(run, "good")
    bad = add_export(run, "bad")
    if damage == "manifest":
        (bad / MANIFEST).write_text("x")
    elif damage == "facts":
        (bad / "moesvd.json").write_text("{}")
    elif damage.startswith("no "):
        (bad / {"no manifest": MANIFEST, "no facts": "moesvd.json"}[damage]).unlink()
    else:
        (bad / "README.md").unlink()
    good, error = list_exports(run)
    assert isinstance(good, ExportFolder)
    assert isinstance(error, MoesvdError)
    assert error.name == "bad"
    assert str(error).startswith("bad/"), "no word of where on the machine it lies"
    with pytest.raises(CheckpointError, match=r"make (the export|it) again"):
        open_export(run, "bad")


@pytest.mark.parametrize(
    ("model", "recipe", "dtype", "name"),
    [
        ("models/demo-moe", Recipe(ratio=0.4), None, "demo-moe-auto-40-factored"),
        ("mistralai/Mixtral-8x7B", Recipe(method="moe-svd", ratio=0.125), "bfloat16", "Mixtral-8x7B-moe-svd-12.5-factored-bfloat16"),
        ("../..", Recipe(ratio=0.0), None, "model-auto-0-factored"),
        ("<b>x</b>", Recipe(ratio=0.4), None, "b-auto-40-factored"),
    ],
)
def test_names_are_readable_and_harmless(model: str, recipe: Recipe, dtype: str | None, name: str) -> None:
    assert export_name(model, recipe, "factored", dtype) == name
