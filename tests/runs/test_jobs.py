"""State is what the diary adds up to."""

import shutil
from pathlib import Path

import pytest

from moesvd_core.runs.events import Event, EventLog
from moesvd_core.runs.jobs import Job, advance, read_jobs


def fold(*events: Event) -> Job:
    jobs: dict[str, Job] = {}
    advance(jobs, [Event(0.0, "submitted", "1", {"action": "analyze"}), *events])
    return jobs["1"]


def progress(time: float, stage: str, done: int, total: int) -> Event:
    return Event(time, "progress", "1", {"stage": stage, "done": done, "total": total})


def test_a_job_waits_until_it_is_started() -> None:
    assert fold().state == "queued"
    assert fold(Event(1.0, "started", "1")).state == "running"


def test_the_time_left_follows_the_pace_of_the_stage() -> None:
    job = fold(Event(0.0, "started", "1"), progress(10.0, "calibrate", 1, 5), progress(20.0, "calibrate", 2, 5))
    assert job.eta_seconds == pytest.approx(30.0)


def test_what_an_earlier_worker_did_does_not_count_for_the_pace() -> None:
    job = fold(Event(100.0, "started", "1"), progress(110.0, "calibrate", 8, 10), progress(120.0, "calibrate", 9, 10))
    assert job.eta_seconds == pytest.approx(10.0)


def test_the_end_keeps_result_or_reason() -> None:
    assert fold(Event(1.0, "finished", "1", {"result": {"perplexity": 40.0}})).result == {"perplexity": 40.0}
    failed = fold(Event(1.0, "failed", "1", {"error": "no text", "error_kind": "InputError"}))
    assert (failed.state, failed.error, failed.error_kind) == ("failed", "no text", "InputError")


def test_events_of_an_unknown_job_are_passed_over() -> None:
    jobs: dict[str, Job] = {}
    advance(jobs, [Event(0.0, "finished", "7")])
    assert jobs == {}


def test_a_line_of_a_diary_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, read, after = EventLog(tmp_path / "events.jsonl"), EventLog.read, list[int]()
    monkeypatch.setattr(EventLog, "read", lambda self, position=0: after.append(position) or read(self, position))
    assert read_jobs(log) == {}
    log.append("submitted", "1", action="plan")
    assert [job.state for job in read_jobs(log).values()] == ["queued"]
    size = log.path.stat().st_size
    log.append("started", "1")
    found = read_jobs(log)
    assert found["1"].state == "running"
    found.clear()  # the caller's own
    assert [job.state for job in read_jobs(EventLog(log.path)).values()] == ["running"]
    assert after == [0, 0, size, log.path.stat().st_size]


@pytest.mark.parametrize("within", [False, True], ids=["another file", "the same file"])
def test_the_diary_of_a_later_run_in_the_same_folder_is_another(tmp_path: Path, within: bool) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl")
    log.path.parent.mkdir()
    log.append("submitted", "1", action="plan")
    assert list(read_jobs(log)) == ["1"]
    if within:
        log.path.write_text("")
        assert read_jobs(log) == {}
    else:
        shutil.rmtree(log.path.parent)
        assert read_jobs(log) == {}
        log.path.parent.mkdir()
    log.append("submitted", "2", action="export")
    log.append("started", "2")
    assert {number: job.state for number, job in read_jobs(log).items()} == {"2": "running"}
