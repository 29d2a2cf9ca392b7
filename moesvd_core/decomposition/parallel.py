"""Several parts of a layer at a time: an eigendecomposition or a Cholesky factor hardly uses more than one core by itself, and on a card
it waits for itself most of the time.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any, Generic, TypeVar

import torch

from moesvd_core.devices import finish, finish_current, on_card

Result = TypeVar("Result")
MOST = 4
"""Parts at a time, each with its matrices of hidden size in double precision."""
STREAMS = 4
"""Parts at a time on a card, each in a stream of its own, with the matrices of its experts: eigendecompositions of 1024 leave so much of an
H100 to others, and threads wait for each other's Python."""
_LOADING = threading.Lock()
_SETTING = threading.Lock()


def in_parallel(work: Callable[[int], Result], parts: int, device: torch.device) -> Iterator[Result]:
    """`work` of every part (expert, side), in their order, so that what is summed up does not depend on which was done first.

    On CPUs several at a time, which share the threads that torch may use; on a card several, each in a stream of its own; elsewhere one
    after the other. Parts of parts share what is left, and what the caller does with a result it does in one thread: more would take
    turns with the parts, and wait for each other for longer than they compute.

    A card's memory goes back to the stream that asked for it, whoever else may still be reading it there. So a part is finished on the card
    before its result is handed over, whatever the caller does with the result is finished before the next one is, and a part starts behind
    all that the caller has asked for before.

    Args:
        work: gets a part's number. It runs in another thread, so it must not change what parts share (what they make when it is first asked
            for is made by `MadeOnce`).
        parts: how many.
        device: where `work` computes.
    """
    workers = min(_most(device), parts)
    if workers < 2:
        yield from map(work, range(parts))
        return
    threads, grad = max(1, torch.get_num_threads() // workers), torch.is_grad_enabled()
    own, place = threading.local(), count()

    def prepare() -> None:  # all are a thread's own
        if device.type == "cpu":
            _set_own_threads(threads)
        torch.set_grad_enabled(grad)
        own.place = next(place)

    done = _streamed(work, device, own) if on_card(device) else work
    with _one_thread(device), ThreadPoolExecutor(workers, initializer=prepare) as pool:
        pending = deque(pool.submit(done, part) for part in range(workers))
        for part in range(workers, parts + workers):
            result = pending.popleft().result()
            if part < parts:
                pending.append(pool.submit(done, part))
            yield result
            finish(device)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Leave a CPU's threads to others meanwhile, but for one."""
    if device.type != "cpu":
        yield
        return
    before, caller = torch.get_num_threads(), threading.get_ident()
    _set_own_threads(1)
    try:
        yield
    finally:
        if threading.get_ident() == caller:  # a generator that nobody exhausts may end in another one
            _set_own_threads(before)


def _set_own_threads(number: int) -> None:
    """Have the calling thread's operations share so many threads, and nobody else's.

    `torch.set_num_threads` says it to all threads that are yet to start as well, which would use a part of the processor ever after. So
    they are told at once that all is as before.
    """
    with _SETTING, ThreadPoolExecutor(1) as new:
        everyone = new.submit(torch.get_num_threads).result()
        torch.get_num_threads()  # a thread that asks for the first time is given everyone's number
        torch.set_num_threads(number)
        new.submit(torch.set_num_threads, everyone).result()


def _most(device: torch.device) -> int:
    if device.type == "cpu":
        return min(MOST, torch.get_num_threads())
    return STREAMS if on_card(device) else 1


def _streamed(work: Callable[[int], Result], device: torch.device, own: threading.local) -> Callable[[int], Result]:
    """The work in a stream of the thread that does it, behind what its caller's stream was given.

    Args:
        own: has the thread's place among those that work.
    """
    _load_decompositions(device)
    caller, asking = torch.cuda.current_stream(device), threading.get_ident()

    def done(part: int) -> Result:
        stream = _stream(caller.device, asking, own.place)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            result = work(part)
            stream.synchronize()
        return result

    return done


@cache
def _load_decompositions(device: torch.device) -> None:
    """Have torch load its library of a card's decompositions, which it does at the first one, and cannot for two threads at once."""
    with _LOADING:
        torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))


@cache
def _stream(device: torch.device, caller: int, place: int) -> torch.cuda.Stream:
    """The same streams again and again for one thread that asks for work: torch keeps memory and workspaces for every stream."""
    return torch.cuda.Stream(device)


class MadeOnce(Generic[Result]):
    """A property that is made when it is first asked for, by one of the threads that ask; the others wait until it is there, on a card too.

    With `functools.cached_property` it would at worst be made twice on CPUs; on a card another stream would read it before it is written.
    """

    def __init__(self, make: Callable[[Any], Result]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Result:
        kept: dict[str, Any] = instance.__dict__  # where the next one who asks finds it without coming here
        with kept.setdefault("_making", threading.RLock()):
            if self._name not in kept:
                made = self._make(instance)
                finish_current()
                kept[self._name] = made
        result: Result = kept[self._name]
        return result
