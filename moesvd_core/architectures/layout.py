"""What one layer's routed experts look like, in one form for every family.

Shapes: E experts, d hidden size, m expert width, n input rows (2m with a gate, m without), T tokens.

Canonical form: `y_e = O_e · gate(I_e x + b) + c`, with `input_END` (gate and up stacked in the family's own row order) and `output_EDM`.
Families that store the transposed matrices are transposed on reading; the order of rows is never changed, because the family's own gate
function (`gate_function`) expects it.
"""

from dataclasses import dataclass
from typing import Literal

import torch

RowOrder = Literal["concatenated", "interleaved", "plain"]


@dataclass(frozen=True)
class ExpertLayer:
    """Where one layer's routed experts are, and how big they are.

    Attributes:
        index: number of the decoder layer, counted from 0 over all layers (dense ones too).
        name: module path of the experts module, "model.layers.3.mlp.experts".
        experts, hidden, width: E, d, m.
        active: experts that answer each token (k).
        rows: which row of the input matrix feeds which neuron: gate rows 0..m-1 then up rows ("concatenated"), alternating
            ("interleaved"), or one row a neuron without a gate ("plain").
        transposed: the module stores `[E, d, n]` and `[E, m, d]` and is transposed on reading.
        biased: both projections carry a bias, which is always kept.
        routing: "weights" — the module is called with (hidden_TD, index_Tk, weight_Tk);
            "scaled-inputs" — llama4: called with hidden states of all experts one below the other, multiplied by the router's scores.
        groups: of neighbouring experts, of which the router takes the best few first and experts only from those; 1 where it does not.
        chosen_groups: how many it takes; 0 where it scores them in a way that cannot rule an expert out, so that none may go.
    """

    index: int
    name: str
    experts: int
    hidden: int
    width: int
    active: int
    rows: RowOrder = "concatenated"
    transposed: bool = False
    biased: bool = False
    routing: Literal["weights", "scaled-inputs"] = "weights"
    groups: int = 1
    chosen_groups: int = 1

    @property
    def input_rows(self) -> int:
        """Rows n of the stacked input matrix."""
        return self.width if self.rows == "plain" else 2 * self.width

    @property
    def input_parameters(self) -> int:
        """Parameters of one expert's input matrix (gate and up)."""
        return self.input_rows * self.hidden

    @property
    def output_parameters(self) -> int:
        """Parameters of one expert's output matrix (down)."""
        return self.hidden * self.width

    @property
    def bias_parameters(self) -> int:
        """Parameters of one expert's biases, which no method touches."""
        return self.input_rows + self.hidden if self.biased else 0

    @property
    def parameters(self) -> int:
        """Parameters of all routed experts of the layer."""
        return self.experts * (self.input_parameters + self.output_parameters + self.bias_parameters)

    def neuron_of_row(self) -> torch.Tensor:
        """Neuron that each input row feeds, int64 [n]."""
        row_N = torch.arange(self.input_rows)
        if self.rows == "interleaved":
            return row_N // 2
        return row_N % self.width

    def rows_of_neuron(self) -> torch.Tensor:
        """Input rows that feed each neuron, in their order, int64 [m, rows of a neuron]."""
        return self.neuron_of_row().argsort(stable=True).view(self.width, -1)

    def rows_in_order(self, order_XM: torch.Tensor) -> torch.Tensor:
        """Which row of an input matrix stands where once its neurons are put in an order, int64 [..., n]; each row stays of its kind.

        Args:
            order_XM: which neuron stands at each place, int64 [..., m]: one order, or one for each of several experts.
        """
        row_MB = self.rows_of_neuron().to(order_XM.device)
        row_XN = order_XM.new_empty(*order_XM.shape[:-1], self.input_rows)
        row_XN[..., row_MB] = row_MB[order_XM]
        return row_XN


@dataclass
class ExpertWeights:
    """One layer's experts in canonical form.

    Attributes:
        input_END: gate and up, [E, n, d].
        output_EDM: down, [E, d, m].
        input_bias_EN, output_bias_ED: biases, or None.
    """

    input_END: torch.Tensor
    output_EDM: torch.Tensor
    input_bias_EN: torch.Tensor | None = None
    output_bias_ED: torch.Tensor | None = None
