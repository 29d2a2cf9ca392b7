"""The backward pass: how much the loss bends under an error of each layer's experts (what is summed up there: `curvature`).

It streams like the forward pass, from the top: a layer is run again from the hidden states that entered it, and the gradients that came
from above are pushed through. Between layers only those gradients live. Weights need no gradients.

The squares of gradients stand for the Hessian as Fisher's information does, which takes its labels from what the model itself predicts
(Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015; Kunstner et al., "Limitations of the
empirical Fisher approximation for natural gradient descent", 2019). So next tokens are drawn beside the one that stands in the text, and
every label has a gradient of its own, scaled so that squares summed over labels are their mean.

Shapes: K labels a position, the text's own first; B windows a batch, T tokens a window, S positions in a chunk, D hidden size,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from moesvd_core.architectures.streaming import CHUNK_ELEMENTS
from moesvd_core.calibration.curvature import LayerCurvature
from moesvd_core.calibration.job import Job, Step, hidden, hooked
from moesvd_core.calibration.settings import Calibration
from moesvd_core.errors import StatisticsError

_NO_DERIVATIVE = ("does not require grad", "derivative for", "not implemented for", "is not differentiable")


class NotDifferentiableError(StatisticsError):
    """A layer that has no backward pass; calibration then measures probes instead."""


def backward_steps(job: Job) -> Iterator[Step]:
    """The loss and the head, then the layers from the last to the first one with experts."""
    yield Step("loss", partial(_loss_gradient, job), (hidden(job.depth),))
    first = min(job.experts)
    for index in reversed(range(first, job.depth)):
        yield Step(f"backward, layer {index}", partial(_backward_layer, job, index, index > first), (hidden(index), _gradient(index + 1)))


def passing(job: Job) -> Iterator[str]:
    """Names of all states that the backward pass reads and writes."""
    for index in range(job.depth + 1):
        yield hidden(index)
        yield _gradient(index)


def _gradient(index: int) -> str:
    """Name of the gradients at the hidden states that enter a layer."""
    return f"gradient-{index:03d}"


class _Part(NamedTuple):
    """What the backward pass takes of one batch of the forward pass: some of its windows.

    Attributes:
        batch: number of that batch.
        place: number of this part among all parts.
        rows: windows of the batch.
        windows: their numbers in the whole text.
        ids_BT: their token ids.
    """

    batch: int
    place: int
    rows: Tensor
    windows: list[int]
    ids_BT: Tensor


def _parts(job: Job) -> Iterator[_Part]:
    """`gradient_samples` windows, evenly spread over all, since those of a long text stand in its order."""
    windows = sum(len(ids_BT) for ids_BT in job.batches)
    taken = min(job.calibration.gradient_samples or windows, windows)
    chosen_W = torch.arange(taken) * windows // taken
    first = place = 0
    for batch, ids_BT in enumerate(job.batches):
        own_B = chosen_W[(chosen_W >= first) & (chosen_W < first + len(ids_BT))]
        if len(own_B):
            yield _Part(batch, place, own_B - first, own_B.tolist(), ids_BT[own_B - first])
            place += 1
        first += len(ids_BT)


def _entering(job: Job, index: int, part: _Part) -> Tensor:
    """Hidden states of a part's windows that enter a layer [B, T, D]."""
    hidden_BTD = job.states.get(hidden(index), part.batch)
    return hidden_BTD if len(part.rows) == len(hidden_BTD) else hidden_BTD[part.rows.to(hidden_BTD.device)]


def _loss_gradient(job: Job) -> None:
    def gradients() -> Iterator[Tensor]:
        for part in _parts(job):
            chance_KBT = _chances(job.calibration, part.windows, part.ids_BT.shape[1])
            yield loss_gradient(job, part.ids_BT, _entering(job, job.depth, part), chance_KBT)

    job.states.put(_gradient(job.depth), gradients())


def _chances(calibration: Calibration, windows: Sequence[int], length: int) -> Tensor:
    """Numbers in [0, 1) that decide which labels are drawn, [K-1, B, T]; a window's own, whatever batch it is in."""
    chance_BKT = torch.empty(len(windows), calibration.drawn_labels, length, dtype=torch.float64)
    for window, chance_KT in zip(windows, chance_BKT, strict=True):
        generator = torch.Generator().manual_seed(calibration.seed * 1_000_003 + window)
        chance_KT.copy_(torch.rand(chance_KT.shape, generator=generator, dtype=torch.float64))
    return chance_BKT.transpose(0, 1)


def loss_gradient(job: Job, ids_BT: Tensor, hidden_BTD: Tensor, chance_KBT: Tensor) -> Tensor:
    """Gradients [K, B, T, D] of the summed NLL of every window's next tokens at the last hidden states, a chunk of tokens at a time; on the
    device of those states.

    Args:
        chance_KBT: a number in [0, 1) for each label to draw, K - 1 a position.
    """
    windows, length = ids_BT.shape
    labels, device = 1 + len(chance_KBT), job.stream.device
    tokens = max(1, CHUNK_ELEMENTS // int(job.stream.config.get_text_config().vocab_size))
    rows, step = max(1, tokens // length), min(tokens, length)
    gradient_KBTD = hidden_BTD.new_zeros(labels, *hidden_BTD.shape)
    for row in range(0, windows, rows):
        for start in range(0, length - 1, step):
            part = (slice(row, row + rows), slice(start, min(start + step, length - 1)))
            target_S = ids_BT[part[0], part[1].start + 1 : part[1].stop + 1].reshape(-1).to(device)
            chunk_BTD = hidden_BTD[part].to(device).requires_grad_()
            with torch.enable_grad():
                logits_BTV = job.stream.head(chunk_BTD, {"input_ids": ids_BT[part]})
                logits_SV = logits_BTV.reshape(-1, logits_BTV.shape[-1]).float()
                targets = [target_S, *_drawn(logits_SV, chance_KBT[:, *part].flatten(1).to(device))]
                logp_SV = logits_SV.log_softmax(-1)
                losses = [nll_loss(logp_SV, target_S, reduction="sum") for target_S in targets]
            if not torch.isfinite(losses[0]):
                raise StatisticsError("the loss is NaN or infinite, the hidden states are not: check the weights of norm and head")
            for label, loss in enumerate(losses):
                (found_BTD,) = torch.autograd.grad(loss, chunk_BTD, retain_graph=label < labels - 1)
                gradient_KBTD[label][part] = (found_BTD / labels**0.5).to(gradient_KBTD.device)
    return gradient_KBTD


@torch.no_grad()
def _drawn(logits_SV: Tensor, chance_KS: Tensor) -> Tensor:
    """Next tokens drawn for each position from what the model predicts [K, S]: where the summed probabilities pass a number in [0, 1)."""
    if len(chance_KS) == 0:
        return chance_KS.long()
    summed_SV = logits_SV.softmax(-1, dtype=torch.float64).cumsum(-1)
    drawn_SK = torch.searchsorted(summed_SV, (chance_KS.T * summed_SV[:, -1:]).contiguous(), right=True)
    return drawn_SK.T.clamp(max=logits_SV.shape[-1] - 1)


def _backward_layer(job: Job, index: int, push: bool) -> None:
    """Curvature of one layer's experts (if it has any), and the gradients at what enters the layer (if a layer below needs them)."""
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
    for part in _parts(job):
        above_KBTD = job.states.get(_gradient(index + 1), part.place)
        at_input_KBTD, at_experts = layer_gradients(job, index, part.ids_BT, _entering(job, index, part), above_KBTD, push)
        if curvature is not None and at_experts is not None:
            curvature.add(*at_experts)
        if at_input_KBTD is not None:
            yield at_input_KBTD


def layer_gradients(
    job: Job, index: int, ids_BT: Tensor, hidden_BTD: Tensor, above_KBTD: Tensor, push: bool
) -> tuple[Tensor | None, tuple[tuple[Tensor, ...], Tensor] | None]:
    """Push gradients through one loaded layer, which is run once for all of them.

    Args:
        hidden_BTD: what enters the layer.
        above_KBTD: gradients at what leaves it.
        push: whether the gradients at what enters the layer are wanted.

    Returns:
        the gradients at the layer's input [K, B, T, D]; and what its experts module was called with, beside the gradients at their output
        [K, tokens, D]. None where not asked for or not there.

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
            each = [
                torch.autograd.grad(after_BTD, wanted, above_BTD.to(job.stream.device), retain_graph=label < len(above_KBTD) - 1)
                for label, above_BTD in enumerate(above_KBTD)
            ]
    except (RuntimeError, NotImplementedError) as error:
        if any(phrase in str(error) for phrase in _NO_DERIVATIVE):
            raise NotDifferentiableError(f"layer {index} has no backward pass ({error})") from error
        raise
    at_input_KBTD = torch.stack([found[0] for found in each]) if push else None
    if not outputs:
        return at_input_KBTD, None
    # llama4 sums the outputs of all experts, one below the other: each block has the same gradient, the first stands for all.
    at_output_KTD = torch.stack([found[int(push)].reshape(-1, found[int(push)].shape[-1])[: ids_BT.numel()] for found in each])
    return at_input_KBTD, (calls[0], at_output_KTD)
