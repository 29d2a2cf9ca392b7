"""What decomposing a layer costs: the straightforward loop of full SVDs beside every structure, on the same random layer in one run.

The loop is what public code of this field does: `torch.linalg.svd` of gate, up and down of every expert, cut at one rank. Ours are timed
with everything that they need: metric, eigendecompositions, the loss at every rank, and the factors at the plan.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from moesvd_core.architectures.layout import ExpertLayer, ExpertWeights
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.decomposition.decompose import Decomposition, decompose
from moesvd_core.decomposition.factors import LayerFactors, PivotedFactors
from moesvd_core.decomposition.registry import METHODS, Method, method
from moesvd_core.devices import finish_all
from moesvd_core.errors import InputError, is_number, require_whole
from moesvd_core.evaluation.benchmarks.checks import require_device
from moesvd_core.evaluation.benchmarks.machine import place
from moesvd_core.evaluation.benchmarks.synthetic import RandomLayer, expert_output, random_layer
from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.planning import LayerPlan, ModelShape, Recipe, plan
from moesvd_core.progress import Progress, Report, silent

LOOP = "loop of full SVDs"


@dataclass(frozen=True)
class DecomposeBenchmark:
    """Settings: layer sizes, share of parameters to remove, methods, how many times each is timed (the median counts), and where."""

    hidden: int = 1024
    width: int = 3584
    experts: int = 8
    ratio: float = 0.4
    methods: tuple[str, ...] = tuple(METHODS)
    repeats: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        require(self.methods, self.ratio)
        require_whole("repeats", self.repeats, 1)
        require_device(self.device)

    def run(self, report: Report = silent) -> Table:
        """Time everything, loop and methods in turn, and compare the errors of the layer's output on tokens not calibrated on."""
        sample = random_layer(self.hidden, self.width, self.experts, seed=self.seed, device=self.device)
        names = (LOOP, *self.methods)
        warm_up(lambda warm, name: _result(warm, name, self.ratio, self.device), names, self.device)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        results: dict[str, _Result] = {}
        for repeat in range(self.repeats):
            for turn, name in enumerate(names):
                finish_all(torch.device(self.device))
                start = time.perf_counter()
                results[name] = _result(sample, name, self.ratio, self.device)
                finish_all(torch.device(self.device))
                seconds[name].append(time.perf_counter() - start)
                report(Progress("benchmark", repeat * len(names) + turn + 1, self.repeats * len(names), name))
        median = {name: sorted(taken)[len(taken) // 2] for name, taken in seconds.items()}
        rows = [self._row(sample, name, results[name], median) for name in names]
        size = f"d {self.hidden}, m {self.width}, {self.experts} experts, float32, {place(self.device)}"
        return Table.of(
            f"Decomposing one random layer ({size})",
            rows,
            [f"seconds: median of {self.repeats}; output error: ‖Δy‖/‖y‖ over all experts on held-out tokens, at the ratio shown"],
        )

    def _row(self, sample: RandomLayer, name: str, result: "_Result", median: dict[str, float]) -> dict[str, Cell]:
        stored = 1 - result.parameters / (sample.weights.input_END.numel() + sample.weights.output_EDM.numel())
        return {
            "method": name,
            "structure": result.structure,
            "seconds": median[name],
            "times as fast": median[LOOP] / median[name],
            "experts' ratio": stored,
            "output error": _output_error(sample, result),
        }


@dataclass(frozen=True)
class _Result:
    """Compressed experts: what they store, and how to multiply them out to [E, n, d] and [E, d, m] (not part of what is timed)."""

    structure: str
    parameters: int
    matrices: Callable[[], tuple[torch.Tensor, torch.Tensor]]


def require(methods: Sequence[str], ratio: float) -> None:
    """Refuse names that are no method's, and a ratio that leaves nothing to do or nothing at all.

    Raises:
        InputError: which it is.
    """
    for name in methods:
        method(name)
    if not (is_number(ratio) and 0 < ratio < 1):
        raise InputError(f"ratio must be in (0, 1), got {ratio!r}")


def warm_up(work: Callable[[RandomLayer, str], object], names: Sequence[str], device: str) -> None:
    """Do every work once on a small layer where a card does it, which loads its libraries when they are first asked for."""
    if torch.device(device).type != "cpu":
        small = random_layer(64, 64, 8, tokens=64, device=device)
        for name in names:
            work(small, name)


def _result(sample: RandomLayer, name: str, ratio: float, device: str) -> _Result:
    """The layer by the loop or by one of our methods."""
    return _loop(sample, ratio) if name == LOOP else _ours(sample, method(name), ratio, device)


def _loop(sample: RandomLayer, ratio: float) -> _Result:
    """Full SVD of every matrix, cut where its factors store 1 - ratio of its parameters."""
    factors: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for input_ND, output_DM in zip(sample.weights.input_END, sample.weights.output_EDM, strict=True):
        factors.append([_truncated(weight, ratio) for weight in (*input_ND.chunk(2), output_DM)])

    def matrices() -> tuple[torch.Tensor, torch.Tensor]:
        dense = [[left @ right for left, right in expert] for expert in factors]
        return torch.stack([torch.cat(expert[:2]) for expert in dense]), torch.stack([expert[2] for expert in dense])

    return _Result("per-expert", sum(left.numel() + right.numel() for expert in factors for left, right in expert), matrices)


def _truncated(weight: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    rank = int(rows * columns * (1 - ratio) / (rows + columns))
    left, value, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * value[:rank], right[:rank]


def _ours(sample: RandomLayer, chosen: Method, ratio: float, device: str) -> _Result:
    made, factors = compressed(sample.weights, sample.layer, sample.statistics, chosen, ratio, device)
    sides = sorted({made.input.structure, made.output.structure})
    return _Result(" + ".join(sides), factors.parameters, lambda: (factors.input.reconstruct(), factors.output.reconstruct()))


def compressed(
    weights: ExpertWeights, layer: ExpertLayer, statistics: LayerStatistics, chosen: Method, ratio: float, device: torch.device | str
) -> tuple[LayerPlan, LayerFactors]:
    """The engine on one layer as if it were the whole model: decomposed, planned at the ratio, and its factors as they are stored."""
    decomposition = decompose(weights, layer, statistics, chosen, device=device)
    made = planned(decomposition, layer, chosen, ratio)
    factors = decomposition.materialise(made)
    for side in (factors.input, factors.output):
        if isinstance(side, PivotedFactors):
            side.stored  # noqa: B018 - the form in which they are stored is part of the work
    return made, factors


def planned(decomposition: Decomposition, layer: ExpertLayer, chosen: Method, ratio: float) -> LayerPlan:
    """The layer's plan, as if it were the whole model."""
    total = layer.parameters
    shape = ModelShape(total, total * layer.active // layer.experts, 4 * total, total, 4.0)
    allocation = chosen.allocation if chosen.allocation == "greedy" else "uniform"  # the others divide between layers; here is one
    return plan(decomposition.curves, shape, Recipe(chosen.name, ratio, allocation=allocation)).layers[0]


def _output_error(sample: RandomLayer, result: _Result) -> float:
    """Relative error of the experts' outputs on held-out tokens."""
    stored = sample.weights.input_END
    input_END, output_EDM = (each.to(stored.device, torch.float32) for each in result.matrices())
    lost = total = 0.0
    for expert, x_TD in enumerate(sample.held_out):
        y_TD = expert_output(sample.weights.input_END[expert], sample.weights.output_EDM[expert], x_TD)
        lost += float((expert_output(input_END[expert], output_EDM[expert], x_TD) - y_TD).square().sum())
        total += float(y_TD.square().sum())
    return sqrt(lost / total)
