"""State is what the diary adds up to."""

import pytest

from moesvd_core.runs.events import Event
from moesvd_core.runs.jobs import Job, advance


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
