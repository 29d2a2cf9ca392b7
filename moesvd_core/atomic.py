"""Files that are either whole or not there: written under a temporary name, synced, then renamed.

A process can be killed between any two instructions, and a disk can fill up in the middle of a write. Whoever reads a name afterwards
must find the old content or the new, never half of either. A temporary file that a killed process left behind is swept by its name.
Files that only grow hold one JSON object a line: several processes may write and read them at once, and a kill loses one line at most.
"""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".partial"
"""Suffix of a file that is still being written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; becomes `path` when the block ends without an error, and is removed otherwise.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON to `path`, whole or not at all; NaN and infinity are refused, since no other JSON reader takes them."""
    write_text(path, json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def append_json(path: Path, data: Mapping[str, Any], *, durable: bool = True) -> None:
    """Add `data` as one line to a file of JSON lines.

    Args:
        durable: return only once the line is on the disk.

    Raises:
        OSError: the line could not be written whole; the file is as it was.
    """
    line = json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a writer was killed in the middle of its line: leave the torn line behind, alone
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes fitted into {path}: free some disk space")
        except OSError:
            os.ftruncate(descriptor, size)
            raise
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path, after: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The objects behind byte `after`, and the position from which to read on; none when there is no such file.

    A line that is still being written is left for the next call; a torn line is passed over.
    """
    try:
        with path.open("rb") as file:
            file.seek(after)
            data = file.read()
    except FileNotFoundError:
        return [], after
    whole = data[: data.rfind(b"\n") + 1]
    return [found for line in whole.splitlines() if (found := _object(line)) is not None], after + len(whole)


def _object(line: bytes) -> dict[str, Any] | None:
    """The object of one line, or None for a torn one."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def is_disk_full(error: BaseException) -> bool:
    """Whether a write found no room; the library of safetensors passes on what the system says, but not its number."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or any(os.strerror(number) in str(error) for number in full)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists: where its disk can be asked for."""
    path = path.absolute()
    return path if path.exists() else existing(path.parent)


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the files that killed processes left half-written directly in `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
