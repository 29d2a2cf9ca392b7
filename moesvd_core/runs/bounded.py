"""Plans that also bound operations, made from a run's curves while a person waits: no model, no statistics, nothing written.

An analysis plans every ratio of a method as it is. A bound on operations has too many values for that, and needs no more than the curves
that are there: 0.2 s for the demo model, some seconds for 60 layers of 128 experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from moesvd_core.curve_files import are_current, load_curves
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import RunError
from moesvd_core.pipeline import decomposition_key, single_structures
from moesvd_core.planning import ModelShape, Plan, Recipe, SideCurve, plans
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import known_plan, plans_file

Table = dict[str, Any]
"""Content of `plans/all-NAME.json` (recipe, max_ratio and plans), or a part of `source.json`."""


def most_flops_ratio(run: RunFolder, method: str) -> float:
    """The largest share of the operations a token that can go, which is what the experts do; 0 where the method is not planned or cannot.

    Raises:
        RunError: a file of the run is damaged.
    """
    file = plans_file(run, method)
    if not METHODS[method].bounds_flops or not file.exists():
        return 0.0
    return _most(run.path, method, file.stat().st_mtime_ns)


def bounded_table(run: RunFolder, method: str, flops_ratio: float) -> Table:
    """Plans of every ratio that the run's own table of the method has, with at least this share of the operations saved.

    Raises:
        InputError: more than the experts do, or a method that does not weigh operations.
        RunError: the method is not planned, or its curves are missing or damaged.
    """
    table = _own_table(run, method)
    recipe = Recipe(method=method, ratio=0.0, flops_ratio=flops_ratio)
    made = _plans(run, table, recipe, [plan["asked_ratio"] for plan in table["plans"]])
    return {"recipe": recipe.as_dict(), "max_ratio": table["max_ratio"], "plans": [plan.as_dict() for plan in made]}


def has_curves(run: RunFolder, method: str) -> bool:
    """Whether the run holds all curves that `bounded_table` needs."""
    return all(are_current(file) for file in _curve_files(run, method))


def plan_at_once(run: RunFolder, recipe: Recipe) -> Plan | None:
    """The plan of a recipe if the run knows it, or if its curves tell it in no time; else None.

    Raises:
        InputError: a share of the operations beyond what the experts do.
        RunError: a file of the run is damaged.
    """
    plan = known_plan(run, recipe)
    file = plans_file(run, recipe.method)
    if plan is not None or recipe.flops_ratio is None or not file.exists():
        return plan
    return _plan(run.path, recipe.unfitted(), file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _plan(path: Path, recipe: Recipe, changed: int) -> Plan:
    run = RunFolder.open(path)
    return _plans(run, _own_table(run, recipe.method), recipe, [recipe.ratio])[0]


@lru_cache(maxsize=64)
def _most(path: Path, method: str, changed: int) -> float:
    run = RunFolder.open(path)
    first = _own_table(run, method)["plans"][0]
    routed = {layer["index"]: layer["active"] / layer["experts"] for layer in _facts(run)["expert_layers"]}
    experts = sum(routed[layer["layer"]] * layer["original_parameters"] for layer in first["layers"])
    return float(2 * experts / first["original_flops"])


def _own_table(run: RunFolder, method: str) -> Table:
    """Plans of the method as it is."""
    table = run.read_json("plans", plans_file(run, method).name)
    if table is None:
        raise RunError(f"{method} is not planned in run {run.name}: plan it first")
    return dict(table)


def _facts(run: RunFolder) -> Table:
    """Facts of the run's model."""
    source = run.read_json("source.json")
    if source is None:
        raise RunError(f"{run.path / 'source.json'} is missing: analyse the model again, which makes it")
    return dict(source["facts"])


def _plans(run: RunFolder, table: Table, recipe: Recipe, ratios: Sequence[float]) -> list[Plan]:
    method = METHODS[recipe.method]
    made = plans(_curves(run, recipe.method), _shape(run, table), replace(recipe, allocation=method.allocation), ratios)
    return [replace(plan, metric=method.metric) for plan in made]


def _curves(run: RunFolder, method: str) -> list[SideCurve]:
    """Every layer's curves by a method.

    Raises:
        RunError: one is missing or damaged.
    """
    curves: list[SideCurve] = []
    for file in _curve_files(run, method):
        found = load_curves(file)
        if found is None:
            raise RunError(f"{file} is missing: plan {method} again, which makes it")
        curves += found
    return curves


def _curve_files(run: RunFolder, method: str) -> list[Path]:
    layers = [layer["index"] for layer in _facts(run)["expert_layers"]]
    folders = [run.path / "curves" / decomposition_key(single) for single in single_structures(METHODS[method])]
    return [folder / f"layer-{layer:03d}.safetensors" for layer in layers for folder in folders]


def _shape(run: RunFolder, table: Table) -> ModelShape:
    """The sizes that the run's own plans were counted against, as the plan that removes most tells them."""
    plan, facts = table["plans"][-1], _facts(run)
    removed = plan["original_parameters"] - plan["parameters"]
    each = (plan["original_bytes"] - plan["bytes"]) / removed if removed else facts["bytes"] / facts["parameters"]
    return ModelShape(
        parameters=plan["original_parameters"],
        active_parameters=plan["original_active_parameters"],
        bytes=plan["original_bytes"],
        expert_parameters=facts["expert_parameters"],
        bytes_per_expert_parameter=each,
        embedding_parameters=plan["original_active_parameters"] - plan["original_flops"] // 2,
    )
