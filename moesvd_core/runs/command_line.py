"""The words of the command line that do what was done on a page: to repeat it elsewhere, in a script, or from a model card."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesvd_core.calibration.settings import Calibration
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.planning import Recipe
from moesvd_core.runs.folder import Identity, RunFolder

_CHOICES = ("metric", "structure", "allocation", "block", "budget")
_WORDS = {
    "dataset": "--dataset", "samples": "--samples", "length": "--length", "seed": "--seed", "drawn_labels": "--drawn-labels",
    "gradient_samples": "--gradient-samples", "dtype": "--dtype",
}
"""Settings of a calibration that have a word on the command line."""


def shown_model(model: str) -> str:
    """A model as it may be told to others: a hub id as it is, a folder from here on, and of a folder elsewhere its name alone."""
    path = Path(model)
    if not path.is_absolute():
        return model
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def export_command(run: RunFolder, recipe: Recipe, *, output: str, form: str, dtype: str | None = None, file: str = "recipe.yaml") -> str:
    """`moesvd export`: from a run that is there.

    Args:
        run: one under the folder of runs.
        dtype: number format to write; None: the original's.
        file: name of a file with the recipe's YAML; named where method and ratio do not say everything.
    """
    chosen = [] if dtype is None else ["--dtype", dtype]
    words = [*_recipe(recipe, file), "--output", output, "--format", form, *chosen, *_trust(run.identity)]
    return shlex.join(["moesvd", "export", run.name, *words])


def compress_command(
    identity: Identity, recipe: Recipe, *, output: str, form: str, dtype: str | None = None, file: str = "recipe.yaml"
) -> str | None:
    """`moesvd compress`: from nothing. None when no words say it: for some settings of a calibration, and for another number format.

    Args:
        dtype: number format to write; the command has one for calibration and export, None there is the original's.
    """
    words = _calibration(identity.calibration)
    if words is None or dtype != identity.calibration.get("dtype"):
        return None
    model = shown_model(identity.model)
    words = [*_recipe(recipe, file), "--output", output, "--format", form, *words, *_trust(identity)]
    return shlex.join(["moesvd", "compress", model, *words])


def _trust(identity: Identity) -> list[str]:
    return ["--allow-remote-code"] if identity.remote_code else []


def _recipe(recipe: Recipe, file: str) -> list[str]:
    usual = Recipe()
    named = [] if all(getattr(recipe, name) == getattr(usual, name) for name in _CHOICES) else ["--recipe", file]
    fewer = [] if recipe.flops_ratio is None else ["--flops-ratio", f"{recipe.flops_ratio:g}"]
    usually = METHODS[recipe.method].compensate
    fitted = [] if recipe.compensate == usually else ["--no-compensate" if usually else "--compensate"]
    routers = ["--refit-router"] if recipe.refit_router else []
    return [*named, "--method", recipe.method, "--ratio", f"{recipe.ratio:g}", *fewer, *fitted, *routers]


def _calibration(settings: Mapping[str, Any]) -> list[str] | None:
    """Words for what differs from the usual calibration; batches only save memory."""
    usual, used = Calibration().as_dict(), Calibration.from_dict(dict(settings)).as_dict()
    changed = {name: value for name, value in used.items() if value != usual.get(name) and name != "batch"}
    if not changed.keys() <= _WORDS.keys():
        return None
    return [word for name, value in changed.items() for word in (_WORDS[name], str(value))]
