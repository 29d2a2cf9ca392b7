"""All plans of a method in the form that the browser looks them up in: one byte a cell of the expert map, sent once, then no request.

A packed table is zlib of: length of the header (4 bytes, little-endian), the header (JSON), then its arrays one after the other, little-
endian, in the order of the header. It travels as text: base64 of that.

Shapes: R ratios, L layers with experts, E experts of the layer that has most of them, S = 2 sides (input, output).
"""

import base64
import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.planning import DENSE, SIDES, Ranks, Structure
from moesvd_core.runs.bounded import bounded_table
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import plans_file

STATES = ("dense", *get_args(Structure))
"""Structures; their place here is their code."""
WHOLE = 255
"""Byte of a cell that is kept as it was. 0 is a cell of which nothing is kept; nothing in between has either."""
DENSE_RANK = 65535
"""Rank of a slot that stays the original matrix."""
_TOTALS = ("ratio", "bytes", "parameters", "active_parameters", "flops", "predicted_loss")
_Row = Mapping[str, Any]


def read(run: RunFolder, method: str, flops_ratio: float | None = None) -> str | None:
    """The packed table of a method as text, None where the run holds no plans of it; packed once for each version of the file.

    Args:
        flops_ratio: share of the operations that each plan saves at least; such plans are made here, from the run's curves.

    Raises:
        InputError: more operations than the experts do, or a method that does not weigh them.
        RunError: a file of the run is damaged or missing.
    """
    made = _made(run, method, flops_ratio)
    return None if made is None else made.text


def totals(run: RunFolder, method: str, flops_ratio: float | None = None) -> dict[str, list[float]] | None:
    """What the plans of a method come to, one value a ratio: ratio, bytes, parameters, active_parameters, flops, predicted_loss."""
    made = _made(run, method, flops_ratio)
    return None if made is None else made.totals


def layer_losses(run: RunFolder, method: str, flops_ratio: float | None = None) -> list[dict[int, float]]:
    """Predicted loss of every layer that each of a method's plans changes, nats a token; no plans where there are none of it."""
    made = _made(run, method, flops_ratio)
    return [] if made is None else made.losses


def _made(run: RunFolder, method: str, flops_ratio: float | None) -> "_Table | None":
    file = plans_file(run, method)
    if not file.exists() or not (run.path / "source.json").exists():
        return None
    return _table(str(run.path), method, flops_ratio, file.stat().st_mtime_ns)


class _Table:
    """One method's plans, packed."""

    def __init__(self, text: str, totals: dict[str, list[float]], losses: list[dict[int, float]]) -> None:
        self.text, self.totals, self.losses = text, totals, losses


@functools.lru_cache(maxsize=32)  # what is kept is small: about a quarter of a megabyte for 60 layers of 128 experts
def _table(path: str, method: str, flops_ratio: float | None, changed: int) -> _Table:
    """The table of the file as it was at the time `changed`."""
    run = RunFolder.open(Path(path))
    source = run.read_json("source.json")
    table = run.read_json("plans", plans_file(run, method).name) if flops_ratio is None else bounded_table(run, method, flops_ratio)
    layers = [ExpertLayer(**layer) for layer in source["facts"]["expert_layers"]]
    scores = run.read_json("evaluations", "sensitivity.json") or {"experts": []}
    packed = pack(table, layers, scores["experts"])
    totals = {name: [plan[name] for plan in table["plans"]] for name in _TOTALS}
    losses = [{row["layer"]: row["predicted_loss"] for row in plan["layers"] if row["selected"]} for plan in table["plans"]]
    return _Table(base64.b64encode(packed).decode(), totals, losses)


def pack(table: _Row, layers: Sequence[ExpertLayer], scores: Sequence[_Row]) -> bytes:
    """The table of a run's `plans/all-NAME.json`, packed.

    Args:
        table: recipe, max_ratio and plans, as `Plan.as_dict` describes them.
        layers: the model's layers with experts.
        scores: rows with layer, expert and f, the share of tokens that calibration routed to the expert; may be empty.
    """
    plans = table["plans"]
    arrays, reasons = _arrays(plans, {layer.index: layer for layer in layers})
    first = plans[0]
    header = {
        "method": table["recipe"]["method"],
        "max_ratio": table["max_ratio"],
        "asked": [round(100 * plan["asked_ratio"]) for plan in plans],
        "totals": {name: [plan[name] for plan in plans] for name in _TOTALS},
        "original": {name: first[f"original_{name}"] for name in ("bytes", "parameters", "active_parameters", "flops")},
        "layers": [row["layer"] for row in first["layers"]],
        "experts": [layer.experts for layer in layers],
        "original_layer": [row["original_parameters"] for row in first["layers"]],
        "reasons": reasons,
        "states": STATES,
    }
    arrays["load"] = _loads(layers, scores)
    header["arrays"] = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    text = json.dumps(header, separators=(",", ":")).encode()
    return zlib.compress(b"".join([len(text).to_bytes(4, "little"), text, *(array.tobytes() for array in arrays.values())]), 6)


def _arrays(plans: Sequence[_Row], layers: Mapping[int, ExpertLayer]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Arrays over ratios and layers, and the sentences that `reason` numbers."""
    ratios, count = len(plans), len(plans[0]["layers"])
    most = max(layers[row["layer"]].experts for row in plans[0]["layers"])
    kept_RLE = np.zeros((ratios, count, most), "<u1")
    state_RLS = np.zeros((ratios, count, 2), "<u1")
    rank_RLS3 = np.zeros((ratios, count, 2, 3), "<u2")
    stored_RL = np.zeros((ratios, count), "<f8")
    loss_RL = np.zeros((ratios, count), "<f4")
    reason_RL = np.zeros((ratios, count), "<u2")
    reasons: dict[str, int] = {}
    for r, plan in enumerate(plans):
        for place, row in enumerate(plan["layers"]):
            layer = layers[row["layer"]]
            kept_RLE[r, place, : layer.experts] = cells(row, layer)
            for s, side in enumerate(SIDES):
                state_RLS[r, place, s] = STATES.index(row["structure"][side])
                rank_RLS3[r, place, s] = _spread(row["ranks"][side])
            stored_RL[r, place], loss_RL[r, place] = row["parameters"], row["predicted_loss"]
            reason_RL[r, place] = reasons.setdefault(row["reason"], len(reasons))
    named = {"kept": kept_RLE, "state": state_RLS, "rank": rank_RLS3, "stored": stored_RL, "loss": loss_RL, "reason": reason_RL}
    return named, list(reasons)


def cells(row: _Row, layer: ExpertLayer) -> NDArray[np.uint8]:
    """Share of each expert that a layer's plan keeps, uint8 [E]: 0 nothing, 255 all of it, as it was.

    What experts share belongs in equal parts to each of those that use it.
    """
    share_E = np.zeros(layer.experts)
    whole_E = np.ones(layer.experts, dtype=bool)
    for side, dense in (("input", layer.input_parameters), ("output", layer.output_parameters)):
        ranks_S = np.array(row["ranks"][side])
        stored = row["side_parameters"][side]
        if row["structure"][side] in ("per-expert", "pivoted", "base-delta", "kept-experts"):
            base = dense if row["structure"][side] == "base-delta" else 0
            dense_E = ranks_S == DENSE
            factored = int(ranks_S[~dense_E].sum())
            spared_S = ranks_S**2 if row["structure"][side] == "pivoted" else np.zeros_like(ranks_S)  # identities
            own = stored - base - int(dense_E.sum()) * dense + int(spared_S[~dense_E].sum())
            unit = own / factored if factored else 0.0
            share_E += np.where(dense_E, dense, ranks_S * unit - spared_S + base / max(1, int((~dense_E).sum())))
            whole_E &= dense_E
        else:
            share_E += stored / layer.experts
            whole_E &= row["structure"][side] == "dense"
    share_E /= layer.input_parameters + layer.output_parameters
    byte_E = np.clip(np.rint(share_E * WHOLE), 1, WHOLE - 1)
    return np.where(whole_E, WHOLE, np.where(share_E == 0, 0, byte_E)).astype(np.uint8)


def _spread(ranks: Sequence[int]) -> tuple[int, int, int]:
    """Smallest, middle and largest rank of the slots that are decomposed; those that stay dense, if any, take the place of the largest."""
    found = Ranks.of(ranks)
    if found.dense == len(ranks):
        return DENSE_RANK, DENSE_RANK, DENSE_RANK
    least, middle, most = (min(rank, DENSE_RANK - 1) for rank in (found.least, found.median, found.most))
    return least, middle, DENSE_RANK if found.dense else most


def _loads(layers: Sequence[ExpertLayer], scores: Sequence[_Row]) -> NDArray[Any]:
    """Share of tokens that reach each expert, float32 [L, E]; 0 where that is not known."""
    load_LE = np.zeros((len(layers), max(layer.experts for layer in layers)), "<f4")
    places = {layer.index: place for place, layer in enumerate(layers)}
    for row in scores:
        if row["layer"] in places and 0 <= row["expert"] < load_LE.shape[1]:
            load_LE[places[row["layer"]], row["expert"]] = row["f"] or 0.0
    return load_LE
