"""Experts in parallel give what one after the other gives, in the same order."""

import threading
from collections.abc import Iterator

import pytest
import torch

from moesvd_core.decomposition.parallel import MOST, in_parallel

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
