"""Workers in processes of their own: killed, cancelled, queued, and found again."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_worker import ACTIONS
from run_helpers import launch_fake, new_run, until

from moesvd_core import atomic
from moesvd_core.errors import InputError, RunError
from moesvd_core.progress import Progress
from moesvd_core.runs import folder
from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.events import Kind
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.jobs import Job, read_jobs
from moesvd_core.runs.process import this_process
from moesvd_core.runs.queue import Queue
from moesvd_core.runs.worker import STOP_SECONDS, work


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path, launch=launch_fake)


def pid_of(run: RunFolder) -> int:
    worker = run.worker()
    assert worker is not None
    return worker.pid


def within(seconds: float, task: Callable[[], list[Job]]) -> list[Job]:
    """What the task returns, which does not keep the tests waiting for ever."""
    found: list[list[Job]] = []
    thread = threading.Thread(target=lambda: found.append(task()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"not done within {seconds} s"
    return found[0]


def test_a_submitted_job_is_done_by_another_process(client: Client) -> None:
    run = new_run(client.root)
    assert client.status(run).state == "new"
    job = client.submit(run, "analyze", to=3)
    assert client.wait(run, job.id, 20).result == {"counted": 3}
    assert client.status(run).state == "finished"
    until(lambda: run.worker() is None)
    assert [event.kind for event, _ in client.tail(run)] == ["submitted", "started", "progress", "progress", "finished"]


def test_a_killed_worker_is_noticed_and_the_run_goes_on_from_where_it_was(client: Client) -> None:
    run = new_run(client.root)
    client.submit(run, "analyze", to=6, pause=0.3)
    until(lambda: (run.path / "factors" / "1.txt").exists())
    os.kill(pid_of(run), signal.SIGKILL)
    until(lambda: client.status(run).state == "interrupted", 10)
    first = (run.path / "factors" / "1.txt").read_text()
    [job] = client.resume(run)
    assert client.wait(run, job.id, 20).state == "finished"
    assert (run.path / "factors" / "1.txt").read_text() == first
    with pytest.raises(RunError, match="nothing to resume"):
        client.resume(run)


def test_the_worker_outlives_the_process_that_asked_for_it(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from run_helpers import launch_fake; from moesvd_core.runs.client import Client; from moesvd_core.runs.folder import RunFolder\n"
        "Client(Path(sys.argv[1]).parent, launch_fake).submit(RunFolder.open(Path(sys.argv[1])), 'analyze', to=8, pause=0.3)\n"
        "print('asked', flush=True); time.sleep(60)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path), str(Path(__file__).parent)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"asked\n"
    until(lambda: (run.path / "factors" / "0.txt").exists())
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    server.stdout.close()
    client = Client(tmp_path)
    assert client.status(run).state == "running"
    assert client.wait(run, "1", 20).state == "finished"


def test_cancelling_takes_effect_within_seconds_and_leaves_a_run_that_resumes(client: Client) -> None:
    run = new_run(client.root)
    client.submit(run, "analyze", to=40, pause=0.1)
    until(lambda: client.status(run).state == "running" and (run.path / "factors" / "1.txt").exists())
    client.cancel(run)
    start = time.monotonic()
    until(lambda: client.status(run).state == "cancelled", 3)
    assert time.monotonic() - start < 3
    [job] = client.resume(run)
    assert job.arguments == {"to": 40, "pause": 0.1}
    assert client.wait(run, job.id, 20).state == "finished"


def test_work_that_does_not_listen_is_ended(client: Client) -> None:
    run = new_run(client.root)
    client.submit(run, "evaluate", how="deaf")
    until(lambda: client.status(run).state == "running")
    pid = pid_of(run)
    client.cancel(run)
    until(lambda: client.status(run).state == "cancelled", STOP_SECONDS + 4)
    until(lambda: run.worker() is None, 2)
    with pytest.raises(ProcessLookupError):
        until(lambda: os.kill(pid, 0) is not None, 2)


def test_what_waits_behind_work_that_does_not_listen_is_done_by_a_fresh_worker(client: Client) -> None:
    run = new_run(client.root)
    ann, bob = (Client(client.root, launch=launch_fake, who=lambda name=name: name) for name in ("ann", "bob"))
    ann.submit(run, "evaluate", how="deaf")
    until(lambda: client.status(run).state == "running")
    pid = pid_of(run)
    waiting = [bob.submit(run, "similarity")]
    ann.cancel(run)
    waiting.append(client.submit(run, "similarity"))
    until(lambda: client.status(run).jobs[0].state == "cancelled", STOP_SECONDS + 4)
    for job in waiting:  # by the program's own worker, which finds no model here
        ended = client.wait(run, job.id, 60)
        assert (ended.state, "'tiny'" in ended.error) == ("failed", True)
    assert client.status(run).jobs[0].error == "cancelled"
    until(lambda: run.worker() is None)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert Queue(client.root).tickets() == []


def test_a_stopped_worker_that_does_not_listen_starts_no_other(client: Client) -> None:
    run = new_run(client.root)
    client.submit(run, "evaluate", how="deaf")
    until(lambda: client.status(run).state == "running")
    client.submit(run, "analyze", to=1)
    os.kill(pid_of(run), signal.SIGTERM)
    until(lambda: client.status(run).jobs[0].state == "cancelled", STOP_SECONDS + 4)
    until(lambda: run.worker() is None, 2)
    assert client.status(run).jobs[0].error == "stopped by SIGTERM"
    assert not run.launched_file.exists()


def test_a_worker_that_hangs_is_recognised_and_cancelling_ends_it(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "HANGING_SECONDS", 1.5)
    run = new_run(client.root)
    client.submit(run, "analyze", to=400, pause=0.1)
    until(lambda: client.status(run).state == "running" and client.status(run).job.stage != "")
    assert client.status(run).hanging is None
    pid = pid_of(run)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: (client.status(run).hanging or 0) > 1.5, 10)
    client.cancel(run)
    assert client.status(run).state == "cancelled"
    until(lambda: run.worker() is None, 5)
    [job] = client.resume(run)
    until(lambda: client.status(run).state == "running")
    client.cancel(run)
    assert client.wait(run, job.id, 20).state == "cancelled"


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("input", "InputError", "samples must be >= 1, got 0"),
        ("memory", "ResourceError", "GiB are free now"),
        ("disk", "ResourceError", "disk full while writing layer-003"),
        ("bug", "RuntimeError", "unexpected ZeroDivisionError: a bug"),
    ],
)
def test_a_failure_is_told_in_words(tmp_path: Path, how: str, kind: str, words: str) -> None:
    run = new_run(tmp_path)
    enqueue(run, "evaluate", {"how": how})
    [job] = work(run, lambda: ACTIONS)
    assert (job.state, job.error_kind) == ("failed", kind)
    assert words in job.error
    assert run.worker() is None


def test_the_next_job_is_done_after_one_that_failed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    enqueue(run, "evaluate", {"how": "bug"})
    enqueue(run, "analyze", {"to": 1})
    seen: list[Progress] = []
    assert [job.state for job in work(run, lambda: ACTIONS, seen.append)] == ["failed", "finished"]
    assert seen[-1].stage == "count"


def test_jobs_of_many_runs_are_done_one_at_a_time_in_order(client: Client) -> None:
    runs = [new_run(client.root, f"run-{number}") for number in range(5)]
    for run in runs:
        client.submit(run, "analyze", to=2, pause=0.05)
    assert [status.id for status in client.queue()][-1] == "run-4"
    assert (client.status(runs[-1]).place or 0) >= 1
    for run in runs:
        client.wait(run, "1", 40)
    times = [float((run.path / "factors" / f"{number}.txt").read_text().split()[1]) for run in runs for number in range(2)]
    assert times == sorted(times)
    assert client.queue() == []


def test_of_twenty_jobs_asked_for_at_once_none_is_lost_and_none_runs_beside_another(client: Client) -> None:
    runs = [new_run(client.root, f"run-{number}") for number in range(20)]
    with ThreadPoolExecutor(len(runs)) as threads:
        barrier = threading.Barrier(len(runs))
        list(threads.map(lambda run: (barrier.wait(), client.submit(run, "analyze", to=2, pause=0.02)), runs))
        order = [ticket.run for ticket in Queue(client.root).tickets()]
    for run in runs:
        assert client.wait(run, "1", 120).state == "finished"
    spans = []
    for run in runs:
        times = {event.kind: event.time for event in run.log.read()[0]}  # of progress, the last
        spans.append((times["started"], times["progress"], run.path.name))
    spans.sort()
    assert all(earlier[1] <= later[0] + 0.002 for earlier, later in itertools.pairwise(spans)), "one at a time (times are in milliseconds)"
    done = [name for *_, name in spans]
    assert [name for name in done if name in order] == order, "in the order in which they were asked for"
    assert client.queue() == []


def test_a_killed_worker_does_not_hold_up_the_queue(client: Client) -> None:
    first, second = new_run(client.root, "first"), new_run(client.root, "second")
    client.submit(first, "evaluate", how="deaf")
    until(lambda: client.status(first).state == "running")
    client.submit(second, "analyze", to=1)
    until(lambda: client.status(second).place == 1)
    os.kill(pid_of(first), signal.SIGKILL)
    assert client.wait(second, "1", 20).state == "finished"


def test_a_killed_worker_does_not_hold_up_the_next_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queue, "_counts", lambda *_: True)  # the new worker itself gives up the dead one's place
    run = new_run(tmp_path)
    enqueue(run, "evaluate", {"how": "deaf"})
    enqueue(run, "analyze", {"to": 1})
    run.log.append("started", "1")
    [job] = within(10, lambda: work(run, lambda: ACTIONS))
    assert (job.id, job.state) == ("2", "finished")
    assert read_jobs(run.log)["1"].state == "interrupted"


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled", "interrupted"])
def test_the_ticket_of_a_job_that_has_ended_is_void_though_its_run_is_attended(tmp_path: Path, end: Kind) -> None:
    run, queue = new_run(tmp_path), Queue(tmp_path)
    enqueue(run, "analyze", {"to": 1})
    enqueue(run, "analyze", {"to": 2})
    atomic.write_json(run.worker_file, this_process().as_dict())
    run.log.append("started", "1")
    assert [ticket.job for ticket in queue.tickets()] == ["1", "2"]
    run.log.append(end, "1")
    assert [ticket.job for ticket in queue.tickets()] == ["2"]
    assert queue.place(run, "2") == 0


def test_a_later_run_in_the_same_folder_is_not_taken_for_the_earlier(tmp_path: Path) -> None:
    run, queue = new_run(tmp_path), Queue(tmp_path)
    enqueue(run, "analyze", {"to": 1})
    run.log.append("cancelled", "1")
    assert queue.tickets() == []
    run.log.path.rename(tmp_path / "earlier")
    enqueue(run, "analyze", {"to": 1})
    assert [ticket.job for ticket in queue.tickets()] == ["1"]


def test_a_diary_that_cannot_be_read_holds_up_no_other_run(tmp_path: Path) -> None:
    first, second = new_run(tmp_path, "first"), new_run(tmp_path, "second")
    enqueue(first, "analyze", {"to": 1})
    enqueue(second, "analyze", {"to": 1})
    first.log.path.unlink()
    first.log.path.mkdir()
    assert Queue(tmp_path).place(second, "1") == 1, "as long as its worker may still come"


def test_a_run_is_worked_on_from_within_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = new_run(tmp_path)
    enqueue(made, "analyze", {"to": 1})
    monkeypatch.chdir(made.path)
    run = RunFolder(Path(), made.identity)
    assert Queue.of(run).place(run, "1") == 0
    [job] = within(10, lambda: work(run, lambda: ACTIONS))
    assert job.state == "finished"
    assert Queue(tmp_path).tickets() == []
    assert not (made.path / ".queue").exists()


def test_a_waiting_job_can_be_cancelled(client: Client) -> None:
    first, second = new_run(client.root, "first"), new_run(client.root, "second")
    client.submit(first, "analyze", to=100, pause=0.1)
    client.submit(second, "analyze", to=1)
    until(lambda: second.worker() is not None and first.worker() is not None)
    client.cancel(second)
    until(lambda: client.status(second).state == "cancelled", 3)
    assert not (second.path / "factors" / "0.txt").exists()
    client.cancel(first)
    until(lambda: client.status(first).state == "cancelled", 3)


def test_a_job_that_no_worker_came_for_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesvd_core.runs.client.START_SECONDS", 0.1)
    client = Client(tmp_path, launch=lambda run: None)
    run = new_run(tmp_path)
    client.submit(run, "analyze", to=1)
    assert client.status(run).state == "queued"
    until(lambda: client.status(run).state == "interrupted", 2)


def test_two_workers_do_not_share_a_run(client: Client) -> None:
    run = new_run(client.root)
    client.submit(run, "analyze", to=10, pause=0.1)
    until(lambda: run.worker() is not None)
    assert work(run, lambda: ACTIONS) == []
    with pytest.raises(RunError, match="is at work"):
        client.delete(run)
    client.cancel(run)
    until(lambda: client.status(run).state == "cancelled" and run.worker() is None, 5)
    client.delete(run)
    assert client.runs() == []


def test_unknown_actions_and_nothing_to_cancel_are_told(client: Client) -> None:
    run = new_run(client.root)
    with pytest.raises(InputError, match="no action 'fly': there are analyze"):
        client.submit(run, "fly")
    with pytest.raises(RunError, match="nothing to cancel"):
        client.cancel(run)


def test_a_worker_that_is_slow_to_start_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesvd_core.runs.client.START_SECONDS", 0.0)
    monkeypatch.setattr("moesvd_core.runs.queue.START_SECONDS", 0.0)
    run = new_run(tmp_path)
    atomic.write_json(run.launched_file, this_process().as_dict())
    launched: list[RunFolder] = []
    client = Client(tmp_path, launch=launched.append)
    client.submit(run, "analyze", to=1)
    assert (client.status(run).state, client.status(run).place) == ("queued", 0)
    assert launched == []
    run.launched_file.unlink()
    assert client.status(run).state == "interrupted"


def test_the_real_worker_is_launched_and_says_why_it_failed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    client = Client(tmp_path)
    job = client.wait(run, client.submit(run, "evaluate").id, 60)
    assert job.state == "failed"
    assert "'tiny'" in job.error  # which is no model
    until(lambda: run.worker() is None)
