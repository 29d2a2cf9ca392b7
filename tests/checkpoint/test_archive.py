"""The tar that is made while it is sent is the one that tar reads, from any position on."""

import os
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from moesvd_core.checkpoint.archive import CHUNK, Archive
from moesvd_core.checkpoint.manifest import MANIFEST, write_manifest
from moesvd_core.errors import CheckpointError, InputError

CONTENT = {"config.json": b"{}", "model.safetensors": os.urandom(CHUNK + 700), "empty.txt": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "auto@0.4000-factored"
    path.mkdir()
    for name, data in CONTENT.items():
        (path / name).write_bytes(data)
    write_manifest(path)
    (path / "stray.txt").write_text("in no manifest")
    return path


def test_tar_reads_every_listed_file_and_no_other(folder: Path, tmp_path: Path) -> None:
    with Archive(folder) as archive:
        data = b"".join(archive.chunks())
        assert (len(data), archive.name) == (archive.size, "auto@0.4000-factored.tar")
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    made = tmp_path / "out" / folder.name
    assert {path.name for path in made.iterdir()} == {*CONTENT, MANIFEST}
    assert {name: (made / name).read_bytes() for name in CONTENT} == CONTENT
    assert (made / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_goes_on_from_any_position(folder: Path) -> None:
    with Archive(folder) as archive:
        whole = b"".join(archive.chunks())
        for start in (0, 1, 511, 512, 2048, CHUNK, len(whole) - 1, len(whole)):
            assert b"".join(archive.chunks(start)) == whole[start:]
        with pytest.raises(InputError, match="start must be in"):
            next(archive.chunks(len(whole) + 1))


def test_a_folder_that_is_replaced_meanwhile_is_sent_as_it_was(folder: Path) -> None:
    with Archive(folder) as archive:
        whole = b"".join(archive.chunks())
        shutil.rmtree(folder)
        assert b"".join(archive.chunks()) == whole


def test_headers_hold_files_beyond_eight_gigabytes(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(9 << 30)  # sparse
    with Archive(folder) as archive:
        sent = archive.chunks()
        head = next(chunk for chunk in sent if b"/model.safetensors" in chunk[:100])
        assert tarfile.TarInfo.frombuf(head, "utf-8", "strict").size == 9 << 30
        assert archive.size > 9 << 30


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "missing"])
def test_sends_regular_files_only(folder: Path, tmp_path: Path, what: str) -> None:
    file = folder / "config.json"
    file.unlink()
    if what == "link":
        (tmp_path / "secret").write_text("secret")
        file.symlink_to(tmp_path / "secret")
    elif what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Archive(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_becomes_shorter_ends_the_archive_with_an_error(folder: Path) -> None:
    with Archive(folder) as archive:
        os.truncate(folder / "model.safetensors", 10)
        with pytest.raises(CheckpointError, match="became shorter"):
            b"".join(archive.chunks())
