"""What pages read from a run's analysis: tables of sensitivity, plans of all ratios, loss curves. Read-only, a few files kept in memory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from moesvd_core.curve_files import load_curves
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import RunError
from moesvd_core.pipeline import decomposition_key, single_structures
from moesvd_core.planning import Ranks, SideCurve
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import plans_file
from pages.components.text import share

_KEPT = 12
"""Tables of plans that stay in memory; one of 60 layers has some megabytes once its ranks are summed up."""


@dataclass(frozen=True)
class Sensitivity:
    """One file of `evaluations/sensitivity*.json`.

    Attributes:
        name: of the file, without ending.
        label: the reference cut that was measured, for people; "" when nothing was measured.
        text: what it was measured on, for people; "" in files that do not tell.
        layers: `sensitivity.layer_table`.
        experts: `sensitivity.expert_table`.
        correlations: `sensitivity.correlations`.
    """

    name: str
    label: str
    text: str
    layers: pd.DataFrame
    experts: pd.DataFrame
    correlations: pd.DataFrame

    @property
    def cut(self) -> str:
        """What was measured, and on what, for captions."""
        return f"{self.label}, on {self.text}" if self.text else self.label

    @property
    def measured(self) -> bool:
        """Whether each layer was decomposed alone and measured."""
        return bool(self.layers["measured_nll"].notna().any())


def sensitivity_names(run: RunFolder) -> list[tuple[str, str]]:
    """Reference cuts that were measured, as (label, name of the file), the latest first."""
    files = sorted((run.path / "evaluations").glob("sensitivity-*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [(_cut(file.stem), file.stem) for file in files]


def sensitivity(run: RunFolder, name: str | None = None) -> Sensitivity | None:
    """A measured reference cut by its name, or else the latest, or else what calibration alone tells; None before the analysis.

    Raises:
        RunError: the file is damaged.
    """
    known = [each for _, each in sensitivity_names(run)]
    chosen = name if name in known else known[0] if known else "sensitivity"
    data = run.read_json("evaluations", f"{chosen}.json")
    if data is None:
        return None
    try:
        frames = [pd.DataFrame(data[part]) for part in ("layers", "experts", "correlations")]
        frames[0] = frames[0].astype({column: float for column in frames[0].columns if column != "layer"})
        text = _text(data["text"]) if "text" in data else ""
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"evaluations/{chosen}.json is damaged ({error}): delete it and analyse again") from error
    return Sensitivity(chosen, _cut(chosen), text, *frames)


def plan_tables(run: RunFolder) -> dict[str, Mapping[str, Any]]:
    """Plans of all ratios by method, in the order of the registry: {"max_ratio", "plans": [{"asked_ratio", "layers"}, ...]} each.

    Layers are those of `Plan.as_dict`, with `Ranks` for ranks.

    Raises:
        RunError: a file is damaged.
    """
    tables = {}
    for name in METHODS:
        path = plans_file(run, name)
        if path.exists():
            tables[name] = _parsed(path, path.stat().st_mtime_ns)
    return tables


def plan_at(table: Mapping[str, Any], ratio: float) -> Mapping[str, Any] | None:
    """The plan nearest to a ratio, or None beyond the method's reach."""
    if ratio > table["max_ratio"] + 0.005:
        return None
    plans: Sequence[Mapping[str, Any]] = table["plans"]
    return min(plans, key=lambda plan: abs(plan["asked_ratio"] - ratio), default=None)


def layer_of(plan: Mapping[str, Any], layer: int) -> Mapping[str, Any] | None:
    """`LayerPlan.as_dict` of one layer of a plan."""
    return next((each for each in plan["layers"] if each["layer"] == layer), None)


def layer_curves(run: RunFolder, layer: int) -> dict[tuple[str, ...], list[SideCurve]]:
    """Loss curves of a layer, for decompositions that were made, by the names of the methods that share one.

    Raises:
        RunError: a file is damaged.
    """
    sharing: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        singles = single_structures(method)
        if len(singles) == 1:
            sharing.setdefault(decomposition_key(singles[0]), []).append(name)
    found = {}
    for key, names in sharing.items():
        curves = load_curves(run.path / "curves" / key / f"layer-{layer:03d}.safetensors")
        if curves is not None:
            found[tuple(names)] = curves
    return found


@lru_cache(maxsize=_KEPT)
def _parsed(path: Path, changed: int) -> Mapping[str, Any]:
    """A file of plans as it was when it was last changed."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {"max_ratio": float(table["max_ratio"]), "plans": [_slim_plan(plan) for plan in table["plans"]]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"plans/{path.name} is damaged ({type(error).__name__}: {error}): delete it and analyse again") from error


def _slim_plan(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    layers = [{**layer, "ranks": {side: Ranks.of(ranks) for side, ranks in layer["ranks"].items()}} for layer in plan["layers"]]
    return {"asked_ratio": float(plan["asked_ratio"]), "layers": layers}


def _text(noted: Mapping[str, Any]) -> str:
    """A text that was measured on as "16 held-out windows of sotu, 4,080 tokens"."""
    return f"{noted['windows']:,} held-out windows of {Path(noted['dataset']).name}, {noted['tokens']:,} tokens"


def _cut(name: str) -> str:
    """ "sensitivity-auto@0.5000" as "auto, 50 % removed" (of the layer's experts); "" for a name without a cut."""
    method, _, ratio = name.removeprefix("sensitivity").removeprefix("-").partition("@")
    try:
        return f"{method}, {share(float(ratio), 0)} removed"
    except ValueError:
        return ""
