"""What all structures of `experts.py` have in common: one side of a layer's experts, how pairs pass it, and how its matrices are packed.

An export carries a copy of this file, so it must import torch and the other files that are carried only.

Shapes as in `experts.py`.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import nn

from moesvd_core.batched import Arranged
from moesvd_core.cpu_tiles import readable
from moesvd_core.errors import InputError
from moesvd_core.grouped import Pairs, grouped_linear, in_turns, pack, through, times
from moesvd_core.tiles import TiledSide, where

DISTINCT_RANKS = 8
"""Up to so many different ranks a side, experts of equal rank are computed together; beyond, ranks are split into powers of two."""

_ARRANGING = Lock()
"""Threads that use a model at the same time put its matrices in order once, and see none that is half moved."""


def segments(ranks: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Cut ragged ranks into slabs that a grouped product can take without padding: (width, experts that have it), widest first.

    Few different ranks: one slab for each. Many: every rank is a sum of powers of two, and slab i holds the experts whose rank has bit i,
    so that 128 experts of ranks up to 2047 need eleven slabs and store not one number more than their ranks say.
    """
    distinct = by_rank(ranks)
    if len(distinct) <= DISTINCT_RANKS:
        return distinct
    widths = [1 << bit for bit in reversed(range(distinct[0][0].bit_length()))]
    slabs = [(width, tuple(e for e, own in enumerate(ranks) if own > 0 and own & width)) for width in widths]
    return [(width, members) for width, members in slabs if members]


def by_rank(ranks: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """The experts of every rank above 0: (rank, experts that have it), highest first."""
    distinct = sorted({rank for rank in ranks if rank > 0}, reverse=True)
    return [(rank, tuple(e for e, own in enumerate(ranks) if own == rank)) for rank in distinct]


def places(members: Sequence[int], experts: int) -> list[int]:
    """Where each of the experts stands among the members; their number for those that are none."""
    return [members.index(expert) if expert in members else len(members) for expert in range(experts)]


class Side(nn.Module):
    """One side of a layer's experts. On the input side it maps tokens to pairs [P, n], on the output side pairs to tokens [T, d].

    What can be done once a token is done before they are spread (`narrow`) or after they are combined (`widen`).

    Attributes:
        by_pair: whether nothing else is: then an expert can take its pairs through both sides before the next one begins.
    """

    by_pair = True

    def __init__(self, rows: int, reads_tokens: bool) -> None:
        """`rows`: of what `multiply` gives."""
        super().__init__()
        self.rows, self.reads_tokens = rows, reads_tokens
        self._tables: dict[str, torch.Tensor] = {}
        self._packed: dict[str, list[torch.Tensor]] = {}
        self._arranged: Arranged | None = None
        self._moved = False  # whether parameters may stand as `arranged` puts them; copies of them do, without what it made
        self._tiled: TiledSide | None = None

    def forward(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Multiply by every pair's own matrix."""
        if self.reads_tokens:
            x_TC = self.narrow(x)
            if pairs.tiles is not None and (tiled := self.tiled()) is not None:
                return tiled.times(x_TC, pairs.tiles, pairs.tiles.token_P)
            return self.multiply(pairs.spread(x_TC), pairs)
        return self.widen(pairs.combine(self.multiply(x, pairs)))

    def narrow(self, x_TC: torch.Tensor) -> torch.Tensor:
        """What the experts of an input side read of each token."""
        return x_TC

    def widen(self, y_TN: torch.Tensor) -> torch.Tensor:
        """Tokens' answers from what the experts of an output side made of them."""
        return y_TN

    def multiply(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Every pair's own matrix times its row [P, N], but for what `narrow` and `widen` do."""
        if pairs.runs is not None:
            return in_turns(x_PC, None, pairs.runs, self.answer, self.rows)
        if pairs.tiles is not None and (tiled := self.tiled()) is not None:
            return tiled.times(x_PC, pairs.tiles, None)
        return self.multiply_grouped(x_PC, pairs)

    def multiply_grouped(self, x_PC: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """The same by grouped products: where gradients or graphs are recorded, and on GPUs that `tiled` gives nothing for."""
        raise NotImplementedError

    def tiled(self) -> TiledSide | None:
        """The matrices as kernels of our own find them, without gradients; None for structures, devices and numbers that these do not know,
        and for matrices that come for the time of `forward` only, which would be kept."""
        if self._comes_and_goes:
            return None
        own = self._parameters | self._buffers
        if self._tiled is None or self._tiled.found != where(own):
            self._tiled = self._tile() if readable(own) and not self._computed else None
        return self._tiled

    def _tile(self) -> TiledSide | None:
        return None

    @property
    def _comes_and_goes(self) -> bool:
        """Whether accelerate brings the parameters for each call and takes them away after it (its hooks' `offload`)."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))

    @property
    def _computed(self) -> bool:
        """Whether others compute parameters anew for each call, as torch's pruning (in a plain tensor) and parametrisations do."""
        return bool(self._modules) or any(isinstance(value, torch.Tensor) for value in self.__dict__.values())

    def answer(self, expert: int, x_QC: torch.Tensor) -> torch.Tensor:
        """The same for rows of one expert [Q, N]."""
        return through(self.chains(expert), x_QC, self.rows)

    def chains(self, expert: int) -> Sequence[Sequence[torch.Tensor]]:
        """What an expert's matrix consists of, as the kernels are to read it: chains of matrices [N, C] whose answers are added up."""
        raise NotImplementedError

    def matrices(self) -> torch.Tensor:
        """Every expert's matrix, multiplied out [E, N, C].

        Raises:
            InputError: they are packed.
        """
        self._require_unpacked()
        return self._multiplied_out()

    def _multiplied_out(self) -> torch.Tensor:
        raise NotImplementedError

    @property
    def batchable(self) -> bool:
        """Whether `arranged` gives anything."""
        return False

    @property
    def joins(self) -> bool:
        """Whether it does, or will after `join`."""
        return self.batchable

    def arranged(self) -> Arranged | None:
        """The matrices as products of many experts need them, without gradients, on a CPU.

        The parameters become views of them. They keep their shapes and numbers, and may be trained, saved, moved and compiled as before;
        where one was replaced or moved since, all are put in order again. Those that have a gradient stay as they are: some optimisers
        (`fused`) take it, the parameter and their own sums for memory in one order, and would not notice that it is not.
        """
        if (found := self._in_order) is not None:
            return found
        with _ARRANGING:
            if (found := self._in_order) is not None:
                return found
            own = [parameter for parameter in self._parameters.values() if parameter is not None]
            if not self.here or self._computed or any(type(each) is not nn.Parameter or each.grad is not None for each in own):
                return None  # what others have put in their place is theirs
            with torch.inference_mode(any(parameter.is_inference() for parameter in own)), torch.no_grad():
                self._arranged, self._moved = self._arrange(), True
            return self._arranged

    def before_training(self) -> None:
        """Undo `arranged` where gradients are recorded: optimisers count on memory of a parameter's own, in the usual order."""
        if self._moved and any(parameter is not None and parameter.requires_grad for parameter in self._parameters.values()):
            self._settle()

    def _settle(self) -> None:
        with _ARRANGING:
            for parameter in self._parameters.values():
                if type(parameter) is nn.Parameter:
                    with torch.inference_mode(parameter.is_inference()):
                        parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
            self._arranged, self._moved = None, False

    @property
    def _in_order(self) -> Arranged | None:
        """What was arranged, while the parameters are still views of it."""
        found = self._arranged
        return found if found is not None and found.holds(self._parameters) else None

    @property
    def here(self) -> bool:
        """Whether a CPU can read the matrices; those that were offloaded come for the time of `forward` only."""
        return bool(self.packed) or all(parameter.device.type == "cpu" for parameter in self.parameters())

    def _arrange(self) -> Arranged | None:
        return None

    def _require_unpacked(self) -> None:
        if self.packed:
            raise InputError("packed experts cannot be saved, loaded, moved, copied or multiplied out: call unpack(model) first")

    def _apply(self, *call: Any, **more: Any) -> "Side":
        """What moves parameters leaves the memory behind that they were views of."""
        self._require_unpacked()
        self._arranged = self._tiled = None
        return super()._apply(*call, **more)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, *call: Any) -> None:
        """Who saves parameters expects that each has memory of its own, in the usual order."""
        self._require_unpacked()
        if self._moved:
            self._settle()
        super()._save_to_state_dict(*call)

    def _load_from_state_dict(self, *call: Any) -> None:
        self._require_unpacked()
        super()._load_from_state_dict(*call)

    def __getstate__(self) -> dict[str, Any]:
        self._require_unpacked()
        return self.__dict__ | {"_arranged": None, "_tiled": None}

    def join(self) -> None:
        """Make one step of what is none (see `FactoredExperts.pack`)."""

    def own(self, x_PC: torch.Tensor, name: str, pairs: Pairs) -> torch.Tensor:
        """Every pair's row times its expert's matrix of a parameter [E, N, C], giving [P, N]."""
        return grouped_linear(x_PC, getattr(self, name), pairs.end_E)

    def shared(self, x_PC: torch.Tensor, name: str) -> torch.Tensor:
        """Rows times the one matrix of a parameter [N, C]."""
        return times(x_PC, self.matrix(name))

    def matrix(self, name: str, place: int | None = None) -> torch.Tensor:
        """A parameter's matrix, or the one of its place, as the kernels are to read it."""
        if name in self._packed:
            return self._packed[name][place or 0]
        weight: torch.Tensor = getattr(self, name)
        return weight if place is None else weight[place]

    @property
    def packed(self) -> list[torch.Tensor]:
        """What `pack` made of the parameters."""
        return self._packed_matrices()

    def _packed_matrices(self) -> list[torch.Tensor]:  # for those who add to them: a graph cannot be made of `super().packed`
        return [matrix_NC for matrices in self._packed.values() for matrix_NC in matrices]

    def pack(self) -> None:
        """See `FactoredExperts.pack`."""
        for name, weight in self.named_parameters():
            if weight.numel() > 0 and name not in self._packed:
                matrices = self.filled_up(name, weight.detach().view(-1, *weight.shape[-2:]))
                self._packed[name] = [pack(matrix_NC) for matrix_NC in matrices]
                self.register_parameter(name, nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad))

    def unpack(self) -> None:
        """Take the parameters out of what `pack` made of them."""
        for name, packed in self._packed.items():
            weight = self.get_parameter(name)
            full_GNC = self.taken_out(name, torch.stack([matrix_NC.to_dense() for matrix_NC in packed]))
            plain = full_GNC[:, : weight.shape[-2], : weight.shape[-1]].contiguous()
            self.register_parameter(name, nn.Parameter(plain.view(weight.shape), weight.requires_grad))
        self._packed.clear()

    def filled_up(self, name: str, weight_GNC: torch.Tensor) -> torch.Tensor:
        """A parameter's matrices as they are packed, where numbers that are not stored save calls or kernels; zeros come last."""
        return weight_GNC

    def taken_out(self, name: str, full_GNC: torch.Tensor) -> torch.Tensor:
        """What `filled_up` was given, with whatever zeros it put last."""
        return full_GNC

    def table(self, name: str, device: torch.device, make: Callable[[], list[Any]]) -> torch.Tensor:
        """A constant of the structure on the device of the data, made once.

        Not a buffer: those that are not saved come back from a checkpoint uninitialised, and those that are would be cast and offloaded.
        """
        if name not in self._tables or self._tables[name].device != device:
            self._tables[name] = torch.tensor(make(), device=device)
        return self._tables[name]
