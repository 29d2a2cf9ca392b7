"""Random factors of every structure for a layer's experts: what tests of run time and export put into tiny models."""

import torch

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.decomposition.factors import (
    BaseDeltaFactors,
    DenseFactors,
    LayerFactors,
    MergedFactors,
    NarrowFactors,
    PerExpertFactors,
    PivotedFactors,
    RightGroup,
    SharedLeftFactors,
    SharedRightFactors,
    SideFactors,
)

RANK = 8
_FORMS = (
    "dense", "ragged", "equal", "many-ranks", "pruned", "summed", "groups", "base-delta", "base-equal", "merged",
    "pivoted", "pivoted-equal", "pivoted-full",
)
INPUT_FORMS = (*_FORMS, "latent")
OUTPUT_FORMS = (*_FORMS, "basis")


def side_factors(form: str, weight_ENM: torch.Tensor, seed: int = 0) -> SideFactors:
    """Random factors [E, N, M] of one form; those that stay dense keep `weight_ENM`."""
    experts, rows, columns = weight_ENM.shape
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    def per_expert(ranks: list[int]) -> PerExpertFactors:
        return PerExpertFactors(
            tuple(ranks),
            tuple(random(rows, max(rank, 0)) for rank in ranks),
            tuple(random(max(rank, 0), columns) for rank in ranks),
            {expert: weight_ENM[expert] for expert, rank in enumerate(ranks) if rank < 0},
        )

    def group(members: list[int], stored: int, sums: list[list[int]], rank: int) -> RightGroup:
        return RightGroup(tuple(members), random(rank, columns), random(stored, rows, rank), tuple(map(tuple, sums)))

    everyone = list(range(experts))
    match form:
        case "dense":
            return DenseFactors(weight_ENM)
        case "equal":
            return per_expert([RANK] * experts)
        case "ragged":
            return per_expert([(8, -1, 0, 5)[expert % 4] for expert in everyone])
        case "many-ranks":
            return per_expert([1 + 2 * expert for expert in everyone])
        case "pruned":
            return per_expert([0] * experts)
        case "summed":
            return SharedRightFactors((group(everyone, 2, [[0, 1] if expert else [1] for expert in everyone], RANK),))
        case "groups":
            half = experts // 2
            first = group(everyone[half:], experts - half, [[slot] for slot in range(experts - half)], 6)
            return SharedRightFactors((first, group(everyone[:half], 1, [[0]] * half, RANK)))
        case "latent":
            return SharedRightFactors((group(everyone, experts, [[expert] for expert in everyone], RANK),))
        case "base-delta":
            return BaseDeltaFactors(random(rows, columns), per_expert([(8, -1, 0, 5)[expert % 4] for expert in everyone]))
        case "base-equal":
            return BaseDeltaFactors(random(rows, columns), per_expert([RANK] * experts))
        case "merged":
            return MergedFactors(random(experts - 1, rows, columns), (*range(experts - 1), 0))
        case "pivoted":
            return PivotedFactors(per_expert([(8, -1, 0, 5)[expert % 4] for expert in everyone]))
        case "pivoted-equal":
            return PivotedFactors(per_expert([RANK] * experts))
        case "pivoted-full":
            return PivotedFactors(per_expert([(columns, 3)[expert % 2] for expert in everyone]))
        case "basis":
            return SharedLeftFactors(random(rows, RANK), random(experts, RANK, columns))
    raise ValueError(form)


def layer_factors(layer: ExpertLayer, weights: ExpertWeights, input_form: str = "latent", output_form: str = "ragged") -> LayerFactors:
    """Random factors of one layer, with its own biases."""
    return LayerFactors(
        layer.index,
        side_factors(input_form, weights.input_END, seed=layer.index),
        side_factors(output_form, weights.output_EDM, seed=100 + layer.index),
        weights.input_bias_EN,
        weights.output_bias_ED,
    )


def narrow_factors(layer: ExpertLayer, weights: ExpertWeights, width: int = 16) -> LayerFactors:
    """Random factors of so many neurons an expert, with as many of its own biases."""
    generator = torch.Generator().manual_seed(layer.index)
    rows = width * layer.input_rows // layer.width
    input_ERD = torch.randn(layer.experts, rows, layer.hidden, generator=generator) * 0.3
    output_EDR = torch.randn(layer.experts, layer.hidden, width, generator=generator) * 0.3
    return LayerFactors(
        layer.index,
        NarrowFactors(input_ERD, 1, 2 if layer.rows == "concatenated" else 1, layer.input_rows),
        NarrowFactors(output_EDR, 2, 1, layer.width),
        None if weights.input_bias_EN is None else weights.input_bias_EN[:, :rows],
        weights.output_bias_ED,
    )


def kept_factors(layer: ExpertLayer, weights: ExpertWeights, kept: tuple[int, ...]) -> LayerFactors:
    """The experts that are kept, as they are."""
    sides = []
    for weight_ENM in (weights.input_END, weights.output_EDM):
        experts, rows, columns = weight_ENM.shape
        none = torch.empty(0, dtype=weight_ENM.dtype)
        dense = {expert: weight_ENM[expert] for expert in kept}
        ranks = tuple(-1 if expert in kept else 0 for expert in range(experts))
        lefts, rights = (none.reshape(rows, 0),) * experts, (none.reshape(0, columns),) * experts
        sides.append(PerExpertFactors(ranks, lefts, rights, dense))
    return LayerFactors(layer.index, *sides, weights.input_bias_EN, weights.output_bias_ED, kept)


def model_factors(
    model: torch.nn.Module, *, leave: int = 0, forms: tuple[tuple[str, str], ...] = (("latent", "ragged"), ("ragged", "basis"))
) -> list[tuple[ExpertLayer, LayerFactors]]:
    """Factors for all routed layers but the first `leave`, of these forms in turns."""
    return [
        (layer, layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), *forms[i % len(forms)]))
        for i, layer in enumerate(expert_layers(model)[leave:])
    ]
