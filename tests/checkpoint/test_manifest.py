"""A manifest names every file of an export, and nothing else."""

from pathlib import Path

import pytest

from moesvd_core.checkpoint.manifest import MANIFEST, check_manifest, read_manifest, write_manifest
from moesvd_core.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    write_manifest(tmp_path)
    return tmp_path


def test_lists_every_file_by_its_checksum(folder: Path) -> None:
    a = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # sha256 of "a", FIPS 180-2
    assert read_manifest(folder) == {"a.txt": a, "b.txt": "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"}
    assert check_manifest(folder) == 2


@pytest.mark.parametrize("line", ["../../etc/passwd", "a/b", "a\\b", ""])
def test_refuses_names_that_leave_the_folder(folder: Path, line: str) -> None:
    (folder / MANIFEST).write_text(f"{'0' * 64}  {line}\n")
    with pytest.raises(CheckpointError, match="is no checksum and file name"):
        read_manifest(folder)


def test_a_changed_a_missing_and_an_unlisted_file_are_told(folder: Path) -> None:
    (folder / "a.txt").write_text("A")
    with pytest.raises(CheckpointError, match=r"a\.txt: differs"):
        check_manifest(folder)
    (folder / "a.txt").rename(folder / "c.txt")
    with pytest.raises(CheckpointError, match=r"a\.txt: is listed"):
        check_manifest(folder)
    (folder / "a.txt").write_text("a")
    with pytest.raises(CheckpointError, match=r"c\.txt: is not listed.*remove it"):
        check_manifest(folder)


def test_what_hubs_and_file_managers_leave_beside_it_is_no_damage(folder: Path) -> None:
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".DS_Store").write_bytes(b"")
    assert check_manifest(folder) == 2
    write_manifest(folder)
    assert read_manifest(folder).keys() == {"a.txt", "b.txt"}
