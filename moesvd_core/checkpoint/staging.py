"""A folder that is either whole or not there: built under a temporary name beside the destination, synced, then renamed.

Each process builds under a name of its own and holds a lock on that folder, which the system takes away when the process ends, however it
does: so two exports to one destination leave each other's work alone, and what is not locked any more was left behind and is swept.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from moesvd_core.atomic import TEMPORARY, existing, is_disk_full, sync
from moesvd_core.errors import InputError, ResourceError

FACTS = "moesvd.json"
"""What an export says of itself; a folder that holds it is one of ours, and may be replaced."""


@contextmanager
def staged(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to build in; becomes `destination` when the block ends without an error, and is removed otherwise.

    What processes that were killed left behind for the same destination is removed first.

    Raises:
        InputError: the destination holds something that may not be replaced, from the start or since.
        ResourceError: the disk is full, or the folder cannot be written; the destination is as it was.
        OSError: something else than the destination failed.
    """
    destination = Path(os.path.abspath(destination))
    refuse_occupied(destination, overwrite=overwrite)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _sweep(destination)
        temporary, lock = _new_folder(destination)
    except OSError as error:
        raise _unwritable(destination, error) from error
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            sync(path)
        sync(temporary)
        _publish(temporary, destination, overwrite=overwrite)
    except (OSError, SafetensorError) as error:
        _remove(temporary)  # before free space is counted
        if is_disk_full(error) or isinstance(error, SafetensorError) or _concerns(error, temporary, destination):
            raise _unwritable(destination, error) from error
        raise
    except BaseException:
        _remove(temporary)
        raise
    finally:
        os.close(lock)


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
        _sweep(export)
        aside = _hidden(export, ".replaced")
        export.rename(aside)
        sync(export.parent)
        _remove(aside)
    except OSError as error:
        raise ResourceError(f"{export} cannot be deleted ({error.strerror or error}): remove it by hand") from error


def _hidden(destination: Path, kind: str = "") -> Path:
    """A name of this process's own beside the destination, that `_sweep` knows: to build under, or for what is not wanted any more."""
    return destination.with_name(f".{destination.name}.{os.getpid()}.{time.time_ns()}{kind}{TEMPORARY}")


def _new_folder(destination: Path) -> tuple[Path, int]:
    """An empty folder under a hidden name, and the descriptor that holds its lock."""
    while True:
        temporary = _hidden(destination)
        temporary.mkdir()
        with suppress(FileNotFoundError):  # swept before it was locked
            lock = _locked(temporary, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def _locked(folder: Path, how: int) -> int:
    """A descriptor that holds a folder's lock, where the file system has locks.

    Raises:
        BlockingIOError: another one holds it, and `how` is not to wait.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # network file systems may have none for folders
    return descriptor


def _sweep(destination: Path) -> None:
    """Remove what processes left behind that are no more; what cannot be removed now is left to the next time."""
    ours = re.compile(re.escape(f".{destination.name}") + r"(\.\d+\.\d+)?(\.replaced)?" + re.escape(TEMPORARY))
    for path in destination.parent.glob(f".*{TEMPORARY}"):
        if not ours.fullmatch(path.name):
            continue
        with suppress(OSError):  # at work, a link, no folder, or gone
            lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _publish(temporary: Path, destination: Path, *, overwrite: bool) -> None:
    """Rename, moving an earlier export aside first: the name never points to half of either."""
    refuse_occupied(destination, overwrite=overwrite)  # another export may have been finished meanwhile
    aside = _hidden(destination, ".replaced")
    if destination.exists():
        destination.rename(aside)
    try:
        temporary.rename(destination)
    except OSError:
        with suppress(OSError):
            aside.rename(destination)
        raise
    sync(destination.parent)
    _remove(aside)


def _remove(folder: Path) -> None:
    """Empty and remove a folder, also while another process sweeps it."""
    while folder.exists():
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _concerns(error: OSError, *folders: Path) -> bool:
    """Whether an error tells that it is about one of the folders or something in them."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return False
    place = Path(os.path.abspath(os.fsdecode(error.filename)))
    return any(place.is_relative_to(folder) for folder in folders)


def _unwritable(destination: Path, error: Exception) -> ResourceError:
    free = shutil.disk_usage(existing(destination)).free
    hint = f"the disk is full ({free:,} bytes are free)" if is_disk_full(error) else str(getattr(error, "strerror", None) or error)
    return ResourceError(f"{destination} cannot be written: {hint}; free space or choose another folder")
