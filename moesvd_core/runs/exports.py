"""The finished exports of a run, and the only way to their files for whoever names them from outside.

A name is looked up among what is there, never joined to a path unchecked; what is no listed, regular file of an export of this run does not
exist. An export that is being written has a name that begins with a dot, and is not among them.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesvd_core.checkpoint.card import CARD
from moesvd_core.checkpoint.manifest import MANIFEST, read_manifest
from moesvd_core.checkpoint.staging import FACTS
from moesvd_core.errors import CheckpointError, RunError
from moesvd_core.planning import Recipe
from moesvd_core.runs.folder import RunFolder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,200}")


@dataclass(frozen=True)
class ExportFile:
    """One file: bytes, and its checksum as the manifest has it ("" for the manifest itself)."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ExportFolder:
    """One finished export.

    Attributes:
        name: of its folder.
        path: its folder.
        facts: content of moesvd.json: format, dtype (since it is noted), ratio, parameters, original_parameters, bytes, original_bytes,
            method, source, plan ...
        files: everything in it, largest first.
        created: UTC time, ISO 8601.
    """

    name: str
    path: Path
    facts: Mapping[str, Any]
    files: tuple[ExportFile, ...]
    created: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def file(self, name: str) -> Path:
        """A file by its name.

        Raises:
            RunError: the export has no such file.
        """
        if name not in [file.name for file in self.files]:
            raise RunError(f"export {self.name} has no file {name[:200]!r}")
        return self.path / name

    def card(self) -> str:
        """The model card, Markdown with front matter.

        Raises:
            RunError: it is missing.
        """
        return self.file(CARD).read_text(encoding="utf-8")


class DamagedExportError(CheckpointError):
    """An export that is there and cannot be used; the message says how it is damaged.

    Attributes:
        name: of its folder.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def export_name(model: str, recipe: Recipe, form: str, dtype: str | None = None) -> str:
    """Name of the folder that an export goes to: model, method, percent removed, format; then what else was chosen (operations, ...)."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.")[:80] or "model"
    fewer = [] if recipe.flops_ratio is None else [f"flops-{100 * recipe.flops_ratio:.4g}"]
    further = [*fewer, *(word.replace(" ", "-") for word in recipe.fits), *([dtype] if dtype else [])]
    return "-".join([readable, recipe.method, f"{100 * recipe.ratio:.4g}", form, *further])


def list_exports(run: RunFolder) -> list[ExportFolder | DamagedExportError]:
    """Exports of a run, newest first; one that is damaged is listed as the error that says how, behind the others."""
    found: list[ExportFolder | DamagedExportError] = []
    for path in _folders(run):
        try:
            found.append(_opened(path))
        except DamagedExportError as damaged:
            found.append(damaged)
    return sorted(found, key=lambda export: "" if isinstance(export, DamagedExportError) else export.created, reverse=True)


def open_export(run: RunFolder, name: str) -> ExportFolder:
    """An export by its name, which may come from a URL: nothing outside the run's exports can be reached.

    Raises:
        RunError: no such export.
        DamagedExportError: it is damaged.
    """
    return _opened(export_folder(run, name))


def export_folder(run: RunFolder, name: str) -> Path:
    """Where an export lies, damaged or not, by its name as in `open_export`.

    Raises:
        RunError: no such export.
    """
    path = next((path for path in _folders(run) if path.name == name), None)
    if path is None:
        raise RunError(f"run {run.name} has no export {name[:200]!r}: it was deleted, or never finished")
    return path


def _folders(run: RunFolder) -> Iterator[Path]:
    root = run.path / "exports"
    if root.is_symlink() or not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        ours = any((path / name).is_file() for name in (FACTS, MANIFEST))  # one that has lost either is damaged
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and ours:
            yield path


def _opened(path: Path) -> ExportFolder:
    """Read what an export says of itself, and look at its files.

    Raises:
        DamagedExportError: its facts or its manifest are damaged, or a file is missing or a link.
    """
    try:
        listed = read_manifest(path) | {MANIFEST: ""}
    except CheckpointError as error:
        reason = str(error).replace(f"{path}{os.sep}", f"{path.name}/")  # pages tell it to those who need not know where runs lie
        raise DamagedExportError(path.name, reason) from error
    files = []
    for name, checksum in listed.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise DamagedExportError(path.name, f"{path.name}/{name}: is missing, or no regular file; make the export again")
        files.append(ExportFile(name, file.stat().st_size, checksum))
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        ratio, form = float(facts["ratio"]), facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedExportError(path.name, f"{path.name}/{FACTS}: is damaged ({type(error).__name__}); make the export again") from error
    created = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime, UTC).isoformat(timespec="seconds")
    files.sort(key=lambda file: -file.size)
    return ExportFolder(path.name, path, {**facts, "ratio": ratio, "format": form}, tuple(files), created)
