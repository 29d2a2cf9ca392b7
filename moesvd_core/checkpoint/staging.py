"""A folder that is either whole or not there: built under a temporary name beside the destination, synced, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moesvd_core.atomic import TEMPORARY, is_disk_full, sync
from moesvd_core.errors import InputError, ResourceError

FACTS = "moesvd.json"
"""What an export says of itself; a folder that holds it is one of ours, and may be replaced."""


@contextmanager
def staged(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to build in; becomes `destination` when the block ends without an error, and is removed otherwise.

    What processes that were killed left behind for the same destination is removed first.

    Raises:
        InputError: the destination holds something that may not be replaced.
        ResourceError: the disk is full, or the folder cannot be written; the destination is as it was.
    """
    destination = Path(os.path.abspath(destination))
    refuse_occupied(destination, overwrite=overwrite)
    temporary = destination.with_name(f".{destination.name}{TEMPORARY}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            sync(path)
        sync(temporary)
        _publish(temporary, destination)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        free = shutil.disk_usage(_existing(destination)).free
        hint = f"the disk is full ({free:,} bytes are free)" if is_disk_full(error) else str(getattr(error, "strerror", None) or error)
        raise ResourceError(f"{destination} cannot be written: {hint}; free space or choose another folder") from error
    except BaseException:
        _remove(temporary)
        raise


def refuse_occupied(destination: Path, *, overwrite: bool = False) -> None:
    """Refuse a destination that holds something else than an export; an earlier export is refused too unless it may be overwritten.

    Raises:
        InputError: it is occupied.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise InputError(f"output must be a folder, got the file {destination}: choose another name")
    if any(destination.iterdir()):
        if not (destination / FACTS).is_file():
            raise InputError(f"output must be a new or empty folder, but {destination} holds files that are no export: choose another name")
        if not overwrite:
            raise InputError(f"output must be a new folder, but {destination} holds an earlier export: name another or allow overwriting")


def discard(export: Path) -> None:
    """Delete an export: at no time does its name point to half of it, and what a process that is killed leaves goes with the next one.

    Raises:
        ResourceError: it cannot be removed; it may be out of sight already.
    """
    try:
        _remove(_aside(export))
        export.rename(_aside(export))
        sync(export.parent)
        _remove(_aside(export))
    except OSError as error:
        raise ResourceError(f"{export} cannot be deleted ({error.strerror or error}): remove it by hand") from error


def _aside(destination: Path) -> Path:
    """Where an export goes that is not wanted any more."""
    return destination.with_name(f".{destination.name}.replaced{TEMPORARY}")


def _publish(temporary: Path, destination: Path) -> None:
    """Rename, moving an earlier export aside first: the name never points to half of either."""
    aside = _aside(destination)
    _remove(aside)
    if destination.exists():
        destination.rename(aside)
    temporary.rename(destination)
    sync(destination.parent)
    _remove(aside)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return path if path.exists() else _existing(path.parent)
