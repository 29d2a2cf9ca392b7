"""A tiny mixture layer run on random tokens: its experts, their layout, and the statistics that calibration would have collected."""

from dataclasses import dataclass

import torch

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.calibration.statistics import LayerStatistics

INDEX = 3


@dataclass
class TinyLayer:
    """What `tiny_layer` makes; x, p, h, g, δ are the tokens that the statistics are sums over."""

    weights: ExpertWeights
    layer: ExpertLayer
    statistics: LayerStatistics
    x_TD: torch.Tensor
    p_TE: torch.Tensor
    h_TEM: torch.Tensor
    g_TD: torch.Tensor
    delta_TEN: torch.Tensor


def tiny_layer(
    experts: int = 4,
    hidden: int = 10,
    width: int = 7,
    *,
    gated: bool = True,
    tokens: int = 400,
    seed: int = 0,
    starved: int | None = None,
    intermediate: bool = True,
    gradient: bool = True,
    measured: bool = True,
) -> TinyLayer:
    """Random experts in float64 and exact statistics of random tokens, two experts a token.

    Args:
        gated: silu(gate)·up, with rows concatenated; otherwise h = pre-activation, whose slope is 1 (rows "plain").
        starved: an expert that no token reaches.
        intermediate: collect H_e.
        gradient: collect Γ.
        measured: collect the backward pass's sums of each expert, too.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = ExpertLayer(INDEX, "layers.3.experts", experts, hidden, width, 2, rows="concatenated" if gated else "plain")
    weights = ExpertWeights(random(experts, layer.input_rows, hidden), random(experts, hidden, width))
    x_TD = random(tokens, hidden) @ (random(hidden, hidden) * torch.linspace(0.1, 1.5, hidden, dtype=torch.float64))
    g_TD = random(tokens, hidden) @ (random(hidden, hidden) * torch.linspace(0.05, 1.0, hidden, dtype=torch.float64))
    bias_E = torch.linspace(1.0, -1.0, experts, dtype=torch.float64)
    score_TE = random(tokens, experts) + bias_E
    if starved is not None:
        score_TE[:, starved] = -torch.inf
    kept_TE = torch.zeros_like(score_TE).scatter(1, score_TE.topk(2, 1).indices, 1.0)
    p_TE = score_TE.masked_fill(kept_TE == 0, -torch.inf).softmax(1)

    pre_TEN = torch.einsum("td,end->ten", x_TD, weights.input_END)
    if gated:
        gate_TEM, up_TEM = pre_TEN.chunk(2, 2)
        sigmoid_TEM = gate_TEM.sigmoid()
        h_TEM = gate_TEM * sigmoid_TEM * up_TEM
        slope_TEN = torch.cat([up_TEM * sigmoid_TEM * (1 + gate_TEM * (1 - sigmoid_TEM)), gate_TEM * sigmoid_TEM], 2)
    else:
        h_TEM, slope_TEN = pre_TEN, torch.ones_like(pre_TEN)
    y_TED = torch.einsum("tem,edm->ted", h_TEM, weights.output_EDM)
    at_neurons_TEM = torch.einsum("te,td,edm->tem", p_TE, g_TD, weights.output_EDM)
    delta_TEN = at_neurons_TEM[:, :, layer.neuron_of_row()] * slope_TEN
    square_TE = p_TE.square()
    count_E = kept_TE.sum(0)
    routed_E1 = count_E.clamp(min=1)[:, None]
    statistics = LayerStatistics(
        layer=INDEX,
        tokens=tokens,
        count_E=count_E.long(),
        weight_square_E=square_TE.sum(0),
        input_gram_EDD=torch.einsum("te,td,tf->edf", square_TE, x_TD, x_TD),
        output_gram_EDD=torch.einsum("te,ted,tef->edf", square_TE, y_TED, y_TED),
        input_mean_ED=torch.einsum("te,td->ed", kept_TE, x_TD.abs()) / routed_E1,
        intermediate_mean_EM=torch.einsum("te,tem->em", kept_TE, h_TEM.abs()) / routed_E1,
        outlier_E=torch.full((experts,), 0.1, dtype=torch.float64),
        input_outlier=0.1,
        principal_rank_E=torch.full((experts,), hidden),
        saliency_E=(p_TE * y_TED.norm(dim=2)).sum(0) / routed_E1[:, 0],
        slope_EN=torch.einsum("te,ten->en", square_TE, slope_TEN.square()),
        intermediate_gram_EMM=torch.einsum("te,tem,ten->emn", square_TE, h_TEM, h_TEM) if intermediate else None,
        gradient_gram_DD=g_TD.T @ g_TD if gradient else None,
        gradient_tokens=tokens if gradient else 0,
    )
    if gradient and measured:
        statistics.gradient_gram_EDD = torch.einsum("te,td,tf->edf", square_TE, g_TD, g_TD)
        statistics.gradient_weight_square_E = square_TE.sum(0)
        statistics.row_square_EN = delta_TEN.square().sum(0)
        statistics.row_gram_ENN = torch.einsum("ten,tek->enk", delta_TEN, delta_TEN)
        statistics.weighted_input_gram_EDD = torch.einsum("te,td,tf->edf", delta_TEN.square().sum(2), x_TD, x_TD)
    return TinyLayer(weights, layer, statistics, x_TD, p_TE, h_TEM, g_TD, delta_TEN)
