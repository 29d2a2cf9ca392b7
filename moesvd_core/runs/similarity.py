"""What a run knows of how alike its experts are: compared layer by layer by its worker, read by the pages.

    evaluations/similarity.layer-003.json                       both sides of a layer: its experts, and the same shuffled
    evaluations/similarity.random.input-512x256x8.seed-0.json   random matrices of a shape, the same for every layer that has it; with
                                                                ".rank-32" before the seed where experts reach no more directions than that
    evaluations/similarity.json                                 means over the pairs, of all layers; written last
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moesvd_core import atomic
from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import DecoderStream
from moesvd_core.errors import RunError
from moesvd_core.progress import Progress, Report
from moesvd_core.runs.folder import RunFolder
from moesvd_core.similarity import Sampling, Side, SideSimilarity, Source, compare, random_control

LayerSimilarity = dict[Side, dict[Source, SideSimilarity]]
"""Both sides of a layer: the experts, and the controls beside them."""
SIDES: tuple[Side, Side] = ("input", "output")


def compare_layers(run: RunFolder, stream: DecoderStream, sampling: Sampling, report: Report) -> str:
    """Compare the experts of every layer that was not compared yet, and write what came out; returns the name of the summary's file.

    Raises:
        InputError, StatisticsError: as `similarity.compare`.
    """
    layers = stream.expert_layers
    rows = []
    for done, layer in enumerate(layers, start=1):
        found = _own(run, layer.index, sampling) or _compared(run, stream, layer, sampling)
        shown = {side: {**found[side], "random": _random(run, found[side]["experts"], sampling, stream.device)} for side in SIDES}
        rows.append({"layer": layer.index} | {side: {name: each.summary() for name, each in shown[side].items()} for side in SIDES})
        report(Progress("similarity", done, len(layers), f"layer {layer.index}: {len(shown['input']['experts'].experts)} experts compared"))
    _write(run.station("evaluations") / "similarity.json", {"sampling": asdict(sampling), "layers": rows})
    return "evaluations/similarity.json"


def read_summary(run: RunFolder) -> list[dict[str, Any]] | None:
    """Means of every layer: {"layer", "input": {"experts" | "shuffled" | "random": `SideSimilarity.summary`}, "output": ...}, or None.

    Earlier versions compared random matrices at ranks of their own; what such a control says of experts of lower rank is not shown.

    Raises:
        RunError: the file is damaged.
    """
    data = run.read_json("evaluations", "similarity.json")
    if data is None:
        return None
    rows = list(data["layers"])
    return rows if all(row[side]["random"]["ranks"] == row[side]["experts"]["ranks"] for row in rows for side in SIDES) else None


def read_layer(run: RunFolder, layer: int) -> LayerSimilarity | None:
    """Every pair of one layer's experts, with both controls, or None when it was not compared.

    Raises:
        RunError: a file is damaged.
    """
    data = run.read_json("evaluations", "similarity.json")
    sampling = None if data is None else Sampling(**data["sampling"])
    found = None if sampling is None else _own(run, layer, sampling)
    if found is None or sampling is None:
        return None
    for side in SIDES:
        control = _kept_random(run, found[side]["experts"], sampling)
        if control is None:
            return None
        found[side] = {**found[side], "random": control}
    return found


def _own(run: RunFolder, layer: int, sampling: Sampling) -> LayerSimilarity | None:
    """What was found for a layer by this sampling, or None."""
    data = run.read_json("evaluations", _layer_file(layer))
    if data is None or data.get("sampling") != asdict(sampling):
        return None
    return {side: {name: _parsed(each, _layer_file(layer)) for name, each in data[side].items()} for side in SIDES}


def _compared(run: RunFolder, stream: DecoderStream, layer: ExpertLayer, sampling: Sampling) -> LayerSimilarity:
    """Compare a layer, and give back what was written: rounded, as whoever resumes will read it."""
    with stream.layer(layer.index), torch.no_grad():
        weights = read_experts(stream.model.get_submodule(layer.name), layer)
        made = {"input": compare(weights.input_END, "input", sampling), "output": compare(weights.output_EDM, "output", sampling)}
    data = {side: {name: found.as_dict() for name, found in own.items()} for side, own in made.items()}
    _write(run.station("evaluations") / _layer_file(layer.index), {"sampling": asdict(sampling), **data})
    return {side: {name: SideSimilarity.from_dict(data[side][name]) for name in made[side]} for side in SIDES}


def _random(run: RunFolder, like: SideSimilarity, sampling: Sampling, device: torch.device) -> SideSimilarity:
    """The control of a shape and its ranks: made once."""
    kept = _kept_random(run, like, sampling)
    if kept is not None:
        return kept
    data = random_control(like, sampling, device).as_dict()
    _write(run.station("evaluations") / _random_file(like, sampling), data)
    return SideSimilarity.from_dict(data)


def _kept_random(run: RunFolder, like: SideSimilarity, sampling: Sampling) -> SideSimilarity | None:
    file = _random_file(like, sampling)
    data = run.read_json("evaluations", file)
    return None if data is None else _parsed(data, file)


def _parsed(data: Mapping[str, Any], file: str) -> SideSimilarity:
    try:
        return SideSimilarity.from_dict(data)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"evaluations/{file} is damaged ({type(error).__name__}: {error}): delete it, it will be made again") from error


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """JSON on one line: these are long lists of numbers that nobody reads line by line."""
    atomic.write_text(path, json.dumps(data, allow_nan=False, separators=(",", ":")))


def _layer_file(layer: int) -> str:
    return f"similarity.layer-{layer:03d}.json"


def _random_file(like: SideSimilarity, sampling: Sampling) -> str:
    """Named by all that decides it; the largest rank tells the others, and goes without saying where it is all that there is room for."""
    rank = f".rank-{like.ranks[-1]}" if like.ranks[-1] < min(like.rows, like.columns) else ""
    return f"similarity.random.{like.side}-{like.rows}x{like.columns}x{len(like.experts)}{rank}.seed-{sampling.seed}.json"
