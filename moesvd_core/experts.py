"""The module that takes the place of `experts` in an unmodified transformers block, and computes with factors instead of matrices.

An export carries a copy of this file, so that a checkpoint loads where nothing of this project is installed: it must import nothing of ours
but `grouped.py` and `sides.py`.

Shapes: T tokens, k active experts a token, P pairs of a token and one of its experts (see `grouped.py`), E experts, d hidden size, m expert
width, n input rows, G members of a group, R rank, N rows and C columns of one expert's matrix.

A side (input: gate and up stacked; output: down) is one expert's matrix `W_e [N, C]`, stored in one of these structures:

- dense: `W_e`
- per-expert: `U_e V_e`, a rank for every expert; rank -1 is the matrix itself, rank 0 nothing at all
- shared-right: `(Σ U_s) V_g`, one V for a group of experts (the paper's form), or for all (latent input: V once a token)
- shared-left: `P B_e` on the output side (latent output: P once a token)
- those of `rival_sides.py`
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from moesvd_core.grouped import Pairs, Runs, grouped_linear, in_graph, in_turns, keeps_tail, packed_bytes
from moesvd_core.sides import Side, places, segments

SMALL_EXPERT = 1 << 20
"""Parameters of an expert up to which packing brings nothing."""
PRODUCT_COST = 4_000_000
"""Multiplications that a CPU does in the time of calling one more product."""
READING_COST = 13
"""The same for reading one more number of a matrix."""

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


def every_expert(x: torch.Tensor, weight_ENC: torch.Tensor, reads_tokens: bool) -> torch.Tensor:
    """Each expert's matrix times each token [T, C], giving [T, E, N]; or times its own row of each token [T, E, C], giving [E, T, N]."""
    x = x.to(weight_ENC.dtype)
    if reads_tokens:
        return linear(x, weight_ENC.flatten(0, 1)).view(len(x), *weight_ENC.shape[:2])
    return torch.bmm(x.transpose(0, 1), weight_ENC.transpose(1, 2))


class DenseSide(Side):
    """The original matrices `weight` [E, N, C]."""

    def __init__(self, experts: int, rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        super().__init__(rows, reads_tokens)
        self.weight = nn.Parameter(torch.empty(experts, rows, columns, **kind))

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return self.own(x_PC, "weight", pairs)

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        return [[self.matrix("weight", expert)]]

    def all_pairs(self, x: torch.Tensor) -> torch.Tensor | None:
        return every_expert(x, self.weight, self.reads_tokens)

    def matrices(self) -> torch.Tensor:
        return self.weight


class PerExpertSide(Side):
    """`U_e V_e` with a rank for every expert, stored unpadded in slabs (see `segments`).

    Slab i is `left_i` [G, N, width] and `right_i` [G, width, C]; an expert's columns of U stand in its slabs from the widest down.
    Experts of rank -1 keep their matrix in `dense` [G, N, C].
    """

    def __init__(self, ranks: Sequence[int], rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        super().__init__(rows, reads_tokens)
        self.ranks, self.columns = tuple(ranks), columns
        self.slabs = segments(ranks)
        self.whole = tuple(e for e, rank in enumerate(ranks) if rank < 0)
        for i, (width, members) in enumerate(self.slabs):
            self.register_parameter(f"left_{i}", nn.Parameter(torch.empty(len(members), rows, width, **kind)))
            self.register_parameter(f"right_{i}", nn.Parameter(torch.empty(len(members), width, columns, **kind)))
        if self.whole:
            self.dense = nn.Parameter(torch.empty(len(self.whole), rows, columns, **kind))
        self._products: list[tuple[tuple[int, ...], tuple[str, ...]]] = [
            (members, (f"right_{i}", f"left_{i}")) for i, (_, members) in enumerate(self.slabs)
        ]
        if self.whole:
            self._products.append((self.whole, ("dense",)))
        self._parts = [[(members.index(e), names) for members, names in self._products if e in members] for e in range(len(ranks))]

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        x_PC = x_PC.to(next((own.dtype for own in self.parameters()), x_PC.dtype))
        if len(self._products) == 1 and len(self._products[0][0]) == len(self.ranks):  # one rank for all: the pairs stand as needed
            for name in self._products[0][1]:
                x_PC = self.own(x_PC, name, pairs)
            return x_PC
        several = any(len(parts) > 1 for parts in self._parts)  # parts of one matrix are added up
        exact = torch.promote_types(x_PC.dtype, torch.float32) if several else x_PC.dtype
        y_PN = torch.zeros(len(x_PC), self.rows, dtype=exact, device=x_PC.device)
        for i, (members, names) in enumerate(self._products):
            place_E = self.table(f"slab {i}", x_PC.device, partial(places, members, len(self.ranks)))
            runs = Runs(place_E[pairs.expert_P], len(members), ascending=True)
            y_QC = runs.take(x_PC)
            for name in names:
                y_QC = runs.clean(grouped_linear(y_QC, getattr(self, name), runs.end_G))
            y_PN.index_add_(0, runs.row_Q, y_QC.to(exact))
        return y_PN.to(x_PC.dtype)

    def filled_up(self, name: str, weight_GNC: torch.Tensor) -> torch.Tensor:
        """Ranks up to the next multiple of 32: each is a kernel of its own, and a packed matrix is filled up in any case."""
        if name == "dense":
            return weight_GNC
        side = name.startswith("right")
        missing = -weight_GNC.shape[1 if side else 2] % 32
        return pad(weight_GNC, (0, 0, 0, missing) if side else (0, missing))

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        return [[self.matrix(name, place) for name in names] for place, names in self._parts[expert]]

    def matrices(self) -> torch.Tensor:
        example = next(self.parameters(), torch.empty(0))
        full_ENC = example.new_zeros(len(self.ranks), self.rows, self.columns)
        for i, (_, members) in enumerate(self.slabs):
            full_ENC[list(members)] += getattr(self, f"left_{i}") @ getattr(self, f"right_{i}")
        if self.whole:
            full_ENC[list(self.whole)] = self.dense
        return full_ENC


class SharedRightSide(Side):
    """One V for each group of experts; an expert's matrix is the sum of one or several stored U's of its group, times V.

    Group g is `right_g` [R, C] and `left_g` [K, N, R]. With one group on the input side, V is applied once a token.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], rows: int, columns: int, reads_tokens: bool, **kind: Any) -> None:
        """Make empty factors.

        Args:
            groups: for each group: experts, rank, stored (how many U's), and sums (for each of its experts the U's that are added up).
        """
        super().__init__(rows, reads_tokens)
        self.groups = groups
        self.experts = sum(len(group["experts"]) for group in groups)
        for g, group in enumerate(groups):
            self.register_parameter(f"right_{g}", nn.Parameter(torch.empty(group["rank"], columns, **kind)))
            self.register_parameter(f"left_{g}", nn.Parameter(torch.empty(group["stored"], rows, group["rank"], **kind)))
        own = [[e] for e in range(self.experts)]
        self.latent = len(groups) == 1 and groups[0]["experts"] == list(range(self.experts)) and groups[0]["sums"] == own
        self._once = reads_tokens and len(groups) == 1
        self._uses = {
            expert: (g, used) for g, group in enumerate(groups) for expert, used in zip(group["experts"], group["sums"], strict=True)
        }

    def narrow(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.shared(x_TC, "right_0") if self._once else x_TC

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        if len(self.groups) == 1 and not self._once:
            x_PC = self.shared(x_PC, "right_0")
        if len(self.groups) == 1:
            return self._expand(0, x_PC, pairs.expert_P, pairs)
        group_P = self.table("groups", x_PC.device, self._group_of_expert)[pairs.expert_P]
        y_PN = x_PC.new_zeros(len(x_PC), self.rows)
        for g in range(len(self.groups)):
            runs = Runs(torch.where(group_P == g, 0, 1), 1, ascending=True)
            if len(runs.row_Q) > 0:
                z_QR = runs.clean(grouped_linear(runs.take(x_PC), getattr(self, f"right_{g}")[None], runs.end_G))
                y_QN = self._expand(g, z_QR, pairs.expert_P[runs.row_Q], pairs)
                y_PN.index_add_(0, runs.row_Q, y_QN.to(y_PN.dtype))
        return y_PN

    def all_pairs(self, x: torch.Tensor) -> torch.Tensor | None:
        return every_expert(self.narrow(x), self.get_parameter("left_0"), True) if self.latent and self.reads_tokens else None

    def matrices(self) -> torch.Tensor:
        full: dict[int, torch.Tensor] = {}
        for g, group in enumerate(self.groups):
            left_KNR, right_RC = getattr(self, f"left_{g}"), getattr(self, f"right_{g}")
            full |= {expert: left_KNR[used].sum(0) @ right_RC for expert, used in zip(group["experts"], group["sums"], strict=True)}
        return torch.stack([full[expert] for expert in range(self.experts)])

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        g, used = self._uses[expert]
        first = [] if self._once else [self.matrix(f"right_{g}")]
        return [[*first, self.matrix(f"left_{g}", place)] for place in used]

    def _expand(self, g: int, z_QR: torch.Tensor, expert_Q: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """`Σ U_s z` over the U's of each row's expert [Q, N]; zero for rows whose expert is of another group."""
        left_KNR = getattr(self, f"left_{g}")
        if self.latent:
            return grouped_linear(z_QR, left_KNR, pairs.end_E)
        used_QS = self.table(f"sums {g}", z_QR.device, partial(self._sums_of_expert, g))[expert_Q]
        runs = Runs(used_QS.reshape(-1), len(left_KNR))
        runs.row_Q = runs.row_Q // used_QS.shape[1]
        y_XN = runs.clean(grouped_linear(runs.take(z_QR), left_KNR, runs.end_G))
        return y_XN.new_zeros(len(z_QR), self.rows).index_add_(0, runs.row_Q, y_XN)

    def _sums_of_expert(self, g: int) -> list[list[int]]:
        """The group's U's that each expert adds up, filled up with the number of U's, which stands for none."""
        depth, none = max(len(used) for used in self.groups[g]["sums"]), self.groups[g]["stored"]
        own = [used if group == g else () for group, used in (self._uses[expert] for expert in range(self.experts))]
        return [[*used, *[none] * depth][:depth] for used in own]

    def _group_of_expert(self) -> list[int]:
        return [self._uses[expert][0] for expert in range(self.experts)]


class SharedLeftSide(Side):
    """`P B_e` on the output side: own small matrices `right` [E, R, C], and one `left` [N, R] that maps every token back once."""

    def __init__(self, rank: int, experts: int, rows: int, columns: int, **kind: Any) -> None:
        super().__init__(rank, reads_tokens=False)
        self.right = nn.Parameter(torch.empty(experts, rank, columns, **kind))
        self.left = nn.Parameter(torch.empty(rows, rank, **kind))

    def widen(self, y_TN: torch.Tensor) -> torch.Tensor:
        return self.shared(y_TN, "left")

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return self.own(x_PC, "right", pairs)

    def chains(self, expert: int) -> list[list[torch.Tensor]]:
        return [[self.matrix("right", expert)]]

    def all_pairs(self, x: torch.Tensor) -> torch.Tensor | None:
        return every_expert(x, self.right, self.reads_tokens)

    def matrices(self) -> torch.Tensor:
        return self.left @ self.right


STRUCTURES: dict[str, Callable[..., Side]] = {}
"""Further structures by name, put here by the files that define them: (spec, experts, rows, columns, reads_tokens) -> empty side."""


def make_side(spec: dict[str, Any], experts: int, rows: int, columns: int, reads_tokens: bool, **kind: Any) -> Side:
    """The empty side that its description asks for.

    Raises:
        ValueError: the structure is unknown.
    """
    structure = spec["structure"]
    if structure == "dense":
        return DenseSide(experts, rows, columns, reads_tokens, **kind)
    if structure == "per-expert":
        return PerExpertSide(spec["ranks"], rows, columns, reads_tokens, **kind)
    if structure == "shared-right":
        return SharedRightSide(spec["groups"], rows, columns, reads_tokens, **kind)
    if structure == "shared-left" and not reads_tokens:
        return SharedLeftSide(spec["rank"], experts, rows, columns, **kind)
    if structure in STRUCTURES:
        return STRUCTURES[structure](spec, experts, rows, columns, reads_tokens, **kind)
    raise ValueError(f"structure {structure!r} is not known for this side: a newer version of moesvd must have made the checkpoint")


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
        """Arrange the factors, where they are, as a CPU's kernels read them: exact, as many bytes, and faster for few tokens.

        Until `unpack` they answer without gradients only, and cannot be saved, moved or compiled. Layers of small experts are left alone:
        there calls cost more than bytes.

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
        if weight_Tk is not None and self._asks_all(index_Tk):
            answer_TD = self._answer_of_all(hidden_TD, index_Tk, weight_Tk)
            if answer_TD is not None:
                return answer_TD.to(hidden_TD.dtype)
        pairs = Pairs(index_Tk, weight_Tk, self.num_experts)
        if pairs.runs is not None and self.input.by_pair and self.output.by_pair and not self._heard:
            y_PN = in_turns(self.input.narrow(hidden_TD), pairs.token_P, pairs.runs, self._answer_of, self.output.rows)
            out_TD = self.output.widen(pairs.combine(y_PN))
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

    def _asks_all(self, index_Tk: torch.Tensor) -> bool:
        """Whether a product for all experts at once takes less than one for each of those that are asked."""
        if self.packed or self._heard or keeps_tail(index_Tk) or torch.is_grad_enabled() or len(index_Tk) == 0:
            return False
        tokens, active = index_Tk.shape
        asked = min(self.num_experts, tokens * active)  # at most
        needless = tokens * (self.num_experts - active) + READING_COST * (self.num_experts - asked)
        return bool(needless * self._size / self.num_experts < 2 * (asked - 1) * PRODUCT_COST)

    def _answer_of_all(self, hidden_TD: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor) -> torch.Tensor | None:
        """Every expert answers every token, and the router's weights leave out whom it did not ask; None where a side cannot."""
        pre_TEN = self.input.all_pairs(hidden_TD)
        if pre_TEN is None:
            return None
        if self.input_bias is not None:
            pre_TEN = pre_TEN + self.input_bias
        hidden_TEM = self.gate(pre_TEN.flatten(0, 1)).unflatten(0, pre_TEN.shape[:2])
        y_ETN = self.output.all_pairs(hidden_TEM)
        if y_ETN is None:
            return None
        weight_TE = weight_Tk.new_zeros(len(weight_Tk), self.num_experts).scatter_add_(1, index_Tk, weight_Tk)
        out_TD = self.output.widen((y_ETN * weight_TE.T[..., None]).sum(0))
        return out_TD if self.output_bias is None else out_TD + weight_TE @ self.output_bias.to(weight_TE.dtype)
