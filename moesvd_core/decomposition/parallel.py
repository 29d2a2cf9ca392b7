"""Several experts of a layer at a time: an eigendecomposition or a Cholesky factor hardly uses more than one core by itself."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
MOST = 4
"""Experts at a time, each with its matrices of hidden size in double precision."""


def each_expert(work: Callable[[int], Result], experts: int, device: torch.device) -> Iterator[Result]:
    """`work` of every expert, in their order, so that what is summed up does not depend on which was done first.

    On CPUs several at a time, which share the threads that torch may use; elsewhere one after the other.

    Args:
        work: gets an expert's number. It runs in another thread, so it must not change what experts share.
        experts: how many.
        device: where `work` computes.
    """
    workers = min(MOST, experts, torch.get_num_threads()) if device.type == "cpu" else 1
    if workers < 2:
        yield from map(work, range(experts))
        return
    threads, grad = torch.get_num_threads() // workers, torch.is_grad_enabled()

    def prepare() -> None:  # both are settings of a thread
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)

    with ThreadPoolExecutor(workers, initializer=prepare) as pool:
        pending = deque(pool.submit(work, expert) for expert in range(workers))
        for expert in range(workers, experts + workers):
            result = pending.popleft().result()
            if expert < experts:
                pending.append(pool.submit(work, expert))
            yield result
