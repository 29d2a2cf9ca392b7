"""What the live model may be asked to be: a plan of a method that a job of the run has planned; the server decomposes for none other."""

from moesvd_core.errors import InputError, RunError
from moesvd_core.live import is_calibrated
from moesvd_core.planning import Recipe
from moesvd_core.runs.client import RunStatus
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import analysed, refuse_unreachable
from pages.components.context import Context
from pages.components.header import worker
from pages.components.recipe_controls import recipe_of
from pages.components.session import ViewState

_WITHOUT = ("similarity", "evaluate")
"""Work of a run that makes no statistics."""


def live_recipe(context: Context, state: ViewState) -> tuple[RunFolder, Recipe]:
    """The run of a view and what the view asks for, where its live model can be that at once; nothing is loaded here.

    Raises:
        InputError: the method is not planned yet, or does not reach the ratio.
        RunError: no run, one without statistics, or one whose analysis is still making what is needed.
    """
    run, recipe = context.require_run(state), recipe_of(state)
    status = context.client.status(run)
    if not is_calibrated(run):
        if any(job.is_open and job.action not in _WITHOUT for job in status.jobs):
            raise RunError(f"the statistics of run {run.name} are still being made ({worker(status)}): ask again when that is done")
        raise RunError(f"run {run.name} has no statistics yet: press “Analyse” on the Model page first")
    if recipe.method not in analysed(run):
        if _plans(status, recipe.method):
            raise RunError(f"{recipe.method} is still being planned ({worker(status)}): ask again when that is done")
        raise InputError(f"{recipe.method} is not planned yet: press “Plan this method” on the Ratio page first")
    refuse_unreachable(run, recipe)
    return run, recipe


def _plans(status: RunStatus, method: str) -> bool:
    """Whether a job that runs or waits plans the method."""
    return any(
        job.action == "analyze" and job.is_open and method in job.arguments.get("methods", ["auto"])
        for job in status.jobs
    )
