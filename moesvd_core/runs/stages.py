"""What a run can be asked to do. Each action finds on disk what earlier ones left, makes the rest, and returns a small record.

Actions are called by the worker as `action(run, arguments, report)`; arguments come from pages and the command line as plain data and are
checked here.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import count
from math import floor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moesvd_core import atomic
from moesvd_core.checkpoint.export import FORMATS, Format
from moesvd_core.checkpoint.staging import refuse_occupied
from moesvd_core.errors import InputError, RunError
from moesvd_core.pipeline import method_of
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress, Report
from moesvd_core.runs.estimate import estimate, require
from moesvd_core.runs.exporting import card_facts, write_export
from moesvd_core.runs.folder import STATIONS, RunFolder
from moesvd_core.runs.similarity import compare_layers
from moesvd_core.runs.source import refuse_out_of_reach
from moesvd_core.runs.workbench import Text, Workbench, plan_key
from moesvd_core.runs.worker import Action
from moesvd_core.sensitivity import Effect, correlations, expert_table, layer_table, measure
from moesvd_core.similarity import Sampling

PROBES = (0.35, 0.6, 0.85)
"""Shares of a method's reach at which an analysis measures plans: as many as a law of losses takes, none so small that noise hides it."""
Arguments = Mapping[str, Any]
Record = Mapping[str, Any]


def analyze(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """Calibrate, decompose, and plan every ratio, for each of `methods`; then evaluate the original on `text`.

    Arguments: methods (list of names, default ["auto"]), text (fields of `Text`), probe (whether to evaluate plans of the first method at
    `PROBES` too, from which its predicted losses get their scale; default no).
    """
    known = _known(arguments, "methods", "text", "probe")
    recipes = [Recipe(method=name) for name in known.get("methods", ["auto"])]
    text = _text(arguments)
    bench = _started(run, report, *(recipe.method for recipe in recipes), text=text)
    tables = [bench.all_plans(recipe) for recipe in recipes]
    _write_sensitivity(bench, "sensitivity", None, None)
    evaluation = bench.original(text)
    for share in PROBES if known.get("probe") else ():
        recipe = replace(recipes[0], ratio=floor(100 * share * tables[0]["max_ratio"]) / 100)
        _recorded(bench, recipe, bench.pipeline.plan(recipe, report), text)
    bench.tidy()
    return {
        "methods": {recipe.method: {"max_ratio": table["max_ratio"]} for recipe, table in zip(recipes, tables, strict=True)},
        "perplexity": evaluation.perplexity,
    }


def sensitivity(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """Decompose each layer alone, and measure what that does to the model.

    Arguments: recipe (its ratio is taken from each layer's own experts), text.
    """
    recipe = Recipe.from_dict(dict(_known(arguments, "recipe", "text").get("recipe", {})))
    text = _text(arguments)
    bench = _started(run, report, recipe.method, fitted=bool(recipe.fits), text=text)
    plans = bench.pipeline.layer_plans(recipe, report)
    bench.original(text)
    done = count()
    bench.report = lambda progress: report(Progress("sensitivity", 0, len(plans), progress.message))

    def effect(index: int) -> Effect:
        layers = next(done)
        bench.report = lambda progress: report(Progress("sensitivity", layers, len(plans), f"layer {index} alone: {progress.message}"))
        evaluation = bench.compressed(f"{plan_key(recipe)}.layer-{index:03d}", plans[index], text)
        if evaluation.delta_nll is None or evaluation.kl_mean is None:
            raise RunError(f"evaluation of layer {index} lacks the comparison with the original: delete the run's evaluations")
        return Effect(evaluation.delta_nll, evaluation.kl_mean)

    effects = measure(plans, effect, report)
    name = f"sensitivity-{plan_key(recipe)}"
    _write_sensitivity(bench, name, {index: plan.predicted_loss for index, plan in plans.items()}, effects, text)
    bench.tidy()
    return {"file": f"evaluations/{name}.json"}


def similarity(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """Compare the experts of every layer with each other and with controls. Arguments: experts, seed (fields of `Sampling`)."""
    sampling = Sampling(**_known(arguments, "experts", "seed"))
    bench = _started(run, report)
    return {"file": compare_layers(run, bench.stream, sampling, report)}


def plan(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """Plan a recipe. Arguments: recipe."""
    recipe = Recipe.from_dict(dict(_known(arguments, "recipe").get("recipe", {})))
    method_of(recipe)
    return _recorded(bench := _started(run, report, recipe.method), recipe, bench.plan(recipe), None)


def measure_plan(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """Evaluate what a recipe makes of the model, without writing the model.

    Arguments: recipe, text.
    """
    recipe = Recipe.from_dict(dict(_known(arguments, "recipe", "text").get("recipe", {})))
    text = _text(arguments)
    bench = _started(run, report, recipe.method, fitted=bool(recipe.fits), text=text)
    plan = bench.plan(recipe)
    return _recorded(bench, recipe, plan, text)


def compress(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """Plan, evaluate, and write the compressed model; it is there only once it was reloaded and verified.

    Arguments: recipe, output (folder; default `exports/` of the run), format, dtype (of the export; default the source's), overwrite,
    text (None: do not evaluate), command (for the model card).
    """
    known = _known(arguments, "recipe", "output", "format", "dtype", "overwrite", "text", "command")
    recipe = Recipe.from_dict(dict(known.get("recipe", {})))
    form: Format = known.get("format", "factored")
    if form not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    output = Path(known["output"]) if known.get("output") else run.station("exports") / f"{plan_key(recipe)}-{form}"
    dtype = None if known.get("dtype") is None else _dtype(known["dtype"])
    text = None if known.get("text", {}) is None else _text(arguments)
    method_of(recipe)
    refuse_occupied(output, overwrite=True)
    kind = {"form": form, "ratio": recipe.ratio, "dtype": known.get("dtype")}
    bench = _started(run, report, recipe.method, output=output, text=text, fitted=bool(recipe.fits), **kind)
    refuse_out_of_reach(recipe, bench.source.facts)
    bench.pipeline.dtype = dtype
    plan = bench.plan(recipe)
    record = dict(_recorded(bench, recipe, plan, text))
    card = card_facts(bench, plan, bench.run.read_json(*record["file"].split("/")) or {}, known.get("command"))
    stored = write_export(bench, plan, output, form, card, overwrite=bool(known.get("overwrite", False)))
    return record | stored | {"output": str(output), "format": form}


def export(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """As `compress`, without evaluating (figures that were measured before are put on the card)."""
    return compress(run, {**arguments, "text": None}, report)


def evaluate(run: RunFolder, arguments: Arguments, report: Report) -> Record:
    """Evaluate the original on a text. Arguments: text."""
    _known(arguments, "text")
    text = _text(arguments)
    bench = _started(run, report, text=text)
    evaluation = bench.original(text)
    bench.tidy()
    return evaluation.as_dict()


ACTIONS: Mapping[str, Action] = MappingProxyType({
    "analyze": analyze, "sensitivity": sensitivity, "similarity": similarity, "plan": plan, "measure": measure_plan,
    "compress": compress, "export": export, "evaluate": evaluate,
})


# -- parts ---------------------------------------------------------------------------------------------------------------------------


def _started(
    run: RunFolder, report: Report, *methods: str, output: Path | None = None, text: Text | None = None, **needs: Any
) -> Workbench:
    """A workbench for a run whose needs this machine can meet.

    Args:
        methods: for which the model will be decomposed.
        output: where an export will be written.
        text: on which the model will be evaluated.
        needs: what else `estimate` takes into account, by name.

    Raises:
        InputError: no such method.
        ResourceError: it cannot.
    """
    bench = Workbench(run, report)
    facts = bench.source.facts
    tokens = 0 if text is None else text.tokens(facts["context_length"])
    require(estimate(facts, bench.calibration, methods=methods, tokens=tokens, run=run.path, **needs), run.path, output)
    for station in (run.station(name) for name in STATIONS if name != "exports"):
        for folder in (station, *(path for path in station.iterdir() if path.is_dir())):
            atomic.sweep(folder)
    return bench


def _known(arguments: Arguments, *names: str) -> Arguments:
    """The arguments, if there are no others than these."""
    unknown = sorted(set(arguments) - set(names))
    if unknown:
        raise InputError(f"this action has no argument {unknown[0]!r}: it has {', '.join(names)}")
    return arguments


def _text(arguments: Arguments) -> Text:
    given = dict(arguments.get("text") or {})
    names = [item.name for item in fields(Text)]
    if unknown := sorted(set(given) - set(names)):
        raise InputError(f"text has no setting {unknown[0]!r}: it has {', '.join(names)}")
    return Text(**given)


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _recorded(bench: Workbench, recipe: Recipe, plan: Plan, text: Text | None) -> Record:
    """Everything that is known of a plan, written to `evaluations/`; the record names the file and says the main figures."""
    if text is None:
        measured = sorted(bench.run.station("evaluations").glob(f"plan.{plan_key(recipe)}--*.json"), key=lambda path: path.stat().st_mtime)
        file = f"evaluations/{measured[-1].name}" if measured else f"plans/{plan_key(recipe)}.json"
        return {"file": file, "ratio": plan.ratio}
    evaluation = bench.compressed(plan_key(recipe), plan, text)
    file = bench.record(recipe, plan, text, evaluation)
    bench.tidy()
    return {"file": file, "ratio": plan.ratio, "perplexity": evaluation.perplexity, "kl_mean": evaluation.kl_mean}


def _write_sensitivity(
    bench: Workbench, name: str, predicted: Mapping[int, float] | None, effects: Mapping[int, Effect] | None, text: Text | None = None
) -> None:
    """Tables of layers and experts, how well each metric ranks the layers, and what effects were measured on."""
    layers = bench.pipeline.sensitivities
    table = layer_table(layers, predicted, effects)
    data: dict[str, Any] = {"layers": _rows(table), "experts": _rows(expert_table(layers)), "correlations": _rows(correlations(table))}
    if text is not None:
        on = bench.original(text).as_dict()
        data["text"] = {part: on[part] for part in ("dataset", "windows", "length", "tokens")}
    atomic.write_json(bench.run.station("evaluations") / f"{name}.json", data)


def _rows(table: Any) -> list[dict[str, Any]]:
    """A data frame as plain data; what is not known is None."""
    return [{name: None if value != value else value for name, value in row.items()} for row in table.to_dict("records")]
