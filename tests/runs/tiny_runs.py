"""A tiny model on disk and runs of it: seconds from nothing to a verified export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tiny_models import save_tiny

from moesvd_core.calibration.settings import Calibration
from moesvd_core.progress import Report, silent
from moesvd_core.runs.client import enqueue
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.jobs import Job
from moesvd_core.runs.source import prepare
from moesvd_core.runs.worker import work

CALIBRATION = Calibration(samples=6, length=24, batch=3)
TEXT = {"windows": 4, "length": 24}
RECIPE = {"method": "auto", "ratio": 0.2}


def tiny_run(folder: Path, model: Path | None = None, calibration: Calibration = CALIBRATION) -> RunFolder:
    """A new run of a tiny model, which is saved beside it if there is none yet."""
    model = model or folder.parent / "model-mixtral"
    if not model.exists():
        save_tiny("mixtral", model)
    return prepare(str(model), calibration, folder=folder)


def do(run: RunFolder, action: str, report: Report = silent, **arguments: Any) -> Job:
    """Do one job in this process."""
    number = enqueue(run, action, arguments).id
    return next(job for job in work(run, watch=report) if job.id == number)


def analysed_tiny_run(folder: Path, **identity: str) -> RunFolder:
    """The same, planned by `auto`, and named after its folder; `created` in the past, so that no page opens on it unasked."""
    made = tiny_run(folder)
    job = do(made, "analyze", methods=["auto"], text=TEXT)
    assert job.state == "finished", job.error
    return named(made, folder.name, **identity)


def named(run: RunFolder, name: str, **identity: str) -> RunFolder:
    """The run by another name, and whatever else of its identity is given."""
    known = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**known, "id": name, **identity}))
    return RunFolder.open(run.path)


def contents(folder: Path) -> Mapping[str, Any]:
    """What every file in a folder holds, by name; of safetensors files tensors and facts, whose order in the file is left to chance."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return file.metadata(), {name: (tensor.dtype, tensor.shape, tensor.numpy(force=True).tobytes()) for name, tensor in tensors.items()}
