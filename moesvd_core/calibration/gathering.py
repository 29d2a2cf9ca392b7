"""Calls of an experts module put together until there is enough for every expert to do: a card that is asked for little at a time spends
longer being asked than working, and a layer with many experts sends few tokens of a batch to each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.devices import on_card

ENOUGH = 4096
"""Tokens an expert is given at a time on average, where calls of fewer are put together."""


class Gathering:
    """Tensors of several calls, one behind the other, for work that sums over tokens.

    Args:
        layer: whose experts are called.
        device: where; calls wait for each other on a card only.
        dims: the dimension of each of a call's tensors that counts tokens.
    """

    def __init__(self, layer: ExpertLayer, device: torch.device, dims: Sequence[int]) -> None:
        waits = on_card(device) and layer.routing == "weights"  # elsewhere the tokens of a call are those of every expert in turn
        self._wanted = ENOUGH * layer.experts // layer.active if waits else 0
        self._dims = dims
        self._calls: list[Sequence[Tensor]] = []
        self._tokens = 0

    def add(self, call: Sequence[Tensor], tokens: int) -> Sequence[Tensor] | None:
        """Take one call's tensors, which must not be changed any more, and give what has come together if that is enough to work on."""
        self._calls.append(call)
        self._tokens += tokens
        return self.rest() if self._tokens >= self._wanted else None

    def rest(self) -> Sequence[Tensor] | None:
        """What is left to work on; None where nothing is."""
        calls, self._calls, self._tokens = self._calls, [], 0
        if len(calls) < 2:
            return calls[0] if calls else None
        return [torch.cat(parts, dim) for parts, dim in zip(zip(*calls, strict=True), self._dims, strict=True)]
