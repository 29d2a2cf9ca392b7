"""What a run will need of memory and disk, against what the machine has: refused beforehand rather than killed half-way.

Figures are upper estimates from the model's shape: one decoder layer with its Gram matrices in memory, hidden states of the calibration
text, factors and the export on disk.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moesvd_core.atomic import existing
from moesvd_core.calibration.settings import Calibration
from moesvd_core.calibration.statistics import SUMMARY
from moesvd_core.calibration.text import DEFAULT_LENGTH
from moesvd_core.checkpoint.export import SHARD_SIZE
from moesvd_core.compensation import TOKENS
from moesvd_core.decomposition.registry import method
from moesvd_core.errors import ResourceError
from moesvd_core.pipeline import decomposition_key, single_structures
from moesvd_core.runs.free_memory import free_memory

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_PROGRAM = 600 * 2**20
"""Interpreter, torch and transformers."""
_SLACK = 0.02
"""Share of a file system that is left free."""


@dataclass(frozen=True)
class Estimate:
    """Bytes.

    Attributes:
        memory: at the peak, above what is in use now.
        run_disk: written into the run folder, all stations together, beside what it holds already.
        export_disk: while the model is exported; 0 when none is written.
        flops: floating-point operations of calibration (forward and backward).
    """

    memory: int
    run_disk: int
    export_disk: int
    flops: int


def estimate(
    facts: Mapping[str, Any],
    calibration: Calibration,
    form: Literal["factored", "dense"] | None = None,
    methods: Iterable[str] = ("auto",),
    fitted: bool = False,
    *,
    ratio: float = 0.0,
    dtype: str | None = None,
    tokens: int = 0,
    run: Path | None = None,
) -> Estimate:
    """What analysing a model needs, and writing it in a format.

    Args:
        facts: `ModelFacts.as_dict()`.
        form: None: nothing is exported.
        methods: for which the model is decomposed; none: it is run only, for which no statistics are wanted.
        fitted: whether a finished model is fitted to the stream that it changes.
        ratio: of the export's plan, which removes no less.
        dtype: floating type of the export; None: the model's.
        tokens: of the text on which the original and what is made of it are evaluated.
        run: folder of the run, whose finished statistics and decomposed layers are not made again; None: nothing is there yet.

    Raises:
        InputError: no such method.
    """
    number = _BYTES[calibration.dtype or facts["dtype"]] if (calibration.dtype or facts["dtype"]) in _BYTES else 4
    layers, experts, hidden, width = facts["moe_layers"], facts["experts"], facts["hidden"], facts["width"]
    length = min(calibration.length or DEFAULT_LENGTH, facts["context_length"] or DEFAULT_LENGTH)
    states = calibration.samples * length * hidden * number
    pushed = (calibration.gradient_samples or calibration.samples) / calibration.samples  # through the backward pass
    layer_experts = facts["expert_parameters"] // max(1, layers)
    outside = facts["parameters"] - facts["expert_parameters"]
    intermediate = experts * width**2 if calibration.collects_intermediate(width) else 0
    forward = 8 * (2 * experts * hidden**2 + intermediate)
    row_gram = experts * (2 * width) ** 2 if calibration.collects_rows(2 * width) else 0
    backward = 8 * ((2 * experts + 1) * hidden**2 + row_gram) if calibration.gradient else 0
    labels = 1 + calibration.drawn_labels if calibration.gradient else 1  # each has a gradient of its own, of one forward pass
    kept = {decomposition_key(single) for name in methods for single in single_structures(method(name))}
    calibrates = bool(kept) and (run is None or not (run / "statistics" / SUMMARY).exists())
    missing = len(kept) * layers - _decomposed(kept, run)
    sums = 2 * max(forward, backward) if calibrates or missing or fitted else (forward + backward) // 2 if kept else 0
    batch = calibration.batch * length * (4 * (1 + labels * calibrates) * hidden + 4 * facts["active"] * width) * 4
    collected = round((facts["layers"] + 2 * labels * pushed) * states) + layers * (forward + backward) // 4
    return Estimate(
        memory=_PROGRAM + (outside + 2 * layer_experts) * number + 4 * layer_experts + sums + batch,
        run_disk=(_left(collected, run) if calibrates else 0)
        + missing * _factor_bytes(facts)
        + (_fitting_bytes(facts, calibration.samples * length, number) if fitted else 0)
        + 2 * tokens * hidden * number,
        export_disk=0 if form is None else _export_bytes(facts, ratio if form == "factored" else 0.0, dtype),
        flops=round(2 * (1 + (1 + labels) * pushed) * facts["active_parameters"] * calibration.samples * length),
    )


def _left(collected: int, run: Path | None) -> int:
    """What a calibration has yet to write, of the bytes of its hidden states and statistics."""
    written = () if run is None else (run / "statistics").rglob("*.safetensors")
    return max(0, collected - sum(file.stat().st_size for file in written))


def _export_bytes(facts: Mapping[str, Any], ratio: float, dtype: str | None) -> int:
    """Of the tensors that an export holds, and of one file of them more, whose tensors lie beside it until it is whole."""
    own = _BYTES.get(facts["dtype"], facts["bytes"] / facts["parameters"])
    number = own if dtype is None else _BYTES[dtype]
    stored: int = round(facts["bytes"] + facts["parameters"] * (number - own - ratio * number))
    return stored + min(stored, SHARD_SIZE)


def _decomposed(kept: Iterable[str], run: Path | None) -> int:
    """How many layers' decompositions of these kinds are there."""
    return 0 if run is None else sum(len(list((run / "factors" / key).glob("layer-*.safetensors"))) for key in kept)


def _factor_bytes(facts: Mapping[str, Any]) -> int:
    """Of the files of one layer's decomposition, at most: a basis of every expert's smaller spaces, curves, and matrices that all experts
    share."""
    experts, hidden, width = (int(facts[name]) for name in ("experts", "hidden", "width"))
    sides = (min(2 * width, hidden), min(width, hidden))
    bases = 4 * experts * sum(size**2 for size in sides)
    curves = 2 * 2 * 8 * experts * sum(sides)
    return bases + curves + 4 * 3 * hidden * width


def _fitting_bytes(facts: Mapping[str, Any], tokens: int, number: int) -> int:
    """Of a finished model's fitted output factors, at most twice the output matrices, a third of the experts, in float32, and both streams
    before and behind a layer."""
    return 4 * int(facts["expert_parameters"]) * 2 // 3 + 4 * min(tokens, TOKENS) * int(facts["hidden"]) * number


def require(needed: Estimate, run: Path, output: Path | None) -> None:
    """Compare an estimate with the machine.

    Raises:
        ResourceError: not enough; the message says of what, how much is needed and how much there is.
    """
    free = free_memory()
    if needed.memory > free:
        raise ResourceError(
            f"not enough memory: about {_gib(needed.memory)} are needed and {_gib(free)} are free; "
            "use a smaller batch, close other programs, or a larger machine"
        )
    wanted: dict[int, tuple[Path, int]] = {}
    for path, size in ((run, needed.run_disk), (output, needed.export_disk)):
        if path is not None:
            place = existing(path)
            device = place.stat().st_dev
            wanted[device] = (place, size + wanted.get(device, (place, 0))[1])
    for place, size in wanted.values():
        disk = shutil.disk_usage(place)
        if size > disk.free - _SLACK * disk.total:
            raise ResourceError(
                f"not enough disk at {place}: about {_gib(size)} are needed and {_gib(disk.free)} are free; "
                "make room, use fewer samples, or put run and output elsewhere"
            )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
