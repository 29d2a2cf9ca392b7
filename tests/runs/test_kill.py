"""kill -9 at any write, or a disk full from then on: the next worker goes on, and the result is the same to the last byte.

A worker is forked from this process, which has imported everything already, and meets its fault at a given write to the disk. Writes are
what matters: between two of them nothing outside the process changes.
"""

import errno
import os
import random
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import RECIPE, TEXT, contents, do, tiny_run

from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.worker import work

POINTS = 24


def work_until(run: RunFolder, write: int | None, fault: Callable[[], None] | None = None) -> bool:
    """Do the run's jobs in a forked process that meets a fault (to be killed) from its n-th write on; whether it lived to the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking is safe here: no other thread runs
        child = os.fork()
    if child == 0:
        fail_at(write, fault or (lambda: os.kill(os.getpid(), signal.SIGKILL)))
        try:
            work(run)
        finally:
            os._exit(0)
    return os.WIFEXITED(os.waitpid(child, 0)[1])


def fail_at(write: int | None, fault: Callable[[], None]) -> None:
    """From the n-th time on that something is written, synced, renamed or appended to, meet the fault just before that happens."""
    left = [write]
    for name in ("fsync", "replace", "rename", "write"):
        def counted(*arguments: object, original: object = getattr(os, name)) -> object:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    fault()
            return original(*arguments)  # type: ignore[operator]

        setattr(os, name, counted)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """A run that nobody disturbed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    run, output = tiny_run(folder / "run"), folder / "out"
    enqueue(run, "compress", {"recipe": RECIPE, "output": str(output), "text": TEXT})
    assert work_until(run, None)
    assert Client(folder).status(run).state == "finished"
    return run, output


def test_a_run_killed_at_random_writes_ends_as_an_undisturbed_one(reference: tuple[RunFolder, Path], tmp_path: Path) -> None:
    rng = random.Random(0)
    undisturbed, expected = reference
    run, output = tiny_run(tmp_path / "run", undisturbed.path.parent / "model-mixtral"), tmp_path / "out"
    client = Client(tmp_path, launch=lambda run: None)
    client.submit(run, "compress", recipe=RECIPE, output=str(output), text=TEXT)
    kills = 0
    while not work_until(run, rng.randrange(2, 24) if kills < POINTS else None):
        kills += 1
        assert client.status(run).state in ("interrupted", "queued")
        if output.exists():
            assert (output / "SHA256SUMS").exists(), "an export is there whole or not at all"
        if client.status(run).state == "interrupted":
            client.resume(run)
    assert kills >= 20
    assert client.status(run).state == "finished"
    assert contents(output) == contents(expected)
    for station in ("statistics", "factors", "curves", "plans", "evaluations"):
        assert contents(run.path / station) == contents(undisturbed.path / station), station
    steps = Counter(
        event.data["message"]
        for event in run.log.read()[0]
        if event.kind == "progress" and event.data["stage"] in ("calibrate", "decompose")
    )
    assert sum(steps.values()) - len(steps) <= kills, "a kill costs one layer at most"


@pytest.mark.parametrize("write", [3, 9, 20, 45, 80, 110, 125])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(reference: tuple[RunFolder, Path], tmp_path: Path, write: int) -> None:
    undisturbed, expected = reference
    model = undisturbed.path.parent / "model-mixtral"
    before = contents(model)
    run, output = tiny_run(tmp_path / "run", model), tmp_path / "out"
    client = Client(tmp_path, launch=lambda run: None)
    client.submit(run, "compress", recipe=RECIPE, output=str(output), text=TEXT)
    assert work_until(run, write, disk_full)
    state = client.status(run).state
    assert state in ("interrupted", "queued"), "the diary itself could not be written"
    assert not output.exists()
    if state == "interrupted":
        client.resume(run)
    assert work_until(run, None)
    assert client.status(run).state == "finished"
    assert contents(output) == contents(expected)
    assert contents(model) == before


def test_a_disk_that_is_full_for_tensors_only_fails_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_for_factors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if "factors" in Path(path).parts:
            disk_full()
        save_file(tensors, path, metadata)

    run = tiny_run(tmp_path / "run")
    monkeypatch.setattr("moesvd_core.tensor_files.save_file", full_for_factors)
    job = do(run, "plan", recipe=RECIPE)
    assert (job.state, job.error_kind) == ("failed", "ResourceError")
    assert re.search(r"the disk is full: .*factors.* needs [\d,]+ bytes, [\d,]+ are free; free some", job.error)
    assert not any((run.path / "factors").rglob("*.safetensors*"))
