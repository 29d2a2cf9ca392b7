"""A file is whole or not there, whatever happens while it is written."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from moesvd_core import atomic


def test_a_written_file_is_read_back_and_leaves_nothing_else(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a.json", {"é": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_error_in_the_middle_keeps_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(OSError, match="disk"), atomic.replacing(path) as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_refuses_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / f".a.txt.123{atomic.TEMPORARY}").write_text("half")
    (tmp_path / "a.txt").write_text("whole")
    atomic.sweep(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_lines_come_back_and_one_that_is_still_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert atomic.read_json_lines(path) == ([], 0)
    atomic.append_json(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": ')
    lines, position = atomic.read_json_lines(path)
    assert lines == [{"a": 1}]
    atomic.append_json(path, {"c": 3})
    assert atomic.read_json_lines(path, position)[0] == [{"c": 3}]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Error while deserializing header: HeaderTooSmall"), False),
    ],
)
def test_a_full_disk_is_known_whoever_met_it(error: Exception, full: bool) -> None:
    assert atomic.is_disk_full(error) is full


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: atomic.write_json(path, [number] * 2000), range(200)))
    (first, *others) = json.loads(path.read_text())
    assert len(others) == 1999
    assert set(others) == {first}
    assert list(tmp_path.iterdir()) == [path]
