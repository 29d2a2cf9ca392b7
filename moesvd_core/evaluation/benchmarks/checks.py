"""What benchmarks refuse before any work: settings that nothing could be measured with, and devices that are not there."""

from collections.abc import Sequence

import torch

from moesvd_core.errors import InputError, is_number


def require_ratios(name: str, ratios: Sequence[object], whole: str = "the model's parameters") -> None:
    """Refuse ratios that no method could reach.

    Args:
        whole: what they are shares of.

    Raises:
        InputError: one that is no number in [0, 1).
    """
    for ratio in ratios:
        if not (is_number(ratio) and 0 <= ratio < 1):
            raise InputError(f"{name} must be numbers in [0, 1), shares of {whole} to remove, got {ratio!r}")


def require_device(device: str) -> None:
    """Refuse a device that is not there, or that benchmarks have no clock for.

    Raises:
        InputError: it is neither the CPU nor a graphics card of this machine.
    """
    cards = [f"cuda:{card}" for card in range(torch.cuda.device_count())]
    there = ["cpu", *(["cuda"] if cards else []), *cards]
    if device not in there:
        known = f"one of {', '.join(there)}" if cards else "cpu on this machine, where torch finds no graphics card"
        raise InputError(f"device must be {known}, got {device!r}")
