"""The diary survives a torn line, and several writers."""

import errno
import os
import threading
from pathlib import Path

import pytest

from moesvd_core import atomic
from moesvd_core.runs.events import EventLog
from moesvd_core.runs.jobs import read_jobs


def test_events_come_back_in_order_with_their_fields(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("submitted", "1", action="analyze", arguments={"ratio": 0.4})
    log.append("progress", "1", stage="calibrate", done=1, total=8)
    events, _ = log.read()
    assert [event.kind for event in events] == ["submitted", "progress"]
    assert events[0].data == {"action": "analyze", "arguments": {"ratio": 0.4}}


def test_reading_goes_on_from_where_it_was(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    assert log.read() == ([], 0)
    log.append("started", "1")
    _, position = log.read()
    log.append("finished", "1")
    events, _ = log.read(position)
    assert [event.kind for event in events] == ["finished"]


@pytest.mark.parametrize("cut", [2, 5, 20])
def test_a_torn_last_line_costs_that_line_only(tmp_path: Path, cut: int) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("started", "1")
    log.append("log", "1", message="torn")
    os.truncate(log.path, log.path.stat().st_size - cut)
    assert [event.kind for event in log.read()[0]] == ["started"]
    log.append("finished", "1")
    assert [event.kind for event in log.read()[0]] == ["started", "finished"]


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    def write() -> None:
        for done in range(20):
            log.append("progress", "1", stage="s" * 500, done=done, total=20)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.read()[0]) == 80


def test_a_full_disk_leaves_the_diary_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("started", "1")
    before = log.path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    with pytest.raises(OSError, match="only 10 of"):
        log.append("finished", "1")
    assert log.path.read_bytes() == before

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        log.append("finished", "1")
    assert log.path.read_bytes() == before


@pytest.mark.parametrize("line", [
    {"time": 1, "kind": "progress", "job": "1", "stagf": "calibrate", "done": 1, "total": 2},
    {"time": 1, "kind": "progress", "job": "1", "stage": "calibrate", "done": "1", "total": 2},
    {"time": 1, "kind": "submitted", "job": "2"},
])
def test_a_line_without_what_its_kind_tells_is_passed_over(tmp_path: Path, line: dict[str, object]) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("submitted", "1", action="analyze")
    atomic.append_json(log.path, line)
    assert [job.state for job in read_jobs(log).values()] == ["queued"]
