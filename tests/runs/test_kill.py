"""kill -9 at any write: the next worker goes on, and the result is the same to the last byte.

A worker is forked from this process, which has imported everything already, and kills itself at a given write to the disk. Writes are what
matters: between two of them nothing outside the process changes.
"""

import os
import random
import signal
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_runs import RECIPE, TEXT, contents, tiny_run

from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.worker import work

POINTS = 24


def work_until(run: RunFolder, write: int | None) -> bool:
    """Do the run's jobs in a forked process that is killed at its n-th write; whether it lived to the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking is safe here: no other thread runs
        child = os.fork()
    if child == 0:
        kill_at(write)
        try:
            work(run)
        finally:
            os._exit(0)
    return os.WIFEXITED(os.waitpid(child, 0)[1])


def kill_at(write: int | None) -> None:
    """From now on, die at the n-th file that is synced, renamed or appended to, just before that happens."""
    left = [write]
    for name in ("fsync", "replace", "rename", "write"):
        def counted(*arguments: object, original: object = getattr(os, name)) -> object:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)  # type: ignore[operator]

        setattr(os, name, counted)


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
