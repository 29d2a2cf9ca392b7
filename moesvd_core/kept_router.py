"""A router that chooses among some of the experts only, as if the others had never been there.

The router's module and its tensors stay as they are, so that they are saved, loaded and moved like those of any other model. What changes
is what it computes with: its own forward function runs on a shallow copy of the module that holds the kept experts' rows alone, and the
numbers that it gives are turned back into the original ones. That is the same as cutting the rows out, in every family, whatever the family
does between scores and weights. Routers that look for the best groups of experts first keep their shape instead, and get an infinite
disadvantage added to the score of every expert that is gone.

An export carries a copy of this file, so it must import torch only.

Shapes: T tokens, E experts, K kept experts, k active ones.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moesvd_core.errors import UnsupportedModelError

ROUTERS = ("gate", "router")
"""Names of routers beside the experts that they choose from."""
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
_GROUPS = ("num_group", "n_group")
_CORRECTION = "e_score_correction_bias"


def router_of(block: nn.Module) -> nn.Module:
    """The router of a block, the parent of an experts module.

    Raises:
        UnsupportedModelError: it has none of a known name.
    """
    for name in ROUTERS:
        router = getattr(block, name, None)
        if isinstance(router, nn.Module):
            return router
    named = " or ".join(ROUTERS)
    raise UnsupportedModelError(f"{type(block).__name__} must have a router named {named} to be restricted or refitted, got neither")


def restrict(block: nn.Module, experts: int, kept: Sequence[int], active: int) -> None:
    """Let a block's router choose among the kept experts only, from now on.

    Args:
        block: parent of the experts module.
        experts: how many there were.
        kept: those that stay, ascending.
        active: how many answer each token.

    Raises:
        UnsupportedModelError: too few are kept, or the router looks for groups of experts in a way that leaves too few.
    """
    router: Any = router_of(block)
    if len(kept) < active:
        raise UnsupportedModelError(f"at least {active} experts must be kept, as many as answer each token, got {len(kept)}")
    groups, chosen = router_groups(router)
    if groups > 1:
        _check_groups(router, groups, chosen, experts, kept, active)
    router.kept_experts, router.counted_experts, router.by_groups = tuple(kept), experts, groups > 1
    router.kept_tables = {}
    router.forward = partial(_forward, router)  # a method would be looked up by its name when it is unpickled, in a class without it


def release(block: nn.Module) -> None:
    """Let the router choose among all experts again."""
    router = router_of(block)
    for name in ("kept_experts", "counted_experts", "by_groups", "kept_tables", "forward"):
        router.__dict__.pop(name, None)


def router_groups(router: nn.Module | None) -> tuple[int, int]:
    """Groups of neighbouring experts that a router looks for first, and how many it takes; (1, 1) where it does not.

    It takes 0 where it scores them in a way that cannot rule an expert out: then no expert may go.
    """
    groups = next((int(getattr(router, name)) for name in _GROUPS if getattr(router, name, None)), 1)
    if groups == 1:
        return 1, 1
    return groups, int(getattr(router, "topk_group", 0)) if isinstance(getattr(router, _CORRECTION, None), torch.Tensor) else 0


def left_in_groups(kept: Sequence[int], experts: int, groups: int) -> list[int]:
    """How many of each group's experts are kept, fewest first."""
    return sorted(sum(1 for expert in kept if expert * groups // experts == group) for group in range(groups))


def enough_left(kept: Sequence[int], experts: int, groups: int, chosen: int, active: int) -> bool:
    """Whether a router finds as many experts as answer each token, whichever groups it takes.

    It takes the best few groups by their two best experts each, and then the best experts in them.
    """
    usable = [count for count in left_in_groups(kept, experts, groups) if count >= 2] if groups > 1 else [len(kept)]
    return 0 < chosen <= len(usable) and sum(usable[:chosen]) >= active


def _check_groups(router: nn.Module, groups: int, chosen: int, experts: int, kept: Sequence[int], active: int) -> None:
    """Enough must be left in every choice of groups."""
    if not chosen:
        raise UnsupportedModelError(
            f"{type(router).__name__} chooses among {groups} groups of experts by scores that cannot be ruled out: "
            "prune neurons or use factors instead"
        )
    if not enough_left(kept, experts, groups, chosen, active):
        left = left_in_groups(kept, experts, groups)
        raise UnsupportedModelError(
            f"{chosen} of {groups} groups of experts must always have {active} experts left, got {left} a group: choose a smaller ratio"
        )


def _forward(router: Any, *args: Any, **kwargs: Any) -> Any:
    """The router's own forward with what is left of it; its answer in the numbers of all experts."""
    experts, device = router.counted_experts, next(router.parameters()).device
    if device not in router.kept_tables:  # made once: a GPU would be waited for at every call
        with torch.inference_mode(False):  # or no later call could record gradients
            router.kept_tables[device] = torch.tensor(router.kept_experts, device=device)
    kept_K: torch.Tensor = router.kept_tables[device]
    if router.by_groups:
        shell = _shell(router)
        bias_E: torch.Tensor = getattr(router, _CORRECTION)
        shell._buffers[_CORRECTION] = torch.full_like(bias_E, -torch.inf).index_copy(0, kept_K, bias_E[kept_K])
        return type(router).forward(shell, *args, **kwargs)

    def cut(value: Any) -> Any:
        is_bias = isinstance(value, torch.Tensor) and value.ndim == 1 and len(value) == experts
        return value[kept_K.to(value.device)] if is_bias else value

    # Not called as a module: hooks belong to the router, which gives them the scores of all experts.
    shell = _cut(router, experts, kept_K)
    answer = type(router).forward(shell, *(cut(arg) for arg in args), **{name: cut(arg) for name, arg in kwargs.items()})
    if not any(_is_index(each) for each in answer):  # scores of all experts, then their logits: llama4
        return _spread(answer[0], experts, kept_K, 0.0), _spread(answer[1], experts, kept_K, -torch.inf)
    logits_TK, *rest = answer
    return (_spread(logits_TK, experts, kept_K, -torch.inf), *(kept_K[each] if _is_index(each) else each for each in rest))


def _is_index(value: torch.Tensor) -> bool:
    return not value.is_floating_point()


def _spread(value_TK: torch.Tensor, experts: int, kept_K: torch.Tensor, rest: float) -> torch.Tensor:
    """A column for every expert [T, E], with `rest` for those that are gone."""
    full_TE = value_TK.new_full((*value_TK.shape[:-1], experts), rest)
    return full_TE.index_copy(-1, kept_K, value_TK)


def _cut(module: nn.Module, experts: int, kept_K: torch.Tensor) -> nn.Module:
    """A shallow copy of a module and those below it that knows of the kept experts only."""
    shell: Any = _shell(module)
    for held in (shell._parameters, shell._buffers):
        for name, value in held.items():
            if value is not None and value.ndim and len(value) == experts:
                held[name] = value[kept_K]
            elif value is not None and value.ndim == 2 and value.shape[1] == experts and len(value) == 1:
                held[name] = value[:, kept_K]
    for name, child in shell._modules.items():
        if child is not None:
            shell._modules[name] = _cut(child, experts, kept_K)
    for name in _COUNTS:
        if getattr(shell, name, None) == experts:
            setattr(shell, name, len(kept_K))
    return shell  # type: ignore[no-any-return]


def _shell(module: nn.Module) -> Any:
    """A shallow copy that computes as the class does, with dictionaries of its own."""
    shell: Any = copy.copy(module)
    shell.__dict__.pop("forward", None)
    shell._parameters, shell._buffers, shell._modules = dict(module._parameters), dict(module._buffers), dict(module._modules)
    return shell
