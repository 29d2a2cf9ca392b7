"""Deleting one export of a run, the one that is chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.deletion import file_sizes
from moesvd_core.runs.exports import export_folder
from pages.components.page import QUIET, Page
from pages.components.question import Question
from pages.components.session import ViewState
from pages.components.text import escape, size


class ExportDeletion:
    """Draws a button and its question where it is made."""

    def __init__(self, page: Page, chosen: gr.Dropdown, drawn: Callable[[ViewState], Any]) -> None:
        """
        Args:
            chosen: names the export.
            drawn: the choice anew.
        """
        self._context, self._drawn = page.context, drawn
        ask = gr.Button("Delete this export", size="sm", min_width=160, scale=0, elem_id="export-delete")
        self._question = Question("export", back="#export-delete")
        self._question.asked_by(ask.click(page.changes(self._ask), [page.state, chosen], self._question.outputs, **QUIET))
        chosen.change(self._question.none, None, self._question.outputs, **QUIET)  # another one is shown: the question was not about it
        self._question.confirmed(page.changes(self._delete), [page.state], [chosen])

    def _ask(self, state: ViewState, name: str | None) -> tuple[Any, ...]:
        """What would go."""
        export = self._deletable(state, name or "")
        sizes = file_sizes(export)
        goes = f"{size(sum(sizes))} in {len(sizes)} files go with it"
        return self._question.of(export.name, f"Delete export {export.name}? {goes}; the run stays, and can write it again.")

    def _delete(self, state: ViewState, asked: str) -> tuple[Any, ...]:
        """Delete the export that was asked about; the newest of the others is chosen."""
        if not asked:
            raise InputError("no export is to be deleted: press “Delete this export” first")
        export = self._deletable(state, asked)
        freed = sum(file_sizes(export))
        self._context.client.delete_export(self._context.require_run(state), export.name)
        gr.Info(escape(f"Export {asked} is deleted: {size(freed)} are free again."))
        return self._drawn(state), *self._question.none()

    def _deletable(self, state: ViewState, name: str) -> Path:
        """The folder of an export, damaged or not, by its name.

        Raises:
            InputError: this is a public demo.
            RunError: no such export, one that is being written or pushed, or that of another login.
        """
        self._context.require_rights()
        run = self._context.require_run(state)
        self._context.client.require_deletable_export(run, name)
        export = export_folder(run, name)
        if self._context.pushes.busy_in(export):
            raise RunError(f"{export.name} is being pushed to the hub: wait until that has ended")
        return export
