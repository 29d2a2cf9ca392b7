"""A disk that is really full: a small file system in memory, which refuses bytes as a disk does, in whatever library is writing.

Needs the right to mount; writes that fail one by one are tried in `test_kill`.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_factors import model_factors
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import RECIPE, TEXT, contents, do, tiny_run

from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export
from moesvd_core.errors import ResourceError
from moesvd_core.runs.client import Client
from moesvd_core.runs.stages import ACTIONS
from moesvd_core.runs.worker import work

Resize = Callable[[int], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A file system of its own and a function that gives it another size in KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "moesvd-test", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")

    def resize(kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", place], check=True)

    yield place, resize
    subprocess.run(["umount", place], check=True)


def used(place: Path) -> int:
    """KiB."""
    return shutil.disk_usage(place).used // 1024


def test_what_does_not_fit_is_refused_before_anything_is_written(disk: tuple[Path, Resize]) -> None:
    place, resize = disk
    run = tiny_run(place / "run", place / "model")
    resize(used(place) + 64)
    before = used(place)
    job = do(run, "compress", recipe=RECIPE, output=str(place / "out"), text=TEXT)
    assert (job.state, job.error_kind) == ("failed", "ResourceError")
    assert f"not enough disk at {place}" in job.error
    assert used(place) < before + 64


@pytest.mark.parametrize("left", [8, 100, 200, 350, 500])
def test_a_disk_that_fills_up_on_the_way_is_told_and_the_run_goes_on_when_there_is_room(
    left: int, disk: tuple[Path, Resize], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, resize = disk
    run, model, output = tiny_run(place / "run", place / "model"), place / "model", place / "out"
    before = contents(model)
    with monkeypatch.context() as patched:
        patched.setattr("moesvd_core.runs.stages.require", lambda *_: None)
        resize(used(place) + left)
        job = do(run, "compress", recipe=RECIPE, output=str(output), text=TEXT)
    assert (job.state, job.error_kind) == ("failed", ResourceError.__name__), job.error
    assert "disk" in job.error and " free" in job.error
    assert not output.exists()
    resize(65536)
    Client(place, launch=lambda run: None).resume(run)
    assert [job.state for job in work(run, lambda: ACTIONS)] == ["finished"]
    assert (output / "SHA256SUMS").exists()
    assert contents(model) == before


def test_a_model_in_memory_finds_no_room_either(disk: tuple[Path, Resize]) -> None:
    place, resize = disk
    model = tiny_model("mixtral")
    small = compressed(model, model_factors(model))
    resize(used(place) + 100)
    with pytest.raises(ResourceError, match=r"out cannot be written: the disk is full \(\d+"):
        export(small, tiny_tokenizer(), place / "out")
    assert not list(place.iterdir())
