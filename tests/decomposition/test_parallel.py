"""Experts in parallel give what one after the other gives, in the same order."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from moesvd_core.decomposition import parallel
from moesvd_core.decomposition.parallel import MOST, STREAMS, MadeOnce, in_parallel

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


@pytest.mark.parametrize("experts", [0, 1, 2, 9])
def test_results_come_in_the_order_of_the_experts(threads: int, experts: int) -> None:
    assert list(in_parallel(lambda expert: expert**2, experts, CPU)) == [expert**2 for expert in range(experts)]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [2, 8], indirect=True)
def test_only_those_who_work_share_threads(threads: int) -> None:
    with ThreadPoolExecutor(1) as others:  # whose thread starts in the middle of the work, as one of a server may
        seen = [(own, torch.get_num_threads(), others.submit(torch.get_num_threads).result()) for own in in_parallel(_threads, 9, CPU)]
    assert set(seen) == {(threads // min(threads, MOST), 1, threads)}
    assert torch.get_num_threads() == threads


def test_threads_are_given_back_by_work_that_is_left_off(threads: int) -> None:
    for _ in in_parallel(_threads, 9, CPU):
        break
    assert torch.get_num_threads() == threads


def _threads(part: int) -> int:
    time.sleep(0.05)  # until all who work have started
    return torch.get_num_threads()


def test_no_more_wait_than_work(threads: int) -> None:
    started: list[int] = []
    results = in_parallel(started.append, 20, CPU)
    next(results)
    assert len(started) <= min(threads, MOST) + 1  # those at work, and the one that takes the place of the first
    results.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("threads")
def test_an_error_reaches_the_caller_and_ends_the_work() -> None:
    def fail(expert: int) -> int:
        if expert == 3:
            raise ValueError("expert 3 is broken")
        return expert

    with pytest.raises(ValueError, match="expert 3 is broken"):
        list(in_parallel(fail, 6, CPU))
    assert all(not thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


@pytest.mark.usefixtures("threads")
def test_gradients_are_recorded_just_where_the_caller_does() -> None:
    with torch.no_grad():
        assert not any(in_parallel(lambda expert: torch.is_grad_enabled(), 3, CPU))
    assert all(in_parallel(lambda expert: torch.is_grad_enabled(), 3, CPU))


class Stream:
    """A stream of a card that keeps a diary."""

    device = CPU

    def __init__(self, diary: list[tuple[str, str]], name: str) -> None:
        self.diary, self.name = diary, name

    def wait_stream(self, other: "Stream") -> None:
        self.diary.append((self.name, f"waits for {other.name}"))

    def synchronize(self) -> None:
        self.diary.append((self.name, "is done"))


def test_parts_of_a_card_start_behind_their_caller_and_are_done_when_they_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    diary: list[tuple[str, str]] = []
    caller = Stream(diary, "caller")
    monkeypatch.setattr(parallel, "on_card", lambda device: True)
    monkeypatch.setattr(parallel, "finish", lambda device: caller.synchronize())
    monkeypatch.setattr(parallel, "_most", lambda device: STREAMS)
    monkeypatch.setattr(parallel, "_stream", lambda device, asking, place: Stream(diary, f"stream {place}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def work(part: int) -> int:
        time.sleep(0.02)
        return part

    for number, result in enumerate(in_parallel(work, 9, CPU)):
        assert result == number
        diary.append(("caller", f"got {result}"))
    assert {name for name, _ in diary} == {"caller", *(f"stream {place}" for place in range(STREAMS))}
    for place in range(STREAMS):
        assert [what for name, what in diary if name == f"stream {place}"][:2] == ["waits for caller", "is done"]
    expected = [each for part in range(9) for each in (f"got {part}", "is done")]
    assert [what for name, what in diary if name == "caller"] == expected, "what the caller does with a result is done before the next"


def test_what_parts_share_is_made_once_and_is_there_for_all_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[bool] = []
    monkeypatch.setattr(parallel, "finish_current", lambda: finished.append(True))

    class Shared:
        made = 0

        @MadeOnce
        def value(self) -> int:
            """What is shared."""
            time.sleep(0.05)
            self.made += 1
            return 7

    shared = Shared()
    threads = [threading.Thread(target=lambda: seen.append(shared.value)) for _ in range(5)]
    seen: list[int] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [7] * 5 and shared.made == 1 and finished == [True]
