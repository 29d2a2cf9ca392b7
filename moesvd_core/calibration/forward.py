"""The forward pass: the text goes through one layer after the other, and each layer's experts are measured on the way.

Every layer is passed, also those that will not be compressed. The hidden states that enter each layer are kept for the backward pass,
which starts each layer again from them.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesvd_core.calibration.job import Job, Step, hidden, hooked
from moesvd_core.calibration.moments import LayerMoments


def forward_steps(job: Job, *, keep_from: int) -> Iterator[Step]:
    """The embedding, then every layer.

    Args:
        keep_from: first layer whose entering hidden states are needed later; `depth` keeps only those that leave the last layer.
    """
    yield Step("embedding", partial(_embed, job))
    for index in range(job.depth):
        yield Step(f"forward, layer {index}", partial(_forward_layer, job, index), () if index >= keep_from else (hidden(index),))


def _embed(job: Job) -> None:
    job.states.put(hidden(0), (job.stream.embed({"input_ids": ids_BT})[0] for ids_BT in job.batches))


@torch.no_grad()
def _forward_layer(job: Job, index: int) -> None:
    with job.stream.layer(index):
        layer = job.experts.get(index)
        if layer is None:
            job.states.put(hidden(index + 1), _outputs(job, index, None))
            return
        intermediate = job.calibration.collects_intermediate(layer.width)
        moments = LayerMoments(job.experts_module(index), layer, threshold=job.calibration.outlier_threshold, intermediate=intermediate)
        job.states.put(hidden(index + 1), _outputs(job, index, moments))
        statistics = moments.finish()
        del moments  # its sums are twice as large as what is written now
        job.layers[index] = statistics


def _outputs(job: Job, index: int, moments: LayerMoments | None) -> Iterator[Tensor]:
    """Hidden states after the layer, batch by batch; what enters its experts is added to `moments`."""
    for batch, ids_BT in enumerate(job.batches):
        listening = nullcontext() if moments is None else hooked(_listen(job.experts_module(index), moments, ids_BT.numel()))
        with listening:
            yield job.run_layer(index, ids_BT, job.states.get(hidden(index), batch))


def _listen(module: nn.Module, moments: LayerMoments, tokens: int) -> Any:
    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args, tokens)

    return module.register_forward_pre_hook(add)
