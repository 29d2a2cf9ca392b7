"""What a run already knows of plans and of how good they are, read from its files; nothing is planned or measured here."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp
from pathlib import Path
from typing import Any

from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError, RunError
from moesvd_core.planning import LossLaw, Plan, Recipe
from moesvd_core.planning.loss_law import CLEAR, ENOUGH, layer_losses
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.source import SOURCE_FILE, refuse_out_of_reach
from moesvd_core.runs.workbench import plan_key

_PLAN_FIELDS = Plan.__dataclass_fields__


@dataclass(frozen=True)
class Measured:
    """A model on one text: the original, or what a recipe makes of it.

    Attributes:
        recipe: None for the original.
        ratio: removed, of the whole model's parameters; 0 for the original.
        bytes: of all tensors.
        figures: fields of `Evaluation`; those of the distance to the original are None for the original.
    """

    recipe: Recipe | None
    ratio: float
    bytes: int
    figures: dict[str, Any]

    @property
    def original_perplexity(self) -> float:
        """The original's, on the very same tokens."""
        return exp(self.figures["nll"] - (self.figures["delta_nll"] or 0.0))


def analysed(run: RunFolder) -> list[str]:
    """Methods whose plans of all ratios the run has."""
    return [name for name in METHODS if plans_file(run, name).exists()]


def reach(run: RunFolder, method: str) -> float | None:
    """The largest ratio that a method reaches, None when it was not analysed.

    Raises:
        RunError: the table of plans is damaged.
    """
    file = plans_file(run, method)
    return _reach(run.path, file.name, file.stat().st_mtime_ns) if file.exists() else None


def refuse_unreachable(run: RunFolder, recipe: Recipe) -> None:
    """Refuse, before a job is asked for it, a ratio that the run's files tell to be out of reach; planning tells of all others.

    Raises:
        InputError: it is.
        RunError: a file of the run is damaged.
    """
    source = run.read_json(SOURCE_FILE)
    if source is not None:
        refuse_out_of_reach(recipe, source["facts"])
    plain = recipe.unfitted() == Recipe(method=recipe.method, ratio=recipe.ratio)
    most = reach(run, recipe.method) if plain else None
    if most is not None and recipe.ratio > most + 1e-12:
        bound = int(1e4 * most) / 1e4
        asked = f"got {recipe.ratio:g}: choose a smaller ratio"
        raise InputError(f"ratio must be in [0, {bound:g}] for {recipe.method} on this model, {asked}")


def known_plan(run: RunFolder, recipe: Recipe) -> Plan | None:
    """The plan of a recipe if it was made: alone, or (for a method as it is) among the plans of all whole percents.

    Neither compensation nor a refitted router changes a rank: plans with and without them are the same.

    Raises:
        RunError: its file is damaged.
        InputError: its content is no plan.
    """
    made = run.read_json("plans", f"{plan_key(recipe)}.json")
    if made is not None:
        return _plan(made)
    file = plans_file(run, recipe.method)
    recipe = recipe.unfitted()
    if recipe != Recipe(method=recipe.method, ratio=recipe.ratio) or not file.exists():
        return None
    return _planned(run.path, file.name, file.stat().st_mtime_ns, recipe.ratio)


def measurements(run: RunFolder) -> list[Measured]:
    """Everything that was measured: text by text, on each the original first, then by ratio; a damaged file is passed over.

    Whoever finds one missing can measure it again, so it is not worth an error.
    """
    found: dict[tuple[str, int, int], dict[str, Measured]] = {}
    for record in _records(run):
        original, recipe = record["original"], Recipe.from_dict(record["recipe"])
        text = (str(original["dataset"]), int(original["windows"]), int(original["length"]))
        rows = found.setdefault(text, {})
        rows[""] = Measured(None, 0.0, int(record["original_bytes"]), original)
        figures = {name: record[name] for name in original}
        rows[plan_key(recipe)] = Measured(recipe, float(record["ratio"]), int(record["bytes"]), figures)
    return [row for text in sorted(found) for row in sorted(found[text].values(), key=lambda row: (row.recipe is not None, row.ratio))]


def loss_laws(run: RunFolder, methods: Iterable[str], dataset: str) -> dict[str, LossLaw]:
    """What predicted losses of each method have to be made of to be of the size of measured ones on a data set, whatever its part.

    Fitted to the method's own measured plans where there are enough of them, and to its cuts of single layers (an analysis of sensitivity
    makes them); else to the plans of all methods; none before enough was measured. What was fitted when it was finished is left out:
    predictions are of factors as they are sliced.
    """
    points = _told(
        (plan_key(recipe), recipe.method, layer_losses(_plan(record)), record)
        for record in _records(run)
        if not (recipe := Recipe.from_dict(record["recipe"])).fits and record["dataset"] == dataset
    )
    laws: dict[str, LossLaw] = {}
    for method in methods:
        own = [point for point in points if point.method == method]
        used = [*own, *_told(_cuts(run, method, dataset))] if len(own) >= ENOUGH else points
        if len(used) >= ENOUGH:
            law = LossLaw.fit([point.predicted for point in used], [point.measured for point in used], [point.error for point in used])
            laws[method] = replace(law, shared=any(point.method != method for point in used))
    return laws


@dataclass(frozen=True)
class _Point:
    """A measured plan for a law: method, predicted loss by layer, measured loss and its standard error."""

    method: str
    predicted: Mapping[int, float]
    measured: float
    error: float | None


def _told(found: Iterable[tuple[str, str, Mapping[int, float], Mapping[str, Any]]]) -> list[_Point]:
    """Of every plan, by name, what the largest part of the text says, where its loss can be told from none."""
    points: dict[str, _Point] = {}
    for name, method, predicted, figures in sorted(found, key=lambda each: int(each[3]["tokens"])):
        measured, error = float(figures["delta_nll"]), figures["delta_nll_stderr"]
        if measured > CLEAR * (error or 0.0) and any(loss > 0 for loss in predicted.values()):
            points[name] = _Point(method, predicted, measured, error)
    return list(points.values())


def _cuts(run: RunFolder, method: str, dataset: str) -> Iterator[tuple[str, str, Mapping[int, float], Mapping[str, Any]]]:
    """Layers that a method as it is cut alone: name, method, predicted loss, measured figures; a damaged file is passed over."""
    for table in sorted((run.path / "evaluations").glob(f"sensitivity-{method}@*.json")):
        try:
            rows = (run.read_json("evaluations", table.name) or {})["layers"]
            for row in (row for row in rows if row["predicted"] is not None):
                name = f"{table.stem.removeprefix('sensitivity-')}.layer-{row['layer']:03d}"
                for file in sorted((run.path / "evaluations").glob(f"{name}--*.json")):
                    figures = run.read_json("evaluations", file.name) or {}
                    if figures["dataset"] == dataset:
                        yield name, method, {row["layer"]: row["predicted"]}, figures
        except (RunError, KeyError):
            continue


def _records(run: RunFolder) -> Iterator[dict[str, Any]]:
    for path in sorted((run.path / "evaluations").glob("plan.*--*.json")):
        try:
            record = run.read_json("evaluations", path.name)
        except RunError:
            continue
        if isinstance(record, dict) and {"original", "recipe", "perplexity", "ratio", "bytes", "original_bytes"} <= record.keys():
            yield record


def plans_file(run: RunFolder, method: str) -> Path:
    """Plans of all whole percents by a method as it is."""
    return run.path / "plans" / f"all-{plan_key(Recipe(method=method)).partition('@')[0]}.json"


# Tables of large models are megabytes, and pages ask often: what was found is kept for as long as the file is the same.


@lru_cache(maxsize=256)
def _reach(run: Path, file: str, changed: int) -> float:
    return float(_table(run, file)["max_ratio"])


@lru_cache(maxsize=256)
def _planned(run: Path, file: str, changed: int, ratio: float) -> Plan | None:
    made = next((plan for plan in _table(run, file)["plans"] if abs(plan["asked_ratio"] - ratio) < 1e-9), None)
    return None if made is None else _plan(made)


def _table(run: Path, file: str) -> dict[str, Any]:
    return dict(RunFolder.open(run).read_json("plans", file) or {"max_ratio": 0.0, "plans": []})


def _plan(made: Mapping[str, Any]) -> Plan:
    return Plan.from_dict({name: made[name] for name in _PLAN_FIELDS if name in made})
