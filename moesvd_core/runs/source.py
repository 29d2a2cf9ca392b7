"""The model that a run is about: found, described, and recognised when it is opened again.

A run keeps results for weeks; a model folder may be replaced meanwhile. Statistics of one model must never be applied to another, so a run
notes a fingerprint and compares it whenever it opens the model.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesvd_core import atomic
from moesvd_core.architectures.files import ModelFiles, require_hub_id, resolve_model
from moesvd_core.architectures.inspect import inspect
from moesvd_core.calibration.identity import file_samples, sample_bytes
from moesvd_core.calibration.settings import Calibration
from moesvd_core.calibration.text import text_version, window_length
from moesvd_core.errors import InputError, RunError
from moesvd_core.planning import Recipe
from moesvd_core.progress import Progress, Report, silent
from moesvd_core.runs.folder import Identity, RunFolder, now, run_id, runs_root

SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class Source:
    """Content of source.json.

    Attributes:
        path: folder of the model's files.
        fingerprint: see `fingerprint`.
        facts: `ModelFacts.as_dict()`.
    """

    path: str
    fingerprint: str
    facts: dict[str, Any]


def fingerprint(files: ModelFiles) -> str:
    """Stands for a model's content: configuration, names and shapes of all tensors, and the first row of some.

    Copies of a model have the same one, wherever they lie; a fine-tuned or compressed model has another.
    """
    digest = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    for key in sorted(files.weight_map):
        digest.update(f"{key} {files.header(key)}\n".encode())
    for _, sample in file_samples(files):
        digest.update(sample_bytes(sample))
    return digest.hexdigest()


def prepare(
    model: str,
    calibration: Calibration,
    *,
    root: Path | None = None,
    folder: Path | None = None,
    model_roots: Sequence[Path] | None = None,
    allow_remote_code: bool = False,
    owner: str = "",
    recipe: Recipe | None = None,
) -> RunFolder:
    """Make the run of a model and a calibration, or open it when it is there; none is made whose first job could only fail.

    Args:
        model: a folder, or a hub id, of which only the headers are fetched here, and the weights by the run's first job.
        root: folder of runs; None: `$MOESVD_RUNS`, else ./runs.
        folder: the run's own folder; None: one under `root` named after model and calibration.
        model_roots: folders in which local models must lie; None: anywhere.
        owner: of the run if it is made.
        recipe: what it is made for, where that is known.

    Raises:
        InputError: no such model, one that cannot be compressed, windows longer than it reads, or a ratio that no method reaches on it.
        RunError: the folder holds something else.
    """
    local = Path(model).exists()
    if local:
        path = resolve_model(model, roots=model_roots, allow_remote_code=allow_remote_code)
        content = fingerprint(ModelFiles.open(path, allow_remote_code=allow_remote_code))
        name = path.name
    else:
        require_hub_id(model)
        content, name = model, model
    identity = Identity(
        id=run_id(name, content + text_version(calibration.dataset), calibration.as_dict()),
        model=str(path) if local else model,
        calibration=calibration.as_dict(),
        created=now(),
        remote_code=allow_remote_code,
        owner=owner,
    )
    place = folder or (root or runs_root()) / identity.id
    facts = _facts_beforehand(place, identity)
    if facts is not None:
        refuse_compressed(model, facts)
        window_length(calibration.length, facts["context_length"])
        if recipe is not None:
            refuse_out_of_reach(recipe, facts)
    return RunFolder.create(place, identity)


def _facts_beforehand(place: Path, identity: Identity) -> dict[str, Any] | None:
    """Facts of a run's model: as the run has them already, else from its headers; None where code of the hub's would have to tell them."""
    if (place / "run.json").exists() and (run := RunFolder.open(place)).identity.id == identity.id:
        known = run.read_json(SOURCE_FILE)
        if known is not None:
            return dict(known["facts"])
    if identity.remote_code and not Path(identity.model).exists():
        return None
    return inspect(identity.model, trust_remote_code=identity.remote_code).as_dict()


def find_source(run: RunFolder, report: Report = silent) -> Source:
    """The run's model: fetched from the hub where need be, described once, and checked to be the one of before.

    Raises:
        InputError: the model cannot be found, read or compressed.
        ResourceError: the disk has no room to download it.
        RunError: it is not the model that this run was made for.
        Cancelled: `report` said so.
    """
    model, remote = run.identity.model, run.identity.remote_code
    report(Progress("inspect", 0, 1, f"looking for {model}"))
    known = run.read_json(SOURCE_FILE)
    if known and Path(known["path"]).exists():
        path = Path(known["path"])
    else:
        path = resolve_model(model, allow_remote_code=remote, report=report)
    content = fingerprint(ModelFiles.open(path, allow_remote_code=remote))
    if known and known["fingerprint"] != content:
        raise RunError(f"{path} is not the model any more that run {run.name} was made for: restore it, or start a new run")
    if known and known["path"] == str(path):
        source = Source(**known)
    else:
        source = Source(str(path), content, inspect(path, trust_remote_code=remote).as_dict())
        atomic.write_json(run.path / SOURCE_FILE, vars(source))
    refuse_compressed(model, source.facts)
    report(Progress("inspect", 1, 1, f"{source.facts['model_type']}, {source.facts['parameters']:,} parameters"))
    return source


def refuse_compressed(model: str, facts: Mapping[str, Any]) -> None:
    """Refuse a model that is an export of ours.

    Args:
        facts: `ModelFacts.as_dict()`.

    Raises:
        InputError: it is.
    """
    if facts["factored"]:
        raise InputError(f"{model} is compressed already: give the original")


def refuse_out_of_reach(recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Refuse at once, before minutes of calibration, a ratio that no method can reach; planning knows each method's own bound.

    Args:
        facts: `ModelFacts.as_dict()`.

    Raises:
        InputError: more would have to go than there is in experts.
    """
    most = facts["expert_parameters"] / facts["parameters"]
    if recipe.ratio > most:
        bound = int(1e4 * most) / 1e4
        raise InputError(f"ratio must be in [0, {bound:g}] for {recipe.method} on this model, got {recipe.ratio:g}: the rest is no expert")
