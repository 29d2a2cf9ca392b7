"""An export as one tar file that is never written: its bytes are made while they are sent, from any position on.

Weights do not compress, and a copy of a large model beside itself may not fit on the disk. All files are opened when the archive is, so one
that is replaced or deleted meanwhile is still sent as it was.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType

from moesvd_core.checkpoint.manifest import MANIFEST, read_manifest
from moesvd_core.errors import CheckpointError, InputError

CHUNK = 1 << 20
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


class Archive:
    """The files that an export's manifest lists, and the manifest, as a tar file under the name of their folder. Close it after use.

    Attributes:
        name: of the tar file.
        size: its bytes.

    Raises:
        CheckpointError: the manifest is missing or damaged, or a file that it lists is missing, a link, or no regular file.
    """

    def __init__(self, folder: Path) -> None:
        self.name = f"{folder.name}.tar"
        self._files: list[FileIO] = []
        self._parts: list[tuple[FileIO | None, bytes, int]] = []  # (file, bytes, length): the file's content, or else the bytes
        try:
            for file in (*sorted(read_manifest(folder)), MANIFEST):
                self._add(folder, file)
        except BaseException:
            self.close()
            raise
        body = sum(length for *_, length in self._parts)
        self._constant(bytes(2 * _BLOCK + -(body + 2 * _BLOCK) % _RECORD))
        self.size = sum(length for *_, length in self._parts)

    def _add(self, folder: Path, file: str) -> None:
        try:
            descriptor = os.open(folder / file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not make the open wait
        except OSError as error:
            raise CheckpointError(f"{folder / file}: cannot be opened ({error.strerror}); make the export again") from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise CheckpointError(f"{folder / file}: is not a regular file; make the export again")
        opened = FileIO(descriptor)
        self._files.append(opened)
        member = tarfile.TarInfo(f"{folder.name}/{file}")
        member.size, member.mtime, member.mode = found.st_size, int(found.st_mtime), 0o644
        self._constant(member.tobuf(tarfile.GNU_FORMAT))
        self._parts.append((opened, b"", found.st_size))
        self._constant(bytes(-found.st_size % _BLOCK))

    def _constant(self, data: bytes) -> None:
        self._parts.append((None, data, len(data)))

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """The tar file's bytes from `start` on, at most `CHUNK` at a time.

        Raises:
            InputError: `start` lies behind the end.
            CheckpointError: a file became shorter.
        """
        if not 0 <= start <= self.size:
            raise InputError(f"start must be in [0, {self.size}], the bytes of the archive, got {start}")
        for file, data, length in self._parts:
            if start >= length:
                start -= length
                continue
            if file is None:
                yield data[start:]
            else:
                yield from self._content(file, start, length)
            start = 0

    def _content(self, file: FileIO, position: int, length: int) -> Iterator[bytes]:
        while position < length:
            data = os.pread(file.fileno(), min(CHUNK, length - position), position)
            if not data:
                raise CheckpointError(f"{self.name}: a file became shorter while it was sent; make the export again")
            position += len(data)
            yield data

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.pop().close()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
