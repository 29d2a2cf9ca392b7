"""One calibration cut into steps that can be repeated: what the passes share.

A step reads states and statistics of earlier steps and writes its own, under names of its own. So a step that was interrupted is simply
done again, and gives the same result.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import DecoderStream
from moesvd_core.calibration.settings import Calibration
from moesvd_core.calibration.states import States
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.errors import StatisticsError


@dataclass(frozen=True)
class Step:
    """A unit of work.

    Attributes:
        name: for people, "forward, layer 3".
        run: does it.
        obsolete: states that nobody needs once it is done.
    """

    name: str
    run: Callable[[], None]
    obsolete: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What all steps work on.

    Attributes:
        stream: the model.
        calibration: the settings.
        batches: token ids of each batch, int64 [B, T].
        experts: the layers with routed experts, by index.
        states: hidden states and gradients between the steps.
        layers: the result, filled layer by layer.
    """

    stream: DecoderStream
    calibration: Calibration
    batches: tuple[Tensor, ...]
    experts: dict[int, ExpertLayer]
    states: States
    layers: MutableMapping[int, LayerStatistics]

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.stream.layers)

    def run_layer(self, index: int, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Hidden states after a layer, on the stream's device.

        Raises:
            StatisticsError: one of them is NaN or infinite.
        """
        call = self.stream.embed({"input_ids": ids_BT})[1][index]
        after_BTD = self.stream.run_layer(index, hidden_BTD.to(self.stream.device), call)
        require_finite(after_BTD, f"layer {index}: the hidden states after it", "calibrate")
        return after_BTD

    def experts_module(self, index: int) -> nn.Module:
        """The experts module of a layer; its weights are there while the layer is."""
        return self.stream.model.get_submodule(self.experts[index].name)


def require_finite(hidden_BTD: Tensor, what: str, doing: str) -> None:
    """Refuse hidden states in which there is NaN or Inf.

    Args:
        what: they are, with the layer.
        doing: what is done with them; a verb.

    Raises:
        StatisticsError: there is.
    """
    if not torch.isfinite(hidden_BTD.sum()) and not hidden_BTD.isfinite().all():
        raise StatisticsError(f"{what} are NaN or infinite; check its weights, or {doing} in bfloat16 or float32 if the dtype is float16")


@contextmanager
def hooked(handle: RemovableHandle) -> Iterator[None]:
    """A hook that is taken off again."""
    try:
        yield
    finally:
        handle.remove()


def hidden(index: int) -> str:
    """Name of the hidden states that enter a layer; `depth` names those that leave the last one."""
    return f"hidden-{index:03d}"
