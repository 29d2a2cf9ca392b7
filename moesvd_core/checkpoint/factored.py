"""From a layer's factors to what a checkpoint stores of them: a description, and tensors under the names that `FactoredExperts` gives them.

Shapes as in `experts.py` and `decomposition/factors.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.decomposition.factors import (
    BaseDeltaFactors,
    DenseFactors,
    LayerFactors,
    MergedFactors,
    NarrowFactors,
    PerExpertFactors,
    PivotedFactors,
    SharedLeftFactors,
    SharedRightFactors,
    SideFactors,
)
from moesvd_core.experts import FactoredExperts
from moesvd_core.pivoted_side import index_type
from moesvd_core.sides import by_rank, segments

Spec = dict[str, Any]


def is_dense(factors: LayerFactors) -> bool:
    """Whether nothing of the layer is factored, so that its native module stays as it is."""
    return isinstance(factors.input, DenseFactors) and isinstance(factors.output, DenseFactors)


def keeps_whole(spec: Spec) -> bool:
    """Whether all that a layer's description says is which experts are kept, as they were."""
    return spec.get("kept") is not None and all(
        side["structure"] == "dense" or (side["structure"] == "per-expert" and all(side["ranks"][expert] < 0 for expert in spec["kept"]))
        for side in (spec["input"], spec["output"])
    )


def layer_spec(layer: ExpertLayer, factors: LayerFactors) -> Spec:
    """Plain data that tells `FactoredExperts` which tensors to expect; it goes into the checkpoint's configuration."""
    spec = {"layer": asdict(layer), "input": _side_spec(factors.input), "output": _side_spec(factors.output)}
    return spec if factors.kept is None else spec | {"kept": list(factors.kept)}


def layer_tensors(
    layer: ExpertLayer, factors: LayerFactors, dtype: torch.dtype, order_EM: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name under the experts module, contiguous tensor) of everything that the factored module holds, as `in_type` casts it.

    Neurons stand as the factors count them, or as `neuron_order` wants them stored (`order_EM`).
    """
    row_EN = None if order_EM is None else layer.rows_in_order(order_EM)
    for name, tensor in _side_tensors(factors.input, row_EN):
        yield f"input.{name}", in_type(tensor, dtype).contiguous()
    for name, tensor in _side_tensors(factors.output):
        if order_EM is not None and name.startswith("pivot"):
            tensor = torch.arange(tensor.shape[1]).expand_as(tensor)  # the first neurons
        yield f"output.{name}", in_type(tensor, dtype).contiguous()
    if factors.input_bias_EN is not None:
        yield "input_bias", _in_order(factors.input_bias_EN, range(layer.experts), row_EN).to(dtype).contiguous()
    if factors.output_bias_ED is not None:
        yield "output_bias", factors.output_bias_ED.to(dtype).contiguous()
    with torch.device("meta"):
        own = dict(FactoredExperts(layer_spec(layer, factors), gate=torch.nn.functional.silu).named_buffers(recurse=False))
    for name, buffer in own.items():
        yield name, torch.zeros(buffer.shape, dtype=dtype)


def in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as experts of this type hold it: numbers in it, indices in integers of as many bytes."""
    return tensor.to(dtype if tensor.is_floating_point() else index_type(dtype))


def _side_spec(factors: SideFactors) -> Spec:
    match factors:
        case DenseFactors():
            return {"structure": "dense"}
        case PerExpertFactors():
            return {"structure": "per-expert", "ranks": list(factors.ranks)}
        case SharedRightFactors():
            groups = [
                {
                    "experts": list(group.experts),
                    "rank": group.right_RM.shape[0],
                    "stored": group.left_KNR.shape[0],
                    "sums": [list(used) for used in group.sums],
                }
                for group in factors.groups
            ]
            return {"structure": "shared-right", "groups": groups}
        case SharedLeftFactors():
            return {"structure": "shared-left", "rank": factors.left_NR.shape[1]}
        case BaseDeltaFactors():
            return {"structure": "base-delta", "ranks": list(factors.own.ranks)}
        case PivotedFactors():
            return {"structure": "pivoted", "ranks": list(factors.own.ranks)}
        case NarrowFactors():
            return {"structure": "narrow", "size": factors.weight_ENM.shape[factors.dim], "blocks": factors.blocks}
        case MergedFactors():
            return {"structure": "merged", "groups": list(factors.groups)}
    raise TypeError(f"factors of type {type(factors).__name__} have no form in a checkpoint")


def _side_tensors(factors: SideFactors, row_EN: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """A side's tensors; each expert's rows in an order of its own where one is given."""
    match factors:
        case DenseFactors():
            yield "weight", _in_order(factors.weight_ENM, range(len(factors.weight_ENM)), row_EN)
        case PerExpertFactors():
            yield from _slabs(factors, row_EN)
        case SharedRightFactors():
            for g, group in enumerate(factors.groups):
                yield f"right_{g}", group.right_RM
                owners = [expert for _, expert in sorted(zip(group.sums, group.experts, strict=True))]
                yield f"left_{g}", _in_order(group.left_KNR, owners, row_EN)
        case SharedLeftFactors():
            yield "right", factors.right_ERM
            yield "left", factors.left_NR
        case BaseDeltaFactors():
            yield "base", factors.base_NM
            yield from _slabs(factors.own)
        case PivotedFactors():
            yield from _pivoted_slabs(factors, row_EN)
        case NarrowFactors():
            yield "weight", factors.weight_ENM
        case MergedFactors():
            yield "weight", factors.weight_GNM


def _slabs(factors: PerExpertFactors, row_EN: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """Cut every expert's factors along the rank, leading ranks into the widest slab that it takes part in."""
    start_E = [0] * len(factors.ranks)
    for i, (width, members) in enumerate(segments(factors.ranks)):
        left_GNR = torch.stack([factors.left[e][:, start_E[e] : start_E[e] + width] for e in members])
        yield f"left_{i}", _in_order(left_GNR, members, row_EN)
        yield f"right_{i}", torch.stack([factors.right[e][start_E[e] : start_E[e] + width] for e in members])
        for expert in members:
            start_E[expert] += width
    yield from _dense(factors, row_EN)


def _pivoted_slabs(factors: PivotedFactors, row_EN: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Every expert's factors without their identity, those of one rank together."""
    for i, (_, members) in enumerate(by_rank(factors.own.ranks)):
        left_GNR, right_GRS, pivot_GR = (torch.stack(tensors) for tensors in zip(*(factors.stored[e] for e in members), strict=True))
        yield f"left_{i}", _in_order(left_GNR, members, row_EN)
        yield f"right_{i}", right_GRS
        yield f"pivot_{i}", pivot_GR
    yield from _dense(factors.own, row_EN)


def _dense(factors: PerExpertFactors, row_EN: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    if factors.dense:
        experts = sorted(factors.dense)
        yield "dense", _in_order(torch.stack([factors.dense[expert] for expert in experts]), experts, row_EN)


def _in_order(tensor_GNX: Tensor, experts: Sequence[int], row_EN: Tensor | None) -> Tensor:
    """What is stored of some experts with the rows of each in its order; as it is where there is none."""
    if row_EN is None:
        return tensor_GNX
    row_GN = row_EN[list(experts)].to(tensor_GNX.device)
    return tensor_GNX[torch.arange(len(row_GN), device=row_GN.device)[:, None], row_GN]
