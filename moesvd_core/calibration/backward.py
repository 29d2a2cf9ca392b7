"""The backward pass: how much the loss bends under an error of each layer's experts (what is summed up there: `curvature`).

It streams like the forward pass, from the top: a layer is run again from the hidden states that entered it, and the gradient that came
from above is pushed through. Between layers only that gradient lives. Weights need no gradients.

Shapes: B windows a batch, T tokens a window, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moesvd_core.calibration.curvature import LayerCurvature
from moesvd_core.calibration.job import Job, Step, hidden, hooked
from moesvd_core.errors import StatisticsError

CHUNK_ELEMENTS = 2**24
"""Logits held at once (64 MiB in float32), whatever the vocabulary."""
_NO_DERIVATIVE = ("does not require grad", "derivative for", "not implemented for", "is not differentiable")


class NotDifferentiableError(StatisticsError):
    """A layer that has no backward pass; calibration then measures probes instead."""


def backward_steps(job: Job) -> Iterator[Step]:
    """The loss and the head, then the layers from the last to the first one with experts."""
    yield Step("loss", partial(_loss_gradient, job), (hidden(job.depth),))
    first = min(job.experts)
    for index in reversed(range(first, job.depth)):
        yield Step(f"backward, layer {index}", partial(_backward_layer, job, index, index > first), (hidden(index), _gradient(index + 1)))


def _gradient(index: int) -> str:
    """Name of the gradient at the hidden states that enter a layer."""
    return f"gradient-{index:03d}"


def _batches(job: Job) -> Iterator[tuple[int, Tensor]]:
    """Number and token ids [B, T] of every batch, as far as `gradient_samples` reaches."""
    left = job.calibration.gradient_samples or job.calibration.samples
    for number, ids_BT in enumerate(job.batches):
        if left <= 0:
            return
        yield number, ids_BT[:left]
        left -= len(ids_BT)


def _loss_gradient(job: Job) -> None:
    def gradients() -> Iterator[Tensor]:
        for number, ids_BT in _batches(job):
            yield loss_gradient(job, ids_BT, job.states.get(hidden(job.depth), number)[: len(ids_BT)])

    job.states.put(_gradient(job.depth), gradients())


def loss_gradient(job: Job, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
    """Gradient [B, T, D] of the summed NLL of every window's next tokens at the last hidden states, a chunk of tokens at a time."""
    windows, length = ids_BT.shape
    tokens = max(1, CHUNK_ELEMENTS // int(job.stream.config.get_text_config().vocab_size))
    rows, step = max(1, tokens // length), min(tokens, length)
    gradient_BTD = torch.zeros_like(hidden_BTD)
    for row in range(0, windows, rows):
        for start in range(0, length - 1, step):
            part = (slice(row, row + rows), slice(start, min(start + step, length - 1)))
            target_S = ids_BT[part[0], part[1].start + 1 : part[1].stop + 1].reshape(-1).to(job.stream.device)
            chunk_BTD = hidden_BTD[part].to(job.stream.device).requires_grad_()
            with torch.enable_grad():
                logits_BTV = job.stream.head(chunk_BTD, {"input_ids": ids_BT[part]})
                loss = cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]).float(), target_S, reduction="sum")
            if not torch.isfinite(loss):
                raise StatisticsError("the loss is NaN or infinite, the hidden states are not: check the weights of norm and head")
            gradient_BTD[part] = torch.autograd.grad(loss, chunk_BTD)[0].cpu()
    return gradient_BTD


def _backward_layer(job: Job, index: int, push: bool) -> None:
    """Curvature of one layer's experts (if it has any), and the gradient at what enters the layer (if a layer below needs it)."""
    layer = job.experts.get(index)
    with job.stream.layer(index):
        row_gram = layer is not None and job.calibration.collects_rows(layer.input_rows)
        curvature = None if layer is None else LayerCurvature(job.experts_module(index), layer, row_gram=row_gram)
        pushed = _push(job, index, curvature, push)
        if push:
            job.states.put(_gradient(index), pushed)
        else:
            for _ in pushed:
                pass
    if curvature is not None:
        sums = curvature.finish()
        del curvature, pushed  # before the sums of the forward pass are read
        job.layers[index] = replace(job.layers[index], **sums)


def _push(job: Job, index: int, curvature: LayerCurvature | None, push: bool) -> Iterator[Tensor]:
    """Gradients at what enters a loaded layer, batch by batch (none unless `push`); those at its experts are added to `curvature`."""
    for number, ids_BT in _batches(job):
        hidden_BTD = job.states.get(hidden(index), number)[: len(ids_BT)]
        above_BTD = job.states.get(_gradient(index + 1), number)
        at_input_BTD, at_experts = layer_gradient(job, index, ids_BT, hidden_BTD, above_BTD, push)
        if curvature is not None and at_experts is not None:
            curvature.add(*at_experts)
        if at_input_BTD is not None:
            yield at_input_BTD


def layer_gradient(
    job: Job, index: int, ids_BT: Tensor, hidden_BTD: Tensor, above_BTD: Tensor, push: bool
) -> tuple[Tensor | None, tuple[tuple[Tensor, ...], Tensor] | None]:
    """Push a gradient through one loaded layer.

    Args:
        hidden_BTD: what enters the layer.
        above_BTD: gradient at what leaves it.
        push: whether the gradient at what enters the layer is wanted.

    Returns:
        the gradient at the layer's input [B, T, D]; and what its experts module was called with, beside the gradient at their output
        [tokens, D], float32. None where not asked for or not there.

    Raises:
        NotDifferentiableError: an operation of the layer has no backward pass.
    """
    outputs: list[Tensor] = []
    calls: list[tuple[Tensor, ...]] = []

    def capture(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append(tuple(arg.detach() for arg in args))
        outputs.append(output)
        return output.clone()  # a block that changes its experts' output in place must not change what was captured

    hidden_BTD = hidden_BTD.to(job.stream.device).requires_grad_()
    try:
        with torch.enable_grad():
            if index in job.experts:
                with hooked(job.experts_module(index).register_forward_hook(capture)):
                    after_BTD = job.run_layer(index, ids_BT, hidden_BTD)
            else:
                after_BTD = job.run_layer(index, ids_BT, hidden_BTD)
            wanted = [*([hidden_BTD] if push else []), *outputs]
            found = list(torch.autograd.grad(after_BTD, wanted, above_BTD.to(job.stream.device)))
    except (RuntimeError, NotImplementedError) as error:
        if any(phrase in str(error) for phrase in _NO_DERIVATIVE):
            raise NotDifferentiableError(f"layer {index} has no backward pass ({error}): calibrate with gradient=False") from error
        raise
    at_input_BTD = found.pop(0) if push else None
    if not found:
        return at_input_BTD, None
    # llama4 sums the outputs of all experts, one below the other: each block has the same gradient, the first stands for all.
    return at_input_BTD, (calls[0], found[0].reshape(-1, found[0].shape[-1])[: ids_BT.numel()].float())
