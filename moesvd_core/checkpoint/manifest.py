"""SHA256SUMS: the checksum of every file of an export, in the form that `sha256sum -c` reads."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from moesvd_core import atomic
from moesvd_core.errors import CheckpointError

MANIFEST = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def write_manifest(folder: Path) -> None:
    """Write the checksums of all files in `folder`."""
    _write(folder, {path.name: _checksum(path) for path in folder.iterdir() if path.is_file() and path.name != MANIFEST})


def renew_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of some files anew: those of weights take long to count."""
    _write(folder, read_manifest(folder) | {name: _checksum(folder / name) for name in names})


def _write(folder: Path, checksums: Mapping[str, str]) -> None:
    atomic.write_text(folder / MANIFEST, "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums)))


def read_manifest(folder: Path) -> dict[str, str]:
    """File name -> sha256 of every file that an export consists of, beside the manifest itself. Nothing but the manifest is read.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({type(error).__name__}), so this is no complete export"
        raise CheckpointError(f"{folder / MANIFEST}: {reason}; make it again") from error
    listed: dict[str, str] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if not match:
            raise CheckpointError(f"{folder / MANIFEST}: line {line[:80]!r} is no checksum and file name; make the export again")
        listed[match[2]] = match[1]
    return listed


def check_manifest(folder: Path) -> int:
    """Compare every file with its checksum; returns how many there are.

    Raises:
        CheckpointError: the manifest is missing or damaged, or a file is missing, changed, unreadable or not listed.
    """
    listed = read_manifest(folder)
    present = {path.name for path in folder.iterdir() if path.name != MANIFEST}
    for name in sorted(present ^ listed.keys()):
        what = "is not listed in the manifest" if name in present else "is listed in the manifest, but missing"
        raise CheckpointError(f"{folder / name}: {what}; make the export again")
    for name, checksum in listed.items():
        if _checksum(folder / name) != checksum:
            raise CheckpointError(f"{folder / name}: differs from its checksum in {MANIFEST}; fetch the file again")
    return len(listed)


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); make the export again") from error
