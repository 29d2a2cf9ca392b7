"""Reading a layer's experts into canonical form, writing them back, and telling which tokens went to which expert.

Shapes: E experts, d hidden size (D), m expert width (M), n input rows (N), T tokens, k active experts; lower-case n: tokens of one expert.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.errors import InputError
from moesvd_core.experts import gate_of


def read_experts(module: nn.Module, layer: ExpertLayer) -> ExpertWeights:
    """The experts of a native module in canonical form: detached views of its own parameters, nothing is copied."""
    input_END, output_EDM = _matrices(module, layer)
    if not layer.biased:
        return ExpertWeights(input_END, output_EDM)
    return ExpertWeights(input_END, output_EDM, _parameter(module, "gate_up_proj_bias"), _parameter(module, "down_proj_bias"))


def write_experts(module: nn.Module, layer: ExpertLayer, weights: ExpertWeights) -> None:
    """Copy canonical weights into a native module, in place and in the module's dtype.

    Raises:
        InputError: a shape differs from the layer's, or a bias is missing or too much.
    """
    if {weights.input_bias_EN is not None, weights.output_bias_ED is not None} != {layer.biased}:
        raise InputError(f"{layer.name}: both biases must be {'given' if layer.biased else 'left out'} for this family")
    targets = vars(read_experts(module, layer))  # views of the module's own parameters
    sources = vars(weights)
    for name, target in targets.items():
        if target is not None and sources[name].shape != target.shape:
            raise InputError(f"{layer.name}: {name} must be {list(target.shape)}, got {list(sources[name].shape)}")
    for name, target in targets.items():
        if target is not None:
            target.copy_(sources[name])


def gate_function(module: nn.Module, layer: ExpertLayer) -> Callable[[Tensor], Tensor]:
    """The function between an expert's two matrices: pre-activations [T, n] in the family's row order -> neurons [T, m].

    It is the module's own wherever it has one, so that clamps and unusual activations are those of the family.
    """
    return gate_of(module, layer.rows)


def routed_tokens(layer: ExpertLayer, args: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Which tokens went to which expert, from the positional arguments of a call of the experts module.

    Yields (expert, rows_n, x_nD, p_n) for every expert with at least one token, experts ascending, rows ascending: row numbers (int64)
    in the layer's T tokens, the input rows, and the weights with which the expert's output enters the layer's. Where a family
    multiplies the inputs by the router's scores ("scaled-inputs"), x is the scaled input and p is 1.

    Raises:
        InputError: the arguments are not those of the layer's family.
    """
    if layer.routing == "scaled-inputs":
        yield from _scaled_inputs(layer, args)
        return
    if len(args) != 3:
        raise InputError(f"{layer.name}: an experts call must have 3 positional arguments (hidden, index, weights), got {len(args)}")
    hidden_TD, index_Tk, weight_Tk = args
    active = index_Tk.shape[1]
    # A stable sort by expert keeps the tokens of each expert in their order.
    expert_S, order_S = index_Tk.reshape(-1).sort(stable=True)
    count_E = torch.bincount(expert_S, minlength=layer.experts)[: layer.experts]
    start = 0
    for expert, count in enumerate(count_E.tolist()):
        if count:
            order_n = order_S[start : start + count]
            rows_n = order_n // active
            yield expert, rows_n, hidden_TD[rows_n], weight_Tk.reshape(-1)[order_n]
        start += count


def _scaled_inputs(layer: ExpertLayer, args: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """llama4: one tensor with every expert's inputs below one another; rows that the router did not choose are zero."""
    if len(args) != 1 or args[0].shape[0] % layer.experts:
        raise InputError(
            f"{layer.name}: an experts call must have 1 positional argument whose rows are a multiple of {layer.experts}, "
            f"got {len(args)} with {args[0].shape[0] if args else 0} rows"
        )
    hidden_ETD = args[0].reshape(layer.experts, -1, layer.hidden)
    for expert, hidden_TD in enumerate(hidden_ETD):
        rows_n = hidden_TD.ne(0).any(dim=1).nonzero().squeeze(1)
        if rows_n.numel():
            x_nD = hidden_TD[rows_n]
            yield expert, rows_n, x_nD, x_nD.new_ones(rows_n.numel())


def _matrices(module: nn.Module, layer: ExpertLayer) -> tuple[Tensor, Tensor]:
    """Canonical views of the module's stacked matrices, [E, n, d] and [E, d, m]."""
    stored_input = _parameter(module, "up_proj" if layer.rows == "plain" else "gate_up_proj")
    stored_output = _parameter(module, "down_proj")
    if layer.transposed:
        return stored_input.transpose(1, 2), stored_output.transpose(1, 2)
    return stored_input, stored_output


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter: Tensor = getattr(module, name)
    return parameter.detach()
