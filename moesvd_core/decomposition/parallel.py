"""Several parts of a layer at a time: an eigendecomposition or a Cholesky factor hardly uses more than one core by itself."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
MOST = 4
"""Parts at a time, each with its matrices of hidden size in double precision."""


def in_parallel(work: Callable[[int], Result], parts: int, device: torch.device) -> Iterator[Result]:
    """`work` of every part (expert, side), in their order, so that what is summed up does not depend on which was done first.

    On CPUs several at a time, which share the threads that torch may use; elsewhere one after the other. Parts of parts share what is left.

    Args:
        work: gets a part's number. It runs in another thread, so it must not change what parts share.
        parts: how many.
        device: where `work` computes.
    """
    workers = min(MOST, parts, torch.get_num_threads()) if device.type == "cpu" else 1
    if workers < 2:
        yield from map(work, range(parts))
        return
    threads, grad = torch.get_num_threads() // workers, torch.is_grad_enabled()

    def prepare() -> None:  # both are settings of a thread
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)

    with ThreadPoolExecutor(workers, initializer=prepare) as pool:
        pending = deque(pool.submit(work, part) for part in range(workers))
        for part in range(workers, parts + workers):
            result = pending.popleft().result()
            if part < parts:
                pending.append(pool.submit(work, part))
            yield result
