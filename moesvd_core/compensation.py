"""Compensation: original and compressed stream side by side, layer by layer, so that each compressed layer mends what it can.

Layers are taken in order. One is run on the original stream and, with its factors, on the compressed one, which all layers before have
changed already. What the compressed layer's experts should answer is what the original's answered to the same tokens, and in addition a
share of what the stream is off by then: the experts' sum is what gets added to it. The output factors are fitted to that
(`decomposition.compensation`), shared bases having been refined before (`decomposition.alternating`), and the compressed stream goes on
through the fitted layer. Ranks, parameters and bytes stay what they were.

Where it is asked for, a layer's router is refitted before its experts are (`decomposition.router_fit`), so that they are fitted to the
tokens that the finished model sends them; also in layers whose experts stay, since what they read has changed as well.

Shapes: N windows, L tokens a window, T tokens of a batch, k active experts, D hidden size, N (in names) input rows, M width; lower-case n:
tokens of one expert.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from moesvd_core.architectures.experts_io import gate_function, read_experts, routed_tokens
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.router import router_input, router_step
from moesvd_core.architectures.streaming import DecoderStream
from moesvd_core.calibration.job import hidden, hooked, require_finite
from moesvd_core.calibration.moments import pre_activations
from moesvd_core.calibration.settings import WIDE
from moesvd_core.calibration.states import States
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.checkpoint.apply import changed
from moesvd_core.decomposition.compensation import OutputFit, can_compensate
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.router_fit import RouterFit
from moesvd_core.planning import Metric
from moesvd_core.progress import Progress, Report

TOKENS = 2**15
"""Calibration tokens that are looked at, at most: the first windows that hold so many."""
BATCH_TOKENS = 2**12
"""Tokens that go through a layer at once."""
_LEAST_WEIGHT = 1e-3
"""Sum of a token's routing weights below which its experts are not asked to mend the stream."""


def batches_of(window_NL: Tensor) -> tuple[Tensor, ...]:
    """The windows that compensation reads, in batches [B, L]."""
    windows, length = window_NL.shape
    batches: tuple[Tensor, ...] = window_NL[: min(windows, max(1, TOKENS // length))].split(max(1, BATCH_TOKENS // length))
    return batches


@dataclass(frozen=True)
class Compensation:
    """One plan's compensation.

    Attributes:
        stream: the original model.
        batches: token ids, from `batches_of`.
        statistics: of a layer, by its index.
        factors: of a layer as planned, its shared bases refined; None where it stays; asked inside `stream.layer`.
        kind: the metric that factors minimise.
        states: where both streams wait between layers.
        finished: factors of a layer that was done before, or None; asked inside `stream.layer`.
        keep: keeps a layer's factors as they are in the end.
        fits_outputs: fit output factors.
        refits: whether a layer's router, by its index, is to be refitted.
    """

    stream: DecoderStream
    batches: Sequence[Tensor]
    statistics: Callable[[int], LayerStatistics]
    factors: Callable[[int], LayerFactors | None]
    kind: Metric
    states: States
    finished: Callable[[int], LayerFactors | None]
    keep: Callable[[int, LayerFactors], None]
    fits_outputs: bool
    refits: Callable[[int], bool]

    @torch.no_grad()
    def run(self, report: Report) -> None:
        """Fit every layer, from the first to the last one with factors; layers that are done are passed over.

        Raises:
            StatisticsError: NaN or infinite hidden states, or answers to be fitted to; names the layer, and the stream or the expert.
        """
        experts = {layer.index: layer for layer in self.stream.expert_layers}
        last = max(experts)
        start = next((index for index in reversed(range(last + 1)) if self._is_there(index)), None)
        if start is None:
            start, embedded = 0, [self.stream.embed({"input_ids": ids_BT})[0] for ids_BT in self.batches]
            self.states.put(_original(0), embedded)
            self.states.put(_compressed(0), embedded)
        for index in range(start, last + 1):
            with self.stream.layer(index):
                self._layer(index, experts.get(index), last=index == last)
            self.states.drop(_original(index))
            self.states.drop(_compressed(index))
            report(Progress("compensate", index + 1, last + 1, f"layer {index}"))

    def _is_there(self, index: int) -> bool:
        """Whether both streams wait in front of a layer."""
        return all(self.states.count(name) == len(self.batches) for name in (_original(index), _compressed(index)))

    def _layer(self, index: int, layer: ExpertLayer | None, *, last: bool) -> None:
        """Fit a loaded layer, and move both streams behind it (the last one has nobody to move them for)."""
        done = None if layer is None else self.finished(index)
        factors = self._planned(layer) if layer is not None and done is None else done
        fit = None
        if layer is not None and factors is not None and done is None and self.fits_outputs and can_compensate(factors):
            fit = self._fit(layer, factors)
        originals = self._all(index, _original) if layer is None or fit is None else self._fitting(layer, fit)
        if not last:
            self.states.put(_original(index + 1), originals)
        elif fit is not None:
            for _ in originals:
                pass
        if factors is not None and done is None:
            factors = factors if fit is None else fit.factors()
            self.keep(index, factors)
        if not last:
            with nullcontext() if layer is None or factors is None else changed(self.stream.model, layer, factors):
                self.states.put(_compressed(index + 1), self._all(index, _compressed))

    def _all(self, index: int, which: Callable[[int], str]) -> Iterator[Tensor]:
        """One stream behind a layer, batch by batch."""
        return (self._run(index, which, number) for number in range(len(self.batches)))

    def _run(self, index: int, which: Callable[[int], str], number: int) -> Tensor:
        """One batch of one stream behind a layer.

        Raises:
            StatisticsError: it is NaN or infinite somewhere; least squares would hand that on to every factor that they fit.
        """
        call = self.stream.embed({"input_ids": self.batches[number]})[1][index]
        after_BTD = self.stream.run_layer(index, self.states.get(which(index), number).to(self.stream.device), call)
        name = "original" if which is _original else "compressed"
        require_finite(after_BTD, f"layer {index}: the hidden states of the {name} stream after it", "compensate")
        return after_BTD

    def _planned(self, layer: ExpertLayer) -> LayerFactors | None:
        """A loaded layer's factors as planned, with its router refitted where that is asked for; None where nothing changes."""
        factors = self.factors(layer.index)
        if not self.refits(layer.index):
            return factors
        step = router_step(self.stream.model, layer)
        fit = RouterFit(step.weight)
        for number in range(len(self.batches)):
            fit.add(*(router_input(step, partial(self._run, layer.index, which, number)) for which in (_original, _compressed)))
        factors = factors or LayerFactors.unchanged(layer.index, read_experts(self.stream.model.get_submodule(layer.name), layer))
        return replace(factors, router_EF=fit.weight())

    def _fit(self, layer: ExpertLayer, factors: LayerFactors) -> OutputFit:
        """The fit of a loaded layer, without a token yet."""
        weights = read_experts(self.stream.model.get_submodule(layer.name), layer)
        metric = LayerMetric(weights, layer, self.statistics(layer.index), self.stream.device)
        return OutputFit(metric, factors, self.kind, narrow=layer.width <= WIDE)

    def _fitting(self, layer: ExpertLayer, fit: OutputFit) -> Iterator[Tensor]:
        """Gather what both streams tell of a layer; gives the original stream behind it, batch by batch."""
        native = self.stream.model.get_submodule(layer.name)
        weights, gate = read_experts(native, layer), gate_function(native, layer)
        adds_up = None
        for number in range(len(self.batches)):
            with _listening(native) as before:
                after_BTD = self._run(layer.index, _original, number)
            after_TD = after_BTD.reshape(-1, layer.hidden)
            with changed(self.stream.model, layer, fit.planned) as module:
                neurons: list[Tensor] = []
                listener = module.get_submodule("output").register_forward_pre_hook(lambda _, args, kept=neurons: kept.append(args[0]))
                with hooked(listener), _listening(module) as now:
                    changed_TD = self._run(layer.index, _compressed, number).reshape(-1, layer.hidden)
                if adds_up is None:
                    adds_up = layer.routing != "scaled-inputs" and self._adds_up(layer, module, number, now, changed_TD)
            missing_TD = self._missing(native, before, now, after_TD, changed_TD) if adds_up else None
            at = 0
            for expert, rows_n, p_n, x_nD in _pairs(layer, before.args, now.args):
                h_nM = neurons[0][at : at + len(rows_n)]
                at += len(rows_n)
                target_nD = gate(pre_activations(weights, expert, x_nD)).to(x_nD.dtype) @ weights.output_EDM[expert].T
                if missing_TD is not None:
                    target_nD = target_nD + missing_TD[rows_n]
                require_finite(target_nD, f"layer {layer.index}: the answers that expert {expert} is to be fitted to", "compensate")
                fit.add(expert, h_nM, target_nD, p_n)
            yield after_BTD

    def _adds_up(self, layer: ExpertLayer, module: nn.Module, number: int, now: "_Call", changed_TD: Tensor) -> bool:
        """Whether what leaves the layer is what it would be without experts, plus their sum (not so where a norm follows them)."""
        with hooked(module.register_forward_hook(lambda _, args, output: torch.zeros_like(output))):
            bare_TD = self._run(layer.index, _compressed, number).reshape(-1, layer.hidden)
        if now.output.numel() != bare_TD.numel():
            return False
        sum_TD = (bare_TD.float() + now.output.reshape(bare_TD.shape).float()).to(changed_TD.dtype)
        return torch.allclose(sum_TD.float(), changed_TD.float(), rtol=3e-2, atol=3e-2 * float(now.output.float().abs().mean()))

    def _missing(self, native: nn.Module, before: "_Call", now: "_Call", after_TD: Tensor, changed_TD: Tensor) -> Tensor:
        """What each token's experts should add beyond their original answers, for each unit of routing weight [T, D], float32."""
        wanted_TD = after_TD.float() - (changed_TD.float() - now.output.reshape(changed_TD.shape).float())
        index_Tk, weight_Tk = now.args[1:]
        answers_TD = native(before.args[0], index_Tk, weight_Tk).reshape(wanted_TD.shape).float()
        weight_T1 = weight_Tk.float().sum(1, keepdim=True)
        return torch.where(weight_T1 > _LEAST_WEIGHT, (wanted_TD - answers_TD) / weight_T1.clamp(min=_LEAST_WEIGHT), 0.0)


class _Call:
    """What an experts module was called with, and what it answered."""

    args: tuple[Tensor, ...]
    output: Tensor


@contextmanager
def _listening(module: nn.Module) -> Iterator[_Call]:
    """Notes the call of an experts module. Copies: a block may change what it passed on or got in place."""
    call = _Call()

    def note(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        call.args, call.output = tuple(arg.clone() for arg in args), output.clone()

    with hooked(module.register_forward_hook(note)):
        yield call


def _pairs(layer: ExpertLayer, before: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(expert, rows, p, x) of all pairs that the compressed stream routes: x [n, D] is what the original stream has there.

    Where a family multiplies the inputs by the router's scores, x keeps the original's score, and is zero where it chose otherwise.
    """
    if layer.routing != "scaled-inputs":
        for expert, rows_n, _, p_n in routed_tokens(layer, now):
            yield expert, rows_n, p_n, before[0][rows_n]
        return
    original_ETD = before[0].reshape(layer.experts, -1, layer.hidden)
    for expert, rows_n, _, p_n in routed_tokens(layer, now):
        yield expert, rows_n, p_n, original_ETD[expert][rows_n]


def _original(index: int) -> str:
    return f"original-{hidden(index)}"


def _compressed(index: int) -> str:
    return f"compressed-{hidden(index)}"
