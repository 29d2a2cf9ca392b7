"""Experts of one layer with random factors of every structure that kernels of our own know, and what they ought to answer."""

import torch

from moesvd_core import pivoted_side, rival_sides  # noqa: F401 - make `FactoredExperts` know their structures
from moesvd_core.experts import FactoredExperts, Gate, swiglu

EXPERTS, HIDDEN, WIDTH = 11, 64, 48
PER_EXPERT = {"structure": "per-expert", "ranks": [8, 16, 8, 24, 16, 8, 8, 8, 16, 8, 8]}
MANY_RANKS = {"structure": "per-expert", "ranks": [8, 17, 9, 24, -1, 0, 5, 40, 33, 12, 3]}
MIXED = {"structure": "per-expert", "ranks": [8, -1, 0, 24, 16, -1, 0, 0, 8, 8, 8]}
PIVOTED = {"structure": "pivoted", "ranks": [8, 40, 8, 24, 16, 8, 8, 40, 48, 8, 8]}
PIVOTED_FIRST = {"structure": "pivoted", "ranks": PIVOTED["ranks"]}
"""The first columns of every expert are its pivots."""
PIVOTED_MIXED = {"structure": "pivoted", "ranks": [8, -1, 0, 13, 47, -1, 13, 8, 0, 8, 9]}
LATENT_IN = {
    "structure": "shared-right",
    "groups": [{"experts": list(range(EXPERTS)), "rank": 24, "stored": EXPERTS, "sums": [[e] for e in range(EXPERTS)]}],
}
GROUPS = {
    "structure": "shared-right",
    "groups": [
        {"experts": [0, 2, 3, 9], "rank": 24, "stored": 4, "sums": [[0], [1], [2], [3]]},
        {"experts": [1, 4, 5, 6, 7, 8, 10], "rank": 13, "stored": 3, "sums": [[0], [0, 1], [1], [0, 1, 2], [2], [2, 0], [1, 2]]},
    ],
}
SUMMED = {
    "structure": "shared-right",
    "groups": [
        {"experts": list(range(EXPERTS)), "rank": 24, "stored": 5, "sums": [[e % 5, (e + 2) % 5][: 1 + e % 2] for e in range(EXPERTS)]},
    ],
}
"""One V for some experts or for all, behind the sum of one or several U's."""
LATENT_OUT = {"structure": "shared-left", "rank": 24}
DENSE = {"structure": "dense"}


UNIFORM, PIVOTED_UNIFORM = ({"structure": structure, "ranks": [16] * EXPERTS} for structure in ("per-expert", "pivoted"))
UNALIGNED, PIVOTED_UNALIGNED = ({"structure": structure, "ranks": [17] * EXPERTS} for structure in ("per-expert", "pivoted"))
CASES = [
    (UNIFORM, PIVOTED_UNIFORM), (UNALIGNED, PIVOTED_UNALIGNED), (PIVOTED, PIVOTED_FIRST),
    (DENSE, DENSE), (PER_EXPERT, PER_EXPERT), (MIXED, MIXED), (PIVOTED, PIVOTED), (PIVOTED_MIXED, PIVOTED_MIXED), (LATENT_IN, LATENT_OUT),
    (MANY_RANKS, MANY_RANKS), (GROUPS, SUMMED), (SUMMED, GROUPS),
]
"""Of the input side and the output side."""


def factored(first: dict, then: dict, gate: Gate = swiglu, dtype: torch.dtype = torch.bfloat16) -> FactoredExperts:
    layer = {
        "index": 0, "name": "experts", "experts": EXPERTS, "hidden": HIDDEN, "width": WIDTH, "active": 2, "rows": "gate-up",
        "transposed": False, "biased": True, "routing": "plain",
    }
    noise = torch.Generator().manual_seed(0)
    made = FactoredExperts({"layer": layer, "input": first, "output": then}, gate, "cpu", dtype)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=noise).mul(0.2).to(dtype)
    for side, spec in ((made.input, first), (made.output, then)):
        for name, pivot_GR in [] if spec is PIVOTED_FIRST else list(side.named_buffers()):
            chosen = torch.stack([torch.randperm(side.columns, generator=noise)[: pivot_GR.shape[1]].sort().values for _ in pivot_GR])
            side.register_buffer(name, chosen.to(pivot_GR.dtype))
    return made.requires_grad_(False)


def call_of(tokens: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, d], and the router's choice of experts [T, 2] and their weights."""
    noise = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, HIDDEN, generator=noise).to(dtype)
    return x_TD, torch.rand(tokens, EXPERTS, generator=noise).topk(2).indices, torch.rand(tokens, 2, generator=noise)


def reference(experts: FactoredExperts, x_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor) -> torch.Tensor:
    input_END, output_EDM = experts.input.double().matrices(), experts.output.double().matrices()
    total_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for expert in range(EXPERTS):
        weight_T = (weight_Tk.double() * (index_Tk == expert)).sum(1)
        h_TM = experts.gate(x_TD.double() @ input_END[expert].T + experts.input_bias[expert].double())
        total_TD += weight_T[:, None] * (h_TM @ output_EDM[expert].T + experts.output_bias[expert].double())
    experts.input.to(x_TD.dtype), experts.output.to(x_TD.dtype)
    return total_TD
