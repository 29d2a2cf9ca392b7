"""Deleting a run from the list of runs.

    runs = tables.pressed_in("runs")             # its rows have a button, whose value is the run
    RunDeletion(page, runs, drawn)               # where the question should stand
"""

from collections.abc import Callable
from typing import Any

import gradio as gr

from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.deletion import held
from moesvd_core.runs.folder import RunFolder
from pages.components.page import QUIET, Page
from pages.components.question import Question
from pages.components.session import ViewState
from pages.components.text import escape, size


class RunDeletion:
    """Draws its question where it is made, and changes the page's state when the run that is shown goes."""

    def __init__(self, page: Page, runs: gr.HTML, drawn: Callable[[ViewState], str]) -> None:
        """
        Args:
            runs: the list; its `.select` names the run to delete.
            drawn: the list anew.
        """
        self._context, self._drawn = page.context, drawn
        self._question = Question("run", back="#runs .table-scroll")
        self._question.asked_by(runs.select(page.changes(self._ask), None, self._question.outputs, **QUIET))
        self._question.confirmed(page.changes(self._delete), [page.state], [page.state, runs])

    def _ask(self, event: gr.SelectData) -> tuple[Any, ...]:
        """What would go with the run that was pressed."""
        run = self._deletable(str(event.value))
        holds, model = held(run), self._context.model_name(run.identity.model)
        goes = f"{size(holds.bytes)} go with it: {', '.join(['its analysis', *holds.counted])}"
        return self._question.of(run.name, f"Delete run {run.name} of {model}? {goes}. Nothing brings them back.")

    def _delete(self, state: ViewState, asked: str) -> tuple[Any, ...]:
        """Delete the run that was asked about; where it is the one that is shown, another is shown."""
        if not asked:
            raise InputError("no run is to be deleted: press Delete beside one first")
        run = self._deletable(asked)
        gone = self._context.client.delete(run)
        self._context.live.forget(run)
        gr.Info(escape(f"Run {asked} is deleted: {size(gone.bytes)} are free again."))
        if state.run == asked:
            next_one = self._context.first_run()
            state = state.but(run=next_one) if next_one else state.without_run()
        return state, self._drawn(state), *self._question.none()

    def _deletable(self, name: str) -> RunFolder:
        """The run by its name.

        Raises:
            InputError: no name of a run; or this is a public demo.
            RunError: no such run, one at work or being pushed, or that of another login.
        """
        self._context.require_rights()
        run = self._context.require_run(ViewState(name))
        self._context.client.require_deletable(run)
        if self._context.pushes.busy_in(run.path):
            raise RunError(f"an export of run {run.name} is being pushed to the hub: wait until that has ended")
        return run
