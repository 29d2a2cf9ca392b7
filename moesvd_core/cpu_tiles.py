"""Products of many rows with their experts' matrices on CPUs, in one call each, whatever shapes the matrices have (`cpu_kernels.c`).

The counterpart of `tiles.py` for processors that `cpu_kernels.py` knows, where no gradients and graphs are recorded. An export carries a
copy of this file, so it must import torch and the other files that are carried only, and do without the functions.

Shapes as in `tiles.py`; S places of rows, F fields of a table's entry.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils import _python_dispatch

from moesvd_core.cpu_kernels import cpu_library

PART_NUMBERS = 1 << 22
"""So many numbers at most are made between two products at a time: they stay in the last cache."""


def calls_are_seen() -> bool:
    """Whether somebody looks at every operation, or does another in its place, as `FlopCounterMode`, `make_fx`, `vmap` and forward-mode
    derivatives do: a kernel of our own would pass them by. Who only watches memory says so (`only_watches`)."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return True
    modes = _python_dispatch._get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() > 0 else ()
    return not all(getattr(mode, "only_watches", False) for mode in modes)


def readable(own: Mapping[str, torch.Tensor | None]) -> bool:
    """Whether kernels can read parameters and what belongs to them as they stand: all on a GPU, or all on a CPU, in 16 bits."""
    tensors = [tensor for tensor in own.values() if tensor is not None]
    if all(tensor.is_cuda and tensor.itemsize == 2 for tensor in tensors):
        return True
    return all(map(_on_cpu, tensors)) and cpu_library() is not None


def plain_on_cpu(*tensors: torch.Tensor | None) -> bool:
    """Whether all are in a CPU's memory, where subclasses of tensors need not be."""
    return all(each is None or (type(each) in (nn.Parameter, torch.Tensor) and each.device.type == "cpu") for each in tensors)


def _on_cpu(tensor: torch.Tensor) -> bool:
    in_rows = tensor.dtype in (torch.bfloat16, torch.int16) and (tensor.stride(-1) == 1 or tensor.numel() == 0)
    return in_rows and plain_on_cpu(tensor)


class CpuTiles:
    """Pairs of a token and an expert in the order of their experts; the counterpart of `Tiles`, whose attributes it has.

    Attributes:
        expert_P, token_P: of each pair, by expert; int32.
        end_E: where each expert's pairs end, int32.
    """

    def __init__(self, expert_P: torch.Tensor, token_P: torch.Tensor, end_E: torch.Tensor) -> None:
        self.expert_P, self.token_P, self.end_E = expert_P, token_P, end_E

    @classmethod
    def arranged(cls, index_Tk: torch.Tensor, experts: int) -> "tuple[CpuTiles, torch.Tensor]":
        """The router's choice by expert, and where each of its pairs stands, int32 [P].

        Raises:
            IndexError: it names an expert that there is not.
        """
        pairs = index_Tk.numel()
        index_Tk, (expert_P, token_P, place_P) = index_Tk.long().contiguous(), torch.empty(3, pairs, dtype=torch.int32, device="cpu")
        end_E = torch.empty(experts, dtype=torch.int32, device="cpu")
        made = (each.data_ptr() for each in (expert_P, token_P, place_P, end_E))
        if _library().arrange(index_Tk.data_ptr(), pairs, index_Tk.shape[1], experts, *made):
            raise IndexError(f"the router chose experts {int(index_Tk.min())} to {int(index_Tk.max())}, but there are 0 to {experts - 1}")
        return cls(expert_P, token_P, end_E), place_P

    def parts(self, numbers: int) -> "Iterator[CpuTiles]":
        """Some pairs at a time, each of so many numbers, whole experts where they fit (`PART_NUMBERS`)."""
        most = max(1, PART_NUMBERS // numbers)
        if len(self.expert_P) <= most:
            yield self
            return
        cuts = [0]
        for start, stop in pairwise([0, *self.end_E.tolist()]):
            if stop - cuts[-1] > most and start > cuts[-1]:
                cuts.append(start)
            while stop - cuts[-1] > most:
                cuts.append(cuts[-1] + most)
        for start, stop in pairwise([*cuts, len(self.expert_P)]):
            yield CpuTiles(self.expert_P[start:stop], self.token_P[start:stop], (self.end_E - start).clamp_(0, stop - start))

    def multiply(
        self,
        entry_SEF: torch.Tensor,
        pieces: int,
        x_SC: torch.Tensor,
        row_P: torch.Tensor | None,
        y_PN: torch.Tensor,
        *,
        across: bool,
        after_identity: bool,
    ) -> None:
        """Write rows times matrices to the pairs whose experts have one; a table and more as in `TiledSide`."""
        failed = _library().multiply(
            x_SC.data_ptr(), x_SC.stride(0), _address(row_P), entry_SEF.data_ptr(), pieces, across, after_identity, self.end_E.data_ptr(),
            len(self.end_E), y_PN.data_ptr(), y_PN.stride(0), torch.get_num_threads(),
        )
        _require_memory(failed)

    def in_order(
        self, x_SC: torch.Tensor, row_P: torch.Tensor | None, order_EC: torch.Tensor | None, *, gated: bool = False
    ) -> torch.Tensor:
        """As `Tiles.in_order`."""
        made_PC = x_SC.new_empty(len(self.expert_P), x_SC.shape[1] // (1 + gated))
        failed = _library().in_order(
            x_SC.data_ptr(), x_SC.stride(0), _address(row_P), self.expert_P.data_ptr(), _address(order_EC), made_PC.data_ptr(),
            *made_PC.shape, gated, torch.get_num_threads(),
        )
        _require_memory(failed)
        return made_PC


def combined(y_PN: torch.Tensor, place_P: torch.Tensor, weight_Tk: torch.Tensor | None, active: int) -> torch.Tensor:
    """Each token's sum of its experts' answers [T, N] by weights (None: all count fully), added up in float32."""
    sum_TN = y_PN.new_empty(len(y_PN) // active, y_PN.shape[1])
    weight_Tk = None if weight_Tk is None else weight_Tk.float().contiguous()
    _library().combine(
        y_PN.data_ptr(), y_PN.stride(0), place_P.data_ptr(), _address(weight_Tk), sum_TN.data_ptr(), len(sum_TN), active, y_PN.shape[1],
        torch.get_num_threads(),
    )
    return sum_TN


def cpu_times(x_QC: torch.Tensor, weight_NC: torch.Tensor) -> torch.Tensor | None:
    """Rows times one matrix [Q, N]; None where the kernels cannot read them, and where they do not fit."""
    fits = x_QC.dtype == torch.bfloat16 and x_QC.ndim == 2 and x_QC.shape[1:] == weight_NC.shape[1:]
    if not (fits and plain_on_cpu(x_QC) and readable({"matrix": weight_NC})) or calls_are_seen():
        return None
    x_QC = x_QC.contiguous()
    y_QN = x_QC.new_empty(len(x_QC), len(weight_NC))
    failed = _library().times(
        x_QC.data_ptr(), len(x_QC), x_QC.stride(0), weight_NC.data_ptr(), *weight_NC.shape, weight_NC.stride(0), y_QN.data_ptr(),
        torch.get_num_threads(),
    )
    _require_memory(failed)
    return y_QN


def _library() -> Any:
    library = cpu_library()
    assert library is not None, "nobody asked whether matrices are `readable`"  # noqa: S101
    return library


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _require_memory(failed: int) -> None:
    if failed:
        raise MemoryError("a CPU's kernels found no memory to bring matrices into order")
