"""A run whose files were damaged from outside: the error names the file, and what it advises works."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import TEXT, analysed_tiny_run, contents, do

from moesvd_core.errors import RunError
from moesvd_core.runs.folder import RunFolder

RECIPE = {"method": "auto", "ratio": 0.3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was analysed."""
    torch.set_num_threads(1)
    return analysed_tiny_run(tmp_path_factory.mktemp("damage") / "run")


@pytest.fixture(scope="module")
def expected(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of it, before anything was damaged."""
    copy = RunFolder.open(Path(shutil.copytree(finished.path, tmp_path_factory.mktemp("copy") / "run")))
    assert do(copy, "export", recipe=RECIPE, output=str(copy.path.parent / "out")).state == "finished"
    return copy.path.parent / "out"


def advised(error: str, run: RunFolder) -> None:
    """Do what an error says."""
    if "remove the folder" in error:
        shutil.rmtree(run.path / "statistics")
    else:
        assert "delete it, it will be made again" in error
        Path(error.partition(" is ")[0]).unlink()


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
@pytest.mark.parametrize(
    "pattern",
    ["source.json", "statistics/statistics.json", "statistics/layer*", "curves/*/layer*", "factors/*/layer*", "plans/*", "evaluations/*"],
)
def test_the_error_names_the_file_and_its_advice_works(
    pattern: str, damage: str, finished: RunFolder, expected: Path, tmp_path: Path
) -> None:
    run = RunFolder.open(Path(shutil.copytree(finished.path, tmp_path / "run")))
    file = random.Random(damage).choice(sorted(run.path.glob(pattern)))
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "garbage": b"\0{garbage" * 9}[damage])
    output = tmp_path / "out"
    job = do(run, "export", recipe=RECIPE, output=str(output))
    if job.state == "failed":
        assert job.error_kind in ("RunError", "StatisticsError"), job.error
        assert str(file) in job.error
        assert not output.exists()
        advised(job.error, run)
        job = do(run, "export", recipe=RECIPE, output=str(output))
    assert job.state == "finished", job.error  # also at once, where nobody needed the file
    assert contents(output) == contents(expected)


def test_one_bit_of_the_statistics_is_missed(finished: RunFolder, tmp_path: Path) -> None:
    run = RunFolder.open(Path(shutil.copytree(finished.path, tmp_path / "run")))
    file = run.path / "statistics" / "layer-001.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    job = do(run, "sensitivity", recipe=RECIPE, text=TEXT)
    assert (job.state, job.error_kind) == ("failed", "StatisticsError")
    assert f"{file} is damaged" in job.error


@pytest.mark.parametrize("pattern", ["curves/*/layer*", "factors/output-*/layer*", "factors/compensated-*/layer*"])
def test_one_bit_of_what_follows_from_statistics_is_missed_and_made_again(pattern: str, finished: RunFolder, tmp_path: Path) -> None:
    run = RunFolder.open(Path(shutil.copytree(finished.path, tmp_path / "run")))
    recipe = {**RECIPE, "compensate": True}
    assert do(run, "export", recipe=recipe, output=str(tmp_path / "before")).state == "finished"
    intact = {file: file.read_bytes() for file in run.path.glob(pattern)}
    for file, content in intact.items():
        file.write_bytes(content[:-7] + bytes([content[-7] ^ 4]) + content[-6:])
    job = do(run, "export", recipe=recipe, output=str(tmp_path / "after"))
    assert (job.state, job.error_kind) == ("failed", "RunError")
    assert "is damaged (its content does not match its digest)" in job.error
    assert not (tmp_path / "after").exists()
    bad = next(file for file in intact if str(file) in job.error)
    for file in set(intact) - {bad}:
        file.write_bytes(intact[file])
    advised(job.error, run)
    assert do(run, "export", recipe=recipe, output=str(tmp_path / "after")).state == "finished"
    assert bad.exists()
    assert contents(tmp_path / "after") == contents(tmp_path / "before")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1}'])
def test_a_damaged_name_plate_is_an_error(content: str, finished: RunFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.path, tmp_path / "run"))
    (folder / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        RunFolder.open(folder)
