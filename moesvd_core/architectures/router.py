"""The step of a router that is linear: its weight, what it reads in a run, and another weight in its place.

Families differ in what a router does before that step (a norm, a scale) and behind it (softmax or sigmoid, groups, corrections); in between
each multiplies by one matrix with a row for every expert. Where it is, its shape tells; that it does what it is taken for, its answer.

Shapes: T tokens, E experts, F features that the matrix reads (the hidden size).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.errors import UnsupportedModelError
from moesvd_core.kept_router import router_of

_CLOSE = 3e-2
"""Share of the logits by which those of half precision may differ."""


@dataclass(frozen=True)
class RouterStep:
    """Where a layer's router multiplies by its matrix.

    Attributes:
        module: the one that does: the router itself, or a part of it.
        leaf: the matrix's name in that module.
        name: its name in the model.
    """

    module: nn.Module
    leaf: str
    name: str

    @property
    def weight(self) -> Tensor:
        """The matrix, [E, F]: the model's own tensor."""
        weight_EF: Tensor = getattr(self.module, self.leaf)
        return weight_EF.detach()

    def put(self, weight_EF: Tensor) -> None:
        """Let the router choose by another matrix, in the dtype and on the device of the one before, which itself stays as it is."""
        before = self.module._parameters[self.leaf]
        assert before is not None  # noqa: S101 - `router_step` found it
        self.module._parameters[self.leaf] = nn.Parameter(weight_EF.to(before.device, before.dtype), before.requires_grad)


def router_step(model: nn.Module, layer: ExpertLayer) -> RouterStep:
    """The linear step of a layer's router; works on models without weights (meta device) too.

    Raises:
        UnsupportedModelError: the router does not hold one matrix with a row for each expert.
    """
    path = layer.name.rpartition(".")[0]
    block = model.get_submodule(path)
    router = router_of(block)
    beside = next(name for name, child in block.named_children() if child is router)
    found = [
        RouterStep(module, leaf, ".".join(part for part in (path, beside, below, leaf) if part))
        for below, module in router.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2 and len(parameter) == layer.experts
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{path}.{beside} ({type(router).__name__}) must hold one matrix with a row for each of {layer.experts} experts "
            f"to be refitted, got {len(found)}: leave refit_router out"
        )
    return found[0]


@contextmanager
def rerouted(model: nn.Module, layer: ExpertLayer, weight_EF: Tensor | None) -> Iterator[None]:
    """Let a layer's router choose by another matrix for as long as the context lasts; None: by its own.

    Raises:
        UnsupportedModelError: as `router_step`.
    """
    if weight_EF is None:
        yield
        return
    step = router_step(model, layer)
    before = step.module._parameters[step.leaf]
    step.put(weight_EF)
    try:
        yield
    finally:
        step.module._parameters[step.leaf] = before


def router_input(step: RouterStep, run: Callable[[], object]) -> Tensor:
    """What the matrix is multiplied with in a run of its layer, [T, F]; nothing behind it is computed.

    Args:
        run: runs the layer; it is stopped where the router has answered.

    Raises:
        UnsupportedModelError: the router did not answer, or not by multiplying what it got.
    """

    def stop(_module: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        raise _AnsweredError(args[0], answer)

    handle = step.module.register_forward_hook(stop)
    try:
        run()
    except _AnsweredError as answered:
        given, answer = answered.args
    else:
        raise UnsupportedModelError(f"{step.name} was not used when its layer ran: leave refit_router out")
    finally:
        handle.remove()
    x_TF: Tensor = given.reshape(-1, step.weight.shape[1])
    if not _multiplies(step, x_TF, answer):
        raise UnsupportedModelError(
            f"{type(step.module).__name__} must multiply what it gets by {step.name} to be refitted, and does something else: "
            "leave refit_router out"
        )
    return x_TF


class _AnsweredError(Exception):
    """A router has answered: its input and its answer. No error: the shortest way out of a layer."""


def _multiplies(step: RouterStep, x_TF: Tensor, answer: Any) -> bool:
    """Whether some of an answer's tensors are the matrix times the input, plus the bias where there is one."""
    bias_E: Tensor | None = getattr(step.module, "bias", None)
    logits_TE = nn.functional.linear(x_TF.float(), step.weight.float(), None if bias_E is None else bias_E.detach().float())
    given = [answer] if isinstance(answer, Tensor) else answer
    size = _CLOSE * float(logits_TE.abs().mean())
    return any(
        isinstance(each, Tensor)
        and each.numel() == logits_TE.numel()
        and torch.allclose(each.reshape(logits_TE.shape).float(), logits_TE, rtol=_CLOSE, atol=size)
        for each in given
    )
