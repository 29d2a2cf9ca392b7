"""The module that takes the place of `experts` in an unmodified transformers block, and computes with factors instead of matrices.

An export carries a copy of this file, so that a checkpoint loads where nothing of this project is installed: it must import nothing of ours
but `factor_sides.py`, `sides.py`, `batched.py` and `grouped.py`.

Shapes: T tokens, k active experts a token, P pairs of a token and one of its experts (see `grouped.py`), E experts, d hidden size, m expert
width, n input rows, G members of a group, R rank, N rows and C columns of one expert's matrix.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from moesvd_core.batched import Batch, Slots, every_row, every_token, slot_rows, sum_of_all
from moesvd_core.factor_sides import make_side
from moesvd_core.grouped import Pairs, add_up, in_graph, in_turns, keeps_tail, packed_bytes, usual

SMALL_EXPERT = 1 << 20
"""Parameters of an expert up to which calls cost more than reading its matrices in whatever order."""
PRODUCT_COST = 4_000_000
"""Multiplications that a CPU does in the time of calling one more product."""
READING_COST = 13
"""The same for reading one more number of a matrix."""
JOINED_PAIRS = 1024
"""So many pairs at most pass all experts at once: with more, calls cost less than what is filled up."""
CACHED_NUMBERS = 1 << 19
"""So many numbers between the sides stay in a CPU's cache; where there are more, each expert in turn passes both sides at once."""
ARRANGING_COST = 3
"""Products in the time of which pairs are arranged by expert."""

Gate = Callable[[torch.Tensor], torch.Tensor]


def gate_of(module: nn.Module, rows: str) -> Gate:
    """The family's own step from `input matrix · x` [P, n] to hidden neurons [P, m], without keeping the module's weights alive.

    Args:
        module: the native experts module.
        rows: "plain" for families without a gate, else the order of the gate's rows (which only the family's own function looks at).
    """
    if rows == "plain":
        return _activation(module)
    if hasattr(module, "_apply_gate"):
        shell = copy.copy(module)
        shell._parameters, shell._buffers = {}, {}
        gate: Gate = shell._apply_gate  # type: ignore[assignment]
        return gate
    activation = _activation(module)

    def chunked(pre_PN: torch.Tensor) -> torch.Tensor:
        gate_PM, up_PM = pre_PN.chunk(2, dim=-1)
        return activation(gate_PM) * up_PM

    return chunked


def _activation(module: nn.Module) -> Gate:
    activation: Gate = module.act_fn  # type: ignore[assignment]
    return activation


class FactoredExperts(nn.Module):
    """All routed experts of one layer, each side in the structure that `spec` describes.

    `spec` is plain data, kept in the checkpoint's configuration: `layer` (index, name, experts, hidden, width, active, rows, transposed,
    biased, routing of the native module), for `input` and `output` the structure with its ranks, and `kept`, the experts among which the
    router chooses, where some were pruned.
    """

    def __init__(self, spec: dict[str, Any], gate: Gate, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Make empty factors; `gate` is the family's own function from pre-activations to neurons (`gate_of`)."""
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        layer = self.expert_layer = spec["layer"]
        experts, hidden, width = layer["experts"], layer["hidden"], layer["width"]
        rows = width if layer["rows"] == "plain" else 2 * width
        self.spec, self.gate, self.num_experts = spec, gate, experts
        self.input = make_side(spec["input"], experts, rows, hidden, True, **kind)
        self.output = make_side(spec["output"], experts, hidden, width, False, **kind)
        own_rows = spec["input"].get("size", rows)  # of the rows that the input side stores
        self.input_bias = nn.Parameter(torch.empty(experts, own_rows, **kind)) if layer["biased"] else None
        self.output_bias = nn.Parameter(torch.empty(experts, hidden, **kind)) if layer["biased"] else None
        self._size = sum(parameter.numel() for parameter in self.parameters())
        # A tripwire without content: where the plug-in is missing, transformers would warn and go on with random experts, but it stops at
        # a shape that does not fit. This shape survives the conversion to one tensor an expert and back.
        self.register_buffer("up_proj" if layer["rows"] == "plain" else "gate_up_proj", torch.zeros(1, 2, 0, **kind))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor | None = None, top_k_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The experts' weighted answers [T, d] to tokens [T, d] and the router's choice [T, k].

        Families with scaled inputs (llama4) pass hidden states [E·T, d] alone, one block of all tokens for each expert, zero where the
        router did not choose it, and get the unsummed answers [E·T, d].
        """
        if top_k_index is not None:
            return self._answer(hidden_states, top_k_index, top_k_weights)
        everyone = in_graph()  # where rows cannot be counted; the answer to zero is zero
        row_Q = torch.arange(len(hidden_states), device=hidden_states.device) if everyone else hidden_states.any(-1).nonzero()[:, 0]
        expert_Q1 = row_Q[:, None] // (len(hidden_states) // self.num_experts)
        answer_QD = self._answer(hidden_states[row_Q], expert_Q1, None)
        return torch.zeros_like(hidden_states).index_copy_(0, row_Q, answer_QD)

    def pack(self) -> None:
        """Arrange the factors, where they are, for faster answers on a CPU: exact, and undone by `unpack`.

        Large ones as its kernels read them, in as many bytes; small ones of different ranks, where calls cost more than bytes, side by
        side, filled up to the largest rank. Until `unpack` they answer without gradients only, and cannot be saved, moved or compiled.

        Raises:
            ValueError: the factors are not on a CPU in bfloat16, or its kernels know no such order.
        """
        example = next(self.parameters())
        if example.device.type == "meta" and self.packed:
            return
        if example.device.type != "cpu" or example.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ValueError(f"only bfloat16 on a CPU that computes with it can be packed, got {example.dtype} on {example.device}")
        if self._size > self.num_experts * SMALL_EXPERT:
            self.input.pack()
            self.output.pack()
        elif self.input.batchable and self.output.batchable:
            self.input.join()
            self.output.join()

    def unpack(self) -> None:
        """Undo `pack`, exactly."""
        self.input.unpack()
        self.output.unpack()

    @property
    def packed(self) -> list[torch.Tensor]:
        """What `pack` made of the parameters."""
        return [*self.input.packed, *self.output.packed]

    @property
    def packed_bytes(self) -> int:
        """What that takes, blocks filled up."""
        return sum(packed_bytes(matrix_NC) for matrix_NC in self.packed)

    def _answer(self, hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None) -> torch.Tensor:
        if self.packed and (torch.is_grad_enabled() or in_graph()):
            raise RuntimeError("packed experts answer without gradients and graphs only: use torch.no_grad(), or unpack() them")
        alone = not (keeps_tail(index_Tk) or torch.is_grad_enabled() or self._heard) and len(index_Tk) > 0
        if alone:
            answer_TD = self._answer_together(hidden_TD, index_Tk, weight_Tk)
            if answer_TD is not None:
                return answer_TD.to(hidden_TD.dtype)
        pairs = Pairs(index_Tk, weight_Tk, self.num_experts)
        large = len(pairs.expert_P) * self.input.rows > CACHED_NUMBERS
        if alone and large and self.input.by_pair and self.output.by_pair:
            y_PN = in_turns(self.input.narrow(hidden_TD), pairs.token_P, pairs.runs or (), self._answer_of, self.output.rows)
            out_TD: torch.Tensor = self.output.widen(pairs.combine(y_PN))
        else:
            pre_PN = self.input(hidden_TD, pairs)
            if self.input_bias is not None:
                pre_PN = pre_PN + self.input_bias[pairs.expert_P]
            out_TD = self.output(self.gate(pre_PN), pairs)
        if self.output_bias is not None:
            out_TD = out_TD + pairs.combine(self.output_bias[pairs.expert_P])
        return out_TD.to(hidden_TD.dtype)

    def _answer_of(self, expert: int, x_QC: torch.Tensor) -> torch.Tensor:
        """One expert's answer to rows [Q, N], from what the input side reads to what the output side combines."""
        pre_QN = self.input.answer(expert, x_QC)
        if self.input_bias is not None:
            pre_QN = pre_QN + self.input_bias[expert]
        return self.output.answer(expert, self.gate(pre_QN))

    @property
    def _heard(self) -> bool:
        """Whether somebody listens to the output side and expects all pairs there, as compensation does."""
        return bool(self.output._forward_pre_hooks)

    def _answer_together(self, hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None) -> torch.Tensor | None:
        """The answer of all experts in one product for each step; None where they cannot, or where taking turns is faster."""
        sides = self.input.batches(), self.output.batches()
        if not all(sides) or self.input.reordered or self.output.reordered or index_Tk.numel() > JOINED_PAIRS:
            return None
        if weight_Tk is not None and self._asks_all(sides, *index_Tk.shape):
            return self._answer_of_all(sides, hidden_TD, index_Tk, weight_Tk)
        counts = index_Tk.reshape(-1).bincount(minlength=self.num_experts).tolist()
        turn = _steps(sides) * PRODUCT_COST * self.num_experts / max(1, self._size)
        rows = slot_rows(counts, turn, READING_COST * counts.count(0))
        return self._answer_in_slots(sides, hidden_TD, index_Tk, weight_Tk, Slots(index_Tk, counts, rows)) if rows > 0 else None

    def _asks_all(self, sides: Sequence[Sequence[Batch]], tokens: int, active: int) -> bool:
        """Whether all experts are to answer all tokens, rather than each its own or those that are asked in turns.

        In multiplications: those that nobody needs, and the time that other ways take for calls and for reading matrices.
        """
        asked = min(self.num_experts, tokens * active)  # at most
        unread = READING_COST * (self.num_experts - asked)
        needless = (tokens * (self.num_experts - active) + unread) * self._size / self.num_experts
        filled_up = (tokens - usual(tokens * active, self.num_experts)) * self._size
        return bool(needless < _steps(sides) * (asked - 1) * PRODUCT_COST and filled_up < ARRANGING_COST * PRODUCT_COST)

    def _answer_of_all(
        self, sides: Sequence[Sequence[Batch]], hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor
    ) -> torch.Tensor:
        """Every expert answers every token, and the router's weights leave out whom it did not ask."""
        pre_ETN = every_token(sides[0], self.input.narrow(hidden_TD))
        weight_TE = weight_Tk.new_zeros(len(weight_Tk), self.num_experts).scatter_add_(1, index_Tk, weight_Tk)
        out_TD = self.output.widen(sum_of_all(sides[1], self._neurons(pre_ETN), weight_TE))
        return out_TD if self.output_bias is None else out_TD + weight_TE @ self.output_bias.to(weight_TE.dtype)

    def _answer_in_slots(
        self,
        sides: Sequence[Sequence[Batch]],
        hidden_TD: torch.Tensor,
        index_Tk: torch.Tensor,
        weight_Tk: torch.Tensor | None,
        slots: Slots,
    ) -> torch.Tensor:
        """Every expert answers its own tokens, and those that have more than the others take turns with the rest."""
        x_TC = self.input.narrow(hidden_TD)
        x_EQC = x_TC.index_select(0, slots.token_EQ.flatten()).view(*slots.token_EQ.shape, -1)
        y_SN = every_row(sides[1], self._neurons(every_row(sides[0], x_EQC))).flatten(0, 1)
        if slots.rest:
            y_SN = torch.cat([y_SN, in_turns(x_TC, slots.token_X, slots.rest, self._answer_of, self.output.rows)])
        out_TD = self.output.widen(add_up(y_SN, slots.place_Tk, weight_Tk))
        return out_TD if self.output_bias is None else out_TD + add_up(self.output_bias, index_Tk, weight_Tk)

    def _neurons(self, pre_EQN: torch.Tensor) -> torch.Tensor:
        """Hidden neurons [E, Q, m] from what the input side makes of rows."""
        return self.gate(pre_EQN if self.input_bias is None else pre_EQN + self.input_bias[:, None])


def _steps(sides: Sequence[Sequence[Batch]]) -> int:
    """In how many products all experts answer together."""
    return sum(len(batch.chain) for batches in sides for batch in batches)
