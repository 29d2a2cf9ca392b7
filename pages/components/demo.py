"""The finished analysis of the demo model that comes with the program, so that a first start has something real to show."""

import logging
import shutil
import time
from pathlib import Path

from moesvd_core import atomic
from moesvd_core.errors import RunError
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import RunFolder
from pages.components.assets import FOLDER

SHIPPED = FOLDER / "demo-run"
MODEL = FOLDER / "demo-moe"

log = logging.getLogger(__name__)


def install(runs: Path, shipped: Path = SHIPPED, model: Path = MODEL) -> str:
    """Copy the shipped run among the runs, where it is not there yet, and tell it where the demo model lies on this machine.

    Returns the run's id, "" when no run is shipped. The copy is seen only once it is whole. A folder of its name that holds no run (deleted
    by half, or somebody's own) makes room, and is kept under another name.

    Raises:
        RunError: the shipped run is damaged.
    """
    if not (shipped / "run.json").exists():
        return ""
    run = RunFolder.open(shipped)
    place = runs / run.identity.id
    if (place / "run.json").exists():
        return run.identity.id
    copy = runs / f".{run.identity.id}.copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(shipped, copy)
    for name, key in (("run.json", "model"), ("source.json", "path")):
        data = run.read_json(name)
        if data is None:
            raise RunError(f"{shipped / name} is missing: restore it from the repository")
        atomic.write_json(copy / name, {**data, key: str(model)})
    if place.exists():
        kept = place.rename(place.with_name(f"{place.name}.no-run.{time.time_ns()}"))
        log.warning("%s held no run and makes room for the demo run: what was in it is in %s now", place, kept)
    copy.rename(place)
    return run.identity.id


def complete(runs: Path, shipped: Path = SHIPPED) -> None:
    """Have the statistics made that are too large to ship: plans are there without them, measuring takes them. Half a minute's work."""
    if not (shipped / "run.json").exists():
        return
    run = RunFolder.open(runs / RunFolder.open(shipped).identity.id)
    client = Client(runs)
    if not (run.path / "statistics" / "statistics.json").exists() and not client.status(run).busy:
        client.submit(run, "analyze", methods=["auto"])
