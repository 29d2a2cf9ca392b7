"""SHA256SUMS: the checksum of every file of an export, in the form that `sha256sum -c` reads.

Names that begin with a dot are no part of an export: hubs, their clients and file managers leave such files and folders beside those that
they keep (.gitattributes, .cache, .DS_Store), and no loader reads them.
"""

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
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST]
    _write(folder, {name: _checksum(folder / name) for name in names})


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
        CheckpointError: the manifest is missing or damaged, or a file is missing, changed, unreadable or (but for hidden ones) not listed.
    """
    listed = read_manifest(folder)
    present = {path.name for path in folder.iterdir() if path.name != MANIFEST}
    for name in sorted(listed.keys() - present):
        raise CheckpointError(f"{folder / name}: is listed in the manifest, but missing; make the export again")
    for name in sorted(present - listed.keys()):
        if not name.startswith("."):
            raise CheckpointError(f"{folder / name}: is not listed in the manifest, so it is no part of the export; remove it")
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
