"""What each command of `moesvd` that makes, uses or follows runs does once its words are understood; `model_commands` has the others.

Torch and transformers are imported only by those that need them.
"""

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from moesvd_core import errors
from moesvd_core.console import LABELS, ProgressBars, plain, show_facts, show_json, show_rows
from moesvd_core.errors import Cancelled, InputError, MoesvdError
from moesvd_core.planning import Plan, Ranks, Recipe
from moesvd_core.planning.recipe import said_in
from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.folder import RunFolder, runs_root
from moesvd_core.runs.jobs import Job, read_jobs
from moesvd_core.runs.worker import work

COMMAND_VARIABLE = "MOESVD_COMMAND"
"""What a person typed to start the explorer, by which its help and its refusals call it."""
_PLAN_FACTS = (
    "method", "ratio", "expert_ratio", "original_parameters", "parameters", "original_active_parameters", "active_parameters",
    "original_bytes", "bytes", "predicted_loss", "perplexity", "perplexity_stderr", "kl_mean", "top1_agreement",
    "tokens", "windows", "length", "dataset", "output", "format",
)


def compress(given: Namespace) -> None:
    """`moesvd compress`: from a model to a verified export, with what was measured."""
    from moesvd_core.checkpoint.staging import refuse_occupied

    recipe, text, output = _recipe(given), _text(given), Path(given.output).absolute()
    refuse_occupied(output, overwrite=True)  # whether it may be replaced depends on what it holds: see `write_export`
    run = _prepared(given, recipe)
    arguments = {
        "recipe": recipe, "output": str(output), "format": given.format, "dtype": given.dtype,
        "overwrite": given.overwrite, "text": text, "command": shlex.join(["moesvd", *given.words]),
    }
    _show_plan(run, _worked(run, "compress", arguments), given.json)


def export(given: Namespace) -> None:
    """`moesvd export`: another format, ratio or method of a run."""
    run = _trusted(given)
    arguments = {
        "recipe": _reachable(run, given), "output": str(Path(given.output).absolute()), "format": given.format, "dtype": given.dtype,
        "overwrite": given.overwrite, "command": shlex.join(["moesvd", *given.words]),
    }
    _show_plan(run, _worked(run, "export", arguments), given.json)


def plan(given: Namespace) -> None:
    """`moesvd plan`: which layers get which ranks, and what that comes to."""
    run = _trusted(given)
    _show_plan(run, _worked(run, "plan", {"recipe": _reachable(run, given)}), given.json)


def analyze(given: Namespace) -> None:
    """`moesvd analyze`: everything the explorer shows of a model before anything is compressed."""
    from moesvd_core.pipeline import method_of

    methods = given.method or ["auto"]
    for name in methods:
        method_of(Recipe(method=name, ratio=given.reference_ratio))
    text = _readable(windows=given.windows)
    run = _prepared(given)
    record = _worked(run, "analyze", {"methods": methods, "text": text, "probe": given.probe})
    if given.measure:
        measured = _worked(run, "sensitivity", {"recipe": {"method": methods[0], "ratio": given.reference_ratio}, "text": text})
        record = {**record, "sensitivity": measured["file"]}
    if given.json:
        show_json({"run": run.name, "path": str(run.path), **record})
        return
    reached = {f"largest ratio of {name}": facts["max_ratio"] for name, facts in record["methods"].items()}
    show_facts(f"run {run.path}", {"perplexity of the original": record["perplexity"], **reached})


def runs(given: Namespace) -> None:
    """`moesvd runs`: every run, and what it is doing."""
    found = Client().runs()
    if given.json:
        show_json([status.as_dict() for status in found])
        return
    rows = []
    for status in found:
        job = status.job
        what = status.error if job is None else job.error or " ".join([job.stage, f"{job.done}/{job.total}" if job.total else ""])
        rows.append((status.id or "?", status.model, status.created, status.state, "" if job is None else job.action, what))
    count = f"{len(found)} {'run' if len(found) == 1 else 'runs'}"
    show_rows(f"{count} in {runs_root()}", ["run", "model", "created", "state", "action", "at"], rows)


def cancel(given: Namespace) -> None:
    """`moesvd cancel`: stop a run's work; what was finished is kept."""
    run = opened(given.run)
    client = Client(run.path.parent)
    client.cancel(run)
    if given.json:
        show_json(client.status(run).as_dict())


def delete(given: Namespace) -> None:
    """`moesvd delete`: a run and everything in it, once a person at the terminal or `--yes` has said so."""
    from moesvd_core.runs.deletion import held

    run = opened(given.run)
    client = Client(run.path.parent)
    client.require_deletable(run)
    holds = held(run)
    what = ", ".join([f"run {run.name} of {run.identity.model}", *holds.counted, f"{holds.bytes:,} bytes"])
    if not given.yes:
        if not sys.stdin.isatty():
            raise InputError(f"nobody can be asked whether to delete {what}: say --yes")
        print(plain(f"Delete {what}? Nothing brings it back. [y/N] "), end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Cancelled(f"run {run.name} is kept")
    gone = client.delete(run)
    if given.json:
        show_json({"run": run.name, "path": str(run.path), **vars(gone)})
    else:
        print(plain(f"deleted {what}"))


def resume(given: Namespace) -> None:
    """`moesvd resume`: go on with what was interrupted, cancelled or failed."""
    run = _trusted(given)
    jobs = Client(run.path.parent, launch=lambda run: None).resume(run)
    records = [{"action": job.action, **_followed(run, job.id)} for job in jobs]
    if given.json:
        show_json(records)


def serve(given: Namespace) -> NoReturn:
    """`moesvd serve`: the explorer with the same words (`moesvd serve --help` lists them), in this process from here on.

    Raises:
        InputError: only the package is installed; the pages are in the repository.
    """
    app = Path(__file__).parents[1] / "app.py"
    if not app.is_file():
        raise InputError("the explorer is not part of the installed package: run `python app.py` in the repository")
    environment = {**os.environ, COMMAND_VARIABLE: "moesvd serve"}
    os.execve(sys.executable, [sys.executable, str(app), *given.rest], environment)  # noqa: S606 - our own app, no shell


def worker(given: Namespace) -> int:
    """`moesvd worker`: do the queued jobs of a run; started by the client, in a session of its own."""
    return 0 if all(job.state == "finished" for job in work(RunFolder.open(Path(given.run)))) else 1


def opened(name: str) -> RunFolder:
    """A run by its folder, or by its name under the runs root.

    Raises:
        RunError: there is none.
    """
    return RunFolder.open(Path(name)) if (Path(name) / "run.json").exists() else RunFolder.named(runs_root(), name)


def _trusted(given: Namespace) -> RunFolder:
    """A run that is there, for work with its model.

    Raises:
        RunError: there is none, or its model brings code of its own and nobody said that it may be run.
    """
    run = opened(given.run)
    run.require_code_allowed(given.allow_remote_code)
    return run


def _prepared(given: Namespace, recipe: Mapping[str, Any] | None = None) -> RunFolder:
    """The run of the model and the calibration that were asked for; none is made where the model's own headers tell that it would fail.

    Args:
        recipe: what the run is made for, where that is known.

    Raises:
        InputError: a model, a text or a recipe that cannot be used.
        RunError: the run is there, and its model brings code of its own, which nobody allowed.
    """
    from moesvd_core.calibration.settings import Calibration
    from moesvd_core.calibration.text import refuse_unreadable
    from moesvd_core.runs.source import prepare

    calibration = Calibration(
        dataset=given.dataset, samples=given.samples, length=given.length, seed=given.seed, drawn_labels=given.drawn_labels,
        gradient_samples=given.gradient_samples, dtype=given.dtype,
    )
    refuse_unreadable(calibration.dataset)
    folder = None if given.run is None else Path(given.run)
    wanted = None if recipe is None else Recipe.from_dict(dict(recipe))
    run = prepare(given.model, calibration, folder=folder, allow_remote_code=given.allow_remote_code, recipe=wanted)
    run.require_code_allowed(given.allow_remote_code)
    return run


def _worked(run: RunFolder, action: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Do one job of a run in this process, or follow the process that is already at work on it."""
    return _followed(run, enqueue(run, action, arguments).id)


def _followed(run: RunFolder, job: str) -> Mapping[str, Any]:
    """Record of a job once it has ended.

    Raises:
        MoesvdError: the job failed, by the error that it failed with; or it was cancelled or interrupted.
    """
    with ProgressBars() as bars:
        if _is_open(run, job):
            work(run, watch=bars)
        if _is_open(run, job) and run.worker() is not None:
            bars.say(f"another process works on {run.path}: waiting for it")
        return _result(Client(run.path.parent).wait(run, job))


def _is_open(run: RunFolder, job: str) -> bool:
    return read_jobs(run.log)[job].is_open


def _result(job: Job) -> Mapping[str, Any]:
    if job.state == "finished":
        return job.result
    if job.state == "cancelled":
        raise Cancelled(f"{job.error}: what was finished is kept, the same command goes on from there")
    kind = getattr(errors, job.error_kind, MoesvdError)
    raise kind(job.error) if issubclass(kind, MoesvdError) else MoesvdError(job.error)


def _recipe(given: Namespace) -> dict[str, Any]:
    """The recipe file, if there is one, with what the command line says on top; checked here, before any work.

    Raises:
        InputError: something in it cannot be used.
    """
    from moesvd_core.pipeline import method_of

    base, said = Recipe(), {}
    if given.recipe is not None:
        try:
            said = said_in(Path(given.recipe).read_text(encoding="utf-8"))
            base = Recipe.from_dict(said)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {given.recipe} cannot be read: {error}") from None
    elif given.ratio is None:
        raise InputError("ratio is missing: give --ratio, the share of the model's parameters to remove, or --recipe")
    chosen = {name: getattr(given, name) for name in ("method", "ratio", "flops_ratio", "budget") if getattr(given, name) is not None}
    recipe = Recipe.from_dict(base.as_dict() | chosen)
    usual = recipe.compensate if "compensate" in said else method_of(recipe).compensate
    if "compensate" in given:  # a command that makes a model, not a plan alone
        routers = recipe.refit_router if given.refit_router is None else given.refit_router
        recipe = replace(recipe, compensate=usual if given.compensate is None else given.compensate, refit_router=routers)
    return recipe.as_dict()


def _reachable(run: RunFolder, given: Namespace) -> dict[str, Any]:
    """As `_recipe`, for a run that is there.

    Raises:
        InputError: also a ratio that is known to be out of reach on the run's model.
    """
    from moesvd_core.runs.known import refuse_unreachable

    recipe = _recipe(given)
    refuse_unreachable(run, Recipe.from_dict(recipe))
    return recipe


def _text(given: Namespace) -> dict[str, Any] | None:
    return _readable(dataset=given.evaluate_on, windows=given.windows) if given.windows else None


def _readable(**text: Any) -> dict[str, Any]:
    """Fields of `Text`, checked before any work.

    Raises:
        InputError: a value out of bounds, or a text file that cannot be read.
    """
    from moesvd_core.calibration.text import refuse_unreadable
    from moesvd_core.runs.workbench import Text

    refuse_unreadable(Text(**text).dataset)
    return text


def _show_plan(run: RunFolder, record: Mapping[str, Any], as_json: bool) -> None:
    """A plan with what was measured and written."""
    known = run.read_json(*record["file"].split("/")) or {}
    facts = {**known, **{name: value for name, value in record.items() if name != "file"}, "run": str(run.path)}
    if as_json:
        show_json(facts)
        return
    if dense := facts.get("format") == "dense":
        facts["ratio"] = known["ratio"]  # that of the files says nothing of the plan
    title = f"{facts['method']} at {facts['ratio']:.1%}{', stored as whole matrices' if dense else ''}"
    shown = {name: facts[name] for name in _PLAN_FACTS if facts.get(name) is not None}
    show_facts(title, shown, LABELS["dense" if dense else "plan"])
    rows = [
        (layer.layer, layer.input.structure, Ranks.of(layer.input.ranks).words, layer.output.structure, Ranks.of(layer.output.ranks).words,
         f"{layer.parameters / layer.original_parameters:.0%}", layer.predicted_loss, layer.reason)
        for layer in Plan.from_dict({name: facts[name] for name in Plan.__dataclass_fields__}).layers
    ]
    show_rows("layers", ["layer", "gate and up", "ranks", "down", "ranks", "kept", "truncation loss, nats", "why"], rows)
