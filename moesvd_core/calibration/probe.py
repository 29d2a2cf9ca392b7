"""Without a backward pass: how much the loss bends under an error of each layer's experts, measured by one small disturbance a layer.

Noise δ is added to the output of a layer's experts and carried to the end; the KL divergence of the predictions from the undisturbed ones
is about ½·E[δᵀΓδ]. One number cannot tell directions apart, so Γ is taken as a multiple of the identity: Γ = 2·KL / E‖δ‖² · I.
All disturbed copies of a few windows move through the layers together, so that each layer is read once.

Shapes: B windows, T tokens a window, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesvd_core.architectures.streaming import CHUNK_ELEMENTS
from moesvd_core.calibration.job import Job, Step, hooked
from moesvd_core.errors import StatisticsError

WINDOWS = 4
"""Windows that the probes are measured on, the first ones."""
RELATIVE_NOISE = 0.3
"""Size of the noise as a share of the experts' output: that of an ordinary compression error. Smaller noise says less: what is left of the
divergence is then mostly routers of later layers that switch to another expert, which falls with the first power of the noise only."""
_LEAST = 1e-12
"""Smallest divergence a token taken for real, in nats: a layer whose noise does not reach the predictions still gets a scale above zero."""


def probe_steps(job: Job) -> Iterator[Step]:
    """The embedding, every layer, then the head."""
    yield Step("probe, embedding", partial(_embed, job))
    for index in range(job.depth):
        yield Step(f"probe, layer {index}", partial(_probe_layer, job, index), (_copies(index),))
    yield Step("probe, predictions", partial(_diverge, job), (_copies(job.depth), *(_energy(index) for index in job.experts)))


def _copies(index: int) -> str:
    """Name of the hidden states that enter a layer: the undisturbed ones, then one copy for each layer with experts below."""
    return f"probe-{index:03d}"


def _energy(index: int) -> str:
    """Name of the mean squared length of a layer's noise."""
    return f"noise-{index:03d}"


def _ids(job: Job) -> Tensor:
    return torch.cat(job.batches)[:WINDOWS]


def _embed(job: Job) -> None:
    job.states.put(_copies(0), [job.stream.embed({"input_ids": _ids(job)})[0]])


@torch.no_grad()
def _probe_layer(job: Job, index: int) -> None:
    ids_BT = _ids(job)
    with job.stream.layer(index):
        copies = [job.states.get(_copies(index), number) for number in range(job.states.count(_copies(index)))]
        after = [job.run_layer(index, ids_BT, copy_BTD) for copy_BTD in copies]
        if index in job.experts:
            disturbed_BTD, energy = _disturb(job, index, ids_BT, copies[0])
            after.append(disturbed_BTD)
            job.states.put(_energy(index), [torch.tensor(energy, dtype=torch.float64)])
    job.states.put(_copies(index + 1), after)


def _disturb(job: Job, index: int, ids_BT: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, float]:
    """Hidden states after a layer to whose experts' output noise was added, and E‖δ‖² a token."""
    generator = torch.Generator().manual_seed(job.calibration.seed * 1_000_003 + index)
    energies: list[float] = []

    def add_noise(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        noise = torch.zeros(output.numel() // output.shape[-1], output.shape[-1])
        noise[: ids_BT.numel()] = torch.randn(ids_BT.numel(), output.shape[-1], generator=generator)  # llama4: one block of rows only
        noise *= RELATIVE_NOISE * _ordinary_size(output)
        energies.append(noise.square().sum().item() / ids_BT.numel())
        return output + noise.reshape(output.shape).to(output)

    with hooked(job.experts_module(index).register_forward_hook(add_noise)):
        after_BTD = job.run_layer(index, ids_BT, hidden_BTD)
    if not energies:
        raise StatisticsError(f"layer {index}: its block never calls its experts, so they cannot be measured")
    return after_BTD, energies[0]


def _ordinary_size(output: Tensor) -> float:
    """Root mean square of the middle one of the rows that are not zero; single tokens can be a hundred times as large as all others."""
    size_T = output.float().reshape(-1, output.shape[-1]).square().mean(1).sqrt()
    return size_T[size_T > 0].median().item() if size_T.any() else 1.0


@torch.no_grad()
def _diverge(job: Job) -> None:
    """Turn what the noise did to the predictions into each layer's gradient Gram.

    What a backward pass has left that came to a layer without one goes: its sums are over other tokens, and only some layers have them.
    """
    ids_BT = _ids(job)
    original_BTD = job.states.get(_copies(job.depth), 0)
    for number, (index, layer) in enumerate(sorted(job.experts.items()), 1):
        divergence = _divergence(job, ids_BT, original_BTD, job.states.get(_copies(job.depth), number))
        scale = 2 * max(divergence, _LEAST) / job.states.get(_energy(index), 0).item()
        job.layers[index] = replace(
            job.layers[index],
            gradient_gram_DD=scale * ids_BT.numel() * torch.eye(layer.hidden),
            gradient_tokens=ids_BT.numel(),
            gradient_gram_EDD=None,
            gradient_weight_square_E=None,
            row_square_EN=None,
            row_gram_ENN=None,
            weighted_input_gram_EDD=None,
        )


def _divergence(job: Job, ids_BT: Tensor, original_BTD: Tensor, disturbed_BTD: Tensor) -> float:
    """KL(original || disturbed) of the next-token distributions, nats a token."""
    step = max(1, CHUNK_ELEMENTS // int(job.stream.config.get_text_config().vocab_size) // len(ids_BT))
    total = 0.0
    for start in range(0, ids_BT.shape[1], step):
        part = slice(start, start + step)
        batch = {"input_ids": ids_BT[:, part]}
        logp, logq = (
            job.stream.head(hidden_BTD[:, part].to(job.stream.device), batch).float().log_softmax(-1)
            for hidden_BTD in (original_BTD, disturbed_BTD)
        )
        total += (logp.exp() * (logp - logq)).sum(dtype=torch.float64).item()
    return total / ids_BT.numel()
