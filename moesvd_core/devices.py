"""What a graphics card has room for, and how large tensors get there and back.

Memory of the host that may be swapped is copied through a small buffer of the driver's, by one thread, at a tenth of what the bus carries.
So it is copied here through two pinned buffers of our own in turns: while one is on the bus, the host's threads fill or empty the other.
Pinning all that waits on the host would take as long as copying it, and take that much memory from the rest of the machine.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

STAGED = 1 << 23
"""Bytes of each of the two buffers: few enough that tensors of a layer take several turns, in which host and bus work at the same time."""
SMALL = 1 << 20
"""Bytes up to which a tensor is copied as it comes."""
SPARED = 0.4
"""Share of a card's memory that stays free for computing when things are kept on it in case they are wanted again."""


def on_card(device: torch.device) -> bool:
    """Whether a device is a graphics card with streams of its own: work for it is queued, and done later."""
    return device.type == "cuda"


def room(device: torch.device) -> int:
    """Bytes that may be kept on a device for later; none where nothing is known of its memory."""
    if not on_card(device):
        return 0
    return max(0, unused(device) - int(SPARED * torch.cuda.mem_get_info(device)[1]))


def unused(device: torch.device) -> int:
    """Bytes of a card's memory that the next tensors can have: those free, and those that torch holds for them."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def finish(device: torch.device) -> None:
    """Wait until the current stream of a card has done all that it was given: then other streams may use what came of it."""
    if on_card(device):
        torch.cuda.current_stream(device).synchronize()


def finish_all(device: torch.device) -> None:
    """Wait until a card has done all that it was given, so that a clock that is read afterwards tells how long that took."""
    if on_card(device):
        torch.cuda.synchronize(device)


def finish_current() -> None:
    """`finish` of the card that this thread works on; nothing where none was used yet."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def to_host(source: Tensor) -> Tensor:
    """The tensor on the host; itself if it is there."""
    if not on_card(source.device) or source.nbytes <= SMALL:
        return source.cpu()
    return copy_to_host_(torch.empty(source.shape, dtype=source.dtype), source)


def copy_to_host_(target: Tensor, source: Tensor) -> Tensor:
    """Copy into a contiguous tensor on the host, rounding to its precision."""
    if not on_card(source.device) or target.nbytes <= SMALL:
        return target.copy_(source)
    flat, wanted = source.to(target.dtype).contiguous().view(-1), target.view(-1)
    pending: tuple[slice, Tensor, torch.cuda.Event] | None = None
    for part, buffer in _parts(wanted):
        buffer.copy_(flat[part], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(source.device))
        _emptied(wanted, pending)  # while this part is on the bus; its buffer is the one that the next part gets
        pending = part, buffer, copied
    _emptied(wanted, pending)
    return target


def _emptied(wanted: Tensor, pending: "tuple[slice, Tensor, torch.cuda.Event] | None") -> None:
    if pending is not None:
        part, buffer, copied = pending
        copied.synchronize()
        wanted[part].copy_(buffer)


def to_device(source: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; itself if it is there. It can be used at once on the current stream of the device."""
    if not on_card(device) or source.device.type != "cpu" or source.nbytes <= SMALL:
        return source.to(device)
    flat, target = source.contiguous().view(-1), torch.empty(source.shape, dtype=source.dtype, device=device)
    wanted, sent = target.view(-1), [torch.cuda.Event(), torch.cuda.Event()]
    for number, (part, buffer) in enumerate(_parts(flat)):
        sent[number % 2].synchronize()  # the part before the last has left the buffer; nothing to wait for at first
        buffer.copy_(flat[part])
        wanted[part].copy_(buffer, non_blocking=True)
        sent[number % 2].record(torch.cuda.current_stream(device))
    return target  # the buffers are not given to anyone else before the copies are done: torch sees to that


def _parts(flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of a flat tensor, and a buffer as long for each, two in turns."""
    length = max(1, STAGED // flat.element_size())
    buffers = [torch.empty(min(length, len(flat)), dtype=flat.dtype, pin_memory=True) for _ in range(2)]
    for number, start in enumerate(range(0, len(flat), length)):
        part = slice(start, min(start + length, len(flat)))
        yield part, buffers[number % 2][: part.stop - part.start]
