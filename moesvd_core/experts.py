"""The module that takes the place of `experts` in an unmodified transformers block, and computes with factors instead of matrices.

An export carries a copy of this file, so that a checkpoint loads where nothing of this project is installed: it must import nothing of ours
but what is carried too.

Shapes: T tokens, k active experts a token, P pairs of a token and one of its experts (see `grouped.py`), E experts, d hidden size, m expert
width, n input rows, G members of a group, R rank, N rows and C columns of one expert's matrix.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import silu
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from moesvd_core.batched import Arranged, Slots, chained, every_pair, every_row, slot_rows, sum_of_pairs
from moesvd_core.cpu_tiles import CpuTiles, calls_are_seen, combined, plain_on_cpu
from moesvd_core.factor_sides import make_side
from moesvd_core.grouped import Pairs, add_up, in_graph, in_turns, packed_bytes, spans_of
from moesvd_core.tiles import TiledSide

SMALL_EXPERT = 1 << 20
"""Parameters of an expert up to which calls cost more than reading its matrices in whatever order."""
PRODUCT_COST = 4_000_000
"""Multiplications that a CPU does in the time of calling one more product."""
READING_COST = 13
"""The same for reading one more number of a matrix."""
JOINED_PAIRS = 512
"""So many pairs at most pass all experts at once: with more, calls cost less than what is filled up."""
CACHED_NUMBERS = 1 << 19
"""So many numbers between the sides stay in a CPU's cache; where there are more, each expert in turn passes both sides at once."""
FEW_MULTIPLICATIONS = 16_000_000
"""So many multiplications of all pairs cost less, one pair at a time, than arranging pairs by expert."""
APART = 3
"""Times as many, where experts would then have to take turns."""

Gate = Callable[[torch.Tensor], torch.Tensor]


def gate_of(module: nn.Module, rows: str) -> Gate:
    """The family's own step from `input matrix · x` [P, n] to hidden neurons [P, m], without keeping the module's weights alive.

    It can be pickled: a bound method is looked up by its function's name when it comes back, which is not that of the class's attribute.

    Args:
        module: the native experts module.
        rows: "plain" for families without a gate, else the order of the gate's rows (which only the family's own function looks at).
    """
    if rows == "plain":
        return _activation(module)
    apply = getattr(type(module), "_apply_gate", _default_apply_gate)
    if apply is _default_apply_gate and (_activation(module) is silu or type(_activation(module)) in (nn.SiLU, SiLUActivation)):
        return swiglu
    shell = copy.copy(module)
    shell._parameters, shell._buffers = {}, {}
    return partial(apply, shell)


def swiglu(pre_PN: torch.Tensor) -> torch.Tensor:
    """What most families do, and what kernels of our own do by themselves (`TiledSide.gated`)."""
    gate_PM, up_PM = pre_PN.chunk(2, dim=-1)
    return silu(gate_PM) * up_PM


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
        """Arrange the factors, where they are, for faster answers of torch on a CPU: exact, and undone by `unpack`.

        Nothing happens where kernels of our own read both sides as they stand (`cpu_tiles.py`). Else large ones are put in the order in
        which torch's kernels read them, in about as many bytes (`Side.filled_up`). Small ones are arranged without being asked
        (`Side.arranged`), but for those of so many ranks that parameters cannot be views: they are filled up to the largest rank here.
        Until `unpack` packed factors answer without gradients only, and cannot be saved, loaded, moved, copied or compiled: whoever tries
        gets an `InputError`, or a `RuntimeError` for gradients and graphs.

        Raises:
            ValueError: the factors are not on a CPU in bfloat16, or its kernels know no such order.
        """
        example = next(self.parameters(), None)
        if example is None or (example.device.type == "meta" and self.packed):  # every rank is 0; or nothing is left to do
            return
        if self._tiled:
            return
        if example.device.type != "cpu" or example.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ValueError(f"only bfloat16 on a CPU that computes with it can be packed, got {example.dtype} on {example.device}")
        if not self._small:
            self.input.pack()
            self.output.pack()
        elif self.input.joins and self.output.joins:
            self.input.join()
            self.output.join()

    def unpack(self) -> None:
        """Undo `pack`, exactly."""
        with torch.inference_mode(False):  # or what is made there could never be trained
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
        recorded = torch.is_grad_enabled() or in_graph()
        if recorded and self.packed:
            raise RuntimeError("packed experts answer without gradients and graphs only: use torch.no_grad(), or unpack() them")
        if recorded and not in_graph():
            self.input.before_training()
            self.output.before_training()
        alone = not recorded and index_Tk.device.type == "cpu" and len(index_Tk) > 0 and not self._heard
        tiled_sides = self._tiled if alone else None
        if tiled_sides and not calls_are_seen() and self._fits(hidden_TD, index_Tk, weight_Tk):
            return self._answer_on_cpu(*tiled_sides, hidden_TD, index_Tk, weight_Tk).to(hidden_TD.dtype)
        if alone and not tiled_sides and self._small and self.input.batchable and self.output.batchable:
            first, then = self.input.arranged(), self.output.arranged()
            if first is not None and then is not None:
                return self._answer_arranged(first, then, hidden_TD, index_Tk, weight_Tk).to(hidden_TD.dtype)
        pairs = Pairs(index_Tk, weight_Tk, self.num_experts)
        large = len(pairs.expert_P) * self.input.rows > CACHED_NUMBERS
        if alone and large and all(side.by_pair and side.here for side in (self.input, self.output)):
            y_PN = in_turns(self.input.narrow(hidden_TD), pairs.token_P, pairs.runs or (), self._answer_of, self.output.rows)
            out_TD: torch.Tensor = self.output.widen(pairs.combine(y_PN))
        else:
            pre_PN = self.input(hidden_TD, pairs)
            if self.input_bias is not None:
                pre_PN = pre_PN + self.input_bias[pairs.expert_P]
            tiles = pairs.tiles if self.gate is swiglu and self.output.by_pair and not self._heard else None
            if tiles is not None and (tiled := self.output.tiled()) is not None:
                out_TD = self.output.widen(pairs.combine(tiled.gated(pre_PN, tiles)))
            else:
                out_TD = self.output(self.gate(pre_PN), pairs)
        if self.output_bias is not None:
            out_TD = out_TD + pairs.combine(self.output_bias[pairs.expert_P])
        return out_TD.to(hidden_TD.dtype)

    def _answer_on_cpu(
        self, first: TiledSide, then: TiledSide, hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None
    ) -> torch.Tensor:
        """The answer by a CPU's kernels (`cpu_tiles.py`): all experts take their pairs through both sides, in a few calls."""
        tiles, place_P = CpuTiles.arranged(index_Tk, self.num_experts)
        x_TC, parts = self.input.narrow(hidden_TD), []
        for part in tiles.parts(self.input.rows):
            pre_QN = first.times(x_TC, part, part.token_P)
            if self.input_bias is not None:
                pre_QN = pre_QN + self.input_bias[part.expert_P]
            parts.append(then.gated(pre_QN, part) if self.gate is swiglu else then.times(self.gate(pre_QN), part))
        y_PN = parts[0] if len(parts) == 1 else torch.cat(parts)
        out_TD = self.output.widen(combined(y_PN, place_P, weight_Tk, index_Tk.shape[1]))
        return out_TD if self.output_bias is None else out_TD + add_up(self.output_bias, index_Tk, weight_Tk)

    def _answer_of(self, expert: int, x_QC: torch.Tensor) -> torch.Tensor:
        """One expert's answer to rows [Q, N], from what the input side reads to what the output side combines."""
        pre_QN = self.input.answer(expert, x_QC)
        if self.input_bias is not None:
            pre_QN = pre_QN + self.input_bias[expert]
        return self.output.answer(expert, self.gate(pre_QN))

    @property
    def _heard(self) -> bool:
        """Whether somebody listens to a side and expects all pairs there, as compensation does, or changes it first, as pruning does."""
        return bool(self.input._forward_pre_hooks or self.output._forward_pre_hooks)

    def _answer_arranged(
        self, first: Arranged, then: Arranged, hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None
    ) -> torch.Tensor:
        """The answer of small experts, in the way that takes least time for so many pairs, and in the matrices' own precision whatever the
        way: autocast knows some of its steps only, and what it rounds does not fit where answers are written."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._answer_arranged(first, then, hidden_TD, index_Tk, weight_Tk)
        joined = first.joined and then.joined
        if index_Tk.numel() * self._size <= FEW_MULTIPLICATIONS * self.num_experts * (1 if joined else APART):
            out_TD = self._answer_by_pair(first, then, hidden_TD, index_Tk, weight_Tk)
        else:
            place_Tk = then.places(index_Tk)
            counts = place_Tk.reshape(-1).bincount(minlength=self.num_experts).tolist()
            turn = (first.steps + then.steps) * PRODUCT_COST * self.num_experts / self._size
            rows = 0 if not joined or index_Tk.numel() > JOINED_PAIRS else slot_rows(counts, turn, READING_COST * counts.count(0))
            if rows > 0:
                out_TD = self._answer_in_slots(first, then, hidden_TD, Slots(place_Tk, counts, rows), weight_Tk)
            else:
                out_TD = self._answer_in_turns(first, then, hidden_TD, Pairs(index_Tk, weight_Tk, self.num_experts))
        return out_TD if self.output_bias is None else out_TD + add_up(self.output_bias, index_Tk, weight_Tk)

    def _answer_by_pair(
        self, first: Arranged, then: Arranged, hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None
    ) -> torch.Tensor:
        """Every pair reads what it needs of its expert's matrices."""
        expert_P = index_Tk.reshape(-1)
        x_PC = first.once(hidden_TD).repeat_interleave(index_Tk.shape[1], 0)
        pre_PN = every_pair(first.batches, x_PC, first.places(expert_P))
        if self.input_bias is not None:
            pre_PN = pre_PN + self.input_bias.index_select(0, expert_P)
        return then.once(sum_of_pairs(then.batches, self.gate(pre_PN), then.places(expert_P), weight_Tk))

    def _answer_in_slots(
        self, first: Arranged, then: Arranged, hidden_TD: torch.Tensor, slots: Slots, weight_Tk: torch.Tensor | None
    ) -> torch.Tensor:
        """Every expert answers its own tokens, and those that have more than the others take turns with the rest."""
        x_TC, token_EQ, same = self.input.narrow(hidden_TD), slots.token_EQ, first.order == then.order
        if not same:
            token_EQ = token_EQ.index_select(0, then.places(torch.tensor(first.order)))
        pre_EQN = every_row(first.batches, x_TC.index_select(0, token_EQ.flatten()).view(*token_EQ.shape, -1))
        if self.input_bias is not None:
            pre_EQN = pre_EQN + self.input_bias[list(first.order), None]
        hidden_EQM = self.gate(pre_EQN)
        if not same:
            hidden_EQM = hidden_EQM.index_select(0, first.places(torch.tensor(then.order)))
        y_SN = every_row(then.batches, hidden_EQM).flatten(0, 1)
        if slots.rest:
            runs = [(then.order[place], start, end) for place, start, end in slots.rest]
            y_SN = torch.cat([y_SN, in_turns(x_TC, slots.token_X, runs, self._answer_of, self.output.rows)])
        return self.output.widen(add_up(y_SN, slots.place_Tk, weight_Tk))

    def _answer_in_turns(self, first: Arranged, then: Arranged, hidden_TD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Each expert in turn takes its own tokens through both sides; `in_turns` with fewer calls, where rows are no burden."""
        spans, rows = spans_of(pairs.runs or ())
        token_S = torch.zeros(rows, dtype=torch.int64)
        if pairs.token_P is not None:
            token_S[: len(pairs.token_P)] = pairs.token_P
        x_SC = self.input.narrow(hidden_TD).to(first.batches[0][0].rows_RN.dtype).index_select(0, token_S)
        y_SN = x_SC.new_empty(rows, self.output.rows)
        for expert, start, stop in spans:
            pre_QN = chained(x_SC[start:stop], first.chains[expert])
            if self.input_bias is not None:
                pre_QN = pre_QN + self.input_bias[expert]
            *others, last_CN = then.chains[expert]
            torch.mm(chained(self.gate(pre_QN), others), cast(torch.Tensor, last_CN), out=y_SN[start:stop])
        return self.output.widen(pairs.combine(y_SN[: len(pairs.expert_P)]))

    @property
    def _tiled(self) -> tuple[TiledSide, TiledSide] | None:
        """Both sides as a CPU's own kernels find them; None where these cannot read them as they stand."""
        if not all(side.by_pair and side.here for side in (self.input, self.output)):
            return None
        first, then = self.input.tiled(), self.output.tiled()
        return None if first is None or then is None else (first, then)

    def _fits(self, hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor | None) -> bool:
        """Whether what is given has the shapes that kernels count on; torch says what is wrong."""
        shape = (len(index_Tk), self.expert_layer["hidden"])
        alike = index_Tk.ndim == 2 and hidden_TD.shape == shape and (weight_Tk is None or weight_Tk.shape == index_Tk.shape)
        return alike and plain_on_cpu(hidden_TD, index_Tk, weight_Tk)

    @property
    def _small(self) -> bool:
        return bool(self._size <= self.num_experts * SMALL_EXPERT)
